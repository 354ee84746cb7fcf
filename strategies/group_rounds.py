"""Rounds of several exchanges with groups of clients, where each group has a model of its own.

What FedMeta and Reptile over groups share. The cohort of a round is fixed: a member that drops out
between two exchanges, or sends what is refused, is named in the round's report and is out of the
rest of it; the shares of its group are those of the members that are left.

A new group adapts as a group: its members exchange models adapted on their support sets, and each
is scored by what the group came to. Validation and unseen clients that are in no group adapt alone,
as ever.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from logging import INFO, WARNING
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from ..architectures import part_of
from ..errors import ConfigError
from ..streams import numpy_stream
from ..wire import EXCHANGE, EXCHANGE_NUMBER, JOIN, METRICS, SCORE, NamedArrays, from_record
from .group_tasks import GroupKinds, Task
from .groups import gathered, group_of, groups_in, sampled
from .rules import Aggregation, Arrays, Rule, Weighting, check_weighting, mean
from .shell import RuleStrategy
from .shell.answers import answer_of, bytes_in, scores_of
from .shell.firewall import Judged, not_finite, without_heavy
from .shell.partial_sums import Part
from .shell.reply_metrics import DIVERGED
from .shell.reports import ClientScore
from .shell.roll_call import Node

Scores = tuple[tuple[ClientScore, ...], list[RecordDict]]
BEFORE, LOSS = "-before", "loss"  # in the metrics of an evaluation


class GroupStrategy(RuleStrategy):
    """Base of strategies over groups; see the module's text.

    Args:
        rule: of models that are weighed by the shares of their clients ("examples").
        weighting: of the members of a group: "uniform" (w_ij = 1 / K_i) or "examples".
        task_weight: of the groups: "uniform" (W_i = 1 / I) or "examples".
        groups: the group of each client by its name, or a JSON file that says it. Else a client is
            in the group that its node says at the roll call, or whose name its own begins with,
            before a slash; and else a group by itself.
        group_size: most members of a group in a round, drawn by chance; 0: all.
        eval_steps: ascending numbers of exchanges after which the members of a new group are
            scored; empty, or with user_privacy: clients adapt alone whatever their group.
        several: whether a round has several exchanges.
        aggregate: how models of a group become one: ``mean``, ``median()``, ...
        shell: see ``RuleStrategy``.

    Raises:
        ConfigError: where a value is out of range, the file cannot be read, or with user_privacy
            and several exchanges.
    """

    first_exchange = ""  # what the first messages of a round ask for

    def __init__(
        self,
        rule: Rule,
        *,
        weighting: Weighting = "uniform",
        task_weight: Weighting = "uniform",
        groups: str | Mapping[str, str] = "",
        group_size: int = 0,
        eval_steps: Sequence[int] = (),
        several: bool = False,
        aggregate: Aggregation = mean,
        **shell: Any,
    ) -> None:
        check_weighting(weighting)
        check_weighting(task_weight)
        if group_size < 0:
            raise ConfigError(f"group_size = {group_size}: must be at least 0")
        if list(eval_steps) != sorted({n for n in eval_steps if n >= 1}):
            raise ConfigError(
                f"eval_steps = {tuple(eval_steps)}: ascending counts of at least 1 are needed"
            )
        if several and shell.get("user_privacy") is not None:
            raise ConfigError(
                f"user_privacy with several exchanges of {type(self).__name__} in a round: the "
                "members of a group would be sent its model without noise; use one exchange"
            )
        super().__init__(rule, **{**shell, "partial_sums": False})
        own = {"weighting": weighting, "task_weight": task_weight}
        self._kinds = GroupKinds(**vars(self._kinds), **own)  # type: ignore[arg-type]  # its fields
        self._groups = (groups_in(groups) if groups else {}) if isinstance(groups, str) else groups
        self._aggregate = aggregate
        self._held: Scores | None = None
        self._are_unknown_told = False
        self.weighting = weighting
        self.task_weight = task_weight
        self.group_size = group_size
        self.eval_steps = () if shell.get("user_privacy") else tuple(eval_steps)

    # -- training ----------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the messages of the round's last exchange; those before it are over by then."""
        self._tasks.clear()
        first = asking(config, self.first_exchange)
        messages = list(super().configure_train(server_round, arrays, first, grid))
        nodes = [self._roster.get(one.metadata.dst_node_id) for one in messages]
        self._open(nodes, from_record(arrays))
        return self.further(grid, messages, config)

    def further(self, grid: Grid, messages: list[Message], config: ConfigRecord) -> list[Message]:
        """Return the messages of the last exchange of a round that began with ``messages``."""
        del grid, config
        return messages

    @property
    def _tasks(self) -> list[Task]:
        return self._kinds.tasks if isinstance(self._kinds, GroupKinds) else []

    def _group(self, node: Node) -> str:
        return group_of(node.name, node.group, self._groups)

    def _open(self, nodes: Sequence[Node], arrays: NamedArrays) -> None:
        """Begin exchanges with ``nodes``, all from the models in ``arrays``."""
        keys = [(self._group(node) or node.order, node.architecture) for node in nodes]
        self._tasks.clear()
        for (group, architecture), members in gathered(nodes, keys).items():
            name = group if isinstance(group, str) else members[0].name
            own = part_of(arrays, architecture)
            self._tasks.append(Task.of(name, architecture, members, own))

    def _ask(self, config: ConfigRecord, exchange: str, number: int = 0) -> list[Message]:
        """Return train messages of an exchange, with what each group is sent now."""
        nodes = [node for task in self._tasks for node in task.nodes]
        told = asking(config, exchange, number)
        return self._messages(ArrayRecord({}), told, nodes, MessageType.TRAIN) if nodes else []

    def _answered(self, grid: Grid, messages: Sequence[Message]) -> list[tuple[Task, Arrays]]:
        """Return each group with the mean of its members' replies, in the dtypes sent.

        Members that did not answer are out, and so is a group of which nobody did.
        """
        replies = list(grid.send_and_receive(messages, timeout=self._timeout)) if messages else []
        found = self._good(replies, self._arrays) if messages else []
        self._round.bytes_up += sum(bytes_in(one.message.content) for _, one in found)
        good = {node.node_id: one for node, one in found}
        means: list[tuple[Task, Arrays]] = []
        for task in list(self._tasks):
            task.nodes = [node for node in task.nodes if node.node_id in good]
            args = task.judged, self.firewall, self.weighted_by_key
            said = [answer_of(good[node.node_id], *args) for node in task.nodes]
            with np.errstate(over="ignore", invalid="ignore"):  # found by the result
                agreed = self._aggregate(task.judged, said, self.weighting) if said else {}
                own = {name: v.astype(task.judged[name].dtype) for name, v in agreed.items()}
            if wild := not_finite(own):
                log(WARNING, "group %s is left out: its array %r %s", task.name, wild, DIVERGED)
            elif not said:
                log(INFO, "group %s is left out: nobody of it answers", task.name)
            if said and not wild:
                means.append((task, own))
            else:
                self._tasks.remove(task)
        return means

    def _good(
        self, replies: Iterable[Message], sent: NamedArrays | None, parts: Sequence[Part] = ()
    ) -> list[tuple[Node, Judged]]:
        """Return the good replies; shares of the weight count within each group and over all."""
        found = super()._good(replies, sent, parts)
        if sent is None or not self._tasks:
            return found
        ones = [one for _, one in found]
        light, heavy = without_heavy(ones, self.firewall, self.weighted_by_key)
        node_of = {id(one.message): node for node, one in found}
        for one in heavy:
            self._round.refuse(node_of[id(one.message)].name, one.reason)
        return [(node_of[id(one.message)], one) for one in light]

    def _sample(self, candidates: list[Node], server_round: int) -> list[Node]:
        if self._account:  # chances and sizes that privacy counts on
            return super()._sample(candidates, server_round)
        self._tell_unknown(candidates)
        trusted = self._history.trusted(candidates, self.max_offences)
        usual = max(int(len(candidates) * self.fraction_train), self.min_train_nodes)
        size = self.clients_per_round or usual
        if size >= len(trusted) and not self.group_size:
            return self._sampler.sample(trusted, size, "sample", server_round)
        groups = list(gathered(trusted, [self._group(n) or n.order for n in trusted]).values())
        rng = numpy_stream(self.seed, "groups", server_round)
        chosen = sampled(groups, size, self.group_size, rng)
        return sorted(chosen, key=lambda node: node.order)

    def _tell_unknown(self, nodes: Sequence[Node]) -> None:
        unknown = [node.name for node in nodes if node.name not in self._groups]
        if self._groups and unknown and not self._are_unknown_told:
            self._are_unknown_told = True
            told = ", ".join(unknown[:5])
            log(WARNING, "groups name no group of %d clients: %s", len(unknown), told)

    # -- evaluation --------------------------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return evaluate messages; none where clients are scored as groups, which is then done."""
        self._tasks.clear()
        self._held, before = None, self._round.bytes_down
        messages = list(super().configure_evaluate(server_round, arrays, config, grid))
        nodes = [self._roster.get(one.metadata.dst_node_id) for one in messages]
        if not self._adapt_as_groups(nodes):
            return messages
        self._round.bytes_down = before
        self._held = self._scored(grid, nodes, arrays, config)
        return []

    def _scores(self, replies: Iterable[Message]) -> Scores:
        held, self._held = self._held, None
        return super()._scores(replies) if held is None else held

    def _final_scores(
        self, grid: Grid, arrays: ArrayRecord, config: ConfigRecord, role: str
    ) -> list[ClientScore]:
        nodes = [node for node in self._roster.with_role(role) if node.role and self.ending.scored]
        if not self._adapt_as_groups(nodes):
            return super()._final_scores(grid, arrays, config, role)
        return list(self._scored(grid, nodes, arrays, config)[0])

    def _adapt_as_groups(self, nodes: Sequence[Node]) -> bool:
        return bool(self.eval_steps) and any(self._group(node) for node in nodes)

    def _scored(
        self, grid: Grid, nodes: Sequence[Node], arrays: ArrayRecord, config: ConfigRecord
    ) -> Scores:
        """Return scores before, and after numbers of exchanges of each group, and their contents.

        A client that failed in any exchange has no score: its curve has a gap.
        """
        self._open(nodes, from_record(arrays))
        passes: list[dict[str, ClientScore]] = []  # by client
        for done in range(self.eval_steps[-1] + 1):
            if done:
                for task, point in self._answered(grid, self._ask(config, JOIN, done)):
                    task.move(point)
            if done in (0, *self.eval_steps):
                passes.append(self._score_now(grid, config, f"-after-{done}" if done else BEFORE))
        self._tasks.clear()
        scores = [
            replace(one, metrics=_with_loss({n: v for of in passes for n, v in _of(of, who)}))
            for who, one in passes[-1].items()
            if all(who in of for of in passes)
        ]
        key = self.weighted_by_key
        contents = [
            RecordDict({METRICS: MetricRecord({**one.metrics, key: one.num_examples})})
            for one in scores
        ]
        return tuple(scores), contents

    def _score_now(self, grid: Grid, config: ConfigRecord, suffix: str) -> dict[str, ClientScore]:
        """Return the scores of the groups' models by client, metrics named by ``suffix``."""
        nodes = [node for task in self._tasks for node in task.nodes]
        told = asking(config, SCORE)
        messages = self._messages(ArrayRecord({}), told, nodes, MessageType.EVALUATE)
        replies = grid.send_and_receive(messages, timeout=self._timeout) if messages else []
        scores, _, notes = scores_of(self._good(replies, None), self.weighted_by_key)
        self._round.quarantined += notes
        return {
            one.client: replace(
                one,
                metrics={
                    name.removesuffix(BEFORE) + suffix: value
                    for name, value in one.metrics.items()
                    if name.endswith(BEFORE)
                },
            )
            for one in scores
        }


def asking(config: ConfigRecord, exchange: str, number: int = 0) -> ConfigRecord:
    """Return a config that names an exchange; the first of a round that has no other has none."""
    named = {EXCHANGE: exchange} if exchange else {}
    numbered = {EXCHANGE_NUMBER: number} if number else {}
    return ConfigRecord({**config, **named, **numbered})


def _of(scores: Mapping[str, ClientScore], client: str) -> Iterable[tuple[str, float]]:
    return scores[client].metrics.items()


def _with_loss(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics with the last loss as what an evaluation is summed up by."""
    losses = [value for name, value in metrics.items() if name.startswith(f"{LOSS}-")]
    return {LOSS: losses[-1], **metrics} if losses else metrics
