"""Ray actors that last and work through blocks of questions, the most expensive ones first.

A thread of its own takes answers and hands out blocks, so that actors are busy whatever the caller
does. An actor that dies is replaced. The block that it was at is run once more, client by client:
that finds the client that kills actors, and gives up nobody else.
"""

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from logging import ERROR, WARNING
from typing import Any

import ray
from flwr.common import log
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from .backends import CLOSED
from .broadcasts import Broadcasts
from .parcels import unpack_answer
from .questions import Block, Delivery, failed

IN_FLIGHT = 2  # blocks that an actor has at once: the next is there when one is done
POLL_S = 0.05
TRIES = 2  # how often a client is begun before it is given up, where its actor dies
START_S = 120.0  # for an actor to start
BAD_STARTS = 3  # actors in a row that did not start, before all is given up
ASKING_S = 5.0
JOIN_S = 10.0  # for the thread to end; a Ctrl-C at a bad moment may have left it the lock


@dataclass(eq=False)
class _Flight:
    """A block at an actor, and when its turn came (0: it waits for the one before)."""

    ref: Any
    block: Block
    number: int
    since: float = 0.0
    recall: Any = None  # the ref that says whether it may still be taken back


@dataclass(eq=False)
class _Seat:
    """One actor; it is at the first of its flights."""

    actor: Any
    starting: Any  # the ref that says it has started, or lives; None once it does
    deadline: float  # of that
    has_started: bool = False
    flights: deque[_Flight] = field(default_factory=deque)


class Pool:
    """Work through blocks on Ray actors.

    Args:
        start: starts an actor with the methods of ``Worker``.
        size: how many actors.
        run_id: Flower's, when a block is handed out.
        deliver: called with each block's answers, in the pool's own thread, under ``lock``.
        is_wanted: whether anybody still waits for the answer to a question, by its id.
        lock: also the caller's; notified when something was delivered or has gone wrong.
        client_timeout_s: a client that takes longer is given up; None: none is.

    Attributes:
        fault: why nothing works any more; "" while it does.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        *,
        size: int,
        run_id: Callable[[], int],
        deliver: Callable[[Delivery], None],
        is_wanted: Callable[[str], bool],
        lock: threading.Condition,
        client_timeout_s: float | None = None,
    ) -> None:
        self._start, self._run_id = start, run_id
        self._deliver, self._is_wanted = deliver, is_wanted
        self._lock = lock
        self._client_timeout_s = client_timeout_s
        self._waiting: list[tuple[float, int, Block]] = []  # a heap: the most expensive first
        self._numbers = itertools.count()
        self._parcels = Broadcasts()
        self._bad_starts = 0
        self.fault = ""
        self._closed = False
        self._seats = [self._seat() for _ in range(size)]
        self._thread = threading.Thread(target=self._serve, name="metabloom-pool", daemon=True)
        self._thread.start()

    def submit(self, blocks: Sequence[Block]) -> None:
        """Take blocks to work on."""
        with self._lock:
            self._parcels.share(blocks)
            for block in blocks:
                self._queue(block)
            self._hand_out()
            self._lock.notify_all()

    def give_up(self) -> None:
        """Stop work that nobody waits for any more."""
        with self._lock:
            blocks = [block for _, _, block in self._waiting]
            self._waiting = []
            for block in blocks:
                self._queue(block)
            for seat in list(self._seats):
                self._stop_unwanted(seat)
            self._hand_out()

    def close(self) -> None:
        """Stop all actors; may be called again."""
        with self._lock:
            self._closed = True
            self.fault = self.fault or CLOSED
            self._lock.notify_all()
        self._thread.join(JOIN_S)
        for seat in self._seats:
            self._kill(seat)
        self._seats, self._waiting, self._parcels = [], [], Broadcasts()

    # -- the pool's own thread ---------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            with self._lock:
                while not (self._closed or self.fault or self._refs()):
                    self._lock.wait()
                if self._closed or self.fault:
                    return
                refs = self._refs()
            if not ray.is_initialized():  # to ask it anything would start another one
                self._break("the Ray of this process was shut down")
                return
            try:
                ready, _ = ray.wait(refs, num_returns=1, timeout=POLL_S)
                for ref in ready:
                    self._take(ref)
                self._look_after()
            except Exception as err:  # Ray itself is gone, or a fault of ours
                log(ERROR, "the engine fails", exc_info=True)
                self._break(f"the engine fails: {type(err).__name__}: {err}")
                return

    def _refs(self) -> list[Any]:
        heads = [
            seat.starting or seat.flights[0].ref
            for seat in self._seats
            if seat.starting or seat.flights
        ]
        return [*heads, *(one.recall for seat in self._seats for one in seat.flights if one.recall)]

    def _take(self, ref: Any) -> None:
        """Take what ``ref`` has come to."""
        with self._lock:
            found = [one for one in self._seats if ref in _refs_of(one)]
            if not found or self._closed:
                return  # of an actor that was given up meanwhile
            (seat,) = found
            if ref not in (seat.starting, seat.flights[0].ref if seat.flights else None):
                self._take_back(seat, ref)
                return
        try:
            value = ray.get(ref)
        except RayTaskError as err:  # not of a client, which raises inside: what it sent, or a sum
            with self._lock:
                if seat not in self._seats:
                    return
                if seat.starting:
                    self._failed_to_start(seat, str(err.cause))
                else:
                    reason = f"the worker raised {err.cause!r}"
                    self._finish(seat, failed(seat.flights[0].block, reason))
            return
        except RayError as err:
            with self._lock:
                if seat not in self._seats:
                    return
                if seat.starting:
                    self._failed_to_start(seat, _reason(err))
                else:
                    self._died(seat, err)
            return
        if ref == seat.starting:
            with self._lock:
                seat.starting, seat.has_started, self._bad_starts = None, True, 0
                self._hand_out()
            return
        if value is None:  # it was skipped, which its recall has yet to say
            with self._lock:
                if seat in self._seats:
                    self._requeue(seat, seat.flights[0])
            return
        answers = [unpack_answer(one) for one in value.answers]
        with self._lock:
            if seat in self._seats:
                self._finish(seat, (seat.flights[0].block, answers, value.part))

    def _finish(self, seat: _Seat, delivery: Delivery) -> None:
        seat.flights.popleft()
        self._next_in(seat)
        self._hand_out()
        self._deliver(delivery)
        self._lock.notify_all()

    def _look_after(self) -> None:
        """Replace actors that do not start, and those whose client takes too long."""
        now = time.monotonic()
        with self._lock:
            for seat in list(self._seats):
                if seat.starting and now > seat.deadline:
                    self._failed_to_start(seat, f"it did not start within {START_S:g} s")
        limit = self._client_timeout_s
        if limit is None:
            return
        with self._lock:
            heads = [(seat, seat.flights[0]) for seat in self._seats if seat.flights]
        for seat, head in heads:
            if now - head.since > limit:
                self._ask(seat, head, limit)

    def _ask(self, seat: _Seat, head: _Flight, limit: float) -> None:
        """Give up the client that an actor is at, where that takes longer than ``limit``."""
        try:
            begun = dict(ray.get(seat.actor.in_progress.remote(), timeout=ASKING_S))
        except GetTimeoutError:  # a client keeps even other threads of its process from running
            begun = dict.fromkeys(head.block.ids, limit)
        except RayError:
            return  # it died: its ref says so
        late = [one for one in head.block.ids if begun.get(one, 0.0) >= limit]
        if not late:
            head.since = time.monotonic() - max(begun.values(), default=0.0)
            return
        with self._lock:
            if seat not in self._seats or not seat.flights or seat.flights[0] is not head:
                return  # it went on meanwhile
            rest = [one.block for one in list(seat.flights)[1:]]
            self._replace(seat)
            if len(begun) > 1:  # one of several at once: each by itself tells which
                rest += head.block.singly()
            else:
                reason = f"the client took longer than client_timeout_s = {limit:g}"
                (slow,) = (one for one in head.block.questions if one.id in late)
                self._deliver(failed(replace(head.block, questions=(slow,)), reason))
                rest += filter(None, [head.block.without(late)])
            for block in rest:
                self._queue(block)
            self._hand_out()
            self._lock.notify_all()

    # -- actors that come and go -------------------------------------------------------------------

    def _seat(self) -> _Seat:
        actor = self._start()
        return _Seat(actor, actor.ready.remote(), time.monotonic() + START_S)

    def _replace(self, seat: _Seat) -> None:
        self._seats.remove(seat)
        self._kill(seat)
        self._seats.append(self._seat())

    def _kill(self, seat: _Seat) -> None:
        if ray.is_initialized():  # else it is gone, and to ask for it would start another Ray
            with suppress(RayError, ValueError):
                ray.kill(seat.actor)

    def _next_in(self, seat: _Seat) -> None:
        """Let the next flight of a seat be the first."""
        if seat.flights:
            seat.flights[0].since = time.monotonic()
            self._stop_unwanted(seat)

    def _stop_unwanted(self, seat: _Seat) -> None:
        """Replace an actor that is at a block for which nobody waits."""
        if seat.flights and not any(map(self._is_wanted, seat.flights[0].block.ids)):
            self._replace(seat)
            for one in list(seat.flights)[1:]:
                self._queue(one.block)

    def _died(self, seat: _Seat, err: RayError) -> None:
        """Replace an actor; what it was at is run once more, one by one."""
        head, *rest = (one.block for one in seat.flights)
        log(WARNING, "a worker died at %d client(s): %s", len(head.questions), _reason(err))
        self._replace(seat)
        for other in self._seats:  # what killed it may have killed those that are idle too
            if not (other.starting or other.flights):
                other.starting = other.actor.ready.remote()
                other.deadline = time.monotonic() + START_S
        for block in rest:
            self._queue(block)
        tries = head.tries + 1
        if tries < TRIES:
            for block in replace(head, tries=tries).singly():
                self._queue(block)
        else:
            reason = f"the process that ran it died, {tries} times: {_reason(err)}"
            self._deliver(failed(head, reason))
        self._hand_out()
        self._lock.notify_all()

    def _failed_to_start(self, seat: _Seat, reason: str) -> None:
        if seat.has_started:  # it died while it was idle
            self._replace(seat)
            return
        self._bad_starts += 1
        others = [one for one in self._seats if one is not seat and not one.starting]
        if others:  # on a cluster that lost a machine there may be no place for it
            log(WARNING, "a worker cannot start, %d are left: %s", len(others), reason)
            self._seats.remove(seat)
            self._kill(seat)
        elif self._bad_starts >= BAD_STARTS:
            self._break(f"{self._bad_starts} workers in a row did not start: {reason}")
        else:
            self._replace(seat)

    def _break(self, reason: str) -> None:
        with self._lock:
            self.fault = reason
            self._lock.notify_all()

    # -- blocks that come and go -------------------------------------------------------------------

    def _queue(self, block: Block) -> None:
        wanted = block.without([one for one in block.ids if not self._is_wanted(one)])
        if wanted:
            heapq.heappush(self._waiting, (-wanted.cost, next(self._numbers), wanted))

    def _hand_out(self) -> None:
        while self._waiting and not self._closed:
            free = [one for one in self._seats if not one.starting and len(one.flights) < IN_FLIGHT]
            if not free:
                return
            seat = min(free, key=lambda one: len(one.flights))
            _, _, block = heapq.heappop(self._waiting)
            since, number = 0.0 if seat.flights else time.monotonic(), next(self._numbers)
            request = self._parcels.of(block, number, self._run_id())
            ref = seat.actor.answer.remote(*request)
            seat.flights.append(_Flight(ref, block, number, since))
        self._recall()

    def _recall(self) -> None:
        """Ask for blocks back that wait at one actor while another one is idle."""
        idle = sum(not (one.starting or one.flights) for one in self._seats)
        behind = [
            (seat, seat.flights[-1])
            for seat in self._seats
            if len(seat.flights) > 1 and not seat.flights[-1].recall
        ]
        for seat, flight in behind[:idle]:
            flight.recall = seat.actor.skip.remote(flight.number)

    def _take_back(self, seat: _Seat, ref: Any) -> None:
        """Queue a block again whose actor has not begun it."""
        (flight,) = (one for one in seat.flights if one.recall == ref)
        flight.recall = None
        try:
            is_free = ray.get(ref)
        except RayError:
            return  # the actor died, which the block that it was at tells
        if is_free:
            self._requeue(seat, flight)

    def _requeue(self, seat: _Seat, flight: _Flight) -> None:
        """Let others have a block that its actor skips."""
        seat.flights.remove(flight)
        self._next_in(seat)
        self._queue(flight.block)
        self._hand_out()


def _refs_of(seat: _Seat) -> list[Any]:
    return [seat.starting, *(ref for one in seat.flights for ref in (one.ref, one.recall) if ref)]


def _reason(err: RayError) -> str:
    """Return what Ray says, without the traceback where the actor itself raised."""
    lines = str(err).strip().splitlines() or [""]
    return lines[-1] if "creation task" in lines[0] else f"{type(err).__name__}: {lines[0]}"
