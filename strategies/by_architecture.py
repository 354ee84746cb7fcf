r"""One rule for each architecture: clients of one architecture are averaged among themselves alone.

    w_a <- rule(w_a, {w_i : client i has architecture a})        for each architecture a

An architecture of which no client answered stays as it is, its state too (an optimiser's moments).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..architectures import joined, part_of
from ..wire import NamedArrays
from .rules import Arrays, Reply, Rule, State


def by_architecture(rule: Rule | Mapping[str, Rule], architectures: Sequence[str]) -> Rule:
    """Return the rule that treats each architecture by ``rule``, or by its own.

    Its arrays are those of ``joined``; a reply holds the arrays of one architecture, under their
    full names.

    Args:
        rule: of one model; or that of each architecture, by its name.
        architectures: the name of each.
    """
    rules = dict.fromkeys(architectures, rule) if isinstance(rule, Rule) else rule

    def init(arrays: NamedArrays) -> State:
        return {one: rules[one].init(part_of(arrays, one)) for one in architectures}

    def update(state: State, sent: NamedArrays, replies: Sequence[Reply]) -> tuple[State, Arrays]:
        states: dict[str, State] = {}
        models: dict[str, NamedArrays] = {}
        for one in architectures:
            own = [replace(reply, arrays=part_of(reply.arrays, one)) for reply in replies]
            answered = [reply for reply in own if reply.arrays]
            states[one], models[one] = state[one], part_of(sent, one)
            if answered:
                states[one], models[one] = rules[one].update(state[one], models[one], answered)
        return states, joined(models)

    return Rule(init, update)
