"""The head of a model and its body: which of its arrays are which.

| ``head`` | what the head is |
|---|---|
| empty | the model's own attribute ``head``, where that holds layers; else its last layer |
| ``classifier`` | the layer, the block of layers or the parameter of that name |
| ``2`` | the last two layers |

A layer is a module that has parameters of its own, and the last one is the one that is registered
last: what runs last cannot be seen. The buffers of a layer go with it. All else is the body.

ANIL (1909.09157) adapts the head alone and BOIL (2008.08882) the body; FedPer (1912.00818) and
FedRep (2102.07078) keep the head at the client, LG-FedAvg (2001.01523) the body.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..errors import ConfigError, ModelError, nearest

OWN = "head"  # the attribute by which a model says what its head is


@dataclass(frozen=True)
class Part:
    """Some of a model's arrays, as a predicate on names; equal parts are equal, and hashable.

    >>> Part(frozenset({"bias"}))("bias")
    True
    """

    names: frozenset[str]

    def __call__(self, name: str) -> bool:
        """Return whether the array ``name`` is of this part."""
        return name in self.names


def is_head(model: nn.Module, head: str = "") -> Part:
    """Return the head of ``model``, as a predicate on names of parameters and buffers.

    Args:
        model: any module; it is not changed.
        head: the name of a layer, of a block of layers or of a parameter; or how many of the last
            layers; empty: see the table above.

    Raises:
        ConfigError: where ``head`` is no name of this model, or a number of layers that it does not
            have beside a body.
        ModelError: where the head would be all that the model has.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> is_head(net)("2.weight"), is_head(net)("0.weight")
    (True, False)
    >>> is_head(net, "2")
    Traceback (most recent call last):
    metabloom.errors.ConfigError: head = '2': at least one layer is needed, and one must be left \
for the body; Sequential has 2
    """
    return Part(head_names(model, head))


def is_body(model: nn.Module, head: str = "") -> Part:
    """Return all of ``model`` but its head; arguments and errors as for ``is_head``."""
    return Part(frozenset(_arrays(model)) - head_names(model, head))


def head_names(model: nn.Module, head: str = "") -> frozenset[str]:
    """Return the names of the head's arrays; arguments and errors as for ``is_head``.

    >>> sorted(head_names(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))))
    ['2.bias', '2.weight']
    """
    parameters = [name for name, _ in model.named_parameters()]
    layers = list(dict.fromkeys(map(_layer_of, parameters)))
    if head.isascii() and head.isdigit():
        belongs = _last(int(head), layers, head, model)
    elif head:
        belongs = _under(head)
        if not any(map(belongs, parameters)):
            known = {name[:end] for name in parameters for end in _ends(name)}
            raise ConfigError(
                f"head = {head!r}: {type(model).__name__} has no layer or parameter of that name; "
                f"{nearest(head, known)}give a name, or how many of the last layers are the head"
            )
    else:
        own = getattr(model, OWN, None)
        is_own = isinstance(own, nn.Module) and any(map(_under(OWN), parameters))
        belongs = _under(OWN) if is_own else (lambda name: _layer_of(name) == layers[-1])
        if len(layers) < 2 and not is_own:
            raise ModelError(
                f"{type(model).__name__} has {len(layers)} layers with parameters, so it has no "
                "body beside its head: use a model of at least two layers, name a parameter as "
                "head, or take a strategy that trains all of it"
            )
    if all(map(belongs, parameters)):
        raise ModelError(
            f"head = {head or OWN!r} is all that {type(model).__name__} has, so no body is left: "
            "name a smaller part of it, or take a strategy that trains all of it"
        )
    return frozenset(filter(belongs, _arrays(model)))


def _last(count: int, layers: list[str], head: str, model: nn.Module) -> Callable[[str], bool]:
    if not 1 <= count < len(layers):
        raise ConfigError(
            f"head = {head!r}: at least one layer is needed, and one must be left for the body; "
            f"{type(model).__name__} has {len(layers)}"
        )
    chosen = frozenset(layers[-count:])
    return lambda name: _layer_of(name) in chosen


def _under(place: str) -> Callable[[str], bool]:
    return lambda name: name == place or name.startswith(f"{place}.")


def _layer_of(name: str) -> str:
    """Return the layer that an array is of; "" for the model itself.

    A parametrised weight lies at LAYER.parametrizations.weight.original0: it belongs to LAYER.
    """
    if "parametrizations." in name:
        return name.partition("parametrizations.")[0].removesuffix(".")
    return name.rpartition(".")[0]


def _ends(name: str) -> list[int]:
    """Return where a part of ``name`` ends that could be named: at each dot, and at its end."""
    return [place for place, one in enumerate(name) if one == "."] + [len(name)]


def _arrays(model: nn.Module) -> list[str]:
    """Return the names of all arrays: what is exchanged, and parameters in any case."""
    return list(dict.fromkeys([*model.state_dict(), *(n for n, _ in model.named_parameters())]))
