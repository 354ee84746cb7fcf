"""Which models can be trained record by record, and Opacus' hooks on those that can."""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ...models import check_layers
from ...opacus_import import import_opacus
from ...streams import torch_seeded

TRACKED = ("running_mean", "running_var", "num_batches_tracked")


def hooked(model: nn.Module) -> Any:
    """Return a copy of ``model`` under Opacus' GradSampleModule.

    Raises:
        ModelError: where single records have no gradient of their own in it, with the remedy.
    """
    import_opacus()
    from opacus import GradSampleModule
    from opacus.validators import ModuleValidator

    check_private_model(model)
    twin = copy.deepcopy(model).train()
    errors = ModuleValidator.validate(twin, strict=False)
    if errors:
        raise ModelError(
            f"{type(model).__name__} cannot be trained record by record: {errors[0]}; "
            "opacus.validators.ModuleValidator.fix(model), before the model is first sent, "
            "replaces what it can"
        )
    return GradSampleModule(twin, loss_reduction="sum", strict=False)


def check_private_model(model: nn.Module) -> None:
    """Raise ModelError for what Opacus lets pass although it mixes or reveals records.

    BatchNorm in any form, tied parameters: see ``check_layers``. Tracked buffers: a buffer would
    leave the client without noise.
    """
    check_layers(model)
    for name, _ in model.named_buffers():
        if name.rpartition(".")[2] in TRACKED:
            raise ModelError(
                f"buffer {name!r} of {type(model).__name__} is tracked over records and would "
                "leave the client without noise: set track_running_stats=False, or use GroupNorm"
            )


def check_records_are_apart(model: nn.Module, inputs: Tensor) -> None:
    """Raise ModelError where the output for one record depends on the others in its batch.

    Tried on two made-up records of the shape of ``inputs`` (N, ...), of which nothing else is used:
    alone against together, and in training mode beside another neighbour.
    """
    pair = made_up_pair(inputs)
    twin = copy.deepcopy(model).to(pair.device)

    def outputs(*rows: int, training: bool) -> Tensor:
        with torch.no_grad(), torch_seeded(0, "records are apart", device=str(pair.device)):
            found: Tensor = twin.train(training)(pair[list(rows)])  # dropout: the same mask always
        return found

    alone = torch.cat([outputs(0, training=False), outputs(1, training=False)])
    beside = torch.stack([outputs(0, 0, training=True)[0], outputs(1, 1, training=True)[1]])
    for training, wanted in ((False, alone), (True, beside)):
        together = outputs(0, 1, training=training)
        if together.shape == wanted.shape and torch.allclose(
            together, wanted, rtol=1e-3, atol=1e-5
        ):
            continue
        raise ModelError(
            f"{type(model).__name__} mixes the records of a batch: its output for a record is "
            "another one beside others, so no record's influence can be bounded; remove what is "
            "computed over the batch (means, norms, attention between records)"
        )


def check_rows_are_gradients(twin: Any, inputs: Tensor) -> None:
    """Raise ModelError where the rows of a hooked module are not the gradients of single records.

    Of two made-up records the first alone is scored: its row must be the gradient, and the other
    zero. Where records are folded into more rows, each part of a record would be clipped by itself.
    """
    named = {name: value for name, value in twin.named_parameters() if value.requires_grad}
    with torch.enable_grad(), torch_seeded(0, "rows", device=str(inputs.device)):
        first = twin(made_up_pair(inputs))[0].reshape(-1)
        backward((first * torch.linspace(0.5, 1.5, len(first)).to(first)).sum())
    found = {}
    for name, value in named.items():
        grad = torch.zeros_like(value) if value.grad is None else value.grad
        rows, value.grad, value.grad_sample = value.grad_sample, None, None
        found[name] = (grad, grad.new_zeros((2, *grad.shape)) if rows is None else rows)
    largest = float(torch.stack([grad.abs().max() for grad, _ in found.values()]).max())
    for name, (grad, rows) in found.items():
        wanted = torch.stack([grad, torch.zeros_like(grad)])
        own = name.removeprefix("_module.")
        if rows.shape != wanted.shape or not (rows - wanted).abs().max() <= 1e-3 * largest:
            raise ModelError(
                f"single records have no gradient of their own for {own!r} (2 records gave rows of "
                f"shape {tuple(rows.shape)}, or others), so no record's influence can "
                "be bounded: give layers inputs (records, ...), fold no records into more rows, "
                "and call each layer instead of using its weights directly"
            )


def forget_batch(twin: Any) -> None:
    """Remove what a batch that raised has left on a hooked module."""
    for module in twin.modules():
        for name in ("activations", "max_batch_len"):
            if hasattr(module, name):
                delattr(module, name)
    for value in twin.parameters():
        value._forward_counter, value.grad, value.grad_sample = 0, None, None
        if hasattr(value, "_current_grad_sample"):
            del value._current_grad_sample


def made_up_pair(inputs: Tensor) -> Tensor:
    """Return two records of the shape, dtype and device of ``inputs`` (N, ...), of no data."""
    shape, dtype = inputs.shape[1:], inputs.dtype
    if dtype.is_floating_point:
        pair = torch.linspace(-1, 1, 2 * shape.numel(), dtype=dtype).sin().reshape(2, *shape)
    else:
        pair = torch.stack([torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype)])
    return pair.to(inputs.device)


def backward(loss: Tensor) -> None:
    """Run the backward pass of a hooked module."""
    with warnings.catch_warnings():
        # The first layer's inputs are data and need no gradient; its parameters get theirs.
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        loss.backward()  # type: ignore[no-untyped-call]  # torch annotates none
