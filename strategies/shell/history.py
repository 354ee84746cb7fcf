"""What a run has done so far: all that a checkpoint holds besides the arrays."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from uuid import uuid4

from flwr.app import MetricRecord

from ...wire import NamedArrays
from ..rules import State
from .reports import RoundReport
from .roll_call import Node
from .snapshot import HISTORIES, Snapshot

Metrics = dict[int, MetricRecord]  # by round


@dataclass
class History:
    """The past of a run.

    Attributes:
        token: identity of the run, the same over resumes; clients key their lasting state by it.
        reports: one for each round.
        train_metrics: of the clients in training.
        evaluate_metrics: of the clients in evaluation.
        server_metrics: of ``evaluate_fn``; round 0 is the initial model.
        offences: bad replies of each client.
    """

    token: str = field(default_factory=lambda: uuid4().hex)
    reports: list[RoundReport] = field(default_factory=list)
    train_metrics: Metrics = field(default_factory=dict)
    evaluate_metrics: Metrics = field(default_factory=dict)
    server_metrics: Metrics = field(default_factory=dict)
    offences: Counter[str] = field(default_factory=Counter)
    _copies: dict[str, dict[int, dict[str, Any]]] = field(
        default_factory=lambda: {name: {} for name in HISTORIES},
        init=False,
        repr=False,
        compare=False,
    )

    @classmethod
    def of(cls, kept: Snapshot) -> "History":
        """Return the history that a snapshot holds."""
        metrics = {
            name: {n: MetricRecord(dict(one)) for n, one in getattr(kept, name).items()}
            for name in HISTORIES
        }
        offences = Counter(kept.offences)
        return cls(token=kept.token, reports=list(kept.reports), offences=offences, **metrics)

    @property
    def exhausted(self) -> set[str]:
        """The clients whose privacy budget is spent: it will not come back in this run."""
        return {name for report in self.reports for name in report.exhausted}

    def trusted(self, nodes: Sequence[Node], max_offences: int | None) -> list[Node]:
        """Return the nodes with fewer bad replies, and a privacy budget that is not spent."""
        bound, spent = max_offences or math.inf, self.exhausted
        return [n for n in nodes if self.offences[n.name] < bound and n.name not in spent]

    @property
    def result(self) -> dict[str, Any]:
        """What a run's result has of it."""
        return {
            "train_metrics_clientapp": self.train_metrics,
            "evaluate_metrics_clientapp": self.evaluate_metrics,
            "evaluate_metrics_serverapp": self.server_metrics,
            "rounds": list(self.reports),
        }

    def snapshot(
        self,
        number: int,
        arrays: NamedArrays,
        state: State | None,
        told: tuple[str, ...],
        best: NamedArrays | None = None,
    ) -> Snapshot:
        """Return the state of the run after round ``number``, which later rounds do not change.

        The metrics of each round are copied once, in the first snapshot that holds them.
        """
        for name, copies in self._copies.items():
            new = islice(getattr(self, name).items(), len(copies), None)
            copies |= {n: dict(metrics) for n, metrics in new}
        return Snapshot(
            round=number,
            arrays=arrays,
            state=state,
            reports=tuple(self.reports),
            **{name: dict(copies) for name, copies in self._copies.items()},
            offences=dict(self.offences),
            told=told,
            token=self.token,
            best=best,
        )
