"""Batches of one client: minibatches of epochs, independent draws, fresh support/query splits."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .data import Batch, ClientData

Padded = tuple[Tensor, Tensor, Tensor]  # inputs (B, ...), targets (B, ...), mask (B,) bool


def minibatches(
    records: Batch, *, batch_size: int, epochs: int, generator: torch.Generator
) -> Iterator[Batch]:
    """Yield each record once an epoch, in a new order each epoch.

    Batches hold ``batch_size`` records, the last one maybe fewer; 0 puts all into one batch.
    """
    total = len(records[1])
    size = batch_size or max(total, 1)  # of no records there are no batches
    for _ in range(epochs):
        order = torch.randperm(total, generator=generator)
        for start in range(0, total, size):
            yield _take(records, order[start : start + size])


def draw(records: Batch, *, size: int, generator: torch.Generator) -> Batch:
    """Return ``size`` different records drawn uniformly.

    0, or more than there are, gives all of them as they stand.
    """
    total = len(records[1])
    if size == 0 or size >= total:
        return records
    return _take(records, torch.randperm(total, generator=generator)[:size])


def resplit(data: ClientData, *, generator: torch.Generator) -> ClientData:
    """Return the client's records in a fresh split, with as many support records of each class.

    Raises:
        DataError: where targets are not classes, i.e. one integer >= 0 for each record.
    """
    inputs, targets = data.all
    if targets.ndim != 1 or targets.is_floating_point():
        raise DataError(
            f"split 'fresh' keeps the classes of the support set, but the targets are "
            f"{targets.dtype} of shape {tuple(targets.shape)}: use split='fixed'"
        )
    wanted = torch.bincount(data.support[1], minlength=int(targets.max()) + 1)
    order = torch.randperm(len(targets), generator=generator)
    rank = _rank_within_class(targets[order])
    in_support = rank < wanted[targets[order]]
    records = (inputs[order], targets[order])
    return ClientData(support=_take(records, in_support), query=_take(records, ~in_support))


def pad(batch: Batch, size: int) -> Padded:
    """Return ``batch`` with copies of its first record up to ``size``, and which are real.

    >>> pad((torch.tensor([[2.0], [3.0]]), torch.tensor([0, 1])), 3)[2]
    tensor([ True,  True, False])
    """
    index = torch.arange(size, device=batch[1].device)
    mask = index < len(batch[1])
    return (*_take(batch, torch.where(mask, index, 0)), mask)


def parts(item: Any) -> tuple[Batch, ...]:
    """Return the batches of one step: of a batch itself, or of a NamedTuple of batches."""
    if isinstance(item[0], Tensor):
        return (item,)
    return tuple(part for part in item if part is not None)


def joined(kind: type, batches: tuple[Any, ...]) -> Any:
    """Return the item of ``kind`` that has these parts; the inverse of ``parts``."""
    return batches[0] if kind is tuple else kind(*batches)


def _rank_within_class(targets: Tensor) -> Tensor:
    """Return for each record how many earlier ones have its class: [2, 1, 2] -> [0, 0, 1]."""
    onehot = torch.nn.functional.one_hot(targets)  # (N, classes)
    return (onehot.cumsum(0) - onehot).gather(1, targets[:, None])[:, 0]


def _take(records: Batch, index: Tensor) -> Batch:
    inputs, targets = records
    return inputs[index], targets[index]
