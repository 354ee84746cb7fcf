r"""A student learns what an ensemble says of unlabelled records: the server's side of FedDF.

    minimise over w   mean_x KL( q(x) || softmax(z(x; w)) )        by Adam, cosine schedule

Pure functions of arrays, modules and streams; nothing of Flower's.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from math import inf

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import ConfigError
from ..models.distillation import cross_entropy, kl_to
from ..public import Batch
from ..wire import NamedArrays
from .rules import Arrays, is_floating

CHUNK = 512  # records of a forward pass without a gradient
CHECKS = 10  # of the loss on all records, over a distillation
SAME = 1e-6  # nats: a student that is so near says what the ensemble says, but for rounding


@dataclass(frozen=True)
class Distillation:
    """How a student learns.

    Attributes:
        steps: most steps of Adam, >= 1.
        lr: of Adam at first, > 0; it falls to 0 by a cosine.
        batch_size: records of a step, >= 1.
        patience: checks of the loss without a better one before it stops; there are ``CHECKS``.

    Raises:
        ConfigError: where a value is out of range, naming it.
    """

    steps: int = 500
    lr: float = 1e-3
    batch_size: int = 128
    patience: int = 3

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "patience"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"{name} = {value!r}: must be a whole number of at least 1")
        if not 0 < self.lr < inf:
            raise ConfigError(f"lr = {self.lr!r}: must be a finite number above 0")


def logits_of(model: nn.Module, arrays: NamedArrays, inputs: Tensor) -> Tensor:
    """Return what ``model`` with ``arrays`` says of all ``inputs``, (N, C), in evaluation mode."""
    state = _as_tensors(arrays, inputs)
    with torch.no_grad():
        parts = [functional_call(model, state, (part,)) for part in _cut(inputs)]
    return torch.cat(parts)


def distilled(
    model: nn.Module,
    arrays: NamedArrays,
    inputs: Tensor,
    targets: Tensor,
    how: Distillation,
    generator: torch.Generator,
    validation: Batch | None = None,
) -> Arrays:
    """Return the arrays of the student, in the dtypes that came.

    Of all states that are checked, the start among them, it is the one with the least loss on all
    records, or the least cross-entropy on a validation set: where the start is the best, or as good
    as the targets, it stays as it is.

    Args:
        model: called functionally and never changed, in the mode that it is in.
        arrays: that it begins with.
        inputs: (N, ...), unlabelled.
        targets: q, (N, C).
        how: it learns.
        generator: of the batches.
        validation: labelled records, (M, ...) and (M,) int64; None: none.
    """
    state = _as_tensors(arrays, inputs)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    fixed = {name: value for name, value in state.items() if name not in trained}
    student = {name: state[name].clone().requires_grad_() for name in trained}
    optimizer = torch.optim.Adam(student.values(), lr=how.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.steps)

    def mean_loss(loss: Callable[[Tensor, Tensor], Tensor], xs: Tensor, ys: Tensor) -> float:
        with torch.no_grad():
            parts = [
                loss(functional_call(model, {**fixed, **student}, (x,)), y) * len(x)
                for x, y in zip(_cut(xs), _cut(ys), strict=True)
            ]
        return float(torch.stack(parts).sum()) / len(xs)

    def judged() -> float:
        if validation is None:
            return mean_loss(kl_to, inputs, targets)
        return mean_loss(cross_entropy, *validation)

    if mean_loss(kl_to, inputs, targets) <= SAME:
        return _as_arrays({}, arrays)
    least, best, idle = judged(), None, 0
    every = max(1, how.steps // CHECKS)
    batches = islice(_batches(len(inputs), how.batch_size, generator), how.steps)
    for number, rows in enumerate(batches, start=1):
        output = functional_call(model, {**fixed, **student}, (inputs[rows],))
        slopes = torch.autograd.grad(kl_to(output, targets[rows]), list(student.values()))
        for value, slope in zip(student.values(), slopes, strict=True):
            value.grad = slope
        optimizer.step()
        schedule.step()
        if number % every == 0 or number == how.steps:
            loss = judged()
            if loss < least:
                least, idle = loss, 0
                best = {name: value.detach().clone() for name, value in student.items()}
            else:
                idle += 1
            if idle >= how.patience:
                break
    return _as_arrays(best or {}, arrays)


def _batches(total: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield rows for ever: all of them once an epoch, in a new order each epoch."""
    while True:
        order = torch.randperm(total, generator=generator)
        for begin in range(0, total, size):
            yield order[begin : begin + size]


def _cut(values: Tensor) -> Iterator[Tensor]:
    """Yield ``values`` in parts of ``CHUNK`` rows."""
    for begin in range(0, len(values), CHUNK):
        yield values[begin : begin + CHUNK]


def _as_tensors(arrays: NamedArrays, like: Tensor) -> dict[str, Tensor]:
    """Return arrays as tensors on the device of ``like``; floating ones in its dtype."""
    return {
        name: torch.from_numpy(np.array(value)).to(
            like.device, like.dtype if is_floating(value) else None
        )
        for name, value in arrays.items()
    }


def _as_arrays(found: Mapping[str, Tensor], like: NamedArrays) -> Arrays:
    """Return ``like`` with what was ``found`` in its place, in the dtypes of ``like``."""
    return {
        name: found[name].cpu().numpy().astype(value.dtype) if name in found else np.asarray(value)
        for name, value in like.items()
    }
