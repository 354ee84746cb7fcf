"""What each node sees of the server's arrays, and how its reply is read: by its architecture.

Without architectures all nodes see the same: all arrays in training, or those that the rule says;
the whole models in evaluation.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from logging import INFO
from typing import TypeVar

from flwr.app import ArrayRecord, Message
from flwr.common import log

from ...architectures import SEPARATOR, full_name, names_of, part_of
from ...errors import ConfigError
from ...wire import NamedArrays
from ..by_architecture import by_architecture
from ..rules import Arrays, Reply, Rule
from .answers import answer_of
from .exchange import Exchange, merged
from .firewall import Firewall, Judged, Sent
from .partial_sums import Part, answers_of
from .roll_call import Node, Roster

Value = TypeVar("Value")
Sort = Callable[[Sequence[Message], Iterable[Message], Sent], Exchange]


@dataclass(frozen=True)
class Kinds:
    """The architectures of a federation.

    Attributes:
        names: of each; empty: there is one, which has no name.
        exchanged: prefix of the arrays that training is about, see ``Rule``; empty: the models.
        trains: which of the models' arrays training is about, see ``Rule``; None: all.
        beside: what travels beside a model in training, see ``Rule``; None: nothing.
    """

    names: tuple[str, ...] = ()
    exchanged: str = ""
    trains: Callable[[str], bool] | None = None
    beside: Callable[[NamedArrays], Arrays] | None = None

    @classmethod
    def of(cls, names: Sequence[str], rule: Rule) -> "Kinds":
        """Return the architectures ``names`` under ``rule``, before anything is put around it."""
        return cls(tuple(names), rule.exchanged, rule.trains, rule.beside)

    def rule_for_each(self, rule: Rule, *, is_user_private: bool) -> Rule:
        """Return ``rule`` for every architecture by itself.

        Raises:
            ConfigError: with user-level privacy, whose noise is that of one sum over all clients.
        """
        if not self.names:
            return rule
        if is_user_private:
            raise ConfigError(
                f"user_privacy with architectures {', '.join(self.names)}: its noise is made for "
                "one sum over all clients, and each architecture has a sum of its own; use one of "
                "the two"
            )
        sees_all = rule.sees_all_architectures or rule.exchanged
        return rule if sees_all else by_architecture(rule, self.names)

    def with_beside(self, models: NamedArrays) -> NamedArrays:
        """Return the arrays of a run: initial models, and what travels beside each."""
        if self.beside is None:
            return models
        arrays: Arrays = {}
        for kind in self.names or ("",):
            own = part_of(models, kind)
            both = {**own, **self.beside(own)}
            arrays |= {full_name(kind, name): value for name, value in both.items()}
        return arrays

    def models(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return the models alone, without what travels beside them."""
        if self.beside is None:
            return arrays
        within = 1 if self.names else 0  # separators in the full name of a model's array
        return ArrayRecord({n: one for n, one in arrays.items() if n.count(SEPARATOR) == within})

    def trained(self, arrays: Mapping[str, Value]) -> Mapping[str, Value]:
        """Return the arrays that training is about."""
        trains = self.trains
        return {n: one for n, one in arrays.items() if trains(n)} if trains else arrays

    def seen(
        self, arrays: ArrayRecord, nodes: Sequence[Node], *, is_training: bool
    ) -> Iterator[tuple[ArrayRecord, list[int]]]:
        """Yield the arrays that the nodes of an architecture are sent, and the ids of the nodes."""
        everyone = [node.node_id for node in nodes]
        if not is_training:
            arrays = self.models(arrays)
        elif self.trains:
            arrays = ArrayRecord(dict(self.trained(arrays)))
        if self.exchanged:
            said = names_of(arrays, self.exchanged)
            if is_training:
                yield ArrayRecord({short: arrays[name] for name, short in said.items()}), everyone
                return
            arrays = ArrayRecord({name: arrays[name] for name in arrays if name not in said})
        if not self.names:
            yield arrays, everyone
            return
        for kind in dict.fromkeys(node.architecture for node in nodes):
            own = {short: arrays[name] for name, short in names_of(arrays, kind).items()}
            yield ArrayRecord(own), [one.node_id for one in nodes if one.architecture == kind]

    def exchange(
        self,
        messages: Sequence[Message],
        replies: Iterable[Message],
        sent: NamedArrays | None,
        roster: Roster,
        sort: Sort,
    ) -> Exchange:
        """Return what became of ``messages``, each judged among those of its architecture.

        Args:
            messages: that were sent.
            replies: to them, in any order.
            sent: the arrays of all architectures that training is about; None for an evaluation.
            roster: knows the nodes.
            sort: what becomes of the messages of one architecture, of its replies and arrays.
        """
        if self.exchanged and sent is not None:
            return sort(messages, replies, part_of(sent, self.exchanged))
        if not self.names or sent is None:
            return sort(messages, replies, sent)
        asked: dict[str, list[Message]] = defaultdict(list)
        kinds: dict[str, str] = {}  # by message
        for message in messages:
            kind = roster.get(message.metadata.dst_node_id).architecture
            kinds[message.metadata.message_id] = kind
            asked[kind].append(message)
        answered: dict[str, list[Message]] = defaultdict(list)
        anyone = next(iter(asked), "")  # is told of a reply that nobody asked for
        for reply in replies:
            to = reply.metadata.reply_to_message_id if isinstance(reply, Message) else ""
            answered[kinds.get(to, anyone)].append(reply)
        return merged(sort(own, answered[kind], part_of(sent, kind)) for kind, own in asked.items())

    def answers(
        self,
        found: Sequence[tuple[Node, Judged]],
        parts: Sequence[Part],
        sent: NamedArrays,
        firewall: Firewall,
        weight_key: str,
    ) -> list[Reply]:
        """Return what the rule sees of good replies, their arrays under their full names."""
        if self.exchanged or not self.names:
            said = part_of(sent, self.exchanged)
            return answers_of([one for _, one in found], parts, said, firewall, weight_key)
        received = {name: part_of(sent, name) for name in self.names}
        answers = []
        for node, judged in found:
            kind = node.architecture
            answer = answer_of(judged, received[kind], firewall, weight_key)
            arrays = {full_name(kind, name): value for name, value in answer.arrays.items()}
            answers.append(replace(answer, arrays=arrays))
        return answers

    def tell_of_absent(self, found: Sequence[tuple[Node, Judged]], server_round: int) -> None:
        """Log the architectures of which nobody answered: their models stay as they are."""
        if self.exchanged or self.trains:  # what others train may be theirs too
            return
        there = {node.architecture for node, _ in found}
        for name in self.names:
            if name not in there:
                log(INFO, "round %d: architecture %s: no reply, it stays", server_round, name)
