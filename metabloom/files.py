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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as err:
        raise ConfigError(
            f"cannot write to {str(path.parent)!r}: {err.strerror}; choose another folder with out"
        ) from err
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
