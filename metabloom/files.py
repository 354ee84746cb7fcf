"""Files written whole or not at all, and JSON that shows when a byte of it was altered."""

import contextlib
import hashlib
import json
import math
import os
import re
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .errors import ConfigError, MetabloomError

if TYPE_CHECKING:
    import numpy as np

ANOTHER_FOLDER = "choose another folder with out"
_ENCODE = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_TEMPORARY = re.compile(r"\.(?P<target>.+)\.[a-z0-9_]{8}", re.DOTALL)  # as mkstemp names them


class Json(str):
    """A text that is JSON already, which ``seal_json`` takes as it is."""

    __slots__ = ()


def write_atomic(path: Path, content: bytes, *, advice: str = ANOTHER_FOLDER) -> None:
    """Write ``content`` to ``path``, whole or not at all, and make its folder.

    A reader, or a crash at any moment, finds the old file or the new one, never a part; once this
    returns, the new one outlasts a power cut.

    Args:
        path: where to.
        content: all of the file.
        advice: what a user can do where the folder cannot be written to.

    Raises:
        ConfigError: where the folder cannot be made or written to.
        MetabloomError: where the content cannot be written (a full disk); what was there stays.
    """
    handle, name = _open_beside(path, advice)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as err:
        with contextlib.suppress(OSError):  # what went wrong first is what matters
            Path(name).unlink(missing_ok=True)
        if isinstance(err, OSError):
            raise MetabloomError(
                f"cannot write {str(path)!r} ({len(content)} bytes): {err.strerror or err}; "
                f"what was there before is kept; free space there, or {advice}"
            ) from err
        raise
    sync_folder(path.parent)


def check_writable(folder: Path) -> None:
    """Make ``folder`` where it is not there; raise ConfigError where files cannot be written to it.

    For before a long computation, whose results would otherwise be lost at its end.
    """
    handle, name = _open_beside(folder / "check", ANOTHER_FOLDER)
    os.close(handle)
    Path(name).unlink()


def temporary_of(name: str) -> str | None:
    """Return which file a temporary file of ``write_atomic`` was to become; None for other files.

    A process that is killed while it writes leaves one behind.

    >>> temporary_of(".results.json.x7_k2abc"), temporary_of("results.json")
    ('results.json', None)
    """
    match = _TEMPORARY.fullmatch(name)
    return match["target"] if match else None


def seal_json(members: Mapping[str, Any]) -> bytes:
    """Return a JSON object of ``members`` and "checksum", the SHA-256 of the object without it.

    Numbers come back to the bit: a float that is not finite, which JSON does not know, becomes
    ``{"float": its 8 bytes in hexadecimal}``. Keys must be texts; tuples come back as lists. A
    member that is ``Json`` is what ``as_json`` made of it.

    Raises:
        TypeError: where a member holds what JSON cannot, naming it.
        ValueError: where a member holds itself, naming it.

    >>> unseal_json(seal_json({"round": 12, "loss": float("inf")}))
    {'round': 12, 'loss': inf}
    """
    text = ",".join(f"{_ENCODE(key)}:{as_json(key, value)}" for key, value in members.items())
    body = f"{{{text}}}".encode()
    return body[:-1] + _seal_of(body)


def as_json(name: str, value: Any) -> Json:
    """Return the JSON of ``value`` as ``seal_json`` writes it; errors call the value ``name``."""
    if isinstance(value, Json):
        return value
    try:
        try:
            return Json(_ENCODE(value))
        except ValueError:  # most often all is finite: look for what is not only where it must be
            return Json(_ENCODE(_marked(value)))
    except (TypeError, ValueError) as err:
        raise type(err)(f"{name}: {err}") from err


def unseal_json(content: bytes) -> dict[str, Any]:
    """Return what was sealed; raise ValueError where a byte of it is missing or another."""
    size = len(_seal_of(b""))
    body = content[:-size] + b"}"
    if content[-size:] != _seal_of(body):
        raise ValueError("it is cut short or altered")
    return cast(dict[str, Any], json.loads(body, object_hook=_unmarked))


def _seal_of(body: bytes) -> bytes:
    """Return what takes the place of the last brace of ``body``."""
    return f',"checksum":"{hashlib.sha256(body).hexdigest()}"}}\n'.encode()


def _marked(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": struct.pack(">d", value).hex()}
    if isinstance(value, list | tuple):
        return [_marked(one) for one in value]
    if isinstance(value, dict):
        return {key: _marked(one) for key, one in value.items()}
    return value


def _unmarked(found: dict[str, Any]) -> Any:
    marked = found.get("float")
    if len(found) == 1 and isinstance(marked, str):
        return struct.unpack(">d", bytes.fromhex(marked))[0]
    return found


def _open_beside(path: Path, advice: str) -> tuple[int, str]:
    """Return the handle and the name of a new temporary file in the folder of ``path``."""
    try:
        make_folder(path.parent)
        return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as err:
        raise ConfigError(
            f"cannot write to {str(path.parent)!r}: {err.strerror}; {advice}"
        ) from err


def make_folder(folder: Path) -> None:
    """Make ``folder`` and those above it, so that they last over a power cut."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in made:
        sync_folder(one.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` last over a power cut, where the system lets folders be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_arrays(path: Path, *, key: str, remedy: str) -> "dict[str, np.ndarray]":
    """Return the named arrays of a safetensors file.

    Args:
        path: of the file.
        key: of the configuration that named it, for the error.
        remedy: what to do where it cannot be read, likewise.

    Raises:
        ConfigError: where it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as err:
        raise ConfigError(
            f"{key}: {str(path)!r} cannot be read as safetensors ({type(err).__name__}: {err}): "
            f"{remedy}"
        ) from err
