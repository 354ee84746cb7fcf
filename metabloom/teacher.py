"""A teacher: a model that an earlier run trained, read back so that clients can learn from it.

The key ``teacher`` names the results folder of a run, or a safetensors file. What the run says of
itself, in the results.json beside the weights, is what is known of the teacher: its model, its data
set, the rate at which it was adapted to clients, and whether it was trained with privacy.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .architectures import architectures_of
from .config import RunConfig
from .errors import ConfigError
from .files import read_arrays
from .keys import parse_options
from .wire import NamedArrays

RESULTS, MODELS = "results.json", "model*.safetensors"  # in the results folder of a run
WHERE = "name the results folder of a finished run, or a safetensors file"

Told = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained model that is not trained any further.

    Attributes:
        model: a module of its architecture; its own weights do not matter.
        arrays: the weights, under the names and in the dtypes of the module.
        was_private: it was trained with record-level privacy, as the configuration of its run says.
        is_public: it is no secret of any client, as the user says.
        inner_lr: the rate at which its run adapted it to clients; None where nobody says.
    """

    model: nn.Module
    arrays: NamedArrays
    was_private: bool = False
    is_public: bool = False
    inner_lr: float | None = None

    @property
    def may_teach_private_clients(self) -> bool:
        """Whether what it says of records may end in a student that leaves a private client."""
        return self.was_private or self.is_public

    @cached_property
    def digest(self) -> str:
        """What tells it from any other teacher, see ``digest_of``."""
        return digest_of(self.arrays)


def teacher_config(config: RunConfig) -> RunConfig:
    """Return ``config`` with the teacher's model in the place of the run's own.

    It is the one of ``teacher-model``; without that, the one of the run that trained it, whose
    folder must then be on this machine.

    Raises:
        ConfigError: where neither says which model it is.
    """
    named = config.teacher_model.strip()
    model, options = _model_named(named) if named else _model_of_its_run(config)
    return config.model_copy(update={"model": model, "model_args": options, "architectures": ""})


def teacher_of(config: RunConfig, model: nn.Module) -> Teacher:
    """Return the configured teacher, its weights checked against ``model``.

    Args:
        config: of the run.
        model: the module of ``teacher_config(config)``.

    Raises:
        ConfigError: where there is no such file, it cannot be read, its arrays are not those of the
            model or not finite, its run was on another data set, or this run has privacy and the
            teacher was neither trained with the same kind nor declared public.
    """
    weights = _weights_of(config)
    told = _told_beside(weights) or {}
    if (dataset := told.get("dataset", config.dataset)) != config.dataset:
        raise ConfigError(
            f"teacher = {config.teacher!r} was trained on dataset {dataset!r}, this run is on "
            f"{config.dataset!r}: take a teacher of the same data set; where the other one is "
            "meant, copy its weights out of their folder and set teacher-model"
        )
    _check_privacy(told, config)
    return Teacher(
        model,
        _checked(read_arrays(weights, key="teacher", remedy=WHERE), model, str(weights)),
        was_private=_is_private(told, "privacy"),
        is_public=config.teacher_is_public,
        inner_lr=float(told["inner-lr"]) if "inner-lr" in told else None,
    )


def digest_of(arrays: NamedArrays) -> str:
    """Return 32 hexadecimal digits that stand for names, dtypes, shapes and values of ``arrays``.

    >>> digest_of({"w": np.zeros(2)}) == digest_of({"w": np.zeros(2)}) != digest_of({})
    True
    """
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        value = arrays[name]
        total.update(repr((name, value.dtype.str, value.shape)).encode())
        total.update(value.tobytes())
    return total.hexdigest()


def _weights_of(config: RunConfig) -> Path:
    """Return the file with the teacher's weights."""
    if not config.teacher:
        raise ConfigError(f"strategy = {config.strategy!r} needs a teacher: {WHERE} as teacher")
    place = Path(config.teacher).expanduser()
    if place.is_file():
        return place
    if not place.is_dir():
        raise ConfigError(f"teacher = {config.teacher!r}: there is no such file or folder; {WHERE}")
    found = sorted(place.glob(MODELS))
    if not found:
        raise ConfigError(f"teacher = {config.teacher!r} holds no model.safetensors; {WHERE}")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ConfigError(
            f"teacher = {config.teacher!r} holds several models ({names}): name one of these files"
        )
    return found[0]


def _told_beside(weights: Path) -> Told | None:
    """Return the configuration in the results.json beside the weights; None where there is none."""
    file = weights.with_name(RESULTS)
    if not file.exists():
        return None
    try:
        told = json.loads(file.read_text(encoding="utf-8"))["config"]
        return dict(told)
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ConfigError(
            f"{str(file)!r} does not say how the teacher beside it was trained "
            f"({type(err).__name__}: {err}): {WHERE}"
        ) from err


def _check_privacy(told: Told, config: RunConfig) -> None:
    """Raise ConfigError where the teacher could tell what this run would have to count."""
    for table, is_on in (("privacy", config.is_private), ("user-privacy", config.is_user_private)):
        if is_on and not (_is_private(told, table) or config.teacher_is_public):
            raise ConfigError(
                f"teacher = {config.teacher!r} was not trained with {table} (its run's {table}."
                "noise-multiplier is 0, or nobody says), and this run is private: what it learnt "
                "from clients' records would leave in the student, and nobody would have counted "
                f"it; train the teacher with {table}.*, or, where it never saw their records, set "
                "teacher-is-public = true"
            )


def _is_private(told: Told, table: str) -> bool:
    return float(told.get(f"{table}.noise-multiplier", 0.0)) > 0


def _model_named(text: str) -> tuple[str, str]:
    """Return model and model-args that ``teacher-model`` spells."""
    model, _, options = text.partition(" ")
    parse_options(options, key="teacher-model")
    return model, options


def _model_of_its_run(config: RunConfig) -> tuple[str, str]:
    """Return model and model-args of the run that trained the teacher."""
    weights = _weights_of(config)
    told = _told_beside(weights)
    if told is None:
        raise ConfigError(
            f"teacher = {config.teacher!r}: there is no {RESULTS} beside {weights.name!r} to say "
            "of which model these weights are: set teacher-model, e.g. 'mlp hidden=400'"
        )
    kinds = {one.name: one for one in architectures_of(str(told.get("architectures", "")))}
    if not kinds:
        return str(told.get("model", "")), str(told.get("model-args", ""))
    name = weights.stem.removeprefix("model-")
    if name not in kinds:
        raise ConfigError(
            f"teacher = {config.teacher!r}: {weights.name!r} is none of the architectures of its "
            f"run ({', '.join(kinds)}): set teacher-model, e.g. 'mlp hidden=400'"
        )
    options = [f"{key}={json.dumps(value)}" for key, value in kinds[name].options.items()]
    return kinds[name].model, " ".join(options)


def _checked(arrays: NamedArrays, model: nn.Module, file: str) -> NamedArrays:
    """Return ``arrays`` in the order and dtypes of ``model``, whose they must be."""
    kind, own = type(model).__name__, model.state_dict()
    if differ := sorted(set(arrays) ^ set(own)):
        raise ConfigError(
            f"teacher: {file!r} and {kind}, its model, differ in {', '.join(differ)}: say in "
            "teacher-model which model these weights are of"
        )
    for name, value in own.items():
        if arrays[name].shape != tuple(value.shape):
            raise ConfigError(
                f"teacher: {name!r} has shape {arrays[name].shape} in {file!r} and "
                f"{tuple(value.shape)} in {kind}, its model: say in teacher-model which model "
                "these weights are of, with its options"
            )
        if not np.isfinite(arrays[name]).all():
            raise ConfigError(
                f"teacher: {name!r} in {file!r} holds NaN or infinity: nobody can learn from it"
            )
    return {name: arrays[name].astype(value.numpy().dtype) for name, value in own.items()}
