"""Groups of clients in one exchange: what each is sent, and how the replies of each are read.

A group is the clients of one task, those of one architecture by themselves.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import ArrayRecord, Message

from ..architectures import full_name
from ..wire import DIRECTION, NamedArrays, to_record
from .groups import gathered, shares
from .rules import Reply, Weighting
from .shell.answers import answer_of
from .shell.exchange import Exchange, merged
from .shell.firewall import Firewall, Judged
from .shell.kinds import Kinds, Sort
from .shell.partial_sums import Part
from .shell.roll_call import Node, Roster


@dataclass
class Task:
    """One group in the exchange under way.

    Attributes:
        name: of the group, or of its only member.
        architecture: of its members' model; "" where all have one.
        nodes: the members that are still in the round.
        points: the models of the group so far, by the model's own names; the first is the server's.
        sent: what its members are sent.
        judged: what their replies are held against.
        as_model: what the rule sees of the arrays of a reply: a model beside the server's.
    """

    name: str
    architecture: str
    nodes: list[Node]
    points: list[NamedArrays]
    sent: NamedArrays
    judged: NamedArrays
    as_model: Callable[[NamedArrays], NamedArrays]

    @classmethod
    def of(cls, name: str, architecture: str, nodes: list[Node], point: NamedArrays) -> "Task":
        """Return a group whose members are sent ``point``, and answer with models."""
        return cls(name, architecture, nodes, [point], point, point, lambda said: said)

    def move(self, point: NamedArrays) -> None:
        """Go on from another model, which the members are sent next."""
        self.points.append(point)
        self.sent = self.judged = point

    def aim(self, point: NamedArrays, direction: NamedArrays) -> None:
        """Send ``direction`` beside ``point``; replies are directions."""
        beside = {full_name(DIRECTION, name): value for name, value in direction.items()}
        self.sent, self.judged = {**point, **beside}, direction


@dataclass(frozen=True)
class GroupKinds(Kinds):
    """What each node sees, and how its reply is read: by its group while ``tasks`` holds any.

    Attributes:
        tasks: of the exchange under way.
        weighting: of the members of a group.
        task_weight: of the groups.
    """

    tasks: list[Task] = field(default_factory=list)
    weighting: Weighting = "uniform"
    task_weight: Weighting = "uniform"

    def seen(
        self, arrays: ArrayRecord, nodes: Sequence[Node], *, is_training: bool
    ) -> Iterator[tuple[ArrayRecord, list[int]]]:
        """Yield what the nodes of a group are sent, and the ids of the nodes."""
        if not self.tasks:
            yield from super().seen(arrays, nodes, is_training=is_training)
            return
        for task in self.tasks:
            yield to_record(task.sent), [node.node_id for node in task.nodes]

    def exchange(
        self,
        messages: Sequence[Message],
        replies: Iterable[Message],
        sent: NamedArrays | None,
        roster: Roster,
        sort: Sort,
    ) -> Exchange:
        """Return what became of ``messages``, each judged by what its group was sent."""
        if sent is None or not self.tasks:
            return super().exchange(messages, replies, sent, roster, sort)
        place_of = {n.node_id: i for i, task in enumerate(self.tasks) for n in task.nodes}
        places = [place_of[one.metadata.dst_node_id] for one in messages]
        by_id = {m.metadata.message_id: i for m, i in zip(messages, places, strict=True)}
        asked = gathered(messages, places)
        anyone = next(iter(asked), 0)  # is told of a reply that nobody asked for
        answered: dict[int, list[Message]] = {}
        for reply in replies:
            to = reply.metadata.reply_to_message_id if isinstance(reply, Message) else ""
            answered.setdefault(by_id.get(to, anyone), []).append(reply)
        return merged(
            sort(own, answered.get(i, []), self.tasks[i].judged) for i, own in asked.items()
        )

    def answers(
        self,
        found: Sequence[tuple[Node, Judged]],
        parts: Sequence[Part],
        sent: NamedArrays,
        firewall: Firewall,
        weight_key: str,
    ) -> list[Reply]:
        """Return what the rule sees of good replies: models with the shares W_i w_ij as weights.

        They are shares among the clients of one architecture, which the rule sees by itself.
        """
        if not self.tasks:
            return super().answers(found, parts, sent, firewall, weight_key)
        place_of = {n.node_id: i for i, task in enumerate(self.tasks) for n in task.nodes}
        answers: list[Reply] = []
        for node, judged in found:
            task = self.tasks[place_of[node.node_id]]
            said = answer_of(judged, task.judged, firewall, weight_key)
            named = task.as_model(said.arrays).items()
            arrays = {full_name(task.architecture, name): value for name, value in named}
            answers.append(replace(said, arrays=arrays))
        places = [place_of[node.node_id] for node, _ in found]
        weights = [0.0] * len(answers)
        for kind in dict.fromkeys(task.architecture for task in self.tasks):
            rows = [row for row, i in enumerate(places) if self.tasks[i].architecture == kind]
            groups = list(gathered(rows, [places[row] for row in rows]).values())
            members = [[answers[row] for row in group] for group in groups]
            how = {"weighting": self.weighting, "task_weight": self.task_weight}
            for group, own in zip(groups, shares(members, **how) if groups else [], strict=True):
                for row, share in zip(group, own.tolist(), strict=True):
                    weights[row] = share
        return [replace(one, num_examples=w) for one, w in zip(answers, weights, strict=True)]
