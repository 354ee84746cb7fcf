"""What is known of the round in progress."""

import time
from dataclasses import dataclass, field

from flwr.app import Message

from .reports import ClientScore, RoundReport


@dataclass
class RoundInProgress:
    """The round in progress: what will be its report, and the messages that are under way."""

    number: int = 0
    started: float = field(default_factory=time.perf_counter)
    clients: tuple[str, ...] = ()
    messages: list[Message] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    quarantined: list[tuple[str, str]] = field(default_factory=list)
    train_metrics: dict[str, float] = field(default_factory=dict)
    validation: tuple[ClientScore, ...] = ()
    skipped: bool = False
    bytes_down: int = 0
    bytes_up: int = 0

    def report(self) -> RoundReport:
        """Return the report of the round, which ends now."""
        return RoundReport(
            round=self.number,
            clients=self.clients,
            failures=tuple(self.failures),
            train_metrics=self.train_metrics,
            validation=self.validation,
            bytes_down=self.bytes_down,
            bytes_up=self.bytes_up,
            seconds=time.perf_counter() - self.started,
            quarantined=tuple(self.quarantined),
            skipped=self.skipped,
        )
