"""One run at a time in a folder of checkpoints: two would delete each other's files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging import WARNING
from pathlib import Path

from flwr.common import log

from ...errors import ConfigError
from ...files import ANOTHER_FOLDER
from .checkpoint import Checkpoints


@contextmanager
def held(checkpoints: Checkpoints | None) -> Iterator[None]:
    """Hold the folder of ``checkpoints`` for a run; nothing is done for one that uses none.

    The lock is the operating system's, on an empty file "<folder>.lock" beside the folder, which
    may so be renamed. It ends with the process, however that ends. The file is removed with the
    run; a process that is killed leaves it behind, which does not matter to anyone. Where there are
    no such locks (Windows, some network file systems), a warning is logged and the run goes on.

    Raises:
        ConfigError: where another run holds the folder.
    """
    if checkpoints is None or not (checkpoints.every or checkpoints.resume):
        yield
        return
    folder = checkpoints.folder.absolute()
    file = folder.with_name(f"{folder.name}.lock")
    try:
        handle = _lock(file)
    except BlockingIOError as err:
        raise ConfigError(
            f"another run is using {str(checkpoints.folder)!r}: wait for it, or {ANOTHER_FOLDER}"
        ) from err
    except (ImportError, OSError) as err:
        why = "%s cannot be locked (%s): see to it that no other run uses the folder"
        log(WARNING, why, checkpoints.folder, err)
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)  # before the lock ends: it is nobody else's until then
        os.close(handle)


def _lock(file: Path) -> int:
    """Return a handle that holds the lock; BlockingIOError where another one does."""
    import fcntl  # not on Windows

    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(handle, file):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # who held it has removed the file since it was opened


def _is(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False
