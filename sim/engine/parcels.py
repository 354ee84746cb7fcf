"""Questions and answers as plain values, which travel between processes.

Arrays lie in NumPy views of their bytes: Ray writes such views into shared memory as they are, and
reads them there. Records that many messages share (the model of a broadcast) travel once.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata

from ...wire import NUM_PARTITIONS, PARTITION_ID
from .questions import Answer, Part, Question

ARRAYS, SHARED, METRICS, CONFIG = "arrays", "shared", "metrics", "config"

PackedArrays = tuple[tuple[str, str, tuple[int, ...], str, np.ndarray], ...]
# (name, kind, value) each: of kind SHARED the value is the place of an ArrayRecord among those that
# travel beside, of kind ARRAYS a PackedArrays, else a dictionary.
PackedRecords = tuple[tuple[str, str, Any], ...]
Share = Callable[[ArrayRecord], int | None]


class PackedQuestion(NamedTuple):
    """A question on its way."""

    id: str
    metadata: Metadata
    content: PackedRecords
    partition: int
    state: PackedRecords


class Request(NamedTuple):
    """A block on its way; the records that its questions share travel beside it.

    Attributes:
        number: later ones are higher.
        run_id: Flower's.
        questions: of the block.
        shared: a token for each record beside, the same for the same record.
    """

    number: int
    run_id: int
    questions: tuple[PackedQuestion, ...]
    shared: tuple[str, ...]


class PackedAnswer(NamedTuple):
    """An answer on its way."""

    content: PackedRecords | None
    code: int
    reason: str
    state: PackedRecords | None
    seconds: float


class Report(NamedTuple):
    """What a block came to, on its way back."""

    answers: tuple[PackedAnswer, ...]
    part: Part


class Settings(NamedTuple):
    """What all nodes of a grid have in common."""

    num_nodes: int
    run_config: dict[str, Any]


def pack_question(question: Question, share: Share) -> PackedQuestion:
    """Return ``question``; ``share`` says which records travel beside, and at which place."""
    context = question.context()
    return PackedQuestion(
        question.id,
        question.message.metadata,
        pack(question.message.content, share),
        int(context.node_config[PARTITION_ID]),
        pack(context.state),
    )


def unpack_question(
    packed: PackedQuestion, run_id: int, settings: Settings, shared: Sequence[ArrayRecord]
) -> Question:
    """Return the question again; records of kind SHARED are the very objects in ``shared``."""
    context = Context(
        run_id=run_id,
        node_id=packed.metadata.dst_node_id,
        node_config={PARTITION_ID: packed.partition, NUM_PARTITIONS: settings.num_nodes},
        state=unpack(packed.state),
        run_config=settings.run_config,
    )
    message = make_message(packed.metadata, unpack(packed.content, shared))
    return Question(packed.id, message, lambda: context)


def pack_answer(answer: Answer) -> PackedAnswer:
    """Return ``answer``, its arrays as views."""
    content, state = (
        None if records is None else pack(records) for records in (answer.content, answer.state)
    )
    return PackedAnswer(content, answer.code, answer.reason, state, answer.seconds)


def unpack_answer(packed: PackedAnswer) -> Answer:
    """Return the answer again."""
    content, state = (
        None if records is None else unpack(records) for records in (packed.content, packed.state)
    )
    return Answer(content, packed.code, packed.reason, state, packed.seconds)


def pack(content: RecordDict, share: Share = lambda _: None) -> PackedRecords:
    """Return the records of ``content``, which is not changed."""
    packed: list[tuple[str, str, Any]] = []
    for name, record in content.items():
        if not isinstance(record, ArrayRecord):
            kind = METRICS if isinstance(record, MetricRecord) else CONFIG
            packed.append((name, kind, dict(record)))
        elif (place := share(record)) is not None:
            packed.append((name, SHARED, place))
        else:
            packed.append((name, ARRAYS, pack_arrays(record)))
    return tuple(packed)


def unpack(packed: PackedRecords, shared: Sequence[ArrayRecord] = ()) -> RecordDict:
    """Return the records again."""
    content = RecordDict()
    for name, kind, value in packed:
        if kind == SHARED:
            content[name] = shared[value]
        elif kind == ARRAYS:
            content[name] = unpack_arrays(value)
        else:
            content[name] = MetricRecord(value) if kind == METRICS else ConfigRecord(value)
    return content


def pack_arrays(record: ArrayRecord) -> PackedArrays:
    """Return the arrays of a record as views of their bytes."""
    return tuple(
        (key, one.dtype, tuple(one.shape), one.stype, np.frombuffer(one.data, np.uint8))
        for key, one in record.items()
    )


def unpack_arrays(packed: PackedArrays) -> ArrayRecord:
    """Return the record again, with bytes of its own."""
    record = ArrayRecord()
    for key, dtype, shape, stype, data in packed:
        record[key] = Array(dtype=dtype, shape=shape, stype=stype, data=data.tobytes())
    return record
