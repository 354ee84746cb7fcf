"""The shared Flower shell: roll call, seeded sampling, a pure rule, evaluation by role.

``RuleStrategy`` is a Flower FedAvg: it takes FedAvg's keyword arguments, runs under Flower's own
``Strategy.start`` loop and touches nothing but the Grid, so the same object works in the simulator,
under ``flwr run`` and on a SuperLink.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from logging import INFO, WARNING
from typing import Any

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from ..errors import ConfigError, MetabloomError
from ..streams import numpy_stream
from ..wire import SERVER_ROUND, from_record, to_record
from .reports import ClientScore, RoundReport, RunResult
from .roll_call import Node, Roster
from .rules import Reply, Rule, State


@dataclass
class _Round:
    """What is known of the round in progress."""

    number: int = 0
    sent: dict[str, Any] = field(default_factory=dict)
    started: float = 0.0
    clients: tuple[str, ...] = ()
    messages: list[Message] = field(default_factory=list)
    recipients: dict[str, int] = field(default_factory=dict)  # message id -> node
    failures: list[tuple[str, str]] = field(default_factory=list)
    train_metrics: dict[str, float] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0


class RuleStrategy(FedAvg):
    """A Flower strategy made of a pure rule and the shared shell.

    Args:
        rule: how replies become the next global model.
        seed: of node sampling, which also depends on the round; of nodes that answer the roll call
            it depends on partitions, never on ids or their order.
        clients_per_round: training clients of a round; None: ``fraction_train`` and
            ``min_train_nodes`` decide.
        eval_every: validate every so many rounds; 0: never. The unseen clients are evaluated once,
            after the last round.
        on_round: called with a RoundReport after each round (a progress bar).
        fedavg: any keyword argument of Flower's FedAvg.

    Raises:
        ConfigError: where a value is out of range, naming it.
    """

    scores_training_clients = False  # after the last round: strategies with personal models

    def __init__(
        self,
        rule: Rule,
        *,
        seed: int = 0,
        clients_per_round: int | None = None,
        eval_every: int = 1,
        on_round: Callable[[RoundReport], None] | None = None,
        **fedavg: Any,
    ) -> None:
        if clients_per_round is not None and clients_per_round < 1:
            raise ConfigError(f"clients_per_round = {clients_per_round}: must be at least 1")
        if eval_every < 0:
            raise ConfigError(f"eval_every = {eval_every}: must be at least 0 (0: never)")
        super().__init__(**fedavg)
        self.rule = rule
        self.seed = seed
        self.clients_per_round = clients_per_round
        self.eval_every = eval_every
        self.on_round = on_round
        self._reset()

    def _reset(self) -> None:
        self._state: State | None = None
        self._roster = Roster()
        self._timeout = 3600.0
        self._round = _Round()
        self._reports: list[RoundReport] = []

    # -- the run -----------------------------------------------------------------------------------

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
        """Run Flower's loop for ``num_rounds``, then evaluate the unseen clients.

        Arguments as in Flower.

        Raises:
            MetabloomError: where too few nodes connect, or no client answered in any round (with
                the first reason).
        """
        self._reset()
        self._timeout = timeout
        result = super().start(
            grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn
        )
        if num_rounds and self.fraction_train and not result.arrays:
            failures = [one for report in self._reports for one in report.failures]
            client, reason = failures[0] if failures else ("nobody", "nothing")
            raise MetabloomError(f"no client answered in any round; {client} said: {reason}")
        arrays = result.arrays or initial_arrays
        config = evaluate_config or ConfigRecord()
        self._round = _Round(number=num_rounds)
        unseen = self._final_scores(grid, arrays, config, "unseen")
        trained = self.scores_training_clients
        return RunResult(
            **{**vars(result), "arrays": arrays},
            rounds=list(self._reports),
            unseen=unseen,
            trained=self._final_scores(grid, arrays, config, "train") if trained else [],
            final_failures=tuple(self._round.failures),
            clients=self._roster.counts(),
            dropped=self._roster.dropped,
        )

    def summary(self) -> None:
        """Log FedAvg's summary and what the shell adds to it."""
        log(INFO, "\t├──> Clients per round: %s", self.clients_per_round or "by fraction_train")
        log(INFO, "\t├──> Validation: every %s rounds", self.eval_every)
        super().summary()

    # -- training ----------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return train messages to the round's sample of the training nodes."""
        self._round = _Round(
            number=server_round, sent=from_record(arrays), started=time.perf_counter()
        )
        if self.fraction_train == 0.0:
            return []
        self._gather(grid)
        candidates = self._roster.with_role("train")
        if not candidates:
            why = self._roster.first_fault() or "no node has the role 'train'"
            raise MetabloomError(f"round {server_round}: nobody can train; {why}")
        size = self.clients_per_round or max(
            int(len(candidates) * self.fraction_train), self.min_train_nodes
        )
        chosen = self._sample(candidates, size, "sample", server_round)
        self._round.clients = tuple(node.name for node in chosen)
        return self._messages(arrays, config, chosen, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the next model and the metrics, or (None, None) where no client answered."""
        good = self._good(replies, is_train=True)
        if not good:
            log(WARNING, "round %d: no client answered, the model stays as it is", server_round)
            return None, None
        contents = [message.content for message in good]
        answers = [self._answer(content) for content in contents]
        self._round.bytes_up += sum(_size(r) for c in contents for r in c.array_records.values())
        sent = self._round.sent
        state = self.rule.init(sent) if self._state is None else self._state
        self._state, new = self.rule.update(state, sent, answers)
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        self._round.train_metrics = _numbers(metrics)
        return to_record(new), metrics

    # -- evaluation --------------------------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return evaluate messages to the validation nodes; without roles, to FedAvg's sample."""
        if self.fraction_evaluate == 0.0 or not self.eval_every or server_round % self.eval_every:
            return []
        self._gather(grid)
        if self._roster.has_roles:
            chosen = self._roster.with_role("validation")
        else:
            nodes = self._roster.with_role("train")
            size = max(int(len(nodes) * self.fraction_evaluate), self.min_evaluate_nodes)
            chosen = self._sample(nodes, size, "evaluate", server_round)
        return self._messages(arrays, config, chosen, MessageType.EVALUATE)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Close the round and return the aggregated metrics; None where no client was asked."""
        good = self._good(replies, is_train=False)
        scores = tuple(self._score(message) for message in good)
        metrics = None
        if good:
            contents = [message.content for message in good]
            metrics = self.evaluate_metrics_aggr_fn(contents, self.weighted_by_key)
        report = self._close_round(scores)
        self._reports.append(report)
        if self.on_round:
            self.on_round(report)
        return metrics

    def _final_scores(
        self, grid: Grid, arrays: ArrayRecord, config: ConfigRecord, role: str
    ) -> list[ClientScore]:
        nodes = [node for node in self._roster.with_role(role) if node.role]
        messages = self._messages(arrays, config, nodes, MessageType.EVALUATE)
        replies = grid.send_and_receive(messages, timeout=self._timeout) if messages else []
        return [self._score(message) for message in self._good(replies, is_train=False)]

    # -- nodes -------------------------------------------------------------------------------------

    def _gather(self, grid: Grid) -> None:
        self._roster.gather(grid, min_nodes=self.min_available_nodes, timeout_s=self._timeout)
        for name, reason in self._roster.new_faults():
            log(WARNING, "%s cannot take part: %s", name, reason)
            self._round.failures.append((name, reason))

    def _sample(self, nodes: list[Node], size: int, purpose: str, server_round: int) -> list[Node]:
        if size > len(nodes):
            log(WARNING, "%d clients wanted, %d there are: all of them take part", size, len(nodes))
        picks = numpy_stream(self.seed, purpose, server_round).choice(
            len(nodes), size=min(size, len(nodes)), replace=False
        )
        return [nodes[pick] for pick in sorted(picks)]

    # -- messages ----------------------------------------------------------------------------------

    def _messages(
        self, arrays: ArrayRecord, config: ConfigRecord, nodes: list[Node], kind: str
    ) -> list[Message]:
        record = RecordDict(
            {
                self.arrayrecord_key: arrays,
                self.configrecord_key: ConfigRecord({**config, SERVER_ROUND: self._round.number}),
            }
        )
        self._round.bytes_down += _size(arrays) * len(nodes)
        ids = [node.node_id for node in nodes]
        self._round.messages = list(self._construct_messages(record, ids, kind))
        return list(self._round.messages)

    def _good(self, replies: Iterable[Message], *, is_train: bool) -> list[Message]:
        """Return the usable replies, by partition; note the others and the missing."""
        received = list(replies)
        # Grids give messages their ids when they send them.
        sent, self._round.messages = self._round.messages, []
        self._round.recipients = {m.metadata.message_id: m.metadata.dst_node_id for m in sent}
        good, bad = self._check_and_log_replies(received, is_train=is_train)
        reasons = [(message, message.error.reason or "no reason given") for message in bad]
        if is_train:
            reasons += [(message, self._weight_fault(message)) for message in good]
        faults = [(message, reason) for message, reason in reasons if reason]
        self._round.failures += [(self._node(message).name, reason) for message, reason in faults]
        answered = {self._node(message).node_id for message in received}
        for node_id in self._round.recipients.values():
            if node_id not in answered:
                missing = f"no reply within {self._timeout:g} s"
                self._round.failures.append((self._roster.get(node_id).name, missing))
        left_out = {id(message) for message, _ in faults}
        usable = [message for message in good if id(message) not in left_out]
        return sorted(usable, key=lambda message: self._node(message).order)

    def _weight_fault(self, message: Message) -> str:
        (metrics,) = message.content.metric_records.values()
        value = metrics[self.weighted_by_key]
        if isinstance(value, int | float) and 0 < value < math.inf:
            return ""
        return f"{self.weighted_by_key} is {value!r}: a finite number above 0 is needed"

    def _node(self, message: Message) -> Node:
        """Return the node that a reply is of; the SuperLink answers for a node that was lost."""
        metadata = message.metadata
        known = self._round.recipients.get(metadata.reply_to_message_id, metadata.src_node_id)
        return self._roster.get(known)

    def _answer(self, content: RecordDict) -> Reply:
        (arrays,) = content.array_records.values()
        (metrics,) = content.metric_records.values()
        return Reply(from_record(arrays), float(metrics[self.weighted_by_key]))  # type: ignore[arg-type]  # checked: no list

    def _score(self, message: Message) -> ClientScore:
        node = self._node(message)
        (metrics,) = message.content.metric_records.values()
        numbers = _numbers(metrics)
        count = numbers.pop(self.weighted_by_key, 0.0)
        return ClientScore(node.name, node.partition_id, node.role or "train", count, numbers)

    def _close_round(self, scores: tuple[ClientScore, ...]) -> RoundReport:
        now = self._round
        return RoundReport(
            round=now.number,
            clients=now.clients,
            failures=tuple(now.failures),
            train_metrics=now.train_metrics,
            validation=scores,
            bytes_down=now.bytes_down,
            bytes_up=now.bytes_up,
            seconds=time.perf_counter() - now.started,
        )


def _size(record: ArrayRecord) -> int:
    return sum(len(array.data) for array in record.values())


def _numbers(metrics: MetricRecord) -> dict[str, float]:
    return {name: float(v) for name, v in metrics.items() if not isinstance(v, list)}
