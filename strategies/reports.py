"""What a run reports: the scores of single clients, what each round did, and the result."""

from dataclasses import dataclass, field

from flwr.serverapp.strategy import Result

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
    """

    client: str
    partition_id: int | None
    role: str
    num_examples: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class RoundReport:
    """What one round did: who trained, failures, metrics, bytes of arrays down and up, seconds."""

    round: int
    clients: tuple[str, ...]
    failures: Failures
    train_metrics: dict[str, float]
    validation: tuple[ClientScore, ...]
    bytes_down: int
    bytes_up: int
    seconds: float


@dataclass
class RunResult(Result):
    """Flower's Result, and what the shell adds to it.

    Attributes:
        rounds: the report of each round.
        unseen: the scores of the unseen clients under the final model.
        trained: those of the training clients, for strategies that leave a personal model on each.
        final_failures: the clients of these two that did not answer.
        clients: the number of nodes of each role.
        dropped: clients of the data set that were too small to take part, as nodes report them.
    """

    rounds: list[RoundReport] = field(default_factory=list)
    unseen: list[ClientScore] = field(default_factory=list)
    trained: list[ClientScore] = field(default_factory=list)
    final_failures: Failures = ()
    clients: dict[str, int] = field(default_factory=dict)
    dropped: int = 0
