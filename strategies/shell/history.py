"""What a run has done so far: all that a checkpoint holds besides the arrays."""

from collections import Counter
from dataclasses import dataclass, field
from uuid import uuid4

from flwr.app import MetricRecord

from ...wire import NamedArrays
from ..rules import State
from .checkpoint import Snapshot
from .reports import RoundReport

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

    @classmethod
    def of(cls, kept: Snapshot) -> "History":
        """Return the history that a snapshot holds."""
        return cls(
            token=kept.token,
            reports=list(kept.reports),
            train_metrics={n: MetricRecord(dict(m)) for n, m in kept.train_metrics.items()},
            evaluate_metrics={n: MetricRecord(dict(m)) for n, m in kept.evaluate_metrics.items()},
            server_metrics={n: MetricRecord(dict(m)) for n, m in kept.server_metrics.items()},
            offences=Counter(kept.offences),
        )

    def snapshot(
        self, number: int, arrays: NamedArrays, state: State | None, told: tuple[str, ...]
    ) -> Snapshot:
        """Return the state of the run after round ``number``, which later rounds do not change."""
        return Snapshot(
            round=number,
            arrays=arrays,
            state=state,
            reports=tuple(self.reports),
            train_metrics={n: dict(m) for n, m in self.train_metrics.items()},
            evaluate_metrics={n: dict(m) for n, m in self.evaluate_metrics.items()},
            server_metrics={n: dict(m) for n, m in self.server_metrics.items()},
            offences=dict(self.offences),
            told=told,
            token=self.token,
        )
