"""Records of one client before they are tensors, and how they are cut into support and query."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ...errors import ConfigError

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Records:
    """Hold one client's targets, and a function that decodes its inputs when they are needed.

    Attributes:
        targets: (n,) integers.
        inputs: returns (n, *input_shape); uint8 means images, scaled to [0, 1] later.
        support_rows: the first so many records are the support and the rest the query, where the
            data decide it (time order, statistics of the support); 0: the split decides.
    """

    targets: npt.NDArray[Any]
    inputs: Callable[[], npt.NDArray[Any]]
    support_rows: int = 0

    @classmethod
    def of_rows(
        cls, inputs: npt.NDArray[Any], targets: npt.NDArray[Any], rows: npt.NDArray[np.int64]
    ) -> Records:
        """Return the records of some ``rows`` of a whole data set, copied when they are needed."""
        return cls(targets[rows], lambda: inputs[rows])


@dataclass(frozen=True)
class Split:
    """Cut each client's records into support and query, by fraction, by size, or by class.

    Attributes:
        support_fraction: share of a client's records in its support, in (0, 1); never all or none.
        support_size: records in the support instead of a share; 0: use the share.
        query_size: records in the query; 0: all that the support leaves.
        shots: support records of each class that the client has, instead; 0: not by class.
        query_shots: query records of each class (only with shots); 0: all that the support leaves.
    """

    support_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    support_size: Annotated[int, Field(ge=0)] = 0
    query_size: Annotated[int, Field(ge=0)] = 0
    shots: Annotated[int, Field(ge=0)] = 0
    query_shots: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        if not 0 < self.support_fraction < 1:
            raise ConfigError(
                f"support_fraction = {self.support_fraction}: must lie between 0 and 1, "
                "both excluded, so that support and query have records"
            )
        for name in ("support_size", "query_size", "shots", "query_shots"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be at least 0")
        if self.shots and (self.support_size or self.query_size):
            raise ConfigError(
                f"shots = {self.shots} with support_size = {self.support_size} and query_size = "
                f"{self.query_size}: choose a size for each class or a total, not both"
            )
        if self.query_shots and not self.shots:
            raise ConfigError(f"query_shots = {self.query_shots} without shots: set shots as well")

    def with_options(self, given: Mapping[str, Any]) -> Split:
        """Return this split with a user's values; a total that is given replaces sizes by class."""
        changes = dict(given)
        if changes.get("shots"):
            changes = {"support_size": 0, "query_size": 0, **changes}
        elif {"support_fraction", "support_size", "query_size"} & changes.keys():
            changes = {"shots": 0, "query_shots": 0, **changes}
            if "support_fraction" in changes:
                changes = {"support_size": 0, **changes}
        return replace(self, **changes)

    def rows(self, targets: npt.NDArray[Any], rng: np.random.Generator) -> tuple[Rows, Rows] | None:
        """Return the rows of support and of query, or None where the client is too small."""
        if self.shots:
            return self._rows_by_class(targets, rng)
        n = len(targets)
        order = rng.permutation(n)
        wanted_query = max(self.query_size, 1)
        share = min(max(1, round(self.support_fraction * n)), n - wanted_query)
        support = self.support_size or share
        if support < 1 or support + wanted_query > n:
            return None
        end = support + self.query_size if self.query_size else n
        return order[:support], order[support:end]

    def _rows_by_class(
        self, targets: npt.NDArray[Any], rng: np.random.Generator
    ) -> tuple[Rows, Rows] | None:
        support, query = [], []
        for label in np.unique(targets):
            members = rng.permutation(np.flatnonzero(targets == label))
            if len(members) < self.shots + max(self.query_shots, 1):
                return None
            end = self.shots + self.query_shots if self.query_shots else len(members)
            support.append(members[: self.shots])
            query.append(members[self.shots : end])
        if not support:
            return None
        return np.concatenate(support), rng.permutation(np.concatenate(query))

    def wanted(self) -> str:
        """Return in words what a client must have, for errors."""
        if self.shots:
            query = max(self.query_shots, 1)
            return (
                f"{self.shots + query} records of each of its classes "
                f"(shots = {self.shots}, at least {query} for the query)"
            )
        support, query = max(self.support_size, 1), max(self.query_size, 1)
        return (
            f"{support + query} records (support_size = {self.support_size or 'by share'}, "
            f"at least {query} for the query)"
        )

    def remedy(self) -> str:
        """Return in words what to change where no client is large enough."""
        names = "shots or query_shots" if self.shots else "support_size or query_size"
        return (
            f"lower {names}, or make larger clients (where the data set makes them itself, a "
            "smaller num_clients does)"
        )
