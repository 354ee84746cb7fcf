r"""One rule for all architectures that share a part of their models: a body under different heads.

    w_A <- rule(w_A, {w_i : client i has an architecture of A})      for each group A of them

A group holds the architectures whose arrays are the same in name, shape and dtype: of such as
training is about (``Rule.trains``), not of all that a model has. Their clients are averaged
together, whatever else they have. An architecture that shares with none is a group by itself.
"""

from collections.abc import Sequence
from dataclasses import replace

from ..architectures import joined, part_of
from ..wire import NamedArrays
from .rules import Arrays, Reply, Rule, State


def over_groups(rule: Rule, architectures: Sequence[str]) -> Rule:
    """Return the rule that treats each group of architectures by ``rule``, as one model.

    Its arrays are those of ``joined``, of the shared part alone; a reply holds the arrays of one
    architecture, under their full names.

    Args:
        rule: of one model.
        architectures: the name of each.
    """

    def init(arrays: NamedArrays) -> State:
        return {first: rule.init(part_of(arrays, first)) for first, *_ in _groups(arrays)}

    def update(state: State, sent: NamedArrays, replies: Sequence[Reply]) -> tuple[State, Arrays]:
        states: dict[str, State] = {}
        models: dict[str, NamedArrays] = {}
        for group in _groups(sent):
            first = group[0]
            states[first], model = state[first], part_of(sent, first)
            own = [_of_group(reply, group) for reply in replies]
            if answered := [reply for reply in own if reply.arrays]:
                states[first], model = rule.update(state[first], model, answered)
            models |= dict.fromkeys(group, model)
        return states, joined({one: models[one] for one in architectures})

    def _groups(arrays: NamedArrays) -> list[list[str]]:
        return groups_of(arrays, architectures)

    return Rule(init, update, sees_all_architectures=True)


def groups_of(arrays: NamedArrays, architectures: Sequence[str]) -> list[list[str]]:
    """Return the architectures by what they share, each group in its order and by its first.

    Args:
        arrays: of all architectures, of the shared part alone.
        architectures: the name of each.
    """
    groups: dict[frozenset[tuple[object, ...]], list[str]] = {}
    for one in architectures:
        own = part_of(arrays, one)
        form = frozenset((name, value.shape, value.dtype.str) for name, value in own.items())
        groups.setdefault(form, []).append(one)
    return list(groups.values())


def with_equal_parts(arrays: NamedArrays, architectures: Sequence[str]) -> Arrays:
    """Return ``arrays`` where each architecture has the shared part of the first of its group.

    Args:
        arrays: of all architectures, of the shared part alone.
        architectures: the name of each.
    """
    groups = groups_of(arrays, architectures)
    models = {one: part_of(arrays, group[0]) for group in groups for one in group}
    return joined({one: models[one] for one in architectures})


def _of_group(reply: Reply, group: Sequence[str]) -> Reply:
    """Return a reply under the names of its model; without arrays where it is of another group."""
    parts = [part_of(reply.arrays, one) for one in group]
    return replace(reply, arrays=next(filter(None, parts), {}))
