"""Convolutions of images of one channel as a product of matrices, for compiled steps on a CPU.

Layers of one channel and of many have one memory layout in common, so the compiler leaves the
result of such a layer with its channels apart, and what follows (ReLU, pooling, and the way back)
is then computed value by value. Here the windows of the images are the rows of a matrix,

    out[(b, h, w), o] = sum_k windows[(b, h, w), k] * weight[k, o] + bias[o],   k over (kh, kw)

and the channels of the result lie side by side (torch.channels_last), so eight are computed at a
time. On two CPU cores a step of a small net takes two thirds of the time; from three channels on
the compiler finds that layout by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class OneChannelAsMatrix(TorchFunctionMode):
    """A block in which ``conv2d`` of one channel is a product of matrices; others stay.

    The same result up to rounding, derivatives of any order included.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call ``func``, or what stands in its place."""
        if func is torch.conv2d:
            product = _convolved(*args, **(kwargs or {}))
            if product is not None:
                return product
        return func(*args, **(kwargs or {}))


def _convolved(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """Return ``conv2d`` of the same arguments: (B, 1, H, W) -> (B, O, H', W').

    None where they are of another kind: more channels, no batch, groups, dilation, a padding in
    words, a GPU.
    """
    is_batch_of_one_channel = inputs.ndim == 4 and weight.shape[1] == groups == 1
    has_numbers = not isinstance(padding, str) and _pair(dilation) == (1, 1)
    if not (is_batch_of_one_channel and has_numbers and inputs.device.type == "cpu"):
        return None
    (down, right), (rows, columns) = _pair(stride), _pair(padding)
    out, _, height, width = weight.shape
    padded = F.pad(inputs[:, 0], (columns, columns, rows, rows))
    windows = padded.unfold(1, height, down).unfold(2, width, right)  # (B, H', W', kh, kw)
    shape = windows.shape[:3]
    # Contiguous, else its derivative is (O, B H' W') @ (B H' W', kh kw): five times as slow.
    kernels = weight.flatten(1).T.contiguous()  # (kh kw, O)
    product = windows.reshape(-1, height * width) @ kernels  # (B H' W', O)
    if bias is not None:
        product = product + bias
    return product.reshape(*shape, out).permute(0, 3, 1, 2)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
