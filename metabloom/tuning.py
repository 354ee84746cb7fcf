"""What is tuned of each strategy in a comparison, and the tries that this makes.

The usual axes are rates: a strategy's grid has those that its recipe reads, so that a new strategy
has one by itself. ``OWN`` has what differs. Every method gets the same number of tries: all points
of its grid, or as many drawn by chance from a larger one.
"""

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from types import MappingProxyType

from .config import FREE_WHEN_RESUMED, RunConfig
from .errors import ConfigError, nearest, unknown_name
from .keys import Scalar, key_of, parse_value
from .streams import numpy_stream

Grid = Mapping[str, tuple[Scalar, ...]]  # key -> its values
Settings = Mapping[str, Scalar]

USUAL: Grid = MappingProxyType(
    {
        "local-lr": (0.03, 0.1, 0.3),
        "outer-lr": (0.003, 0.01, 0.03),  # of Adam, on the server
        "digest-lr": (0.03, 0.1, 0.3),
        "teach-lr": (0.003, 0.01, 0.03),
        "proximal-mu": (0.01, 0.1, 1.0),
        "ditto-lambda": (0.01, 0.1, 1.0),
        "reptile-epsilon": (0.3, 1.0),
        "inner-lr": (0.1, 0.3, 1.0),  # every method adapts to a new client
    }
)
OWN: Mapping[str, Grid] = MappingProxyType(
    {
        "per-fedavg": {"outer-lr": (0.03, 0.1, 0.3)},  # of the clients' meta-steps
        "scaffold": {"outer-lr": (0.5, 1.0)},  # a step towards the clients' mean
    }
)

FIXED = frozenset(  # what all methods of a comparison have in common
    {
        *("strategy", "dataset", "dataset-args", "num-clients", "seed", "plugins"),
        *("public-data", "public-size", "distill-validation"),  # and so the clients' records
        *("eval-steps", "eval-every", "patience"),
        *("score-unseen", "score-training", "held-back"),
        *map(key_of, FREE_WHEN_RESUMED),
    }
)
BUDGETS = MappingProxyType({"rounds": "rounds", "bytes": "max-bytes", "seconds": "max-seconds"})
MOST_ROUNDS = 1000  # of a run whose budget is not rounds, unless the user says another number
EXAMPLE = '"local-lr=0.01,0.1 fedmeta:outer-lr=0.001,0.01"'


@dataclass(frozen=True)
class Entry:
    """One method of a comparison: a strategy, and the keys that are its own and not tuned.

    Attributes:
        name: as the user wrote it, e.g. "fedmeta:order=first".
        strategy: registry name.
        fixed: its own keys.
    """

    name: str
    strategy: str
    fixed: Settings = field(default_factory=dict)


def entries_of(text: str) -> tuple[Entry, ...]:
    """Return the methods that ``text`` lists, with commas between them.

    One that stands there twice counts once. A strategy may have keys of its own behind a colon,
    with spaces between them; a value with spaces stands in quotes.

    Raises:
        ConfigError: where there is none, or a key is unknown or must be the same for all.

    >>> entries_of("fedavg, fedmeta:order=first inner-steps=2")[1].fixed
    {'order': 'first', 'inner-steps': 2}
    """
    names = dict.fromkeys(filter(None, (one.strip() for one in text.split(","))))
    if not names:
        raise ConfigError(f"--strategies {text!r}: name one or more, e.g. fedavg,fedmeta")
    return tuple(_entry(name) for name in names)


def _entry(name: str) -> Entry:
    strategy, colon, keys = name.partition(":")
    what = f"--strategies {name!r}"
    try:
        words = shlex.split(keys)
    except ValueError as err:  # a quote that is not closed
        raise ConfigError(f"{what}: {err}: write strategy:key=value") from err
    fixed: dict[str, Scalar] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise ConfigError(f"{what}: write strategy:key=value, e.g. fedmeta:order=first")
        _check_key(f"{what}:", key)
        fixed[key] = parse_value(value)
    if colon and not fixed:
        raise ConfigError(f"{what}: no key stands behind the colon; leave the colon out")
    return Entry(name, strategy.strip(), fixed)


@dataclass(frozen=True)
class Budget:
    """What each run of a comparison may spend.

    Attributes:
        kind: "rounds", "bytes" or "seconds", see ``strategies.shell.ending``.
        amount: of it, > 0.
    """

    kind: str
    amount: float

    @classmethod
    def of(cls, text: str) -> "Budget":
        """Return the budget that ``text`` spells.

        Raises:
            ConfigError: where it is of no such kind, or no number above 0; whole, but for seconds.

        >>> Budget.of("bytes=5e6")
        Budget(kind='bytes', amount=5000000)
        """
        kind, equals, number = text.strip().partition("=")
        amount = parse_value(number.strip())
        what = f"--budget {text!r}"
        if not equals:
            raise ConfigError(f"{what}: write rounds=50, bytes=5e6 or seconds=60")
        if kind not in BUDGETS:
            raise unknown_name("budget", kind, BUDGETS)
        is_number = isinstance(amount, int | float) and not isinstance(amount, bool)
        if not is_number or not 0 < float(amount) < math.inf:
            raise ConfigError(f"{what}: a number above 0 is needed, e.g. {kind}=50")
        if kind == "seconds":
            return cls(kind, float(amount))
        if float(amount) != int(amount):
            raise ConfigError(f"{what}: {kind} are whole, e.g. {kind}=50")
        return cls(kind, int(amount))

    def keys(self, most_rounds: int) -> dict[str, Scalar]:
        """Return the keys of a run that spends it, in no more than ``most_rounds``."""
        return {"rounds": most_rounds, BUDGETS[self.kind]: self.amount}

    def __str__(self) -> str:
        return f"{self.kind}={self.amount}"


def usual_grid(strategy: str, read: Iterable[str]) -> dict[str, tuple[Scalar, ...]]:
    """Return what is tuned of a strategy, where nobody says otherwise.

    Args:
        strategy: registry name.
        read: the keys that it reads.

    >>> sorted(usual_grid("per-fedavg", ["outer-lr", "inner-lr", "order"]))
    ['inner-lr', 'outer-lr']
    """
    known, own = set(read), OWN.get(strategy, {})
    return {key: own.get(key, values) for key, values in USUAL.items() if key in known}


def overridden(
    grids: Mapping[str, Grid], texts: Sequence[str], read: Mapping[str, Iterable[str]]
) -> dict[str, dict[str, tuple[Scalar, ...]]]:
    """Return the grid of each strategy with the axes that a user gave in the place of its own.

    Args:
        grids: by method.
        texts: each some ``key=value,value``, with spaces between them; ``STRATEGY:key=...`` is for
            that strategy alone, else for all that read the key.
        read: the keys that each method reads and has not fixed.

    Raises:
        ConfigError: where a text is no axis, names a strategy that is not compared or a key that is
            unknown, that nobody reads, or that all methods must have in common.
    """
    found = {strategy: dict(grid) for strategy, grid in grids.items()}
    for part in (part for text in texts for part in text.split()):
        name, equals, listed = part.partition("=")
        strategy, colon, key = name.rpartition(":")
        values = tuple(parse_value(one) for one in listed.split(",") if one)
        if not (key and equals and values) or (colon and not strategy):
            raise ConfigError(f"--grid {part!r}: write key=value,value, e.g. --grid {EXAMPLE}")
        known = {one: one.partition(":")[0] for one in found}
        if colon and strategy not in known.values():
            raise unknown_name("compared strategy", strategy, set(known.values()))
        _check_key(f"--grid {part!r}:", key)
        asked = [one for one in found if not colon or known[one] == strategy]
        whose = [one for one in asked if key in set(read[one])]
        if not whose:
            who = strategy if colon else " and ".join(found)
            raise ConfigError(f"--grid {part!r}: {key} has no effect under {who}: leave it out")
        for one in whose:
            found[one][key] = tuple(dict.fromkeys(values))
    return found


def _check_key(what: str, key: str) -> None:
    known = RunConfig.defaults()
    if key not in known:
        hint = nearest(key, known)
        raise ConfigError(f"{what} unknown configuration key {key!r}: {hint}")
    if key in FIXED or key in BUDGETS.values():
        raise ConfigError(
            f"{what} {key} must be the same for all methods, or they could not be "
            "compared: give it as --set, or as an option"
        )


def points(grid: Grid) -> list[dict[str, Scalar]]:
    """Return every point of a grid, the last key changing fastest; one, empty, of an empty grid.

    >>> points({"a": (1, 2), "b": (3,)})
    [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
    """
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def tries_of(
    grids: Mapping[str, Grid], tries: int | None, seed: int
) -> dict[str, list[dict[str, Scalar]]]:
    """Return the points that are tried of each strategy: of each the same number.

    A grid that has more is drawn from without replacement, by the seed and the strategy's name.

    Args:
        grids: by strategy.
        tries: how many; None: as many as the smallest grid has.
        seed: of the draws.

    Raises:
        ConfigError: where it is not at least 1, or a grid has fewer points.
    """
    every = {strategy: points(grid) for strategy, grid in grids.items()}
    smallest = min(every, key=lambda strategy: len(every[strategy]))
    most = len(every[smallest])
    count = most if tries is None else tries
    if not 1 <= count <= most:
        raise ConfigError(
            f"--tries {count}: must be from 1 to {most}, the points of the grid of {smallest}: "
            "every method gets the same number; give --grid more values for a larger one"
        )
    return {strategy: _drawn(of, count, seed, strategy) for strategy, of in every.items()}


def _drawn(
    of: Sequence[dict[str, Scalar]], count: int, seed: int, strategy: str
) -> list[dict[str, Scalar]]:
    order = numpy_stream(seed, "tries", strategy).permutation(len(of))
    return [of[place] for place in sorted(order[:count])]


def on_edge(chosen: Settings, grid: Grid) -> list[str]:
    """Return the keys whose chosen value is the least or greatest of three or more numbers.

    >>> on_edge({"a": 1, "b": 0.1}, {"a": (1, 2, 3), "b": (0.01, 0.1, 1.0)})
    ['a']
    """
    found = []
    for key, values in grid.items():
        numbers = [one for one in values if isinstance(one, int | float)]
        if len(numbers) == len(values) >= 3 and chosen[key] in (min(numbers), max(numbers)):
            found.append(key)
    return found


def evaluated_every(rounds: int) -> int:
    """Return how often to validate, so that the last of ``rounds`` is: their divisor up to 10.

    >>> [evaluated_every(rounds) for rounds in (50, 25, 7, 1, 13)]
    [10, 5, 7, 1, 1]
    """
    return max(every for every in range(1, 11) if rounds % every == 0)
