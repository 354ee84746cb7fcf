r"""Groups of clients that share a task: who is in which, and what each member counts.

Member j of group i has the share W_i w_ij of a step, over the groups and members that answered:

    w_ij = 1 / K_i  or  n_ij / n_i,      W_i = 1 / I  or  n_i / sum_i n_i,      n_i = sum_j n_ij

A client of which nothing is known is a group by itself: K_i = 1.
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..errors import ConfigError
from .rules import Reply, Weighting, weights_of

Key = TypeVar("Key", bound=Hashable)
One = TypeVar("One")

SEPARATOR = "/"  # "Greek/chars-01-05/drawers-07-12" is of the group "Greek"


def groups_in(file: str) -> dict[str, str]:
    """Return the group of each client by its name, as a JSON file says: ``{"client": "group"}``.

    Raises:
        ConfigError: where it cannot be read, or holds something else.
    """
    try:
        told = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except OSError as err:
        raise ConfigError(
            f"groups = {file!r}: the file cannot be read ({err.strerror}); check the path"
        ) from err
    except ValueError as err:
        raise ConfigError(f"groups = {file!r}: the file is not JSON ({err})") from err
    if not isinstance(told, dict) or not all(isinstance(one, str) for one in told.values()):
        raise ConfigError(
            f"groups = {file!r}: the group of each client by its name is needed, e.g. "
            '{"client-0": "north", "client-1": "south"}'
        )
    return told


def group_of(client: str, told: str, groups: Mapping[str, str]) -> str:
    """Return the group of a client; "" for one that is a group by itself.

    Args:
        client: its name.
        told: its group in its own words; "" where it says none.
        groups: of clients by name; they count before all else.

    >>> group_of("Greek/chars-01-05", "", {}), group_of("ward-3", "north", {})
    ('Greek', 'north')
    >>> group_of("Greek/chars-01-05", "", {"Greek/chars-01-05": "european"}), group_of("c1", "", {})
    ('european', '')
    """
    first, separator, _ = client.partition(SEPARATOR)
    return groups.get(client) or told or (first if separator else "")


def gathered(ones: Sequence[One], keys: Sequence[Key]) -> dict[Key, list[One]]:
    """Return what has the same key together, in the order in which it comes.

    >>> gathered([1, 2, 3], ["a", "b", "a"])
    {'a': [1, 3], 'b': [2]}
    """
    found: dict[Key, list[One]] = {}
    for one, key in zip(ones, keys, strict=True):
        found.setdefault(key, []).append(one)
    return found


def shares(
    groups: Sequence[Sequence[Reply]], *, weighting: Weighting, task_weight: Weighting
) -> list[np.ndarray]:
    """Return W_i w_ij for the replies of each group; they sum to 1.

    Args:
        groups: replies of the members, at least one in each group.
        weighting: w_ij: "uniform" or "examples".
        task_weight: W_i: the same.

    >>> a, b = Reply({}, 1), Reply({}, 3)
    >>> [one.tolist() for one in shares([[a, b], [b]], weighting="uniform", task_weight="uniform")]
    [[0.25, 0.25], [0.5]]
    """
    wholes = [Reply({}, sum(reply.num_examples for reply in one)) for one in groups]
    whole = weights_of(wholes, task_weight)
    return [share * weights_of(one, weighting) for share, one in zip(whole, groups, strict=True)]


def sampled(
    groups: Sequence[Sequence[One]], size: int, most: int, rng: np.random.Generator
) -> list[One]:
    """Return ``size`` members of groups in a random order, group after group.

    Of each group up to ``most`` members take part, drawn by chance, and of the last one as many as
    there is room for.

    Args:
        groups: members, by group.
        size: of the sample; all, where there are no more.
        most: members of one group; 0: all.
        rng: of the order and the members.
    """
    chosen: list[One] = []
    for place in rng.permutation(len(groups)):
        room = min(size - len(chosen), most or len(groups[place]))
        drawn = rng.permutation(len(groups[place]))[: max(room, 0)]
        chosen += [groups[place][i] for i in sorted(drawn)]
    return chosen
