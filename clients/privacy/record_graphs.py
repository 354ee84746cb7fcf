"""Gradients of single records as a traced graph, and what is written otherwise in it for speed.

- The gradient of a linear layer for one record is an outer product a b^T: its norm is ||a|| ||b||,
  and the weighted sum over records one matrix product, so that it is never written out.
- The backward pass of max-pooling whose windows do not overlap is a scatter, each target once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from ...errors import ModelError

_aten = torch.ops.aten
_SAME = (_aten.view, _aten._unsafe_view, _aten.reshape, _aten.expand, _aten.clone)


def traced(rows: Callable[..., list[Tensor]], tensors: Sequence[Tensor]) -> fx.GraphModule:
    """Return ``rows`` as a graph for tensors of these shapes; no number of them is in it.

    Raises:
        ModelError: where a constant would be in it.
    """
    found = make_fx(rows, tracing_mode="fake")(*tensors)
    if any(node.op == "get_attr" for node in found.graph.nodes):
        raise ModelError("its forward pass makes tensors of its own from numbers")
    return found


def split_outer_products(graph: fx.GraphModule) -> list[bool]:
    """Let outputs that are outer products give their factors instead; return which ones do."""
    output: Any
    (output,) = [node for node in graph.graph.nodes if node.op == "output"]
    factors = [_factors(one) for one in output.args[0]]
    split = [
        part for one, pair in zip(output.args[0], factors, strict=True) for part in (pair or (one,))
    ]
    with graph.graph.inserting_before(output):
        parts = [
            graph.graph.call_function(_aten.squeeze.dim, (one, dim)) if dim else one
            for one, dim in ((one if isinstance(one, tuple) else (one, 0)) for one in split)
        ]
    graph.graph.erase_node(output)
    graph.graph.output(parts)
    graph.graph.set_codegen(fx.graph.CodeGen())  # one flat list instead of the traced form
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return [pair is not None for pair in factors]


def _factors(node: Any) -> tuple[tuple[fx.Node, int], tuple[fx.Node, int]] | None:
    """Return a (B, m, 1) and b (B, 1, n), or either's transpose, with the axis that is 1.

    None where ``node`` is no product a b^T.
    """
    is_turned = False
    while node.target is not _aten.bmm.default:
        packet = getattr(node.target, "overloadpacket", None)
        if node.op != "call_function" or node.meta["val"].ndim != 3:
            return None
        if packet is _aten.transpose and {one % 3 for one in node.args[1:]} == {1, 2}:
            is_turned = not is_turned
        elif packet not in _SAME or node.args[0].meta["val"].shape != node.meta["val"].shape:
            return None
        node = node.args[0]
    left, right = node.args
    if left.meta["val"].shape[2] != 1:
        return None
    return ((right, 1), (left, 2)) if is_turned else ((left, 2), (right, 1))


def scatter_pools(graph: fx.GraphModule) -> None:
    """Write the backward pass of max-pooling whose windows do not overlap as a scatter."""
    for node in list(graph.graph.nodes):
        if node.target is not _aten.max_pool2d_with_indices_backward.default:
            continue
        arguments: Any = node.args
        slope, inputs, size, stride, padding, dilation, _, chosen = arguments
        if list(size) != list(stride or size) or any(padding) or any(one != 1 for one in dilation):
            continue
        shape = list(inputs.meta["val"].shape)  # (N, C, H, W)
        flat = [shape[0] * shape[1], shape[2] * shape[3]]
        with graph.graph.inserting_before(node):
            call = graph.graph.call_function
            zeros = call(_aten.new_zeros.default, (inputs, flat))
            rows = [call(_aten.reshape.default, (one, [flat[0], -1])) for one in (chosen, slope)]
            filled = call(_aten.scatter.src, (zeros, 1, *rows))
            found = call(_aten.reshape.default, (filled, shape))
        node.replace_all_uses_with(found)
        graph.graph.erase_node(node)
    graph.recompile()
