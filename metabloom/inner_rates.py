"""Learned inner learning rates: arrays that travel beside a model's, one rate for each parameter.

The rates of parameter ``NAME`` are the array ``inner_lr/NAME``, of its shape. So they are averaged,
saved and sent like any other array, by strategies and clients that know nothing of them too.
"""

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
from torch import nn

from .architectures import full_name, names_of
from .errors import ConfigError

INNER_LR = "inner_lr"  # prefix; a parameter's name has dots, never a slash

Value = TypeVar("Value")
Predicate = Callable[[str], bool]  # on names of parameters


def rate_name(name: str) -> str:
    """Return the name of the rates of a parameter.

    >>> rate_name("head.weight")
    'inner_lr/head.weight'
    """
    return full_name(INNER_LR, name)


def rated_names(model: nn.Module, adapt: Predicate | None = None) -> tuple[str, ...]:
    """Return the names of the parameters that have rates: the trainable ones that are adapted."""
    return tuple(
        name
        for name, value in model.named_parameters()
        if value.requires_grad and (adapt is None or adapt(name))
    )


def initial_rates(
    model: nn.Module, inner_lr: float, adapt: Predicate | None = None
) -> dict[str, np.ndarray]:
    """Return rates that are all ``inner_lr``, for each trainable parameter that is adapted.

    Args:
        model: whose parameters' shapes and dtypes they have.
        inner_lr: > 0.
        adapt: which parameter names are adapted; None: all.

    Raises:
        ConfigError: where ``inner_lr`` is not a finite number above 0.

    >>> rates = initial_rates(nn.Linear(3, 2), 0.1)
    >>> {name: value.shape for name, value in rates.items()}
    {'inner_lr/weight': (2, 3), 'inner_lr/bias': (2,)}
    """
    if not 0 < inner_lr < math.inf:
        raise ConfigError(f"inner_lr = {inner_lr!r}: must be a finite number above 0, e.g. 0.1")
    held = dict(model.named_parameters())
    return {
        rate_name(name): np.full_like(held[name].detach().cpu().numpy(), inner_lr)
        for name in rated_names(model, adapt)
    }


def split_rates(values: Mapping[str, Value]) -> tuple[dict[str, Value], dict[str, Value]]:
    """Return the values of a model's own names, and the rates by the names of their parameters.

    >>> split_rates({"w": 1, "inner_lr/w": 2})
    ({'w': 1}, {'w': 2})
    """
    rates = names_of(values, INNER_LR)
    own = {name: value for name, value in values.items() if name not in rates}
    return own, {name: values[full] for full, name in rates.items()}
