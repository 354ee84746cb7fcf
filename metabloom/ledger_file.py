"""The file under a privacy ledger: lines appended to the disk, under the system's lock."""

import os
import time
from contextlib import suppress
from pathlib import Path

from .errors import ConfigError

LOCK_S = 60.0  # longest wait for another process to finish its line
ADVICE = "put it on a local disk that this process may write to (for clients: privacy.root)"
CHECKSUM = 64  # hexadecimal digits, before
_END = b'"}\n'


def append(handle: int, content: bytes, size: int, path: Path) -> None:
    """Write ``content`` after ``size`` bytes, to the disk, or leave the file as it was."""
    try:
        os.ftruncate(handle, size)
        written = os.pwrite(handle, content, size)
        if written < len(content):
            raise OSError(f"{written} of {len(content)} bytes were written")
        os.fsync(handle)
    except OSError as err:
        with suppress(OSError):
            os.ftruncate(handle, size)
        raise ConfigError(
            f"the privacy ledger {str(path)!r} cannot be written ({err.strerror or err}), so "
            f"nothing is released: free space there, or {ADVICE}"
        ) from err


def lock(handle: int, path: Path) -> None:
    """Take the lock on an open file, which ends when it is closed; wait for it within bounds.

    Raises:
        ConfigError: where the system has no locks, or another process does not let go.
    """
    try:
        import fcntl
    except ImportError as err:
        raise ConfigError(
            "a privacy ledger needs file locks, which this system does not have: two processes "
            "could spend one budget twice"
        ) from err
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"the privacy ledger {str(path)!r} has been locked for {LOCK_S:g} s: another "
                    "process holds it; stop that one"
                ) from None
            time.sleep(0.005)
        except OSError as err:
            raise ConfigError(
                f"the privacy ledger {str(path)!r} cannot be locked: {err.strerror}; {ADVICE}"
            ) from err


def stamp_of(status: os.stat_result) -> tuple[int, ...]:
    """Return what changes whenever a file does."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def checksum_of(line: bytes) -> str:
    """Return the checksum in which ``seal_json`` ends a line."""
    return line[-len(_END) - CHECKSUM : -len(_END)].decode(errors="replace")
