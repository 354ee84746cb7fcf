"""What the engine hands around: questions to virtual nodes, blocks of them, and answers."""

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.common.constant import ErrorCode

BLOCKS = 32  # a round of many clients is cut into so many, which 2, 4, 8 and 16 workers share ...
LARGEST = 32  # ... or into a multiple of it, so that none has more clients
COHORT = 128  # clients of a block that are computed at once, on a GPU

Part = Any  # what a reducer made of the replies of a block; it can be pickled
Reducer = Callable[[Sequence[tuple[Message, Message]]], tuple[Part, Sequence[RecordDict]]]


@dataclass(frozen=True)
class Question:
    """A message to a virtual node.

    Attributes:
        id: of the message.
        message: as it was pushed; not to be written into.
        context: gives the node's, with what it keeps by now; not to be written into. Called when
            the question is begun: the states of all nodes need not be in memory at once.
    """

    id: str
    message: Message
    context: Callable[[], Context]


@dataclass(frozen=True)
class Answer:
    """What became of a question.

    Attributes:
        content: of the reply; None where there is none.
        code: Flower's error code where there is none.
        reason: of the error.
        state: what the node keeps from now on; None: what it had.
        seconds: how long the client took.
    """

    content: RecordDict | None = None
    code: int = ErrorCode.UNKNOWN
    reason: str = ""
    state: RecordDict | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Block:
    """Questions that one worker goes through at a time.

    Which questions are together depends on the order of the messages alone, never on the number of
    workers: sums over blocks have the same bits whoever computes them.

    Attributes:
        questions: one or more.
        reducer: what sums up the replies; None: they stay as they are.
        cost: expected seconds.
        tries: how often it was begun and its worker died.
    """

    questions: tuple[Question, ...]
    reducer: Reducer | None = None
    cost: float = 0.0
    tries: int = 0

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of its questions."""
        return tuple(one.id for one in self.questions)

    def without(self, ids: Collection[str]) -> "Block | None":
        """Return the rest of the block; None where nothing is left."""
        rest = tuple(one for one in self.questions if one.id not in ids)
        return replace(self, questions=rest) if rest else None

    def singly(self) -> "list[Block]":
        """Return a block for each question."""
        share = self.cost / len(self.questions)
        return [replace(self, questions=(one,), cost=share) for one in self.questions]


# What a block came to: an answer for each of its questions, and the part.
Delivery = tuple[Block, Sequence[Answer], Part]


def cut(
    questions: Sequence[Question],
    seconds: Sequence[float | None],
    reducers: Sequence[Reducer | None],
    *,
    in_cohorts: bool = False,
) -> list[Block]:
    """Return consecutive blocks of ``questions``, one reducer each, of sizes one apart at most.

    Args:
        questions: in the order of their messages.
        seconds: what each took before; None: it is expected to take the mean of the others.
        reducers: what sums up the reply to each.
        in_cohorts: whether clients of a block are computed at once: then blocks are large.
    """
    known = [one for one in seconds if one is not None]
    usual = sum(known) / len(known) if known else 0.0
    blocks: list[Block] = []
    for reducer, run in itertools.groupby(
        zip(questions, seconds, reducers, strict=True), key=lambda one: one[2]
    ):
        alike = list(run)
        total = len(alike)
        count = min(total, BLOCKS * math.ceil(total / (BLOCKS * LARGEST)))
        if in_cohorts:
            count = math.ceil(total / COHORT)
        for begin, end in itertools.pairwise(total * place // count for place in range(count + 1)):
            part = alike[begin:end]
            cost = sum(usual if known is None else known for _, known, _ in part)
            blocks.append(Block(tuple(question for question, _, _ in part), reducer, cost))
    return blocks


def failed(block: Block, reason: str, code: int = ErrorCode.CLIENT_APP_CRASHED) -> Delivery:
    """Return a block of which nothing came."""
    return block, [Answer(code=code, reason=reason) for _ in block.questions], None
