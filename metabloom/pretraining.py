r"""Training one model centrally, on public records with labels: where a federation may start.

    minimise over w   mean_(x, y) H(y, softmax(z(x; w)))        by Adam, cosine schedule

A tenth of the records is kept apart and judges each epoch; the best of them is what comes out.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .errors import ConfigError, DataError
from .public import Batch

JUDGES = 0.1  # share of the records that judge, one at least
CHUNK = 512  # records of a forward pass without a gradient


@dataclass(frozen=True)
class Pretraining:
    """How a model is trained.

    Attributes:
        epochs: >= 1.
        lr: of Adam at first, > 0; it falls to 0 by a cosine.
        batch_size: records of a step, >= 1.

    Raises:
        ConfigError: where a value is out of range, naming it.
    """

    epochs: int = 5
    lr: float = 1e-3
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                key = name.replace("_", "-")
                raise ConfigError(f"{key} = {value!r}: must be a whole number of at least 1")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"lr = {self.lr!r}: must be a finite number above 0")


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to.

    Attributes:
        number: from 1; 0: before the first.
        loss: mean cross-entropy of the records that judge.
        accuracy: theirs, in [0, 1].
    """

    number: int
    loss: float
    accuracy: float


def pretrained(
    model: nn.Module,
    records: Batch,
    how: Pretraining,
    generator: torch.Generator,
    *,
    device: str = "cpu",
    on_epoch: Callable[[Epoch], None] | None = None,
) -> tuple[nn.Module, Epoch]:
    """Return a trained copy of ``model`` on the CPU, and the epoch that it is of.

    Of all epochs, the start among them, it is the one with the least loss of the records that
    judge. The model itself is not changed.

    Args:
        model: where it starts.
        records: inputs (N, ...) and int64 classes (N,), N >= 2.
        how: it learns.
        generator: of the split and the batches, on the CPU.
        device: where it computes.
        on_epoch: called after each epoch.

    Raises:
        DataError: where there are fewer than two records.
    """
    inputs, targets = (part.to(device) for part in records)
    total = len(inputs)
    if total < 2:
        raise DataError(f"{total} public records: two are needed, one to train and one to judge")
    order = torch.randperm(total, generator=generator).to(device)
    cut = max(1, round(JUDGES * total))
    judges, rows = order[:cut], order[cut:]
    student = copy.deepcopy(model).to(device).train()
    batches = -(-len(rows) // how.batch_size)
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=how.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.epochs * batches)
    best = _judged(student, inputs[judges], targets[judges], 0)
    kept = copy.deepcopy(student.state_dict())
    for number in range(1, how.epochs + 1):
        mixed = rows[torch.randperm(len(rows), generator=generator).to(device)]
        for part in torch.split(mixed, how.batch_size):
            optimizer.zero_grad()
            loss = cross_entropy(student(inputs[part]), targets[part])
            loss.backward()  # type: ignore[no-untyped-call]  # torch annotates none
            optimizer.step()
            schedule.step()
        epoch = _judged(student, inputs[judges], targets[judges], number)
        if epoch.loss < best.loss:
            best, kept = epoch, copy.deepcopy(student.state_dict())
        if on_epoch:
            on_epoch(epoch)
    student.load_state_dict(kept)
    return student.cpu(), best


def _judged(model: nn.Module, inputs: Tensor, targets: Tensor, number: int) -> Epoch:
    model.eval()
    with torch.no_grad():
        outputs = torch.cat([model(part) for part in torch.split(inputs, CHUNK)])
    model.train()
    loss = cross_entropy(outputs, targets).item()
    accuracy = (outputs.argmax(dim=1) == targets).double().mean().item()
    return Epoch(number, loss, accuracy)
