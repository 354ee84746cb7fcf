"""The privacy ledger: every release ever made on one data set, over all rounds, runs and servers.

A file of one JSON object a line, each with the checksum of the line before it and its own. It is
only ever appended to, under a lock, and a line is on the disk (fsync) before the releases that it
pays for begin. What is reserved is never given back: after a crash the ledger holds at least what
was released.

What it finds: every altered byte, every line that is missing from the front or the middle, another
data set's ledger. What a file alone cannot find is that its last lines were cut off:
``check_not_behind`` holds it against a copy of the head kept elsewhere (clients keep one in
Flower's Context.state). A last line without its end is of a write that power cut short: it paid for
nothing yet, and is dropped.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from .accounting import (
    Accountant,
    Budget,
    Event,
    Events,
    aggregated,
    check_events,
    epsilon_of,
    schedule_of,
)
from .errors import BudgetExhaustedError, ConfigError, LedgerError, PrivacyError, RefusedError
from .files import make_folder, seal_json, sync_folder, unseal_json
from .ledger_file import ADVICE, append, checksum_of, lock, stamp_of

FORMAT = 1
UNIT = "one record, added or removed"


class Entry(NamedTuple):
    """One reservation.

    Attributes:
        time: UTC, ISO 8601.
        mechanism: of the round, e.g. "fomaml".
        events: what was reserved.
        run: identity of the run.
        server_round: 0 where the server says none.
        seeded: whether the noise came from a seed, so that it protects nobody (tests).
    """

    time: str
    mechanism: str
    events: tuple[Event, ...]
    run: str
    server_round: int
    seeded: bool


class Head(NamedTuple):
    """How far a ledger has come: its number of lines, and the checksum of the last one."""

    lines: int
    checksum: str


_NOTHING = Head(0, "")


@dataclass
class Charge:
    """Releases that are paid for; each can be taken once.

    Raises, in ``take``:
        PrivacyError: where no such release is left.
    """

    left: dict[tuple[float, float], int]

    @classmethod
    def of(cls, events: Events) -> "Charge":
        """Return the charge of ``events``."""
        return cls({(s, q): count for s, q, count in aggregated(events)})

    def take(self, noise_multiplier: float, sample_rate: float) -> None:
        """Take one release; it cannot be taken again."""
        key = (float(noise_multiplier), float(sample_rate))
        if not self.left.get(key):
            raise PrivacyError(
                f"a release with noise_multiplier = {noise_multiplier:g} and sample_rate = "
                f"{sample_rate:g} was not reserved in the ledger: reserve it before data are used"
            )
        self.left[key] -= 1

    @property
    def is_used_up(self) -> bool:
        """Whether all that was reserved was released."""
        return not any(self.left.values())


@dataclass
class _State:
    """What a ledger's lines say.

    Attributes:
        stamp: inode, size and time of change of the file when it was read.
        size: bytes of whole lines.
        head: the last of them.
        spent: all events, equal ones together.
        first: the schedule of the first reservation.
        is_fixed: whether all others repeat it.
    """

    stamp: tuple[int, ...] = ()
    size: int = 0
    head: Head = _NOTHING
    spent: Events = ()
    first: Events = ()
    is_fixed: bool = True

    def with_entries(self, entries: Iterable[Entry | None]) -> "_State":
        """Return what is known once these, too, are booked."""
        counts = Counter(entry.events for entry in entries if entry)  # most are alike
        schedules = [schedule_of(events) for events in counts]
        first = self.first or (schedules[0] if schedules else ())
        more = [e._replace(count=e.count * n) for events, n in counts.items() for e in events]
        return replace(
            self,
            spent=aggregated([*self.spent, *more]),
            first=first,
            is_fixed=self.is_fixed and all(one == first for one in schedules),
        )


class PrivacyLedger:
    """The ledger of one data set.

    Args:
        path: the file; it is made, with its folder, by the first reservation.
        data: identity of the data set, part of the first line; "" takes any.
        unit: what is protected, part of the first line: a record or a client; "" takes either.

    Raises, wherever the file is used:
        LedgerError: where a line was altered or is missing, or the ledger is of other data.
        ConfigError: where the file cannot be read, written or locked.
    """

    def __init__(self, path: str | Path, *, data: str = "", unit: str = "") -> None:
        self.path = Path(path)
        self.data = data
        self.unit = unit
        self._state = _State()

    # -- reading -----------------------------------------------------------------------------------

    @property
    def events(self) -> list[tuple[float, float, int]]:
        """All releases as (noise_multiplier, sample_rate, count), equal ones together."""
        return [(sigma, rate, count) for sigma, rate, count in self._fresh().spent]

    def epsilon(self, delta: float, accountant: Accountant = "rdp") -> float:
        """Return what all releases together cost at ``delta``; see ``epsilon_of``."""
        return epsilon_of(self._fresh().spent, delta, accountant)

    @property
    def head(self) -> Head:
        """How far the ledger has come."""
        return self._fresh().head

    def entries(self) -> list[Entry]:
        """Return every reservation, oldest first."""
        return [entry for _, entry in self._lines() if entry]

    def admits(self, events: Events, budget: Budget) -> bool:
        """Return whether ``budget`` has room for ``events`` after all that was reserved.

        Raises:
            RefusedError: where the accountant is "prv" and ``events`` follow another schedule than
                those before: it is for schedules that never change.
        """
        state, wanted = self._fresh(), aggregated(events)
        schedule = schedule_of(wanted)
        first = state.first or schedule
        is_fixed = state.is_fixed and schedule == first
        if not is_fixed and budget.accountant == "prv":
            raise RefusedError(
                "accountant = 'prv' is for a schedule that never changes, and the releases asked "
                "for are others than those in the ledger: set privacy.accountant to 'rdp'"
            )
        return budget.admits(state.spent, wanted, first=first, is_fixed=is_fixed)

    def check_not_behind(self, head: Head) -> None:
        """Raise LedgerError where the ledger has forgotten what it held at ``head``.

        ``head`` is a copy that was kept elsewhere.
        """
        if head.lines and self.head != head:
            self._check_follows(self._lines(), head)

    # -- writing -----------------------------------------------------------------------------------

    def reserve(
        self,
        events: Events,
        *,
        budget: Budget | None = None,
        pinned: Budget | None = None,
        mechanism: str = "",
        run: str = "",
        server_round: int = 0,
        seeded: bool = False,
    ) -> Charge:
        """Book ``events`` for good, and return them as a charge once they are on the disk.

        Args:
            events: the releases that will be made, at most.
            budget: what may be spent over all time; None: anything.
            pinned: another one that must have room too: the client's own, where ``budget`` is one
                that a server wishes for.
            mechanism: for the reader, as are run and server_round.
            run: identity of the run.
            server_round: number of the round in it.
            seeded: whether the noise will be reproducible, and so protect nobody.

        Raises:
            BudgetExhaustedError: where the budget does not admit them: then nothing is booked.
            ConfigError: where an event is out of range, or the file cannot be written.
            LedgerError: where the file is damaged.
        """
        check_events(events)  # each one, before counts add up
        wanted = aggregated(events)
        entry = Entry(_now(), mechanism, tuple(wanted), run, server_round, seeded)
        with self._locked() as handle:
            if not all(self.admits(wanted, one) for one in (budget, pinned) if one):
                raise BudgetExhaustedError
            state = self._fresh()
            told = [{"kind": "reserve", **entry._asdict()}]
            if not state.head.lines:
                told.insert(
                    0,
                    {
                        "kind": "open",
                        "format": FORMAT,
                        "data": self.data,
                        "unit": self.unit or UNIT,
                    },
                )
            head, content = state.head, b""
            for one in told:
                line = seal_json({**one, "previous": head.checksum})
                head, content = Head(head.lines + 1, checksum_of(line)), content + line
            append(handle, content, state.size, self.path)
            if not state.head.lines:
                sync_folder(self.path.parent)
            self._state = replace(
                state.with_entries([entry]),
                stamp=stamp_of(os.fstat(handle)),
                size=state.size + len(content),
                head=head,
            )
        return Charge.of(wanted)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        try:
            make_folder(self.path.parent)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as err:
            raise ConfigError(
                f"the privacy ledger {str(self.path)!r} cannot be opened: {err.strerror}; {ADVICE}"
            ) from err
        try:
            lock(handle, self.path)
            if not self.path.exists() or not os.path.samestat(os.fstat(handle), self.path.stat()):
                raise LedgerError(
                    f"the privacy ledger {str(self.path)!r} was moved or removed while it was "
                    "opened: put it back"
                )
            yield handle
        finally:
            os.close(handle)  # and so unlocks

    # -- the file ----------------------------------------------------------------------------------

    def _fresh(self) -> _State:
        """Return what the file says; it is read only where it is not as it was left."""
        try:
            stamp = stamp_of(self.path.stat())
        except FileNotFoundError:
            stamp = ()
        if stamp != self._state.stamp:
            lines = self._lines()
            self._check_follows(lines, self._state.head)
            head = Head(len(lines), checksum_of(lines[-1][0])) if lines else _NOTHING
            size = sum(len(line) for line, _ in lines)
            self._state = _State(stamp, size, head).with_entries(entry for _, entry in lines)
        return self._state

    def _check_follows(self, lines: Sequence[tuple[bytes, Entry | None]], head: Head) -> None:
        """Raise LedgerError where ``lines`` have forgotten what there was up to ``head``."""
        if len(lines) < head.lines:
            raise LedgerError(
                f"the privacy ledger {str(self.path)!r} has {len(lines)} lines and had "
                f"{head.lines} before: what was released cannot be forgotten; restore the file"
            )
        if head.lines and checksum_of(lines[head.lines - 1][0]) != head.checksum:
            raise LedgerError(
                f"line {head.lines} of the privacy ledger {str(self.path)!r} is not the one that "
                "was there before: restore the file"
            )

    def _lines(self) -> list[tuple[bytes, Entry | None]]:
        """Return the whole lines of the file, each of them checked, and what they reserve.

        None where there is no file; the first line reserves nothing.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as err:
            raise ConfigError(
                f"the privacy ledger {str(self.path)!r} cannot be read: {err.strerror}; {ADVICE}"
            ) from err
        lines = content.splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            torn = lines.pop()  # of a write that power cut short: nothing was released on it
            if _is_sealed(torn[:-1] + b"\n") or _is_sealed(torn + b"\n"):  # but this was whole
                raise LedgerError(
                    f"the last byte of the privacy ledger {str(self.path)!r} was altered or cut "
                    "off: it is a line's end; restore the file"
                )
        before, found = "", []
        for number, line in enumerate(lines, 1):
            found.append((line, self._checked(line, number, before)))
            before = checksum_of(line)
        return found

    def _checked(self, line: bytes, number: int, before: str) -> Entry | None:
        where = f"line {number} of the privacy ledger {str(self.path)!r}"
        try:
            told = unseal_json(line)
            entry = _entry(told)
            kind, follows = told["kind"], told["previous"]
            known, data, unit = FORMAT, "", ""
            if kind == "open":
                known, data, unit = told["format"], told["data"], str(told["unit"])
        except (ValueError, KeyError, TypeError) as err:
            raise LedgerError(f"{where} was altered ({err}): restore the file") from err
        if follows != before or (kind == "open") != (number == 1):
            raise LedgerError(f"{where} does not follow the one before: restore the file")
        if number > 1:
            return entry
        if known != FORMAT:
            raise LedgerError(f"{where}: its format is {known}, known is {FORMAT}")
        if self.unit and _protected(unit) != _protected(self.unit):
            raise LedgerError(
                f"the privacy ledger {str(self.path)!r} counts for {_protected(unit)!r}, not for "
                f"{_protected(self.unit)!r}: each has a ledger of its own"
            )
        if self.data and data != self.data:
            raise LedgerError(
                f"the privacy ledger {str(self.path)!r} is that of {data!r}, the data are "
                f"{self.data!r}: each data set has a ledger of its own"
            )
        return None


def _entry(told: Mapping[str, Any]) -> Entry | None:
    """Return the reservation of a line; None for the first line."""
    if told["kind"] == "open":
        return None
    events = tuple(Event(*event) for event in told["events"])
    check_events(events)
    return Entry(**{name: told[name] for name in Entry._fields} | {"events": events})


def _protected(unit: str) -> str:
    """Return "one record" or "one client", whichever way it may differ."""
    return unit.partition(",")[0]


def _is_sealed(line: bytes) -> bool:
    try:
        unseal_json(line)
    except ValueError:
        return False
    return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
