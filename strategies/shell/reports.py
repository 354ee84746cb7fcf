"""What a run reports: the scores of single clients, what each round did, and the result."""

from dataclasses import dataclass, field
from functools import cached_property

from flwr.serverapp.strategy import Result

from ...files import Json, as_json
from .user_account import UserLevelSpent

Failures = tuple[tuple[str, str], ...]  # (client, reason)


@dataclass(frozen=True)
class ClientScore:
    """The evaluation of one client.

    Attributes:
        client: its name.
        partition_id: None where it never said.
        role: "train", "validation" or "unseen".
        num_examples: query records.
        metrics: as the client names them.
        architecture: of its model, where the federation has several.
    """

    client: str
    partition_id: int | None
    role: str
    num_examples: float
    metrics: dict[str, float]
    architecture: str = ""


@dataclass(frozen=True)
class RoundReport:
    """What one round did.

    Attributes:
        round: its number, from 1.
        clients: who was asked to train.
        failures: who could not take part, raised, or did not answer in time.
        quarantined: whose reply the firewall refused, and why.
        skipped: whether the model stayed as it was, for want of good replies.
        train_metrics: aggregated over the good replies.
        validation: the scores of the validation clients.
        bytes_down: bytes of arrays that were sent.
        bytes_up: bytes of arrays in the good replies.
        bytes_training: of both, those of training.
        seconds: how long it took.
        exhausted: who refused to train since its privacy budget is spent: no failure.
        spent: what the privacy ledgers of the clients that trained have come to (epsilon).
        privacy_delta: the largest delta of these; 0 where nobody told one.
    """

    round: int
    clients: tuple[str, ...]
    failures: Failures
    train_metrics: dict[str, float]
    validation: tuple[ClientScore, ...]
    bytes_down: int
    bytes_up: int
    seconds: float
    quarantined: Failures = ()
    skipped: bool = False
    exhausted: tuple[str, ...] = ()
    spent: tuple[tuple[str, float], ...] = ()
    privacy_delta: float = 0.0
    bytes_training: int = 0

    @cached_property
    def as_json(self) -> Json:
        """The report as each checkpoint from its round on holds it, encoded once.

        Raises:
            TypeError: where a metric is no number.
        """
        members = {**vars(self), "validation": [vars(score) for score in self.validation]}
        return as_json(f"report of round {self.round}", members)


@dataclass
class RunResult(Result):
    """Flower's Result, and what the shell adds to it.

    Attributes:
        rounds: the report of each round.
        unseen: the scores of the unseen clients under the final model.
        trained: those of the training clients, for strategies that leave a personal model on each.
        final_failures: the clients of these two that did not answer.
        final_quarantined: those of them whose reply was refused.
        clients: the number of nodes of each role.
        dropped: clients of the data set that were too small to take part, as nodes report them.
        user_level: what the models tell of any one client; None without user-level privacy.
        ended: why the run ended before its last round; empty where it did not.
        model_round: the round whose model ``arrays`` are, where the run looked for the best one.
    """

    rounds: list[RoundReport] = field(default_factory=list)
    unseen: list[ClientScore] = field(default_factory=list)
    trained: list[ClientScore] = field(default_factory=list)
    final_failures: Failures = ()
    final_quarantined: Failures = ()
    clients: dict[str, int] = field(default_factory=dict)
    dropped: int = 0
    user_level: UserLevelSpent | None = None
    ended: str = ""
    model_round: int | None = None
