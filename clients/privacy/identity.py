"""What decides how a model and a loss compute: a key under which work can be kept and used again.

A key says of what kind each module is, with its plain attributes, of what shape and dtype its
tensors are, and which plain globals a function names; attributes of classes are taken as fixed.
Where something has no such key (a closure, an object of unknown kind, a tensor that is not
registered) there is none, and nothing is kept: better slow than another client's.
"""

import functools
import hashlib
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..data import Batch

V = TypeVar("V")

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_BUILTIN = (types.BuiltinFunctionType, types.MethodDescriptorType)


class NoKeyError(Exception):
    """Say what it is that cannot be told from another of its kind."""


def key_of(value: object) -> Hashable:
    """Return what decides how ``value`` computes, without the numbers in its tensors.

    Modules, functions without closures, classes, and containers of plain values have a key.

    Raises:
        NoKeyError: where something has none, naming it.

    >>> key_of(nn.Linear(3, 2)) == key_of(nn.Linear(3, 2)) != key_of(nn.Linear(3, 4))
    True
    """
    if isinstance(value, nn.Module):
        return _module_key(value)
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, _BUILTIN):
        return value
    if isinstance(value, type):
        return _named(value)
    if isinstance(value, types.FunctionType) and not value.__closure__:
        defaults = key_of(value.__defaults__), key_of(value.__kwdefaults__)
        return _named(value), *defaults, _globals_key(value)
    if type(value) in (tuple, list):
        return type(value), tuple(map(key_of, value))  # type: ignore[call-overload]  # is iterable
    if type(value) in (dict, OrderedDict):
        items = value.items()  # type: ignore[attr-defined]  # is a dictionary
        return type(value), tuple((key_of(name), key_of(one)) for name, one in items)
    if type(value) is set and not value:
        return set
    if type(value) is functools.partial:
        return functools.partial, *map(key_of, (value.func, value.args, value.keywords))
    raise NoKeyError(f"{type(value).__name__} {getattr(value, '__qualname__', '')}".strip())


def kind_key(model: nn.Module, loss_fn: object, records: Batch) -> Hashable:
    """Return the key of ``model`` and ``loss_fn`` on records of such shape, dtype and device.

    None where there is none.
    """
    told = [(tuple(one.shape[1:]), one.dtype, one.device) for one in records]
    try:
        return key_of(model), key_of(loss_fn), *told
    except NoKeyError:
        return None


def values_of(model: nn.Module) -> bytes:
    """Return the SHA-256 of all parameters and buffers of ``model``."""
    digest = hashlib.sha256()
    for value in (*model.parameters(), *model.buffers()):
        plain = value.detach().contiguous().cpu().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _module_key(module: nn.Module) -> Hashable:
    told: list[Hashable] = [_named(type(module))]
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers"):
            tensors = [
                (own, None if one is None else (*_tensor_key(one), one.requires_grad))
                for own, one in value.items()
            ]
            told.append((name, tuple(tensors)))
        elif name == "_non_persistent_buffers_set":
            told.append((name, frozenset(value)))
        else:
            told.append((name, key_of(value)))
    return tuple(told)


def _globals_key(function: types.FunctionType) -> Hashable:
    """Return the plain values outside of ``function`` that it names; torch's own change none."""
    if function.__module__.partition(".")[0] == "torch":
        return None
    held = function.__globals__
    named = {name: held[name] for name in function.__code__.co_names if name in held}
    settled = (types.ModuleType, types.FunctionType, type, *_BUILTIN)
    return tuple(
        (name, key_of(value)) for name, value in named.items() if not isinstance(value, settled)
    )


def _tensor_key(value: Tensor) -> tuple[Hashable, ...]:
    if type(value) not in (Tensor, nn.Parameter):
        raise NoKeyError(f"tensor of kind {type(value).__name__}")
    return tuple(value.shape), value.dtype, value.device


def _named(kind: Any) -> Hashable:
    if "<locals>" in kind.__qualname__ or kind.__qualname__.startswith("Parametrized"):
        raise NoKeyError(f"{kind.__qualname__}, which may be made anew each time")
    found: Hashable = kind
    return found


class Kept(Generic[V]):
    """Values by key: the last ``size`` that were used; safe to share between threads.

    >>> squares = Kept(2)
    >>> squares.get_or_make(3, lambda: 9), squares.get_or_make(3, lambda: 0)
    (9, 9)
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._lock = threading.Lock()

    def get_or_make(self, key: Hashable, make: Callable[[], V]) -> V:
        """Return the value of ``key``; of one that is new, or None, what ``make`` returns."""
        if key is None:
            return make()
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            self._values[key] = value
            while len(self._values) > self._size:
                self._values.popitem(last=False)
        return value

    def __len__(self) -> int:
        return len(self._values)
