"""Checkpoints: the whole state of a run on disk, to go on from after a crash.

Two files hold the state after a round, here the twelfth. ``round-00000012.safetensors`` holds the
arrays: those of the model as ``model/NAME``, those of the rule's state as ``rule/N``.
``round-00000012.json`` (strict JSON under a checksum, see ``metabloom.files.seal_json``) holds
everything else, and the size and the SHA-256 of the first; it is written last, by an atomic rename,
and so is the commit mark.

JSON has no tuple and no int as a key. In the rule's state a mapping is ``{"dict": [[key, value],
...]}``, a tuple ``{"tuple": [...]}``, a tensor, array or NumPy scalar ``{"tensor" | "array" |
"scalar": [its name in the first file, its dtype]}``; elsewhere, mappings whose keys are not fixed
are lists of pairs.
"""

import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from logging import WARNING
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from flwr.common import log
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ...config import Scalar
from ...errors import CheckpointError, ConfigError
from ...files import seal_json, temporary_of, unseal_json, write_atomic
from ...wire import NamedArrays
from ..rules import State
from .reports import ClientScore, RoundReport

FORMAT = 1
INSTEAD = "start anew with resume = false"
MetricHistory = Mapping[int, Mapping[str, int | float | list[int] | list[float]]]

_FILE = re.compile(r"round-(?P<round>\d{8,})\.(?:json|safetensors)")
_HISTORIES = ("train_metrics", "evaluate_metrics", "server_metrics")
_MAPPINGS = (dict, OrderedDict, MappingProxyType)  # they come back as dict
_DTYPES = {"bool", "float16", "float32", "float64"} | {
    f"{sign}int{size}" for sign in ("", "u") for size in (8, 16, 32, 64)
}
_AS_BITS = {torch.bfloat16: torch.int16}  # NumPy has none


@dataclass(frozen=True)
class Snapshot:
    """The whole state of a run after a round.

    Attributes:
        round: its number, >= 1.
        arrays: the model; the order of the names is kept.
        state: the rule's, of dict, list, tuple, None, bool, int, float, str, torch.Tensor,
            np.ndarray and NumPy scalars; keys are str or int. Tensors come back on the CPU.
        reports: of every round so far.
        train_metrics: Flower's history of them, by round.
        evaluate_metrics: the same of the clients' evaluations.
        server_metrics: the same of the server's own evaluations, which begin at round 0.
        offences: how many bad replies each client has sent.
        told: the nodes whose fault the user knows of.
        token: identity of the run, the same over resumes.
    """

    round: int
    arrays: NamedArrays
    state: State | None
    reports: tuple[RoundReport, ...]
    train_metrics: MetricHistory
    evaluate_metrics: MetricHistory
    server_metrics: MetricHistory
    offences: Mapping[str, int]
    told: tuple[str, ...]
    token: str


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run in a folder of their own.

    Attributes:
        folder: made with the first checkpoint; files in it that are not ours are left alone.
        every: rounds from one checkpoint to the next, >= 0; 0: never.
        keep: how many are kept, the newest ones, >= 1.
        settings: what must be equal to go on.
        resume: whether to go on from what is there.

    Raises:
        ConfigError: where a value is out of range, naming it.
    """

    folder: Path
    every: int = 1
    keep: int = 3
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    resume: bool = False

    def __post_init__(self) -> None:
        for key, value, least in (("every", self.every, 0), ("keep", self.keep, 1)):
            if value < least:
                raise ConfigError(f"{key} = {value!r} of checkpoints: must be at least {least}")

    def save(self, snapshot: Snapshot) -> Path:
        """Write a checkpoint and return the file that completes it.

        Older ones beyond ``keep`` go, and so do those of later rounds, which the run that writes
        this one is about to play again.

        Raises:
            CheckpointError: where the rule's state or a history holds what cannot be saved.
            ConfigError: where the folder cannot be written to.
            MetabloomError: where the disk is full; the older checkpoints stay as they are.
        """
        if snapshot.round < 1:
            raise CheckpointError(f"round = {snapshot.round}: checkpoints are of rounds from 1 on")
        arrays, record = _packed(snapshot, self.settings)
        self._clear_leftovers()
        record_file, arrays_file = _pair(self.folder, snapshot.round)
        write_atomic(arrays_file, arrays)
        write_atomic(record_file, record)
        rounds = self._rounds()
        kept = [number for number in rounds if number <= snapshot.round][-self.keep :]
        for number in set(rounds) - set(kept):
            _remove(_pair(self.folder, number))
        return record_file

    def load(self) -> Snapshot | None:
        """Return the newest checkpoint that can be read; None where there is none.

        Its NumPy arrays are read-only. Files are never changed.

        Raises:
            CheckpointError: where there are some and none can be read, naming each; where one was
                written by a later version of this project.
            ConfigError: where its settings are not those of this run, naming each.
        """
        faults: list[str] = []
        for number in reversed(self._rounds()):
            file, arrays_file = _pair(self.folder, number)
            try:
                snapshot, settings = _unpacked(file, arrays_file)
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as err:
                faults.append(f"checkpoint {str(file)!r} cannot be used: {_reason(err)}")
                continue
            _check_settings(file, settings, self.settings)
            for fault in faults:
                log(WARNING, "%s; %s, the one before, is used", fault, file.name)
            return snapshot
        if faults:
            raise CheckpointError("\n".join([*faults, f"none is left to go on from: {INSTEAD}"]))
        return None

    def set_aside(self) -> Path | None:
        """Make way for a new run: rename a folder with checkpoints to "<folder>-previous".

        Returns:
            Where they are now, in the place of those that were there before; None where there were
            none to set aside.

        Raises:
            CheckpointError: where the folder cannot be renamed.
        """
        if not self._rounds():
            return None
        folder = self.folder.absolute()
        aside = folder.with_name(f"{folder.name}-previous")
        try:
            if aside.is_dir() and set(aside.iterdir()) <= set(_ours(aside)):
                _remove(_ours(aside))
                aside.rmdir()
            folder.rename(aside)
        except OSError as err:
            raise CheckpointError(
                f"the checkpoints in {str(folder)!r} are of an earlier run and cannot be set aside "
                f"as {str(aside)!r}: {err.strerror}; move them away, or go on from them with "
                "resume = true"
            ) from err
        return aside

    def oldest(self) -> int:
        """Return the round of the oldest checkpoint that is kept; 0 where there is none."""
        return min(self._rounds(), default=0)

    def _files(self) -> list[Path]:
        try:
            return _ours(self.folder)
        except OSError as err:
            raise CheckpointError(
                f"checkpoints in {str(self.folder)!r} cannot be looked for: {err.strerror}"
            ) from err

    def _rounds(self) -> list[int]:
        return sorted(_round_of(file.name) for file in self._files() if file.suffix == ".json")

    def _clear_leftovers(self) -> None:
        """Remove what a killed process left: arrays without their record, temporary files."""
        rounds = self._rounds()
        _remove(file for file in self._files() if _round_of(file.name) not in rounds)


# -- files -----------------------------------------------------------------------------------------


def _pair(folder: Path, number: int) -> tuple[Path, Path]:
    """Return the record, which is the commit mark, and the arrays of a round."""
    name = f"round-{number:08d}"
    return folder / f"{name}.json", folder / f"{name}.safetensors"


def _round_of(name: str) -> int:
    """Return the round of a file of ours; 0 for any other file, temporary ones among them."""
    match = _FILE.fullmatch(name)
    return int(match["round"]) if match and match["round"] == f"{int(match['round']):08d}" else 0


def _ours(folder: Path) -> list[Path]:
    """Return the files of checkpoints, temporary ones among them; none where there is no folder."""
    files = sorted(folder.iterdir()) if folder.exists() else []
    return [file for file in files if _round_of(temporary_of(file.name) or file.name)]


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        try:
            file.unlink(missing_ok=True)
        except OSError as err:  # a file too many is no reason to stop a run
            log(WARNING, "%s cannot be removed: %s", file, err.strerror)


# -- snapshots and the contents of the two files ---------------------------------------------------


def _packed(snapshot: Snapshot, settings: Mapping[str, Scalar]) -> tuple[bytes, bytes]:
    """Return what the two files hold, arrays first."""
    arrays = {
        f"model/{name}": _storable(value, f"the model's {name!r}")
        for name, value in snapshot.arrays.items()
    }
    root = None if snapshot.state is None else dict(snapshot.state)
    try:
        state = _pack(root, "state", arrays)
    except RecursionError as err:
        raise CheckpointError("state cannot be saved: it is nested too deeply") from err
    try:
        blob = save(arrays)
    except UnicodeError as err:
        raise CheckpointError(f"the name of an array cannot be saved: {err}") from err
    told: dict[str, Any] = {
        "format": FORMAT,
        "round": snapshot.round,
        "token": snapshot.token,
        "settings": list(settings.items()),
        "names": list(snapshot.arrays),
        "state": state,
        "offences": list(snapshot.offences.items()),
        "told": list(snapshot.told),
        **{key: [[n, dict(one)] for n, one in vars(snapshot)[key].items()] for key in _HISTORIES},
        "reports": [
            {**vars(one), "validation": [vars(score) for score in one.validation]}
            for one in snapshot.reports
        ],
        "arrays": _identity(blob),
    }
    try:
        return blob, seal_json(told)
    except (TypeError, ValueError) as err:
        raise CheckpointError(f"round {snapshot.round} cannot be saved: {err}") from err


def _unpacked(file: Path, arrays_file: Path) -> tuple[Snapshot, dict[str, Scalar]]:
    """Return a snapshot and the settings of its run; raise any error where a file is not whole."""
    told = _checked(file)
    blob = arrays_file.read_bytes()
    if _identity(blob) != told["arrays"]:
        raise ValueError(f"{arrays_file.name} is cut short or altered")
    arrays = load(blob)
    for value in arrays.values():
        value.flags.writeable = False
    snapshot = Snapshot(
        round=told["round"],
        arrays={name: arrays[f"model/{name}"] for name in told["names"]},
        state=_unpack(told["state"], arrays),
        reports=tuple(map(_report, told["reports"])),
        **{key: dict(told[key]) for key in _HISTORIES},
        offences=dict(told["offences"]),
        told=tuple(told["told"]),
        token=told["token"],
    )
    return snapshot, dict(told["settings"])


def _report(told: dict[str, Any]) -> RoundReport:
    scores = tuple(ClientScore(**score) for score in told.pop("validation"))
    return RoundReport(**{key: _tuples(one) for key, one in told.items()}, validation=scores)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _checked(file: Path) -> dict[str, Any]:
    told = unseal_json(file.read_bytes())
    if told["format"] > FORMAT:
        raise CheckpointError(
            f"checkpoint {str(file)!r} is of format {told['format']}, this metabloom reads up to "
            f"{FORMAT}: use the version that wrote it, or {INSTEAD}"
        )
    if told["format"] != FORMAT:
        raise ValueError(f"it is of format {told['format']!r}, not {FORMAT}")
    return told


def _check_settings(file: Path, theirs: Mapping[str, Scalar], ours: Mapping[str, Scalar]) -> None:
    def said(settings: Mapping[str, Scalar], key: str) -> str:
        return f"{key} = {settings[key]!r}" if key in settings else f"no {key}"

    differing = [
        f"{file.name}: checkpoint has {said(theirs, key)}, this run "
        + (repr(ours[key]) if key in ours and key in theirs else said(ours, key))
        for key in sorted({*theirs, *ours})
        if (key in theirs, theirs.get(key)) != (key in ours, ours.get(key))
    ]
    if differing:
        advice = (
            f"a run goes on with the settings it began with: take the checkpoint's, or {INSTEAD}"
        )
        raise ConfigError("\n".join([*differing, advice]))


def _reason(err: Exception) -> str:
    if isinstance(err, OSError):
        return f"{Path(err.filename or '').name}: {err.strerror}"
    return str(err) if type(err) is ValueError else f"{type(err).__name__}: {err}"


def _identity(blob: bytes) -> dict[str, Any]:
    return {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}


# -- trees and JSON --------------------------------------------------------------------------------


def _pack(node: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """Return ``node`` as JSON can hold it; put its arrays into ``arrays``."""
    if node is None or type(node) in (bool, int, float, str):
        return node
    if type(node) in (list, tuple):
        items = [_pack(one, f"{path}[{i}]", arrays) for i, one in enumerate(node)]
        return items if type(node) is list else {"tuple": items}
    if type(node) in _MAPPINGS:
        for key in node:
            if type(key) not in (str, int):
                raise CheckpointError(f"{path} has the key {key!r}: only str and int can be saved")
        return {"dict": [[k, _pack(one, f"{path}[{k!r}]", arrays)] for k, one in node.items()]}
    name = f"rule/{len(arrays)}"
    arrays[name] = _storable(node, path)
    kinds = {"tensor": torch.Tensor, "array": np.ndarray, "scalar": np.generic}
    (kind,) = (kind for kind, one in kinds.items() if isinstance(node, one))
    return {kind: [name, str(node.dtype)]}


def _unpack(node: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(node, list):
        return [_unpack(one, arrays) for one in node]
    if not isinstance(node, dict):
        return node
    ((kind, held),) = node.items()
    if kind == "dict":
        return {key: _unpack(one, arrays) for key, one in held}
    if kind == "tuple":
        return tuple(_unpack(one, arrays) for one in held)
    name, dtype = held
    if kind == "tensor":
        bits = torch.from_numpy(arrays[name].copy())
        return bits.view(getattr(torch, dtype.removeprefix("torch.")))
    return {"array": arrays[name], "scalar": arrays[name][()]}[kind]


def _storable(value: Any, path: str) -> np.ndarray:
    """Return ``value`` as a contiguous array that safetensors holds; raise where there is none."""
    kind = f"{type(value).__name__} of {value.dtype}" if hasattr(value, "dtype") else ""
    if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta:
        dtype = str(value.dtype).removeprefix("torch.")
        if value.dtype in _AS_BITS or dtype in _DTYPES:
            bits = value.detach().view(_AS_BITS.get(value.dtype, value.dtype))
            return np.asarray(bits.numpy(force=True), order="C")
    plain = type(value) is np.ndarray or isinstance(value, np.generic)
    if plain and value.dtype.name in _DTYPES:
        return np.asarray(value, dtype=value.dtype.newbyteorder("="), order="C")
    raise CheckpointError(
        f"{path} is a {kind or type(value).__name__}, which a checkpoint cannot hold: numbers, "
        "texts, None, dict, list, tuple, and dense real tensors and arrays can be saved"
    )
