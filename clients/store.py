"""State of a client that lasts: versions by round, on disk and in Flower's Context.state.

The state of a client in one run is a row of versions; version r is what training in round r left.
Training in round r begins at the newest version before r, evaluation in round r uses the newest of
r or before. So a message that comes twice has one effect, and a server that was killed in round 7
and goes on from round 5 finds its clients as they were after round 5.

Two places hold versions: Context.state the last one alone, for as long as the context lives, and
the disk, which outlives a SuperNode and Flower's run. A version is taken from whichever place has
the right one, from the context where both do: then nothing is read. Without a store there is the
context alone, with its one version.

Files: ``<folder>/<run token>/<client>/<kind>/round-00000012.safetensors``; names that are no safe
file names end in a hash. Runs that are over are never deleted: remove their folders by hand.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from logging import WARNING
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Context
from flwr.common import log
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ..errors import ConfigError
from ..files import temporary_of, write_atomic
from ..wire import KEPT_ROUND, RUN_TOKEN, SERVER_ROUND, NamedArrays, from_record, to_record

ADVICE = (
    "set state-root to a folder for clients' lasting state, in the run config or, on a SuperNode, "
    "in its --node-config"
)
_PLAIN = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_FILE = re.compile(r"round-(\d{8,})\.safetensors")

Config = Mapping[str, bool | bytes | float | int | str]


@dataclass(frozen=True)
class ClientStore:
    """A folder for the lasting state of clients; it is made when the first of them saves.

    Runs and clients in it never mix. Nothing of an earlier run is ever removed.
    """

    folder: Path

    def versions(self, token: str, client: str, kind: str) -> "Versions":
        """Return one kind of state of one client in one run; the names may be any texts."""
        place = self.folder / file_name(token) / file_name(client) / file_name(kind)
        return Versions(place, (token, client, kind))


@dataclass(frozen=True)
class Versions:
    """The versions of one state on disk.

    Attributes:
        folder: theirs alone.
        identity: whose state it is, and of which run; part of each checksum.
    """

    folder: Path
    identity: tuple[str, ...]

    def rounds(self) -> list[int]:
        """Return the rounds of the versions, ascending.

        Raises:
            ConfigError: where the folder cannot be read.
        """
        return sorted(number for number in map(_round_of, self._names()) if number is not None)

    def load_if_there(self, number: int) -> NamedArrays | None:
        """Return version ``number``; None where there is none, or it is damaged."""
        return self.load(number) if self._file(number).exists() else None

    def load(self, number: int) -> NamedArrays | None:
        """Return version ``number``; None, with a warning, where it is damaged."""
        try:
            blob = self._file(number).read_bytes()
            held = load(blob)
            size = int.from_bytes(blob[:8], "little")
            told = json.loads(blob[8 : 8 + size])["__metadata__"]
            arrays = {name: held[name] for name in json.loads(told["names"])}
            if told["sha256"] != self._digest(number, arrays):
                raise ValueError("its checksum is another")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as err:
            file, reason = self._file(number), f"{type(err).__name__}: {err}"
            log(WARNING, "%s cannot be used (%s): what an earlier round left is", file, reason)
            return None
        return arrays

    def save(self, number: int, arrays: NamedArrays, *, kept: int) -> None:
        """Write version ``number`` and remove those that nobody can need any more.

        Later versions are of a run that was stopped and is played again. Of the versions up to
        ``kept``, the oldest round that the server may resume from, the newest is needed.

        Raises:
            ConfigError: where the folder cannot be written to.
            MetabloomError: where the disk is full.
        """
        told = {"names": json.dumps(list(arrays)), "sha256": self._digest(number, arrays)}
        rows = {name: np.asarray(value, order="C") for name, value in arrays.items()}
        write_atomic(self._file(number), save(rows, metadata=told), advice=ADVICE)
        rounds = self.rounds()
        needed = {one for one in rounds if kept < one <= number}
        needed |= {max((one for one in rounds if one <= kept), default=number)}
        for name in self._names():
            target = temporary_of(name)
            leftover = target is not None and _round_of(target) is not None
            if leftover or _round_of(name) not in {None, *needed}:
                with contextlib.suppress(OSError):  # a file too many is no reason to stop a round
                    (self.folder / name).unlink(missing_ok=True)

    def _names(self) -> list[str]:
        try:
            return [path.name for path in self.folder.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as err:
            raise ConfigError(
                f"cannot read {str(self.folder)!r}: {err.strerror}; {ADVICE}"
            ) from err

    def _file(self, number: int) -> Path:
        return self.folder / f"round-{number:08d}.safetensors"

    def _digest(self, number: int, arrays: NamedArrays) -> str:
        """Return the SHA-256 of all that a version says, and of whose it is."""
        shapes = [(name, value.dtype.str, value.shape) for name, value in arrays.items()]
        digest = hashlib.sha256(ascii((self.identity, number, shapes)).encode())
        for value in arrays.values():
            digest.update(value.tobytes())
        return digest.hexdigest()


class LastingState:
    """One kind of state of one client: its versions in Context.state and in a store.

    Args:
        context: Flower's.
        kind: what it is, e.g. "personal".
        client: the client's name.
        store: None: Context.state alone.
    """

    def __init__(
        self, context: Context, *, kind: str, client: str, store: ClientStore | None
    ) -> None:
        self._context = context
        self._kind = kind
        self._client = client
        self._store = store
        self._key = f"metabloom.{kind}"
        self._version_key = f"{self._key}.version"

    def before(self, config: Config) -> NamedArrays | None:
        """Return what training in the round that ``config`` names begins at; None at first."""
        return self._newest(config, _round(config))

    def after(self, config: Config) -> NamedArrays | None:
        """Return what evaluation in the round that ``config`` names uses; None at first."""
        return self._newest(config, _round(config) + 1)

    def keep(self, config: Config, arrays: NamedArrays) -> None:
        """Keep ``arrays`` as what the round that ``config`` names left.

        The last thing that a client does in a round: what raises afterwards cannot undo it on disk.

        Raises:
            ConfigError: where the store's folder cannot be written to.
            MetabloomError: where its disk is full.
        """
        number, token = _round(config), self._token(config)
        if self._store:
            # The server may ask for the round again, whatever it says of those it resumes from.
            kept = min(int(config.get(KEPT_ROUND, number)), number - 1)
            self._store.versions(token, self._client, self._kind).save(number, arrays, kept=kept)
        state = self._context.state
        state[self._key] = to_record(arrays)
        state[self._version_key] = ConfigRecord({"token": token, "round": number})

    def _newest(self, config: Config, end: int) -> NamedArrays | None:
        """Return the newest version of a round below ``end``, of any where no round is known."""
        token = self._token(config)
        mirrored = self._mirrored(token)
        if not self._store:
            return None if mirrored is None else self._mirror()
        versions = self._store.versions(token, self._client, self._kind)
        known = {*versions.rounds(), *(() if mirrored is None else (mirrored,))}
        for number in sorted(known, reverse=True):
            if number >= end and _round(config):
                continue
            arrays = self._mirror() if number == mirrored else versions.load(number)
            if arrays is not None:
                return arrays
        return None

    def _mirrored(self, token: str) -> int | None:
        """Return the round of the version in Context.state; None where it holds none of the run."""
        version = self._context.state.config_records.get(self._version_key)
        if version is None or version["token"] != token:
            return None
        return int(version["round"])  # type: ignore[arg-type]  # written by keep

    def _mirror(self) -> NamedArrays:
        return from_record(self._context.state.array_records[self._key])

    def _token(self, config: Config) -> str:
        """Return the identity of the run; servers that are not ours have Flower's run alone."""
        return str(config.get(RUN_TOKEN, f"run-id {self._context.run_id}"))


def file_name(text: str) -> str:
    """Return a name for a file, another one for each text, on any system and of bounded length.

    >>> file_name("client-3"), file_name("..")
    ('client-3', '_.5ec1f7e700f37c3d0b2981d04855fc34')
    """
    if _PLAIN.fullmatch(text):
        return text
    readable = re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-")[:32]
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{readable or '_'}.{digest[:32]}"


def _round(config: Config) -> int:
    """Return the round of a message; 0 where the server does not say."""
    return max(0, int(config.get(SERVER_ROUND, 0)))


def _round_of(name: str) -> int | None:
    match = _FILE.fullmatch(name)
    return int(match[1]) if match and match[1] == f"{int(match[1]):08d}" else None
