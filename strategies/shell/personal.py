"""A model of its own for each node: what it is sent, and how its reply is judged and named."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import ArrayRecord, Message

from ...architectures import full_name, part_of
from ...wire import NamedArrays, from_record, to_record
from ..rules import Reply
from .answers import answer_of
from .exchange import Exchange
from .firewall import Firewall, Judged, Sent, SentEach
from .kinds import Kinds, Sort
from .partial_sums import Part
from .reply_metrics import records_of
from .roll_call import Node, Roster


@dataclass(frozen=True)
class PersonalModels(Kinds):
    """The architectures of a federation, in which each node has a model of its own.

    A reply is judged against what its node was sent, and the rule is told whose it is.

    Attributes:
        model_of: ``model_of(arrays, node, is_training)``: what ``node`` is sent in the place of the
            arrays of its architecture.
    """

    model_of: Callable[[NamedArrays, Node, bool], NamedArrays] = field(kw_only=True)

    def seen(
        self, arrays: ArrayRecord, nodes: Sequence[Node], *, is_training: bool
    ) -> Iterator[tuple[ArrayRecord, list[int]]]:
        """Yield the arrays that each node is sent, and its id; see ``Kinds``."""
        held = from_record(arrays)
        for node in nodes:
            own = self.model_of(part_of(held, self._kind_of(node)), node, is_training)
            yield to_record(own), [node.node_id]

    def exchange(
        self,
        messages: Sequence[Message],
        replies: Iterable[Message],
        sent: NamedArrays | None,
        roster: Roster,
        sort: Sort,
    ) -> Exchange:
        """Return what became of ``messages``; see ``Kinds``."""
        each = SentEach(
            {
                one.metadata.message_id: from_record(records_of(one.content, ArrayRecord)[0])
                for one in messages
            }
        )

        def sorted_each(own: Sequence[Message], some: Iterable[Message], seen: Sent) -> Exchange:
            return sort(own, some, None if seen is None else each)

        return super().exchange(messages, replies, sent, roster, sorted_each)

    def answers(
        self,
        found: Sequence[tuple[Node, Judged]],
        parts: Sequence[Part],
        sent: NamedArrays,
        firewall: Firewall,
        weight_key: str,
    ) -> list[Reply]:
        """Return what the rule sees of good replies, with the names of their clients."""
        del parts  # a rule with a model for each client has no use for means
        answers = []
        for node, judged in found:
            kind = self._kind_of(node)
            received = self.model_of(part_of(sent, kind), node, True)
            answer = answer_of(judged, received, firewall, weight_key)
            arrays = {full_name(kind, name): value for name, value in answer.arrays.items()}
            answers.append(replace(answer, arrays=arrays, client=node.name))
        return answers

    def _kind_of(self, node: Node) -> str:
        return node.architecture if self.names else ""
