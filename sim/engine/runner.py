"""Answers questions with a ClientApp, as virtual nodes would; the same in every process."""

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol, cast, runtime_checkable

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.app.message import make_message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from .questions import Answer, Part, Question, Reducer

Handed = Iterator[tuple[Message, Context]]


@runtime_checkable
class CohortApp(Protocol):
    """A ClientApp that may answer for many nodes at once."""

    def answer_all(self, questions: Handed) -> Iterator[tuple[int, Message | Exception]]:
        """Yield (position, reply, or what it raised) for each of ``questions``, in any order."""


class Runner:
    """Answer blocks of questions with one ClientApp.

    Args:
        app: one with a method ``answer_all`` gets a block at once, any other one question after
            another.
    """

    def __init__(self, app: ClientApp) -> None:
        self._app = app
        self._begun: dict[str, float] = {}  # by question that is in progress: since when

    def answers(
        self, questions: Sequence[Question], reducer: Reducer | None = None
    ) -> tuple[list[Answer], Part]:
        """Return an answer for each question, and the part of the reducer.

        Whatever a client raises is its own answer.
        """
        found = self._answered(questions)
        self._begun.clear()
        if reducer is None:
            return found, None
        replied = [i for i, one in enumerate(found) if one.content is not None]
        pairs = [
            (
                questions[i].message,
                Message(cast(RecordDict, found[i].content), reply_to=questions[i].message),
            )
            for i in replied
        ]
        if not pairs:
            return found, None
        part, contents = reducer(pairs)
        for i, content in zip(replied, contents, strict=True):
            found[i] = replace(found[i], content=content)
        return found, part

    def in_progress(self) -> list[tuple[str, float]]:
        """Return the questions that were begun and not yet answered, with seconds since then.

        May be called from another thread.
        """
        now = time.monotonic()
        return [(one, now - begun) for one, begun in list(self._begun.items())]

    def _answered(self, questions: Sequence[Question]) -> list[Answer]:
        contexts: dict[int, tuple[Context, Context]] = {}  # before, and what the client has

        def handed() -> Handed:
            for position, question in enumerate(questions):
                self._begun[question.id] = time.monotonic()
                before = question.context()
                message, context = _own(question.message, before)
                contexts[position] = before, context
                yield message, context

        found: dict[int, Answer] = {}
        last = time.monotonic()
        reason = "it was not answered"
        try:
            for position, reply in self._replies(handed()):
                now = time.monotonic()
                seconds, last = now - last, now
                self._begun.pop(questions[position].id, None)
                before, after = contexts.pop(position)
                try:
                    found[position] = _answer(reply, before.state, after.state, seconds)
                except Exception as err:  # a reply, or a state, that is none
                    found[position] = _answer(err, before.state, after.state, seconds)
        except Exception as err:  # of an app that answers for many: the others are lost with it
            reason = _said(err)
        missing = Answer(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason)
        return [found.get(position, missing) for position in range(len(questions))]

    def _replies(self, handed: Handed) -> Iterator[tuple[int, Message | Exception]]:
        if isinstance(self._app, CohortApp):
            yield from self._app.answer_all(handed)
            return
        for position, (message, context) in enumerate(handed):
            try:
                reply: Message | Exception = self._app(message, context)
            except Exception as err:  # a client may raise anything: the others go on
                reply = err
            yield position, reply


def _answer(reply: object, before: RecordDict, after: RecordDict, seconds: float) -> Answer:
    if isinstance(reply, Exception):  # what it wrote into its state is not kept
        code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        return Answer(code=code, reason=_said(reply), seconds=seconds)
    if not isinstance(reply, Message):
        reason = f"the ClientApp returned {type(reply).__name__}, a Message is needed"
        code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        return Answer(code=code, reason=reason, seconds=seconds)
    state = None if _is_same(before, after) else after
    if reply.has_error():
        code, reason = reply.error.code, reply.error.reason or ""
        return Answer(code=code, reason=reason, state=state, seconds=seconds)
    if not isinstance(reply.content, RecordDict):
        raise TypeError(f"the reply holds {type(reply.content).__name__}, not a RecordDict")
    return Answer(reply.content, state=state, seconds=seconds)


def _own(message: Message, context: Context) -> tuple[Message, Context]:
    """Return copies for a client to write into: nodes share the records of a broadcast."""
    message = make_message(copy.copy(message.metadata), _copied(message.content))
    context = copy.copy(context)
    context.state, context.run_config = _copied(context.state), dict(context.run_config)
    return message, context


def _copied(records: RecordDict) -> RecordDict:
    """Return copies of records, of their lists and arrays; the bytes of arrays stay shared."""
    copies = {name: record.copy() for name, record in records.items()}
    for record in copies.values():
        for key, value in record.items():
            if isinstance(value, list | Array):
                record[key] = copy.copy(value)  # type: ignore[assignment]  # a copy has its type
    return RecordDict(copies)


def _is_same(before: RecordDict, after: RecordDict) -> bool:
    """Return whether nothing was written: arrays have the same bytes object, the rest is equal."""
    if list(before) != list(after):
        return False
    for name, record in after.items():
        old = before[name]
        if type(old) is not type(record) or list(old) != list(record):
            return False
        if isinstance(record, ArrayRecord) and isinstance(old, ArrayRecord):
            if any(layout_of(record[key]) != layout_of(old[key]) for key in record):
                return False
        elif dict(record) != dict(old):
            return False
    return True


def layout_of(array: Array) -> tuple[object, ...]:
    """Return what tells an array that was written into: its bytes are another object then."""
    return id(array.data), array.dtype, tuple(array.shape), array.stype


def _said(err: Exception) -> str:
    return f"{type(err).__name__}: {err}"
