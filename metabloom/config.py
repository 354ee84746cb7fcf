"""The run configuration: one frozen, checked object.

It is read once, from the command line, a TOML file or Flower's run config.

Keys are written with hyphens (``inner-lr``) wherever a user writes them; the same key is
``config.inner_lr`` in Python.
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError, field_validator, model_validator

from .architectures import Architecture, architectures_of
from .config_keys import RunKeys
from .config_keys_task import DATA_ENVIRONMENT_VARIABLE
from .errors import ConfigError, nearest
from .keys import Scalar, flattened, key_of

__all__ = ["DATA_ENVIRONMENT_VARIABLE", "FREE_WHEN_RESUMED", "RunConfig", "data_folder"]

FREE_WHEN_RESUMED = (  # keys that do not decide what a run computes, only how far, where and when
    "rounds",
    "max_bytes",
    "max_seconds",
    "out",
    "resume",
    "checkpoint_every",
    "checkpoints_kept",
    "state_root",
    "privacy_root",
    "data_root",
    "download",
    "timeout_s",
    "device",
    "engine",
    "workers",
    "kernel",  # beyond rounding
    "ray_address",
    "gpus_per_worker",
    "client_timeout_s",
)


class RunConfig(RunKeys):
    """Every key of a run, with its default, its check and a line of help.

    Raises ConfigError from ``RunConfig.read`` for an unknown key (naming the nearest) or a value
    out of range.
    """

    @field_validator("eval_steps", mode="before")
    @classmethod
    def _eval_steps_are_counts(cls, value: object) -> str:
        parts = [part.strip() for part in str(value).split(",")]  # a lone 5 is a number in TOML
        if not all(part.isdigit() and int(part) >= 1 for part in parts):
            raise ValueError("must be counts of at least 1 with commas, e.g. '1,5'")
        return ",".join(str(step) for step in sorted({int(part) for part in parts}))

    @field_validator("workers", mode="before")
    @classmethod
    def _workers_are_counted(cls, value: object) -> str:
        text = str(value).strip()  # a lone 2 is a number in TOML
        if text != "auto" and not (text.isascii() and text.isdigit()):
            raise ValueError("must be 'auto' or a whole number of at least 0")
        return text if text == "auto" else str(int(text))

    @model_validator(mode="after")
    def _architectures_stand_in_the_place_of_one_model(self) -> Self:
        for name in ("model", "model_args"):
            if self.kinds and getattr(self, name):
                raise ValueError(
                    f"{key_of(name)} is set beside architectures, which list the models with their "
                    "options: leave one of the two out"
                )
        if self.kinds and self.is_user_private:
            raise ValueError(
                "user-privacy with architectures: its noise is made for one sum over all clients, "
                "and each architecture has a sum of its own; use one of the two"
            )
        return self

    @model_validator(mode="after")
    def _patience_has_validations_to_look_at(self) -> Self:
        if self.patience and not 0 < self.eval_every <= self.rounds:
            raise ValueError(
                f"patience = {self.patience}, but no round is validated with eval-every = "
                f"{self.eval_every} and rounds = {self.rounds}: set eval-every to 1 or more, and "
                "to no more than rounds"
            )
        if self.patience and self.is_private and not self.unprotected_metrics:
            raise ValueError(
                f"patience = {self.patience}, but private clients keep their metrics to "
                "themselves: name in privacy.unprotected-metrics what validation clients may tell, "
                "or leave patience at 0"
            )
        return self

    @model_validator(mode="after")
    def _workers_are_there_where_they_are_described(self) -> Self:
        for name in ("ray_address", "gpus_per_worker", "client_timeout_s"):
            if self.workers == "0" and getattr(self, name):
                raise ValueError(
                    f"{key_of(name)} is set, but workers = 0 runs all clients in one process, "
                    "where it can have no effect: set workers to 'auto' or at least 1"
                )
        return self

    @model_validator(mode="after")
    def _privacy_is_on_where_it_is_described(self) -> Self:
        for table, is_on, hint in (
            ("privacy", self.is_private, " ('metabloom privacy plan' says how far)"),
            ("user_privacy", self.is_user_private, ""),
        ):
            described = [
                key_of(name)
                for name, field in type(self).model_fields.items()
                if name.startswith(f"{table}_")
                and name != "privacy_root"
                and getattr(self, name) != field.default
            ]
            if described and not is_on:
                switch = key_of(f"{table}_noise_multiplier")
                what = table.replace("_", " ")
                raise ValueError(
                    f"{described[0]} is set, but {what} is off: set {switch} above 0{hint}"
                )
        return self

    @model_validator(mode="after")
    def _user_privacy_goes_with_the_mean(self) -> Self:
        if self.is_user_private and self.aggregation != "mean":
            raise ValueError(
                f"aggregation = {self.aggregation!r} with user-privacy: updates are clipped, "
                "summed and noised before anything else sees them, so it would have no effect; "
                "use 'mean'"
            )
        return self

    @property
    def kinds(self) -> tuple[Architecture, ...]:
        """The architectures of the clients; empty where there is one model for all."""
        return architectures_of(self.architectures)

    @property
    def is_private(self) -> bool:
        """Whether clients train with record-level privacy."""
        return self.privacy_noise_multiplier > 0

    @property
    def is_user_private(self) -> bool:
        """Whether the server clips clients' updates and adds noise: user-level privacy."""
        return self.user_privacy_noise_multiplier > 0

    @property
    def unprotected_metrics(self) -> tuple[str, ...]:
        """The metrics that private clients send as they are, by name."""
        parts = self.privacy_unprotected_metrics.split(",")
        return tuple(filter(None, (part.strip() for part in parts)))

    @property
    def adaptation_steps(self) -> tuple[int, ...]:
        """``eval_steps`` as numbers, ascending."""
        return tuple(int(part) for part in self.eval_steps.split(","))

    @property
    def data_folder(self) -> Path:
        """Where data sets lie; see the function of that name."""
        return data_folder(self.data_root)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the default of every key, hyphenated, as Flower's app config lists them."""
        return {key_of(name): field.default for name, field in cls.model_fields.items()}

    @classmethod
    def read(cls, values: Mapping[str, object]) -> Self:
        """Return the configuration that ``values`` (hyphenated keys) describe.

        Raise ConfigError naming each wrong key.
        """
        known = cls.defaults()
        wrong = [
            f"unknown configuration key {key!r}: {nearest(key, known)}"
            "'metabloom config' lists every key"
            for key in sorted(set(values) - set(known))
        ]
        wrong += [
            f"{key} = {value!r}: a number or a text is needed, not true or false"
            for key, value in values.items()
            if isinstance(value, bool) and key in known and not isinstance(known[key], bool)
        ]
        if wrong:
            raise ConfigError("\n".join(wrong))
        try:
            return cls.model_validate(dict(values))
        except ValidationError as err:
            lines = [_one_line(dict(problem)) for problem in err.errors()]
            raise ConfigError("\n".join(lines)) from err

    @classmethod
    def read_toml(cls, path: Path) -> dict[str, object]:
        """Return the keys of a TOML file as a flat mapping.

        Raise ConfigError where it is missing or not TOML.
        """
        try:
            return flattened(tomllib.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as err:
            raise ConfigError(
                f"configuration file {str(path)!r} does not exist: check the path"
            ) from err
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
            raise ConfigError(f"configuration file {str(path)!r} is not TOML: {err}") from err
        except OSError as err:
            raise ConfigError(
                f"configuration file {str(path)!r} cannot be read: {err.strerror}"
            ) from err

    def identity(self) -> dict[str, Scalar]:
        """Return the keys that decide what a run computes: a resumed run must have the same."""
        return self.model_dump(by_alias=True, exclude=set(FREE_WHEN_RESUMED))

    def to_flower(self) -> dict[str, Scalar]:
        """Return every key with its value, hyphenated, as Flower's run config holds them."""
        return self.model_dump(by_alias=True)


def data_folder(root: str = "") -> Path:
    """Return where data sets lie: ``root``, else METABLOOM_DATA of the environment, else ./data."""
    chosen = root or os.environ.get(DATA_ENVIRONMENT_VARIABLE) or "data"
    return Path(chosen).expanduser()


def _one_line(problem: dict[str, Any]) -> str:
    key = "-".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if not key:  # of the whole, which names its keys
        return str(message)
    said = message[0].lower() + message[1:]
    return f"{key} = {problem['input']!r}: {said}; 'metabloom config' says what it means"
