"""The objective of one client: a pure function of named parameters and a batch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import ModelError
from .batches import Padded, pad
from .data import Batch

Params = dict[str, Tensor]
LossFn = Callable[[Tensor, Tensor], Tensor]
MaybePadded = Batch | Padded
Objective = Callable[[Params, MaybePadded], Tensor]
Pullback = Callable[[Params], Params]


def objective(model: nn.Module, loss_fn: LossFn) -> Objective:
    """Return ``f(params, (inputs, targets)) = loss_fn(model(inputs; params), targets)``, a scalar.

    The model is called functionally and never changed: its buffers are copied, its own parameters
    are not used.

    A padded batch has the mean loss of its real records alone. That is the loss of the batch before
    it was padded where ``loss_fn`` is the mean of the losses of single records and the model treats
    each record by itself: see ``takes_padding``.

    Raises (when called):
        ModelError: where the loss is not a scalar, or a target has no column in the output.
    """
    buffers = {name: value.detach().clone() for name, value in model.named_buffers()}

    def evaluate(params: Params, batch: MaybePadded) -> Tensor:
        inputs, targets = batch[:2]
        if len(batch) == 3:
            inputs, targets = _without_padding(*batch)
        output = functional_call(model, (params, buffers), (inputs,))
        try:
            if len(batch) == 3:
                return _mean_of_real(_losses(loss_fn, output, targets), batch[2])
            loss = loss_fn(output, targets)
        except IndexError as err:  # what torch's losses raise for a class beyond the last column
            low, high = int(targets.min()), int(targets.max())
            wrong = f"smallest target is {low}" if low < 0 else f"largest target is {high}"
            raise ModelError(
                f"the output of {type(model).__name__} has shape {tuple(output.shape)}, the "
                f"{wrong}: targets are the indices 0, 1, ... of its columns"
            ) from err
        if loss.ndim != 0:
            raise ModelError(
                f"the loss has shape {tuple(loss.shape)}, a scalar mean over the batch is needed: "
                "use reduction='mean'"
            )
        return loss

    return evaluate


def grad_and_value(function: Callable[[Params], Tensor], params: Params) -> tuple[Params, Tensor]:
    """Return the gradient of ``function`` at ``params``, and its value, both without a graph.

    It does what torch.func.grad_and_value does, with the same bits; where no transform and no
    compiler is at work, by plain autograd, which costs half of it on small models.
    """
    if _is_transformed():
        found: tuple[Params, Tensor] = torch.func.grad_and_value(function)(params)
        return found
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    with torch.enable_grad():
        value = function(leaves)
    return _derived([value], [torch.ones_like(value)], leaves), value.detach()


def gradient_and_pullback(
    function: Callable[[Params], Tensor], params: Params, names: tuple[str, ...]
) -> tuple[Params, Pullback]:
    """Return the gradient of ``function`` with respect to ``names``, and u -> H[:, names] u.

    H is the Hessian at ``params``. By torch.func or by plain autograd, as ``grad_and_value``.
    """
    if _is_transformed():

        def partial(point: Params) -> Params:
            part = {name: point[name] for name in names}
            found: Params = torch.func.grad(lambda own: function({**point, **own}))(part)
            return found

        gradient, pullback = torch.func.vjp(partial, params)  # type: ignore[misc]  # no has_aux
        return gradient, lambda direction: pullback(direction)[0]
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    with torch.enable_grad():
        value = function(leaves)
        part = {name: leaves[name] for name in names}
        gradient = _derived([value], [torch.ones_like(value)], part, create_graph=True)

    def product(direction: Params) -> Params:
        curved = [name for name in names if gradient[name].requires_grad]
        outputs, along = [gradient[n] for n in curved], [direction[n] for n in curved]
        return _derived(outputs, along, leaves, retain_graph=True)

    return detached(gradient), product


def _derived(outputs: list[Tensor], along: list[Tensor], leaves: Params, **options: bool) -> Params:
    """Return the product of ``along`` and the derivative; zeros for what nothing depends on."""
    if not any(output.requires_grad for output in outputs):
        return {name: torch.zeros_like(value) for name, value in leaves.items()}
    found = torch.autograd.grad(
        outputs, list(leaves.values()), along, materialize_grads=True, **options
    )
    return dict(zip(leaves, found, strict=True))


def _is_transformed() -> bool:
    """Return whether vmap, another transform or a compiler is at work: they need torch.func."""
    return torch.compiler.is_compiling() or (
        torch._C._functorch.peek_interpreter_stack() is not None
    )


def takes_padding(loss: Objective, params: Params, batch: Batch) -> bool:
    """Return whether padding ``batch`` leaves its loss and gradient what they are.

    It does not where the model mixes records, or the loss is no mean over them (class weights).

    Args:
        loss: see ``objective``.
        params: at which to try.
        batch: (inputs, targets) of at least two records, better of all classes.
    """
    larger = pad(batch, len(batch[1]) + 2)
    wanted_gradient, wanted = grad_and_value(lambda point: loss(point, batch), params)
    gradient, value = grad_and_value(lambda point: loss(point, larger), params)
    close = min(1e3 * torch.finfo(value.dtype).eps, 0.05)  # a thousand roundings
    away = torch.stack([(gradient[n] - w).norm() for n, w in wanted_gradient.items()])
    size = torch.stack([w.norm() for w in wanted_gradient.values()])
    return bool((value - wanted).abs() <= close * wanted.abs()) and bool(
        away.norm() <= close * size.norm()
    )


def predict(model: nn.Module, params: Params, inputs: Tensor) -> Tensor:
    """Return ``model(inputs; params)`` without a graph, with the model's own buffers.

    What ``params`` hold beside the model's parameters (learned rates) is left out.
    """
    buffers = {name: value.detach().clone() for name, value in model.named_buffers()}
    own = {name: params[name] for name, _ in model.named_parameters() if name in params}
    with torch.no_grad():
        output: Tensor = functional_call(model, (own, buffers), (inputs,))
    return output


def detached(params: Params) -> Params:
    """Return the same tensors without a graph and without requires_grad."""
    return {name: value.detach() for name, value in params.items()}


def _without_padding(inputs: Tensor, targets: Tensor, mask: Tensor) -> Batch:
    """Return the records, those of the padding replaced by the first one.

    What they held is then part of nothing: a NaN times a zero share would still be NaN.
    """
    rows = [
        torch.where(mask.reshape(-1, *[1] * (value.ndim - 1)), value, value[:1])  # (B, ...)
        for value in (inputs, targets)
    ]
    return rows[0], rows[1]


def _losses(loss_fn: LossFn, output: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each record, (B,)."""
    if loss_fn is nn.functional.cross_entropy and targets.ndim == 1:
        return nn.functional.cross_entropy(output, targets, reduction="none")
    of_each = torch.func.vmap(lambda one, target: loss_fn(one[None], target[None]))
    found: Tensor = of_each(output, targets)
    return found


def _mean_of_real(losses: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, losses, 0.0).sum() / mask.sum()
