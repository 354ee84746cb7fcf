"""Files written whole or not at all."""

import os
import tempfile
from pathlib import Path

from .errors import ConfigError


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all.

    A reader, or a crash at any moment, finds the old file or the new one, never a part.

    Raises:
        ConfigError: where the folder cannot be made or written to.
    """
    handle, name = _open_beside(path)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def check_writable(folder: Path) -> None:
    """Make ``folder`` where it is not there; raise ConfigError where files cannot be written to it.

    For before a long computation, whose results would otherwise be lost at its end.
    """
    handle, name = _open_beside(folder / "check")
    os.close(handle)
    Path(name).unlink()


def _open_beside(path: Path) -> tuple[int, str]:
    """Return the handle and the name of a new temporary file in the folder of ``path``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as err:
        raise ConfigError(
            f"cannot write to {str(path.parent)!r}: {err.strerror}; choose another folder with out"
        ) from err
