"""Local training as pure (begin, step, finish) functions.

A serial loop, a compiled step and a vectorised cohort can all drive the same three functions;
``run_update`` is the serial one.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..architectures import full_name, names_of
from .objective import Params

PERSONAL = "personal"  # prefix of parameters that stay on their client

State = TypeVar("State")
Item = TypeVar("Item")


@dataclass(frozen=True)
class LocalResult:
    """What a client's local training gives back: new parameters, and metrics as plain numbers."""

    params: Params
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class LocalUpdate(Generic[State, Item]):
    """One local training rule: functions that return new values and write into no argument.

    Attributes:
        begin: received parameters -> state.
        step: (state, batch) -> state.
        finish: state -> result.
    """

    begin: Callable[[Params], State]
    step: Callable[[State, Item], State]
    finish: Callable[[State], LocalResult]


def with_personal(params: Params, personal: Params) -> Params:
    """Return both as the parameters of a result, the personal ones as ``personal/NAME``.

    No model has such names, so no reply holds them.
    """
    return params | {full_name(PERSONAL, name): value for name, value in personal.items()}


def personal_in(params: Params) -> Params:
    """Return the personal parameters of a result, by the names that its model gives."""
    return {own: params[name] for name, own in names_of(params, PERSONAL).items()}


def run_update(
    update: LocalUpdate[State, Item], params: Params, batches: Iterable[Item]
) -> LocalResult:
    """Run ``update`` over ``batches`` from ``params``."""
    state = update.begin(params)
    for batch in batches:
        state = update.step(state, batch)
    return update.finish(state)


def mean_of(losses: tuple[Tensor, ...]) -> float:
    """Return the mean of scalar losses; NaN where there is none (an update of zero steps)."""
    return torch.stack(losses).mean().item() if losses else float("nan")
