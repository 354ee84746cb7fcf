"""The server's side of a teacher: each node is sent it once, beside the model.

A node has the teacher once it has given a good reply to a message that held it. A node that fails
afterwards may have lost what it made of the teacher: it is sent it again, and so is everyone after
a resume, which costs bytes and changes no result.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from ..keys import Scalar
from ..teacher import Teacher
from ..wire import (
    TEACHER,
    TEACHER_DIGEST,
    TEACHER_LR,
    TEACHER_PRIVATE,
    NamedArrays,
    size_of,
    to_record,
)
from .shell import RuleStrategy
from .shell.firewall import Judged
from .shell.partial_sums import Part
from .shell.roll_call import Node
from .shell.snapshot import Snapshot


class Teaching(RuleStrategy):
    """A strategy whose messages of one kind hold a teacher, where the node has none yet.

    Args:
        teacher: its weights are sent as they are.
        strategy: keyword arguments of the strategy that this one stands before.
    """

    teaches_in = MessageType.TRAIN  # or EVALUATE

    def __init__(self, *, teacher: Teacher, **strategy: Any) -> None:
        self._record = to_record(teacher.arrays)
        self._told: dict[str, Scalar] = {
            TEACHER_DIGEST: teacher.digest,
            TEACHER_PRIVATE: teacher.may_teach_private_clients,
        }
        if teacher.inner_lr is not None:
            self._told[TEACHER_LR] = teacher.inner_lr
        super().__init__(**strategy)
        self.teacher = teacher.digest  # a run that is resumed must have the same one
        if self.checkpoints and self.checkpoints.settings:  # which say in which file it was
            settings = {**self.checkpoints.settings, TEACHER_DIGEST: teacher.digest}
            self.checkpoints = replace(self.checkpoints, settings=settings)

    def _begin(self, kept: Snapshot | None, arrays: NamedArrays, timeout_s: float) -> None:
        super()._begin(kept, arrays, timeout_s)
        self._have_it: set[int] = set()

    def _messages(
        self, arrays: ArrayRecord, config: ConfigRecord, nodes: list[Node], kind: str
    ) -> list[Message]:
        if kind != self.teaches_in:
            return super()._messages(arrays, config, nodes, kind)
        told = ConfigRecord({**config, **self._told})
        messages = super()._messages(arrays, told, nodes, kind)
        for message in messages:
            if message.metadata.dst_node_id not in self._have_it:
                message.content = RecordDict({**message.content, TEACHER: self._record})
                self._round.bytes_down += size_of(self._record)
        return messages

    def _good(
        self, replies: Iterable[Message], sent: NamedArrays | None, parts: Sequence[Part] = ()
    ) -> list[tuple[Node, Judged]]:
        asked = {
            message.metadata.dst_node_id
            for message in self._round.messages
            if message.metadata.message_type == self.teaches_in
        }
        good = super()._good(replies, sent, parts)
        self._have_it -= asked
        self._have_it |= asked & {node.node_id for node, _ in good}
        return good
