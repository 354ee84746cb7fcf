"""Checks of what a builder is given: options that a user typed, and the shape that the data has.

A wrong option is a ConfigError that names the option and the value; ``build_model`` adds the
options that the model knows.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from ..errors import ConfigError, ModelError, unknown_name

T = TypeVar("T")

ACTIVATIONS: Mapping[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def count(option: str, value: object, *, high: int | None = None) -> int:
    """Return ``value`` as a whole number of at least 1, and at most ``high``; refuse all else.

    >>> count("width", "64")
    64
    >>> count("width", 0)
    Traceback (most recent call last):
    metabloom.errors.ConfigError: option width = 0: must be a whole number of at least 1
    """
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    whole = isinstance(number, int) and not isinstance(number, bool)
    if not (whole and 1 <= number <= (high or math.inf)):  # type: ignore[operator]  # whole: an int
        wanted = "of at least 1" if high is None else f"from 1 to {high}"
        raise ConfigError(f"option {option} = {value!r}: must be a whole number {wanted}")
    return int(number)  # type: ignore[call-overload, no-any-return]  # whole: an int


def counts(option: str, value: object) -> tuple[int, ...]:
    """Return ``64``, ``"64"``, ``"64,32"`` or ``(64, 32)`` as a tuple of numbers of at least 1.

    >>> counts("hidden", "64,32")
    (64, 32)
    """
    parts: Sequence[object]
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",")]
    else:
        parts = list(value) if isinstance(value, list | tuple) else [value]
    try:
        numbers = tuple(count(option, part) for part in parts)
    except ConfigError:
        numbers = ()
    if not numbers:
        raise ConfigError(
            f"option {option} = {value!r}: must be whole numbers of at least 1 with commas, "
            "e.g. 64 or '64,64'"
        )
    return numbers


def choice(option: str, value: object, table: Mapping[str, T]) -> T:
    """Return the entry of ``table`` that ``value`` names; refuse any other, naming the nearest."""
    if not (isinstance(value, str) and value in table):
        raise unknown_name(f"value of option {option}", str(value), table)
    return table[value]


def check_sizes(input_shape: object, num_classes: object) -> None:
    """Raise ModelError unless ``input_shape`` and ``num_classes`` are sizes of at least 1."""
    sizes = list(input_shape) if isinstance(input_shape, tuple | list) else []
    if not (sizes and all(_is_size(size) for size in sizes)):
        raise ModelError(
            f"input_shape = {input_shape!r}: must be one record's shape, a tuple of whole numbers "
            "of at least 1 without the batch, e.g. (1, 28, 28)"
        )
    if not _is_size(num_classes):
        raise ModelError(f"num_classes = {num_classes!r}: must be a whole number of at least 1")


def image_shape(
    model: str, input_shape: Sequence[int], *, smallest: int = 1
) -> tuple[int, int, int]:
    """Return (channels, height, width); raise ModelError where that is no image of the size."""
    if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
        raise ModelError(
            f"model {model} got input_shape {tuple(input_shape)}: it takes images "
            f"(channels, height, width) of at least {smallest}x{smallest}; 'mlp' takes any shape"
        )
    channels, height, width = input_shape
    return channels, height, width


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
