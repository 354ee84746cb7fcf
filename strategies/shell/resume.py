"""Go on with a run that was stopped: from its newest checkpoint, through Flower's own loop."""

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from logging import ERROR, INFO, WARNING

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from ...errors import CheckpointError, ConfigError, MetabloomError
from ...wire import KEPT_ROUND, RUN_TOKEN, SERVER_ROUND, NamedArrays
from .checkpoint import Checkpoints
from .snapshot import INSTEAD, Snapshot

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


def snapshot_to_resume(
    checkpoints: Checkpoints | None, initial: NamedArrays, num_rounds: int
) -> Snapshot | None:
    """Return the state to go on from; None for a run that begins anew.

    A run that begins anew beside the checkpoints of another one sets those aside.

    Raises:
        ConfigError: where the checkpoint is of another configuration or model, or of a later round
            than ``num_rounds``.
        CheckpointError: where there are checkpoints and none can be read.
    """
    if checkpoints is None:
        return None
    if not checkpoints.resume:
        aside = checkpoints.set_aside() if checkpoints.every else None
        if aside:
            log(WARNING, "the checkpoints of an earlier run were moved to %s", aside)
        return None
    kept = checkpoints.load()
    if kept is None:
        log(WARNING, "no checkpoint in %s: the run begins anew", checkpoints.folder)
        return None
    if kept.round > num_rounds:
        raise ConfigError(
            f"rounds = {num_rounds}: the checkpoint in {str(checkpoints.folder)!r} is of round "
            f"{kept.round} already; resume with at least so many rounds"
        )
    _check_same_model(kept.arrays, initial)
    log(INFO, "resumed after round %d of %d", kept.round, num_rounds)
    return kept


def _check_same_model(kept: NamedArrays, initial: NamedArrays) -> None:
    for name in (*kept, *initial):
        old, new = (
            f"{arrays[name].dtype} of shape {arrays[name].shape}" if name in arrays else "not there"
            for arrays in (kept, initial)
        )
        if old != new:
            raise ConfigError(
                f"array {name!r} is {old} in the checkpoint and {new} in this run: resume with the "
                f"same model, or {INSTEAD}"
            )


def told_of_run(
    server_round: int, token: str, checkpoints: Checkpoints | None
) -> dict[str, int | str]:
    """Return what clients are told: the round and, where it may be resumed, of which run it is."""
    told: dict[str, int | str] = {SERVER_ROUND: server_round}
    if checkpoints and (checkpoints.every or checkpoints.resume):
        told |= {RUN_TOKEN: token, KEPT_ROUND: checkpoints.oldest()}
    return told


class Saver:
    """Saves every so many rounds, and the last whole one when the run ends, however it ends.

    A disk that fails does not end the run: it is logged as an error, and tried again with the next
    round. A state that can never be saved does, with the first try.

    Args:
        checkpoints: None: nothing is saved.
        kept: what the run was resumed from, which is saved already.
    """

    def __init__(self, checkpoints: Checkpoints | None, kept: Snapshot | None) -> None:
        self._checkpoints = checkpoints if checkpoints and checkpoints.every else None
        self._last = kept
        self._saved = kept.round if kept else 0
        self._overdue = False

    def offer(self, snapshot: Snapshot) -> None:
        """Take the state after a round, and save it where its turn has come.

        Raises:
            CheckpointError: where it holds what can never be saved.
        """
        self._last = snapshot
        every = self._checkpoints.every if self._checkpoints else 0
        if every and (self._overdue or snapshot.round % every == 0):
            self.flush()

    def finish(self) -> None:
        """Mark the run as finished."""
        if self._checkpoints:
            try:
                self._checkpoints.finish()
            except MetabloomError as err:  # of the disk
                log(ERROR, "the run could not be marked as finished: %s", err)

    @contextmanager
    def flushed(self) -> Iterator[None]:
        """Save the last state that the block offered, however the block ends.

        Raises:
            CheckpointError: as ``flush``, where the block raises nothing.
        """
        try:
            yield
        except BaseException:
            self.flush(failing=True)
            raise
        self.flush()

    def flush(self, *, failing: bool = False) -> None:
        """Save the last state that was offered, unless it is saved or can never be.

        Args:
            failing: an exception is under way, which is what matters: whatever goes wrong here is
                logged only.

        Raises:
            CheckpointError: where the state holds what can never be saved; not when ``failing``.
        """
        if not (self._checkpoints and self._last and self._last.round > self._saved):
            return
        number = self._last.round
        try:
            self._checkpoints.save(self._last)
        except Exception as err:
            self._overdue = isinstance(err, MetabloomError) and not isinstance(err, CheckpointError)
            if not self._overdue:
                self._last = None  # it can never be saved
                if not failing:
                    raise
            told = "round %d could not be saved, the checkpoints before it are kept: %s"
            log(ERROR, told, number, err)
        else:
            self._saved, self._overdue = number, False


def closing(
    evaluate_fn: EvaluateFn,
    done: int,
    told: MutableMapping[int, MetricRecord],
    close_round: Callable[[], None],
    models: Callable[[ArrayRecord], ArrayRecord],
) -> EvaluateFn:
    """Return ``evaluate_fn`` for a loop that begins after round ``done``; it closes rounds.

    Args:
        evaluate_fn: the user's.
        done: rounds that were played before.
        told: takes what it returns.
        close_round: called after each round.
        models: what the user's function sees of the arrays of a run.
    """

    def evaluate(loop_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if done and not loop_round:
            return None  # the model that is resumed from was evaluated in its own round
        metrics = evaluate_fn(loop_round + done, models(arrays))
        if metrics is not None:
            told[loop_round + done] = metrics
        if loop_round:
            close_round()
        return metrics

    return evaluate


class ResumedRun(Strategy):
    """A strategy in Flower's loop, whose first round is round ``done`` + 1 to the strategy.

    Flower's loop counts from 1, whatever was done before.
    """

    def __init__(self, strategy: Strategy, done: int) -> None:
        self._strategy = strategy
        self._done = done

    def summary(self) -> None:
        """Log what is resumed, and the strategy's own summary."""
        log(INFO, "\t├──> Resumed: [ROUND 1] below is round %d", self._done + 1)
        self._strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the strategy's train messages."""
        return self._strategy.configure_train(server_round + self._done, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the strategy's next model and metrics."""
        return self._strategy.aggregate_train(server_round + self._done, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the strategy's evaluate messages."""
        return self._strategy.configure_evaluate(server_round + self._done, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the strategy's metrics."""
        return self._strategy.aggregate_evaluate(server_round + self._done, replies)
