"""The reply firewall around anybody's strategy: ``guard(FedAdam(...))``.

The guard stands between Flower's loop and the strategy. It lets through the replies that are good,
as they are and in their order, so that with good replies the result is the strategy's own to the
bit; a round without enough of them leaves the model as it is.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from logging import ERROR, INFO

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping as AdaptiveClippingAtClients,
)
from flwr.serverapp.strategy import FedAvg, FedXgbBagging, FedXgbCyclic, QFedAvg, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from flwr.supercore.differential_privacy import KEY_NORM_BIT

from ...errors import ConfigError
from ...wire import NUM_EXAMPLES, NamedArrays, from_record, size_of, to_record
from .exchange import sort_replies
from .firewall import Firewall, clipped, not_finite
from .patient_grid import PatientGrid
from .reply_metrics import (
    DIVERGED,
    diverged,
    finite_metrics,
    in_common,
    numbers_of,
    usual_ones,
    with_metrics,
    with_others,
)
from .reports import RoundReport, RunResult
from .round import RoundInProgress
from .strategy import RuleStrategy

LARGEST_COUNTER = 2.0**53  # up to it float64, in which Flower averages, has every whole number
UNLIKE = (FedXgbBagging, FedXgbCyclic)  # their clients answer with other arrays than were sent


def guard(
    strategy: Strategy,
    *,
    firewall: Firewall | None = None,
    min_fit_replies: int = 1,
) -> "Guarded":
    """Return ``strategy`` behind the reply firewall.

    Args:
        strategy: any Message-API strategy that sends every client the same arrays, and whose
            clients answer with those. Ours have this firewall already.
        firewall: what is refused; None: the defaults of ``Firewall``.
        min_fit_replies: good replies that a round needs, >= 1; with fewer the model stays.

    Raises:
        ConfigError: where a value is out of range, or the strategy is of ours, or one of Flower's
            XGBoost ones.

    Example:
        >>> from flwr.serverapp.strategy import FedAdam
        >>> guard(FedAdam(eta=0.1), min_fit_replies=2)
        guard(FedAdam)
    """
    return Guarded(strategy, firewall or Firewall(), min_fit_replies)


class Guarded(Strategy):
    """A strategy behind the reply firewall; made by ``guard``."""

    def __init__(self, strategy: Strategy, firewall: Firewall, min_fit_replies: int) -> None:
        if not isinstance(strategy, Strategy):
            raise ConfigError(
                f"guard({type(strategy).__name__}): a strategy of flwr.serverapp is needed"
            )
        if isinstance(strategy, RuleStrategy):
            raise ConfigError(
                f"guard({type(strategy).__name__}): it has this firewall already: give it "
                "firewall= and min_fit_replies="
            )
        if isinstance(strategy, UNLIKE):
            raise ConfigError(
                f"guard({type(strategy).__name__}): its clients answer with trees that were not "
                "sent, which the firewall would refuse"
            )
        if min_fit_replies < 1:
            raise ConfigError(f"min_fit_replies = {min_fit_replies}: must be at least 1")
        nested = self._strategies = list(_nested(strategy))
        self.strategy = strategy
        self.firewall = replace(
            firewall, required_metrics=(*firewall.required_metrics, *_needed(nested))
        )
        self.min_fit_replies = min_fit_replies
        keys = [one.weighted_by_key for one in nested if isinstance(one, FedAvg)]
        self.weighted_by_key = keys[0] if keys else NUM_EXAMPLES
        self._begin(3600.0)

    def __repr__(self) -> str:
        return f"guard({type(self.strategy).__name__})"

    def _begin(self, timeout_s: float) -> None:
        self._timeout = timeout_s
        self._round = RoundInProgress()
        self._initial: NamedArrays = {}
        self._sent: NamedArrays = {}
        self._reports: list[RoundReport] = []

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> RunResult:
        """Run Flower's loop; the result also says what each round refused.

        Raises:
            MetabloomError: where too few nodes connect within ``timeout`` seconds.
        """
        self._begin(timeout)
        result = super().start(
            grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn
        )
        result.arrays = result.arrays or initial_arrays
        return RunResult(**vars(result), rounds=list(self._reports))

    def summary(self) -> None:
        """Log the firewall and the strategy's own summary."""
        log(INFO, "\t├──> Firewall: %s", self.firewall)
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the strategy's train messages."""
        self._round = RoundInProgress(server_round)
        patient = PatientGrid(grid, self._timeout)
        messages = list(self.strategy.configure_train(server_round, arrays, config, patient))
        self._sent = from_record(_array_record(messages, arrays))
        self._initial = self._initial or self._sent
        self._round.messages = messages
        self._round.bytes_down = self._round.bytes_to_train = len(messages) * size_of(arrays)
        self._round.clients = tuple(f"node-{one.metadata.dst_node_id}" for one in messages)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the strategy's next model of the good replies; (None, None) with too few."""
        if not self._round.clients:
            return self.strategy.aggregate_train(server_round, replies)
        good = self._usual(self._good(replies, self._sent), "train_metrics_aggr_fn")
        if len(good) < self.min_fit_replies:
            return self._round.skip(f"{len(good)} good replies, {self.min_fit_replies} are needed")
        contents = [message.content for message in good]
        answers = [
            _with(message, self._as_sent(content))
            for message, content in zip(good, in_common(contents), strict=True)
        ]
        before = [(one, dict(vars(one))) for one in self._strategies]
        arrays, metrics, fault = self._aggregated(server_round, answers)
        if arrays is None or fault:
            for one, attributes in before:  # what it computed from these replies is not kept
                vars(one).clear()
                vars(one).update(attributes)
            return self._round.skip(fault or f"{self.strategy} gives no model")
        self._round.bytes_up = sum(
            size_of(_array_record([message], ArrayRecord())) for message in good
        )
        metrics = with_others(metrics, contents, self.weighted_by_key)
        self._round.train_metrics = numbers_of(metrics)
        return self._with_whole_numbers(arrays), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the strategy's evaluate messages."""
        patient = PatientGrid(grid, self._timeout)
        messages = list(self.strategy.configure_evaluate(server_round, arrays, config, patient))
        self._round.messages = messages
        return messages

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Close the round; return the strategy's metrics of the good replies, None without any."""
        metrics = self._evaluated(server_round, replies)
        self._reports.append(self._round.report())
        return metrics

    def _evaluated(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        finite = [_with(one, self._finite(one)) for one in self._good(replies, None)]
        good = self._usual(finite, "evaluate_metrics_aggr_fn")
        if not good:
            return None
        contents = [message.content for message in good]
        answers = [_with(m, c) for m, c in zip(good, in_common(contents), strict=True)]
        try:
            metrics = self.strategy.aggregate_evaluate(server_round, answers)
        except Exception:  # a function of the user's, and a number that it cannot do with
            log(ERROR, "%r fails in round %d", self, server_round, exc_info=True)
            metrics = None
        return with_others(metrics, contents, self.weighted_by_key)

    def _aggregated(
        self, server_round: int, answers: list[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None, str]:
        """Return the strategy's model and metrics, or what is wrong with them."""
        try:
            with np.errstate(all="ignore"):
                arrays, metrics = self.strategy.aggregate_train(server_round, answers)
        except Exception as err:  # too few replies for it, or values that it cannot do with
            log(ERROR, "%r fails in round %d", self, server_round, exc_info=True)
            return None, None, f"{type(self.strategy).__name__}: {type(err).__name__}: {err}"
        wild = not_finite(from_record(arrays)) if arrays else ""
        return arrays, metrics, f"the aggregated array {wild!r} {DIVERGED}" if wild else ""

    def _good(self, replies: Iterable[Message], sent: NamedArrays | None) -> list[Message]:
        """Return the good replies as they came; note the others and the missing."""
        messages, self._round.messages = self._round.messages, []
        exchange = sort_replies(
            messages,
            replies,
            sent=sent,
            firewall=self.firewall,
            weight_key=self.weighted_by_key,
            timeout_s=self._timeout,
            initial=self._initial,
        )
        self._round.note(exchange, "node-{}".format)
        return [one.message for _, one in exchange.good]

    def _usual(self, messages: list[Message], function: str) -> list[Message]:
        """Return the replies that a function of the user's can do with: those with usual metrics.

        Flower's own mean can do with all.
        """
        own = [getattr(one, function, aggregate_metricrecords) for one in self._strategies]
        if not messages or all(one is aggregate_metricrecords for one in own):
            return messages
        usual = {id(one) for one in usual_ones([message.content for message in messages])}
        unlike = [message for message in messages if id(message.content) not in usual]
        for message in unlike:
            reason = "its metrics are not those of most replies, on which the strategy counts"
            self._round.quarantined.append((f"node-{message.metadata.src_node_id}", reason))
        return [message for message in messages if id(message.content) in usual]

    def _finite(self, message: Message) -> RecordDict:
        metrics, wild = finite_metrics(message.content)
        if wild:
            node = f"node-{message.metadata.src_node_id}"
            self._round.quarantined.append((node, diverged(wild)))
        return with_metrics(message.content, metrics) if wild else message.content

    def _as_sent(self, content: RecordDict) -> RecordDict:
        """Return a reply with its arrays in the order in which they were sent, and clipped.

        Some of Flower's strategies go by their positions.
        """
        ((name, record),) = content.array_records.items()
        if list(record) != list(self._sent):
            record = ArrayRecord({one: record[one] for one in self._sent})
        bound = self.firewall.max_update_norm
        if bound is not None and self.firewall.norm_action == "clip":
            record = to_record(clipped(from_record(record), self._sent, bound))
        return RecordDict({**content, name: record})

    def _with_whole_numbers(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return counters as the whole numbers that they were: Flower's mean makes floats of them.

        Clients whose counters are whole would be refused in the next round.
        """
        whole = {
            name: self._whole(name, value)
            for name, value in from_record(arrays).items()
            if value.dtype.kind == "f"
            and name in self._initial
            and self._initial[name].dtype.kind in "biu"
        }
        return ArrayRecord({**arrays, **to_record(whole)}) if whole else arrays

    def _whole(self, name: str, value: np.ndarray) -> np.ndarray:
        rounded = np.rint(value)
        if np.abs(rounded).max(initial=0.0) > LARGEST_COUNTER:
            rounded = self._sent[name]  # no count of anything: what was sent stays
        return np.asarray(rounded, dtype=self._initial[name].dtype)


def _nested(strategy: Strategy) -> Iterable[Strategy]:
    """Return a strategy, and those that it wraps."""
    yield strategy
    for value in list(vars(strategy).values()):
        if isinstance(value, Strategy):
            yield from _nested(value)


def _needed(strategies: Iterable[Strategy]) -> list[str]:
    """Return the metrics without which one of Flower's own strategies raises."""
    losses = [one.train_loss_key for one in strategies if isinstance(one, QFedAvg)]
    adaptive = (one for one in strategies if isinstance(one, AdaptiveClippingAtClients))
    return [*losses, *(KEY_NORM_BIT for _ in adaptive)]


def _array_record(messages: Sequence[Message], usual: ArrayRecord) -> ArrayRecord:
    """Return the one ArrayRecord that was sent, which a strategy may have changed."""
    records = list(messages[0].content.array_records.values()) if messages else []
    return records[0] if len(records) == 1 else usual


def _with(message: Message, content: RecordDict) -> Message:
    """Return a copy with ``content``; a strategy that writes into it leaves the reply alone."""
    copied = copy.copy(message)
    copied.content = RecordDict({name: record.copy() for name, record in content.items()})
    return copied
