"""Models by name: the table of builders, and initial weights that depend on their seed alone."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from ..errors import ConfigError, ModelError, nearest
from ..registry import Registry
from ..streams import torch_seeded
from ._options import check_sizes

Builder = Callable[..., nn.Module]
B = TypeVar("B", bound=Builder)

MODELS: Registry[Builder] = Registry("model")


def register_model(name: str) -> Callable[[B], B]:
    """Return a decorator that gives ``name`` to a builder: a function or an nn.Module class.

    The builder is called as ``builder(input_shape, num_classes, **options)``; its further
    parameters are the options that users may set. Raises ConfigError where another builder has the
    name.
    """

    def decorate(builder: B) -> B:
        MODELS.add(name, builder)
        return builder

    return decorate


def build_model(
    name: str, *, input_shape: tuple[int, ...], num_classes: int, seed: int, **options: object
) -> nn.Module:
    """Return a new model whose initial weights depend on these arguments alone.

    The model is in training mode, torch's default: Opacus' hooks record nothing in evaluation mode,
    and our own models compute the same in both. Torch's global random state is left as it was.

    Args:
        name: registry name, see ``MODELS``.
        input_shape: shape of one record, without the batch; ``(sequence_length,)`` for
            ``char-lstm``.
        num_classes: width of the output; the vocabulary for ``char-lstm``.
        seed: seed of the initial weights.
        **options: the model's own, e.g. ``hidden=64``.

    Raises:
        ConfigError: nobody knows the name or an option, or an option has a value that cannot work.
        ModelError: the model cannot take records of that shape.

    >>> model = build_model("mlp", input_shape=(1, 15, 15), num_classes=5, seed=0, hidden=64)
    >>> [tuple(value.shape) for value in model.parameters()]
    [(64, 225), (64,), (5, 64), (5,)]
    """
    builder = MODELS[name]
    check_sizes(input_shape, num_classes)
    known, takes_any = _options_of(builder)
    if not takes_any:
        _refuse_unknown(name, options, known)
    with torch_seeded(seed, "model", name):
        try:
            model: object = builder(tuple(input_shape), num_classes, **options)
        except ConfigError as err:
            raise ConfigError(f"model {name!r}, {err}. {_told(known)}") from err
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"the builder of model {name!r} returned {type(model).__name__}: it must return an "
            "nn.Module"
        )
    return model


def _options_of(builder: Builder) -> tuple[list[str], bool]:
    parameters = list(inspect.signature(builder).parameters.values())[2:]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return [found.name for found in parameters if found.kind is not found.VAR_KEYWORD], takes_any


def _refuse_unknown(name: str, options: Mapping[str, Any], known: list[str]) -> None:
    for option in sorted(set(options) - set(known)):
        raise ConfigError(
            f"model {name!r} has no option {option} (= {options[option]!r}): "
            f"{nearest(option, known)}{_told(known)}"
        )


def _told(known: list[str]) -> str:
    return f"Its options: {', '.join(sorted(known))}" if known else "It has no options"
