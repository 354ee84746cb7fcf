r"""Classes and a teacher's logits in one tensor of targets, and the loss that takes them apart.

    targets_i = (y_i, z_t(x_i))        (N,) and (N, C) -> (N, 1 + C)

So every kernel, and every gradient of a single record, sees a teacher as it sees labels.
"""

from functools import lru_cache, partial

import torch
from torch import Tensor

from ..errors import DataError
from ..models.distillation import check_alpha, check_temperature, distillation_loss
from .objective import LossFn


@lru_cache
def taught_loss(alpha: float, temperature: float) -> LossFn:
    """Return the loss J of 1503.02531 as ``loss_fn(outputs, pack(classes, logits))``.

    It is the same object for equal arguments, so that clients can be computed at once.

    Args:
        alpha: share of the teacher, in [0, 1].
        temperature: T, finite and above 0.

    Raises:
        ConfigError: where an argument is outside its range.
    """
    check_alpha(alpha)
    check_temperature(temperature)
    return partial(loss_of_packed, alpha=alpha, temperature=temperature)


def loss_of_packed(outputs: Tensor, packed: Tensor, *, alpha: float, temperature: float) -> Tensor:
    """Return J of outputs (B, C) and packed targets (B, 1 + C), a mean over the records."""
    classes, logits = packed[:, 0].long(), packed[:, 1:]
    return distillation_loss(outputs, logits, classes, alpha=alpha, temperature=temperature)


def pack(classes: Tensor, logits: Tensor, *, name: str, unsound_as_nan: bool = False) -> Tensor:
    """Return (N, 1 + C): the class of each record, then what the teacher says of it.

    Args:
        classes: (N,) integers in [0, C).
        logits: (N, C), float32 or float64.
        name: of the client, for errors.
        unsound_as_nan: a record with another class, or with logits that are not finite, gets NaN,
            so that it has no share in a private release: that a client fails would tell of it.

    Raises:
        DataError: where targets are no classes, or, without ``unsound_as_nan``, a record is
            unsound.

    >>> pack(torch.tensor([1]), torch.tensor([[0.5, -0.5]]), name="anna")
    tensor([[ 1.0000,  0.5000, -0.5000]])
    """
    if classes.ndim != 1 or classes.is_floating_point():
        raise DataError(
            f"client {name!r} has targets of shape {tuple(classes.shape)} and dtype "
            f"{classes.dtype}: a teacher's outputs are of classes, one integer for each record"
        )
    known = (classes >= 0) & (classes < logits.shape[1])
    sound = known & logits.isfinite().all(1)
    if not unsound_as_nan and not sound.all():
        row = int((~sound).nonzero()[0])
        what = "logits that are not finite" if known[row] else f"class {int(classes[row])}"
        raise DataError(
            f"client {name!r}: record {row} has {what}, the teacher's outputs are of the classes "
            f"0 to {logits.shape[1] - 1} and must be finite numbers: nobody can learn from it"
        )
    column = torch.where(sound, classes, 0).to(logits.dtype)[:, None]
    return torch.cat([column, torch.where(sound[:, None], logits, torch.nan)], dim=1)
