"""Which messages wait for what: the queue of each node, what it keeps, and the answers."""

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flwr.app import Context, Error, Message, UserConfig
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE

from ...wire import NUM_PARTITIONS, PARTITION_ID
from .questions import Answer, Block, Delivery, Question, cut
from .replies import Reduced
from .states import States

UNKNOWN = "there is no such message, its reply was pulled before, or its time to live is over"
GIVEN_UP = Answer(code=ErrorCode.MESSAGE_UNAVAILABLE, reason=UNKNOWN)


@dataclass
class _Pending:
    """A message whose reply was not pulled yet."""

    message: Message
    number: int
    reduced: Reduced | None
    answer: Answer | None = None


class Mailbox:
    """Hold messages from when they are pushed until their replies are pulled.

    A message to a node that is still at another one waits for it. All methods are to be called
    under ``lock``, but ``take``.

    Args:
        partitions: the partition of each node, by its id.
        run_config: of all nodes.
        lock: notified when answers have come.

    Attributes:
        run_id: Flower's.
        partitions: as given.
    """

    def __init__(
        self, partitions: Mapping[int, int], run_config: UserConfig, lock: threading.Condition
    ) -> None:
        self.run_id = 0
        self.partitions, self._run_config = partitions, run_config
        self._lock = lock
        self._numbers = itertools.count(1)
        self._pending: dict[str, _Pending] = {}
        self._queues: dict[int, deque[str]] = {}  # by node: the first message is being answered
        self._states = States()
        self._seconds: dict[tuple[int, str], float] = {}  # by node and type of message: its last
        self._freed: list[str] = []  # messages whose turn has come
        self._first_end = math.inf  # no time to live is over before

    # -- questions ---------------------------------------------------------------------------------

    def accept(self, message: Message, reduced: Reduced | None) -> str:
        """Take a message and return its id, which it has from now on."""
        number = next(self._numbers)
        message_id = f"{self.run_id}-{number}"
        message.metadata.__dict__["_message_id"] = message_id  # as Flower's own grids do
        pending = self._pending[message_id] = _Pending(message, number, reduced)
        self._first_end = min(self._first_end, _end(message))
        node_id = message.metadata.dst_node_id
        if node_id not in self.partitions:
            reason = f"there is no node {node_id} in this grid"
            pending.answer = Answer(code=ErrorCode.NODE_UNAVAILABLE, reason=reason)
            return message_id
        if not message.has_content():
            pending.answer = Answer(code=ErrorCode.UNKNOWN, reason="the message has no content")
            return message_id
        queue = self._queues.setdefault(node_id, deque())
        queue.append(message_id)
        if len(queue) == 1:
            self._freed.append(message_id)
        return message_id

    def blocks(self) -> list[Block]:
        """Return blocks of the messages whose turn has come since the last call."""
        freed, self._freed = self._freed, []
        turn = [(one, self._pending[one]) for one in freed if self.is_wanted(one)]
        return cut(
            [self._question(message_id, one.message) for message_id, one in turn],
            [self._seconds.get(_kind(one.message)) for _, one in turn],
            [one.reduced.reducer if one.reduced else None for _, one in turn],
            in_cohorts=self._run_config.get("kernel") == "vmap",
        )

    def _question(self, message_id: str, message: Message) -> Question:
        node_id = message.metadata.dst_node_id

        def context() -> Context:
            return Context(
                run_id=self.run_id,
                node_id=node_id,
                node_config={
                    PARTITION_ID: self.partitions[node_id],
                    NUM_PARTITIONS: len(self.partitions),
                },
                state=self._states.get(node_id),
                run_config=self._run_config,
            )

        return Question(message_id, message, context)

    # -- answers -----------------------------------------------------------------------------------

    def take(self, delivery: Delivery) -> None:
        """Take what a block came to; nothing of what nobody waits for."""
        block, answers, part = delivery
        with self._lock:
            wanted = [self.is_wanted(one) for one in block.ids]
            if part is not None and not all(wanted):  # a sum of what was given up as well
                answers, part = [GIVEN_UP] * len(answers), None
            first = self._pending.get(block.ids[0])
            if part is not None and first is not None and first.reduced is not None:
                first.reduced.add(first.number, block.ids, part)
            for question, answer, is_wanted in zip(block.questions, answers, wanted, strict=True):
                if is_wanted:
                    node_id, _ = kind = _kind(question.message)
                    if answer.seconds:
                        self._seconds[kind] = answer.seconds
                    if answer.state is not None:
                        self._states.put(node_id, answer.state)
                    self._settle(question.id, answer)
            self._lock.notify_all()

    def is_wanted(self, message_id: str) -> bool:
        """Return whether the reply to a message is still to come."""
        pending = self._pending.get(message_id)
        return pending is not None and pending.answer is None

    def is_there(self, message_id: str) -> bool:
        """Return whether pulling a message gives a reply by now, an error for an unknown id."""
        return not self.is_wanted(message_id)

    def pull(self, message_id: str) -> Message:
        """Return the reply to a message and forget it; an error where there is none."""
        pending = self._pending.pop(message_id, None)
        answer = pending.answer if pending else None
        if pending is None or answer is None or answer is GIVEN_UP:
            return _unavailable(self.run_id, message_id)
        said = answer.content
        if said is None:
            reply = Message(Error(answer.code, answer.reason), reply_to=pending.message)
        else:
            reply = Message(said, reply_to=pending.message)
        reply.metadata.__dict__["_message_id"] = f"{message_id}-reply"
        return reply

    def expire(self) -> bool:
        """Give up messages whose time to live is over; return whether some were at work.

        Replies that nobody pulled in that time are forgotten.
        """
        now = time.time()
        if now < self._first_end:
            return False
        ends = {message_id: _end(one.message) for message_id, one in self._pending.items()}
        self._first_end = min((end for end in ends.values() if end > now), default=math.inf)
        past = [message_id for message_id, end in ends.items() if end <= now]
        over = [message_id for message_id in past if self.is_wanted(message_id)]
        for one in past:
            if self._pending[one].answer not in (None, GIVEN_UP):
                del self._pending[one]
        for one in over:
            self._settle(one, GIVEN_UP)
        return bool(over)

    def forget(self, ids: Iterable[str]) -> bool:
        """Forget messages; return whether some were not answered yet."""
        known = [one for one in ids if one in self._pending]
        late = [one for one in known if self.is_wanted(one)]
        for one in late:
            self._settle(one, GIVEN_UP)
        for one in known:
            del self._pending[one]
        return bool(late)

    def _settle(self, message_id: str, answer: Answer) -> None:
        """Take the answer to a message; the next one to the same node has its turn."""
        pending = self._pending[message_id]
        pending.answer = answer
        node_id = pending.message.metadata.dst_node_id
        queue = self._queues[node_id]
        was_first = queue[0] == message_id
        queue.remove(message_id)
        if not queue:
            del self._queues[node_id]
        elif was_first:
            self._freed.append(queue[0])


def _kind(message: Message) -> tuple[int, str]:
    return message.metadata.dst_node_id, message.metadata.message_type


def _end(message: Message) -> float:
    return message.metadata.created_at + message.metadata.ttl


def _unavailable(run_id: int, message_id: str) -> Message:
    """Return what the SuperLink says in its own name of a message that it does not have."""
    metadata = Metadata(
        run_id=run_id,
        message_id=f"{message_id}-unavailable",
        src_node_id=SUPERLINK_NODE_ID,
        dst_node_id=SUPERLINK_NODE_ID,
        reply_to_message_id=message_id,
        group_id="",
        message_type=SYSTEM_MESSAGE_TYPE,
        created_at=time.time(),
        ttl=0,
    )
    return make_message(metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, UNKNOWN))
