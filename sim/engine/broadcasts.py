"""Blocks as requests to actors: what many questions share lies in Ray's store, once."""

import itertools
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import ray
from flwr.app import ArrayRecord

from .parcels import Request, pack_arrays, pack_question
from .questions import Block, Reducer
from .runner import layout_of

PUTS_KEPT = 4  # records: of this round, of the one before, of an evaluation


class _Put(NamedTuple):
    """A record in Ray's store: its arrays tell whether it was written into since."""

    record: ArrayRecord
    layout: list[tuple[object, ...]]
    data: list[bytes]  # held, so that no other ones have their ids
    token: str
    ref: Any


class Broadcasts:
    """Keep what was put into Ray's store for as long as it may be sent again."""

    def __init__(self) -> None:
        self._puts: OrderedDict[int, _Put] = OrderedDict()  # by id() of the record
        self._reducer: tuple[Reducer, Any] | None = None  # the last one, and where it is
        self._tokens = itertools.count()

    def share(self, blocks: Sequence[Block]) -> None:
        """Put the records that several questions of ``blocks`` have in common."""
        records = [
            record
            for block in blocks
            for question in block.questions
            for record in question.message.content.array_records.values()
        ]
        counts = Counter(map(id, records))
        shared = {id(one): one for one in records if counts[id(one)] > 1}
        for record in shared.values():
            put = self._puts.pop(id(record), None)
            if put is None or not _is_as_put(record, put):
                ref = ray.put(pack_arrays(record))
                data = [array.data for array in record.values()]
                put = _Put(record, _layout(record), data, str(next(self._tokens)), ref)
            self._puts[id(record)] = put
        while len(self._puts) > max(PUTS_KEPT, len(shared)):
            self._puts.popitem(last=False)

    def of(self, block: Block, number: int, run_id: int) -> tuple[Any, ...]:
        """Return the arguments of ``Worker.answer`` for a block."""
        beside: dict[str, Any] = {}  # ref by token

        def share(record: ArrayRecord) -> int | None:
            put = self._puts.get(id(record))
            if put is None or not _is_as_put(record, put):
                return None
            beside[put.token] = put.ref
            return list(beside).index(put.token)

        questions = tuple(pack_question(one, share) for one in block.questions)
        request = Request(number, run_id, questions, tuple(beside))
        return request, self._put(block.reducer), *beside.values()

    def _put(self, reducer: Reducer | None) -> Any:
        if reducer is None:
            return None
        if self._reducer is None or self._reducer[0] is not reducer:
            self._reducer = (reducer, ray.put(reducer))
        return self._reducer[1]


def _is_as_put(record: ArrayRecord, put: _Put) -> bool:
    return _layout(record) == put.layout


def _layout(record: ArrayRecord) -> list[tuple[object, ...]]:
    return [(key, *layout_of(array)) for key, array in record.items()]
