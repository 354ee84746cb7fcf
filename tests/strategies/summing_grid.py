"""A grid that sums replies in blocks beside its clients, as one with workers does: over pickles."""

import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from metabloom.sim import CohortGrid
from metabloom.strategies import RunResult
from metabloom.wire import from_record, to_record
from tests.strategies.bad_replies import Tamper
from tests.strategies.toy import Arrays, Toy

KEY = "num-examples"


@dataclass
class Handle:
    """What ``BlockGrid.reduced`` gives back; read before all replies came it lacks parts."""

    reducer: object
    messages: Sequence[Message]
    parts: list = field(default_factory=list)


class BlockGrid(CohortGrid):
    """A grid that reduces replies in blocks.

    Attributes:
        size: clients of a block.
        dies: blocks, by number, whose worker dies: their clients are asked one by one.
        late: blocks of which nothing comes in time.
        order: shuffles the replies; None: they come in the order of the messages.
        handles: of the exchanges that were reduced.
    """

    size = 4
    dies: Sequence[int] = ()
    late: Sequence[int] = ()
    order: np.random.Generator | None = None

    def __init__(self, *args, **more) -> None:
        super().__init__(*args, **more)
        self.handles: list[Handle] = []

    def reduced(self, messages, reducer) -> Handle:
        self.handles.append(Handle(reducer, list(messages)))
        return self.handles[-1]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None):
        messages = list(messages)
        came = super().send_and_receive(messages, timeout=timeout)
        replies = {reply.metadata.reply_to_message_id: reply for reply in came}
        handle = self.handles[-1] if self.handles else None
        if not messages or handle is None or messages[0] is not handle.messages[0]:
            return self._late(messages, replies)
        return self._reducing(handle, messages, replies)

    @property
    def summed(self) -> int:
        """How many replies came without their arrays."""
        parts = [part for handle in self.handles for _, part in handle.parts if part]
        return sum(len(part.message_ids) for part in parts)

    def _blocks(self, messages: list[Message]) -> list[list[Message]]:
        return [messages[i : i + self.size] for i in range(0, len(messages), self.size)]

    def _late(self, messages: list[Message], replies: dict[str, Message]) -> list[Message]:
        is_training = bool(messages) and messages[0].metadata.message_type == "train"
        return [
            replies[one.metadata.message_id]
            for number, block in enumerate(self._blocks(messages))
            for one in block
            if not (is_training and number in self.late)
        ]

    def _reducing(self, handle: Handle, messages: list[Message], replies: dict[str, Message]):
        came, parts = [], []
        for number, block in enumerate(self._blocks(messages)):
            if number in self.late:
                continue
            for part_of_it in [[one] for one in block] if number in self.dies else [block]:
                ids = tuple(one.metadata.message_id for one in part_of_it)
                part, answers = reduce_block(
                    handle.reducer, [(one, replies[one.metadata.message_id]) for one in part_of_it]
                )
                parts.append((ids, part))
                came += answers
        if self.order is not None:
            came = [came[i] for i in self.order.permutation(len(came))]
        yield from came
        handle.parts += parts


def reduce_block(reducer, pairs: Sequence[tuple[Message, Message]]) -> tuple[object, list[Message]]:
    """Return the part of a block, and its replies as they travel; all of it is pickled twice."""
    answered = [(question, reply) for question, reply in pairs if not reply.has_error()]
    if not answered:
        return None, [reply for _, reply in pairs]
    reducer, answered = copied((reducer, answered))
    part, contents = copied(reducer(answered))
    left = iter(contents)
    return part, [
        reply if reply.has_error() else Message(next(left), reply_to=question)
        for question, reply in pairs
    ]


def copied(value):
    """Return what comes out of another process."""
    return pickle.loads(pickle.dumps(value))  # noqa: S301  of the line itself


def asked_and_answered(
    number: int, arrays: Arrays, weight: float, *, sent: Arrays
) -> tuple[Message, Message]:
    """Return the question with id ``number`` and a good reply to it."""
    content = RecordDict({"arrays": to_record(sent), "config": ConfigRecord({"lr": 0.1})})
    question = Message(content, 7, "train")
    question.metadata.__dict__["_message_id"] = str(number)
    metrics = MetricRecord({KEY: weight, "loss": 0.5})
    records = {"arrays": to_record(arrays), "metrics": metrics, "config": ConfigRecord({"a": 1})}
    return question, Message(RecordDict(records), reply_to=question)


def blocks_of(size: int = 4, **options) -> type[BlockGrid]:
    """Return a grid with blocks of ``size``; its last instance is ``last``."""

    class Grid(BlockGrid):
        last: BlockGrid

        def __init__(self, *args, **more) -> None:
            super().__init__(*args, **more)
            type(self).last = self

    for name, value in {"size": size, **options}.items():
        setattr(Grid, name, value)
    return Grid


@dataclass
class Odd(Toy):
    """A toy whose clients send what ``tamper``, by partition, makes of their training replies."""

    tamper: dict[int, Tamper] = field(default_factory=dict)

    def _train(self, message, context) -> Message:
        answer = super()._train(message, context)
        partition = int(context.node_config["partition-id"])
        return self.tamper.get(partition, lambda one: one)(answer)


def told(result: RunResult) -> dict[str, object]:
    """Return all that a run tells but its arrays and how long it took."""
    rest = {name: value for name, value in vars(result).items() if name not in ("arrays", "rounds")}
    return {**rest, "rounds": [replace(report, seconds=0.0) for report in result.rounds]}


def close(one: RunResult, other: RunResult, rounds: int = 1) -> None:
    """Assert that two runs have the same arrays, up to the last bit of their dtype a round."""
    ours, theirs = from_record(one.arrays), from_record(other.arrays)
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        if value.dtype.kind != "f":
            assert np.array_equal(value, theirs[name]), name
            continue
        # float64 sums of values below 2, in another order: a few units in the last place of 2; in
        # a smaller dtype the rounding of the result may flip
        rtol = 0 if value.dtype == np.float64 else rounds * np.finfo(value.dtype).eps
        atol = 16 * rounds * np.finfo(np.float64).eps
        np.testing.assert_allclose(value, theirs[name], rtol=rtol, atol=atol, err_msg=name)
