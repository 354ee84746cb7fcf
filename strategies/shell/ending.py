"""When a run ends before its last round, and which of its models it then leaves.

Two budgets end it: bytes of arrays that training exchanged, down and up, and seconds of rounds,
validation among them. Patience ends it where validation clients have not got better for so many
validations; the run then leaves the model that they liked best, whether it ended early or not.

All of this follows from the reports of the rounds, which checkpoints hold; they hold the arrays of
the best model too. So a run that is resumed ends where it would have ended.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from logging import INFO
from statistics import fmean
from typing import Any

from flwr.app import ArrayRecord
from flwr.common import log
from flwr.serverapp.strategy import Result

from ...errors import ConfigError
from ...keys import Scalar
from ...wire import NamedArrays, to_record
from .reports import ClientScore, RoundReport
from .snapshot import Snapshot

Score = tuple[float, float]  # the greater, the better: accuracy, then the loss with its sign turned


@dataclass(frozen=True)
class Ending:
    """What ends a run; without any of it all rounds are played, and the last model stays.

    Attributes:
        patience: validations in a row without a better one, >= 1; 0: nobody looks.
        max_bytes: of arrays, sent for training and in good replies to it, >= 1; 0: no bound. The
            run ends with the round in which so many have come together.
        max_seconds: of rounds, > 0; 0: no bound. As that.
        accuracy: metric of validation clients whose mean says which model is better.
        loss: metric whose mean decides where accuracies are equal, or nobody tells them.
        scored: unseen clients score the model that the run leaves, and training clients their own
            models where they keep some; False: nobody is asked.
        trained: training clients score in any case.

    Raises:
        ConfigError: where a value is out of range, naming it.
    """

    patience: int = 0
    max_bytes: int = 0
    max_seconds: float = 0.0
    accuracy: str = "accuracy"
    loss: str = "loss"
    scored: bool = True
    trained: bool = False

    def __post_init__(self) -> None:
        for name in ("patience", "max_bytes"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 0):
                raise ConfigError(f"{name} = {value!r}: must be a whole number of at least 0")
        if not 0 <= self.max_seconds < math.inf:
            raise ConfigError(
                f"max_seconds = {self.max_seconds!r}: must be a finite number of at least 0"
            )

    @property
    def settings(self) -> dict[str, Scalar]:
        """What a run that is resumed must have: a larger budget only lets it go further."""
        if not self.patience:
            return {}
        return {"patience": self.patience, "best by": f"{self.accuracy}, {self.loss}"}

    def score_of(self, validation: Sequence[ClientScore]) -> Score | None:
        """Return how good a model is; None where its clients say nothing of it.

        A metric counts where all of the clients tell it: a mean over some would be another one.

        >>> told = {"accuracy": 0.5, "loss": 2.0}
        >>> Ending(patience=1).score_of([ClientScore("a", 0, "validation", 9, told)])
        (0.5, -2.0)
        """
        accuracy, loss = (_mean_of(validation, name) for name in (self.accuracy, self.loss))
        if accuracy is None and loss is None:
            return None
        return -math.inf if accuracy is None else accuracy, -math.inf if loss is None else -loss


def _mean_of(scores: Sequence[ClientScore], metric: str) -> float | None:
    told = [one.metrics[metric] for one in scores if metric in one.metrics]
    return fmean(told) if told and len(told) == len(scores) else None


class RunOver(Exception):  # noqa: N818  it ends Flower's loop, and is no error
    """Ends Flower's loop, which knows of no early end; ``result`` has the last arrays."""

    def __init__(self, arrays: NamedArrays) -> None:
        super().__init__("the run is over")
        self.result = Result(arrays=to_record(arrays))


def played(loop: Callable[..., Result], *arguments: Any) -> Result:
    """Return what Flower's loop comes to, also where the run was over before its last round."""
    try:
        return loop(*arguments)
    except RunOver as over:
        return over.result


class Watch:
    """What a run has spent so far, and the best of its models.

    Args:
        ending: what ends it.
        kept: what it goes on from; None: it begins.
    """

    def __init__(self, ending: Ending, kept: Snapshot | None) -> None:
        self._ending = ending
        self._score: Score | None = None
        self._round = self._best_round = self._idle = self._bytes = 0
        self._seconds = 0.0
        self.best: NamedArrays | None = None  # None: there is none, or nobody looks
        for report in kept.reports if kept else ():
            self._count(report)
        if kept:
            self.best = kept.best

    def note(self, report: RoundReport, arrays: NamedArrays) -> None:
        """Take the report of a round and the arrays after it."""
        if self._count(report):
            self.best = arrays

    @property
    def over(self) -> str:
        """Why the run ends after the rounds so far; empty where it goes on."""
        ending = self._ending
        if ending.patience and self._idle >= ending.patience:
            return f"patience = {ending.patience}: no better validation since that of round " + str(
                self._best_round
            )
        if ending.max_bytes and self._bytes >= ending.max_bytes:
            return f"max-bytes = {ending.max_bytes}: training has exchanged {self._bytes}"
        if ending.max_seconds and self._seconds >= ending.max_seconds:
            return f"max-seconds = {ending.max_seconds:g}: its rounds took {self._seconds:.1f}"
        return ""

    @property
    def result(self) -> dict[str, Any]:
        """What a run's result has of it."""
        if self.best is None:
            return {"ended": self.over}
        return {"ended": self.over, "model_round": self._best_round}

    def model(self, last: ArrayRecord) -> ArrayRecord:
        """Return what the run leaves: the best model where it looked for it, else the ``last``."""
        return last if self.best is None else to_record(self.best)

    def end(self, arrays: NamedArrays) -> None:
        """Raise RunOver, with the last ``arrays``, where the run is over."""
        if why := self.over:
            log(INFO, "the run ends after round %d: %s", self._round, why)
            raise RunOver(arrays)

    def _count(self, report: RoundReport) -> bool:
        """Count a round, and return whether its model is the best so far."""
        self._round = report.round
        self._bytes += report.bytes_training
        self._seconds += report.seconds
        if not self._ending.patience or not report.validation:
            return False
        score = self._ending.score_of(report.validation)
        if score is None:
            return False
        if self._score is not None and score <= self._score:
            self._idle += 1
            return False
        self._score, self._best_round, self._idle = score, report.round, 0
        return True
