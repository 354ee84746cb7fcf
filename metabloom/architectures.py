"""Several architectures in one federation: names, arrays side by side, and whose is which.

Where clients differ in what they can compute, the server keeps one model for each architecture. All
of them lie in one set of named arrays, ``ARCHITECTURE/ARRAY``: so they travel through Flower's
strategies, checkpoints and results as one model does. A client sees its own alone, under the names
that its model gives.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from .errors import ConfigError
from .keys import Scalar, parse_options
from .streams import numpy_stream

NamedArrays = Mapping[str, np.ndarray]

SEPARATOR = "/"  # torch's names have dots, never this
KEY = "architectures"
EXAMPLE = "small: mlp hidden=32; large: mlp hidden=400; resnet18"


@dataclass(frozen=True)
class Architecture:
    """One entry of the key ``architectures``.

    Attributes:
        name: what nodes and results call it.
        model: registry name of the model.
        options: of the model.
    """

    name: str
    model: str
    options: Mapping[str, Scalar]


def architectures_of(text: str) -> tuple[Architecture, ...]:
    """Return the architectures that ``text`` lists, in its order; none for an empty one.

    Each is ``MODEL option=value ...``, with a name of its own before a colon where the model's is
    not enough; semicolons stand between them.

    Raises:
        ConfigError: where an entry has no model, an option is none, or a name comes twice or cannot
            be one.

    >>> small, cnn = architectures_of("small: mlp hidden=8; cnn")
    >>> small.name, small.model, dict(small.options), cnn.name
    ('small', 'mlp', {'hidden': 8}, 'cnn')
    """
    found = [_entry(part, text) for part in text.split(";") if part.strip()]
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"{KEY} = {text!r}: the name {name!r} comes twice; give each a name of its own, "
                f"e.g. {EXAMPLE!r}"
            )
    return tuple(found)


def _entry(part: str, text: str) -> Architecture:
    label, colon, rest = part.partition(":")
    model, _, options = (rest if colon else label).strip().partition(" ")
    name = label.strip() if colon else model
    if not model or "=" in model:
        raise ConfigError(f"{KEY} = {text!r}: {part.strip()!r} names no model, e.g. {EXAMPLE!r}")
    if not name or not all(one.isalnum() or one in "-_." for one in name):
        raise ConfigError(
            f"{KEY} = {text!r}: {name!r} cannot be a name, which goes into names of arrays and "
            "files: letters, digits, '-', '_' and '.' are needed"
        )
    return Architecture(name, model, MappingProxyType(parse_options(options, key=KEY)))


def assigned(names: Sequence[str], clients: Sequence[str], seed: int) -> dict[str, str]:
    """Return the architecture of each client: as many of each as there can be, by chance.

    It depends on the seed and on the set of clients, not on their order.

    Args:
        names: of the architectures, at least one.
        clients: names of clients among whom the architectures are to be balanced.
        seed: of the choice.

    >>> sorted(assigned(["a", "b"], ["x", "y", "z", "w"], seed=0).values())
    ['a', 'a', 'b', 'b']
    """
    ordered = sorted(clients)
    order = numpy_stream(seed, KEY, *ordered[:1]).permutation(len(ordered))
    return {ordered[client]: names[place % len(names)] for place, client in enumerate(order)}


def joined(models: Mapping[str, NamedArrays]) -> dict[str, np.ndarray]:
    """Return the arrays of all models side by side; the inverse of ``part_of`` for each."""
    return {
        full_name(architecture, name): value
        for architecture, arrays in models.items()
        for name, value in arrays.items()
    }


def part_of(arrays: NamedArrays, architecture: str) -> dict[str, np.ndarray]:
    """Return the arrays of one architecture, under their own names; of "" those without any."""
    return {own: arrays[name] for name, own in names_of(arrays, architecture).items()}


def names_of(names: Iterable[str], architecture: str) -> dict[str, str]:
    """Return those of ``names`` that are of an architecture: full name -> the model's own."""
    prefix = f"{architecture}{SEPARATOR}" if architecture else ""
    return {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def full_name(architecture: str, name: str) -> str:
    """Return the name of an array beside those of other architectures.

    >>> full_name("cnn", "head.weight"), full_name("", "head.weight")
    ('cnn/head.weight', 'head.weight')
    """
    return f"{architecture}{SEPARATOR}{name}" if architecture else name
