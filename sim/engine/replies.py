"""What a caller of the grid gets back: replies as they come, sums as they were made."""

import itertools
from collections.abc import Iterator, Sequence
from typing import overload

from flwr.app import Message

from ...errors import MetabloomError
from .questions import Part, Reducer


class Reduced:
    """What became of messages whose replies are summed up where they are made.

    Attributes:
        reducer: see ``CohortGrid.reduced``.
    """

    def __init__(self, reducer: Reducer) -> None:
        self.reducer = reducer
        self._parts: dict[int, tuple[tuple[str, ...], Part]] = {}  # by number of the first message

    def add(self, number: int, ids: tuple[str, ...], part: Part) -> None:
        """Take the part of a block whose first message has that number."""
        self._parts[number] = (ids, part)

    @property
    def parts(self) -> list[tuple[tuple[str, ...], Part]]:
        """(message ids, part) of each block that answered, in the order of the messages."""
        return [self._parts[number] for number in sorted(self._parts)]


class Replies(Sequence[Message]):
    """The replies to messages, in their order; iteration waits for the next one.

    True before any came where something was sent; ``len`` and an index wait for all of them.
    """

    def __init__(self, source: Iterator[Message], is_any: bool) -> None:
        self._source, self._is_any = source, is_any
        self._came: list[Message] = []
        self._broken: BaseException | None = None

    def __iter__(self) -> Iterator[Message]:
        for position in itertools.count():
            if position == len(self._came) and not self._has_next():
                return
            yield self._came[position]

    def _has_next(self) -> bool:
        """Wait for the next reply; after an error there is none, and it is no end either."""
        if self._broken:
            raise MetabloomError("the replies were not all taken: an error came") from self._broken
        try:
            reply = next(self._source, None)
        except BaseException as err:
            self._broken = err
            if isinstance(err, TypeError):  # list() takes one from __len__ for no length at all
                raise MetabloomError(f"a reply cannot be made: {err}") from err
            raise
        if reply is not None:
            self._came.append(reply)
        return reply is not None

    def _all(self) -> list[Message]:
        while self._has_next():
            pass
        return self._came

    def __bool__(self) -> bool:
        return self._is_any

    def __len__(self) -> int:
        return len(self._all())

    @overload
    def __getitem__(self, index: int) -> Message: ...

    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...

    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        return self._all()[index]
