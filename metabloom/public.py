"""Public records, which server and clients all have: what distillation exchanges opinions on.

Answers are averaged record by record, so both ends must hold the same records in the same order: a
fingerprint says so (``check_agrees``), and the records of a round follow from the round and the
seed alone (``PublicData.subset``), so that no list of them travels.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import DataError, WireError, shortened
from .streams import numpy_stream

Rows = npt.NDArray[np.int64]
Batch = tuple[Tensor, Tensor]  # inputs (B, ...), targets (B,)


@dataclass(frozen=True, eq=False)
class PublicData:
    """Hold public records; ``of`` makes one with its fingerprint.

    Attributes:
        name: where they come from, for errors and results: "held-out", "dataset:fashion-mnist".
        inputs: (N, *input_shape) with N >= 1, as models take them; not to be changed.
        fingerprint: ``fingerprint_of(inputs)``.
        targets: (N,) int64 classes of the federation's own, where they are known; else None.
    """

    name: str
    inputs: Tensor
    fingerprint: str
    targets: Tensor | None = None

    @classmethod
    def of(cls, name: str, inputs: Tensor, targets: Tensor | None = None) -> "PublicData":
        """Return checked public records with their fingerprint.

        Raises:
            DataError: no records, inputs that are not finite, targets that are not one int64 each.

        >>> public = PublicData.of("noise", torch.zeros(4, 2))
        >>> len(public), public.batch([0, 3]).shape
        (4, torch.Size([2, 2]))
        """
        if inputs.ndim < 2 or 0 in inputs.shape:
            raise DataError(
                f"public data {name!r} have inputs of shape {tuple(inputs.shape)}: at least one "
                "record of at least one number is needed"
            )
        if not torch.isfinite(inputs).all():
            raise DataError(f"public data {name!r} hold NaN or infinity: drop those records")
        if targets is not None and (
            targets.shape != inputs.shape[:1] or targets.dtype != torch.int64
        ):
            raise DataError(
                f"public data {name!r} have targets of shape {tuple(targets.shape)} and dtype "
                f"{targets.dtype}: {len(inputs)} int64 classes are needed, or None"
            )
        return cls(name, inputs, fingerprint_of(inputs), targets)

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: npt.ArrayLike | Tensor) -> Tensor:
        """Return the inputs (B, *input_shape) of some records, in the order of ``indices``.

        Args:
            indices: (B,) integers in [0, N). Negative ones and masks are refused: where both ends
                must mean the same records, a surprise is an error.

        Raises:
            DataError: the indices are not as they must be.
        """
        return self.inputs[self._rows(indices)]

    def labelled_batch(self, indices: npt.ArrayLike | Tensor) -> Batch:
        """Return inputs and targets of some records; see ``batch``.

        Raises:
            DataError: these records have no targets, or the indices are not as they must be.
        """
        if self.targets is None:
            raise DataError(
                f"public data {self.name!r} have no targets, and this method learns from them: use "
                "'held-out', or a method for unlabelled public data"
            )
        rows = self._rows(indices)
        return self.inputs[rows], self.targets[rows]

    def subset(self, server_round: int, size: int, seed: int) -> Rows:
        """Return the records of one round: ``size`` different indices, ascending.

        They follow from (seed, server_round) and the number of records alone.

        Raises:
            DataError: the size is not in [1, N].
        """
        _check_size(f"public data {self.name!r}", size, len(self))
        order = numpy_stream(seed, "public-subset", server_round).permutation(len(self))
        return np.sort(order[:size])

    def mark_of(self, rows: Rows) -> npt.NDArray[np.uint8]:
        """Return 16 bytes that stand for ``rows`` of these very records, in their order."""
        digest = hashlib.blake2b(self.fingerprint.encode(), digest_size=16)
        digest.update(np.ascontiguousarray(rows, dtype="<i8").data)
        return np.frombuffer(digest.digest(), np.uint8)

    def split(self, size: int, seed: int) -> tuple["PublicData", "PublicData"]:
        """Return two parts in the order of the records, the second of ``size``, drawn by chance.

        Raises:
            DataError: the size is not in [1, N - 1].
        """
        second, first = held_out_rows(len(self), size, seed)

        def part(rows: Rows) -> PublicData:
            targets = None if self.targets is None else self.targets[torch.from_numpy(rows)]
            return PublicData.of(self.name, self.batch(rows), targets)

        return part(first), part(second)

    def _rows(self, indices: npt.ArrayLike | Tensor) -> Tensor:
        rows: npt.NDArray[Any] = np.asarray(indices)
        if rows.ndim == 1 and not rows.size:
            return torch.empty(0, dtype=torch.int64)
        fits = rows.ndim == 1 and np.issubdtype(rows.dtype, np.integer)
        if not fits or not 0 <= rows.min() <= rows.max() < len(self):
            raise DataError(
                f"indices {shortened(rows.tolist(), 80)} of public data {self.name!r}: a row of "
                f"whole numbers from 0 to {len(self) - 1} is needed"
            )
        return torch.from_numpy(rows.astype(np.int64))


def fingerprint_of(inputs: Tensor) -> str:
    """Return 32 hexadecimal digits that stand for dtype, shape and every bit of the values.

    The layout in memory (strides) and the device do not count. Machines of one byte order agree.

    >>> fingerprint_of(torch.zeros(2, 3)) == fingerprint_of(torch.zeros(3, 2).T)
    True
    >>> fingerprint_of(torch.zeros(2, 3)) == fingerprint_of(torch.zeros(3, 2))
    False
    """
    total = hashlib.blake2b(digest_size=16)
    total.update(repr((str(inputs.dtype), tuple(inputs.shape))).encode())
    flat = inputs.detach().cpu().contiguous().reshape(-1)
    total.update(flat.view(torch.uint8).numpy().data)  # bytes, since NumPy has no bfloat16
    return total.hexdigest()


def check_agrees(ours: str, theirs: str) -> None:
    """Raise WireError unless two ends hold the same public records, by their fingerprints."""
    if ours != theirs:
        raise WireError(
            f"the public data differ: fingerprint {ours!r} here, {shortened(repr(theirs), 80)} at "
            "the other end; answers on other records, or in another order, cannot be averaged: "
            "give both ends the same source, size, seed and files"
        )


def held_out_rows(total: int, size: int, seed: int) -> tuple[Rows, Rows]:
    """Return the rows set aside as public, and those that are left to the clients; each ascending.

    They are disjoint and together 0 to total - 1. A loader partitions what is left alone.

    Args:
        total: rows of the whole training set.
        size: in [1, total - 1], rows to set aside.
        seed: of the choice, which is the run's own at both ends.

    Raises:
        DataError: the size leaves no row on one side.

    >>> [len(rows) for rows in held_out_rows(10, 3, seed=0)]
    [3, 7]
    """
    _check_size("the rows to hold out", size, total - 1)
    order = numpy_stream(seed, "held-out").permutation(total)
    return np.sort(order[:size]), np.sort(order[size:])


def _check_size(what: str, size: int, most: int) -> None:
    if not 1 <= size <= most:
        raise DataError(f"{what}: size = {size!r}: must be from 1 to {most}, the records there are")
