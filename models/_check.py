"""What a model must be to be safe for meta-gradients, per-sample gradients and the wire."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from ..errors import ModelError
from ..streams import torch_seeded


def check_model(
    model: nn.Module,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    input_dtype: torch.dtype = torch.float32,
) -> None:
    """Raise ModelError unless ``model`` can be adapted, trained record by record and sent.

    The model itself is never changed. Refused: no trainable parameter; lazy or shared parameters;
    BatchNorm in any form; statistics kept over batches; torch's fused recurrent layers; Opacus'
    hooks; a model that cannot be copied; a forward pass that raises, or that changes a buffer; an
    output that is not (B, num_classes).

    Args:
        model: any module; a copy of it runs once, in training mode, on two records of zeros.
        input_shape: shape of one record, without the batch.
        num_classes: width of the output that the loss expects.
        input_dtype: dtype of the records; ``torch.int64`` for characters.

    >>> check_model(nn.Linear(3, 2), input_shape=(3,), num_classes=2)
    >>> check_model(nn.Linear(3, 2), input_shape=(3,), num_classes=5)
    Traceback (most recent call last):
    metabloom.errors.ModelError: Linear returned shape (2, 2) for 2 records of shape (3,), wanted \
(2, 5): the loss needs one row of num_classes = 5 logits a record; change the last layer
    """
    check_layers(model)
    # Layers of a kind that refuses to be copied are named above; what is left fails here.
    try:
        twin = copy.deepcopy(model).train()
    except Exception as err:
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({err}): clients work on copies; keep no "
            "computed tensors, open files or locks on a module"
        ) from err
    _check_forward(twin, tuple(input_shape), num_classes, input_dtype)


def check_layers(model: nn.Module) -> None:
    """Raise ModelError for what can be seen without running ``model``; see ``check_model``.

    >>> check_layers(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    Traceback (most recent call last):
    metabloom.errors.ModelError: layer '1' is BatchNorm1d: BatchNorm mixes the records of a batch, \
so no record has a gradient of its own, and its statistics leave the client without noise; use \
GroupNorm, or run opacus.validators.ModuleValidator.fix(model) before the model is first sent
    """
    _check_parameters(model)
    for name, module in model.named_modules():
        where = f"layer {name!r}" if name else "the model"
        _check_layer(f"{where} is {type(module).__name__}", module)


def _check_parameters(model: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(
            f"{type(model).__name__} has no trainable parameter: there is nothing to learn; "
            "register tensors as nn.Parameter and leave requires_grad on"
        )
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_lazy(parameter):
            raise ModelError(
                f"parameter {name!r} is lazy, it has no shape yet: the server sends weights before "
                "any data is seen; call the model once on a batch first"
            )
        where = parameter.untyped_storage().data_ptr()
        if where and where in owners:
            raise ModelError(
                f"parameters {owners[where]!r} and {name!r} share their memory: named arrays "
                "cannot carry the tie, and each would be updated by the other's step; give each "
                "layer its own parameter"
            )
        owners[where] = name


def _check_layer(what: str, module: nn.Module) -> None:
    if isinstance(module, _BatchNorm):
        raise ModelError(
            f"{what}: BatchNorm mixes the records of a batch, so no record has a gradient of its "
            "own, and its statistics leave the client without noise; use GroupNorm, or run "
            "opacus.validators.ModuleValidator.fix(model) before the model is first sent"
        )
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        raise ModelError(
            f"{what} with track_running_stats=True: its statistics are averaged over records and "
            "leave the client without noise; set track_running_stats=False or use GroupNorm"
        )
    if isinstance(module, nn.RNNBase):
        raise ModelError(
            f"{what}: torch's fused recurrent layers have no double backward on a GPU (cuDNN) and "
            "no batching rule for vmap, so neither meta-gradients nor per-sample gradients work; "
            "use model 'char-lstm', or opacus.layers.DPLSTM"
        )
    if hasattr(module, "autograd_grad_sample_hooks"):
        raise ModelError(
            f"{what} with Opacus' hooks on it: torch.func and copies fail on a hooked module, and "
            "the privacy engine hooks its own copy; pass the plain module"
        )


def _check_forward(
    twin: nn.Module, input_shape: tuple[int, ...], num_classes: int, input_dtype: torch.dtype
) -> None:
    kind = type(twin).__name__
    device = next(twin.parameters()).device
    zeros = torch.zeros(2, *input_shape, dtype=input_dtype, device=device)
    before = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    try:
        with torch.no_grad(), torch_seeded(0, "check_model"):
            output: object = twin(zeros)
    except Exception as err:
        raise ModelError(
            f"{kind} fails on 2 records of shape {input_shape} and dtype {input_dtype}: "
            f"{type(err).__name__}: {err}; build the model for the shape and dtype of the data"
        ) from err
    for name, buffer in twin.named_buffers():
        if name in before and not torch.equal(buffer, before[name]):
            raise ModelError(
                f"the forward pass of {kind} changes its buffer {name!r}: what it keeps of the "
                "records leaves the client without noise; use a layer without running statistics"
            )
    got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    if not isinstance(output, Tensor) or output.shape != (2, num_classes):
        raise ModelError(
            f"{kind} returned {got} for 2 records of shape {input_shape}, wanted "
            f"{(2, num_classes)}: the loss needs one row of num_classes = {num_classes} logits a "
            "record; change the last layer"
        )
