"""Ledgers in a temporary folder, for the tests of what they keep and find."""

import errno
import os
from pathlib import Path

from metabloom.accounting import Event
from metabloom.ledger import Head, PrivacyLedger

DELTA = 1e-5
ROUND = [Event(1.0, 0.05, 20)]


def ledger_at(path: Path, **more) -> PrivacyLedger:
    return PrivacyLedger(path, data="digits/anna", **more)


def written(path: Path, reservations: int = 4) -> PrivacyLedger:
    """Return a ledger of so many reservations and a line before them."""
    ledger = ledger_at(path)
    for number in range(reservations):
        ledger.reserve(
            [Event(1.0 + number / 4, 0.05, number + 1)],
            mechanism="fomaml",
            run="a run",
            server_round=number + 1,
        )
    return ledger


def read(path: Path, head: Head | None = None) -> list[tuple[float, float, int]]:
    """Return what a ledger that was opened anew says, and hold it against a kept head."""
    fresh = ledger_at(path)
    found = fresh.events
    if head is not None:
        fresh.check_not_behind(head)
    return found


def full(*arguments, **more):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def count_of(path: Path) -> int:
    return sum(count for _, _, count in read(path))


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)
