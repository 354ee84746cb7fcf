"""How keys and values are spelt where a user writes them: TOML, ``key=value``, option texts."""

import shlex
import tomllib
from collections.abc import Mapping

from .errors import ConfigError

Scalar = bool | int | float | str
TABLES = ("privacy", "user_privacy")  # fields that begin so are keys of a table


def key_of(name: str) -> str:
    """Return the key that a user writes for a field: ``privacy`` is a table in TOML.

    >>> key_of("inner_lr"), key_of("privacy_max_grad_norm")
    ('inner-lr', 'privacy.max-grad-norm')
    >>> key_of("user_privacy_sample_rate")
    'user-privacy.sample-rate'
    """
    for table in TABLES:
        if name.startswith(f"{table}_"):
            rest = name.removeprefix(f"{table}_")
            return f"{table.replace('_', '-')}.{rest.replace('_', '-')}"
    return name.replace("_", "-")


def flattened(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return tables as dotted keys, as Flower reads them.

    >>> flattened({"rounds": 3, "privacy": {"max-grad-norm": 1.0}})
    {'rounds': 3, 'privacy.max-grad-norm': 1.0}
    """
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def parse_value(text: str) -> Scalar:
    """Return ``text`` as the TOML value that it spells, else as the string itself.

    >>> parse_value("0.5"), parse_value("true"), parse_value("digits")
    (0.5, True, 'digits')
    """
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float | str) else text


def parse_options(text: str, *, key: str) -> dict[str, Scalar]:
    """Return ``'ways=5 shots=1'`` as a mapping.

    Raise ConfigError, naming ``key``, where a part has no ``=``.

    >>> parse_options("ways=5 alphabet='Old Church'", key="dataset-args")
    {'ways': 5, 'alphabet': 'Old Church'}
    """
    options: dict[str, Scalar] = {}
    try:
        parts = shlex.split(text)
    except ValueError as err:
        raise ConfigError(f"{key} = {text!r}: {str(err).lower()}, close the quotes") from err
    for part in parts:
        name, equals, value = part.partition("=")
        if not (name and equals):
            raise ConfigError(
                f"{key} = {text!r}: {part!r} is not of the form name=value, e.g. 'ways=5 shots=1'"
            )
        options[name.replace("-", "_")] = parse_value(value)
    return options
