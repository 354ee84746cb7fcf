"""Checkpoints: a folder with the state of a run after its newest rounds, to go on after a crash.

Two files hold the state after a round, here the twelfth: ``round-00000012.safetensors`` and the
record ``round-00000012.json``; ``snapshot`` says what is in them. The record is written last, by an
atomic rename, and so is the commit mark.
"""

import itertools
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from logging import WARNING
from pathlib import Path

from flwr.common import log
from safetensors import SafetensorError

from ...errors import CheckpointError, ConfigError
from ...files import ANOTHER_FOLDER, temporary_of, write_atomic
from ...keys import Scalar
from .snapshot import INSTEAD, Snapshot, packed, unpacked

FINISHED = "finished"  # an empty file in the folder of a run that got to its end
_FILE = re.compile(r"round-(?P<round>\d{8,})\.(?:json|safetensors)")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run in a folder of their own.

    Attributes:
        folder: made with the first checkpoint, a text becomes a Path; files in it that are not
            ours are left alone.
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
        object.__setattr__(self, "folder", Path(self.folder))
        for key, value, least in (("every", self.every, 0), ("keep", self.keep, 1)):
            if value < least:
                raise ConfigError(f"{key} = {value!r} of checkpoints: must be at least {least}")

    def save(self, snapshot: Snapshot) -> Path:
        """Write a checkpoint and return the file that completes it.

        Older ones beyond ``keep`` go, and so do those of later rounds, which the run that writes
        this one is about to play again.

        Raises:
            CheckpointError: where the rule's state or a history holds what can never be saved.
            ConfigError: where the folder cannot be read or written to.
            MetabloomError: where the disk is full; the older checkpoints stay as they are.
        """
        if snapshot.round < 1:
            raise CheckpointError(f"round = {snapshot.round}: checkpoints are of rounds from 1 on")
        arrays, record = packed(snapshot, self.settings)
        self._clear_leftovers()
        _remove([self.folder / FINISHED])
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

        The arrays of its model are read-only. Files are never changed.

        Raises:
            CheckpointError: where there are some and none can be read, naming each; where one was
                written by a later version of this project.
            ConfigError: where its settings are not those of this run, naming each; where the folder
                cannot be read.
        """
        faults: list[str] = []
        for number in reversed(self._rounds()):
            file, arrays_file = _pair(self.folder, number)
            try:
                snapshot, settings = unpacked(file, arrays_file)
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

    def finish(self) -> None:
        """Mark the run as finished: its checkpoints need not be kept for ever.

        Raises:
            ConfigError: where the folder cannot be read or written to.
            MetabloomError: where the disk is full.
        """
        if self._rounds():
            write_atomic(self.folder / FINISHED, b"")

    def set_aside(self) -> Path | None:
        """Make way for a new run: rename a folder with checkpoints to "<folder>-previous".

        Where that is taken it becomes "<folder>-previous-2", and so on. A run that was stopped is
        never deleted; one that is finished takes the place of a finished one that was no longer.

        Returns:
            Where they are now; None where there were none to set aside.

        Raises:
            CheckpointError: where the folder cannot be renamed.
            ConfigError: where it cannot be read.
        """
        if not self._rounds():
            return None
        folder = self.folder.absolute()
        aside = folder.with_name(f"{folder.name}-previous")
        numbers = itertools.count(2)
        try:
            while os.path.lexists(aside) and not _gives_way(aside, folder):
                aside = folder.with_name(f"{folder.name}-previous-{next(numbers)}")
            folder.rename(aside)
        except OSError as err:
            raise CheckpointError(
                f"the checkpoints in {str(folder)!r} are of an earlier run and cannot be set aside "
                f"as {str(aside)!r}: {err.strerror}; move them away, or go on from them with "
                "resume = true"
            ) from err
        return aside

    def oldest(self) -> int:
        """Return the round of the oldest checkpoint that is kept; 0 where none can be seen."""
        try:
            return min(self._rounds(), default=0)
        except ConfigError:  # of the disk: clients then keep all that they have
            return 0

    def _files(self) -> list[Path]:
        try:
            return _ours(self.folder)
        except OSError as err:
            raise ConfigError(
                f"checkpoints in {str(self.folder)!r} cannot be looked for: {err.strerror}; "
                f"{ANOTHER_FOLDER}"
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


def _gives_way(old: Path, new: Path) -> bool:
    """Remove a folder whose run is finished, as that of ``new`` is, and was no longer."""
    if not ((old / FINISHED).exists() and (new / FINISHED).exists()):
        return False
    if max(map(_round_of, os.listdir(old))) > max(map(_round_of, os.listdir(new))):
        return False
    _remove([*_ours(old), old / FINISHED])
    with suppress(OSError):  # something that is not ours lies in it
        old.rmdir()
    return not old.exists()


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        try:
            file.unlink(missing_ok=True)
        except OSError as err:  # a file too many is no reason to stop a run
            log(WARNING, "%s cannot be removed: %s", file, err.strerror)


# -- what errors say -------------------------------------------------------------------------------


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
