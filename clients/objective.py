"""The objective of one client: a pure function of named parameters and a batch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import ModelError
from .data import Batch

Params = dict[str, Tensor]
LossFn = Callable[[Tensor, Tensor], Tensor]
Objective = Callable[[Params, Batch], Tensor]


def objective(model: nn.Module, loss_fn: LossFn) -> Objective:
    """Return ``f(params, (inputs, targets)) = loss_fn(model(inputs; params), targets)``, a scalar.

    The model is called functionally and never changed: its buffers are copied, its own parameters
    are not used.

    Raises (when called):
        ModelError: where the loss is not a scalar, or a target has no column in the output.
    """
    buffers = {name: value.detach().clone() for name, value in model.named_buffers()}

    def evaluate(params: Params, batch: Batch) -> Tensor:
        inputs, targets = batch
        output = functional_call(model, (params, buffers), (inputs,))
        try:
            loss = loss_fn(output, targets)
        except IndexError as err:  # what torch's losses raise for a class beyond the last column
            raise ModelError(
                f"the output of {type(model).__name__} has shape {tuple(output.shape)}, the "
                f"largest target is {int(targets.max())}: one column for each class is needed"
            ) from err
        if loss.ndim != 0:
            raise ModelError(
                f"the loss has shape {tuple(loss.shape)}, a scalar mean over the batch is needed: "
                "use reduction='mean'"
            )
        return loss

    return evaluate


def predict(model: nn.Module, params: Params, inputs: Tensor) -> Tensor:
    """Return ``model(inputs; params)`` without a graph, with the model's own buffers."""
    buffers = {name: value.detach().clone() for name, value in model.named_buffers()}
    with torch.no_grad():
        output: Tensor = functional_call(model, (params, buffers), (inputs,))
    return output


def detached(params: Params) -> Params:
    """Return the same tensors without a graph and without requires_grad."""
    return {name: value.detach() for name, value in params.items()}
