"""How local training is computed: which kernel, and the compiler behind one of them."""

import functools
from collections.abc import Callable
from logging import WARNING
from types import CodeType, FunctionType
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from flwr.common import log

from ..errors import ConfigError

Kernel = Literal["eager", "compiled", "vmap"]
Key = TypeVar("Key")
Value = TypeVar("Value")
Function = TypeVar("Function", bound=Callable[..., Any])

# Compiled in this process: workers of the compiler would stay in every actor that compiles.
OPTIONS: dict[str, Any] = {"compile_threads": 1}


def compiled(
    function: Function, *, on_failure: Callable[[Exception], None] | None = None
) -> Function:
    """Return ``function`` compiled by torch.compile; the same results up to rounding.

    For pure functions of tensors and of dicts and tuples of them. Each combination of shapes and
    dtypes is compiled once, when it is first seen, which takes seconds to a minute; torch keeps
    what it made on disk (TORCHINDUCTOR_CACHE_DIR), and a later process reads it in a few seconds.

    Where it cannot be compiled (no C++ compiler, an operation that the compiler does not know), one
    warning says so, and ``function`` itself runs from then on. What ``function`` raises, this does.

    Args:
        function: to compile.
        on_failure: called once with what the compiler raised, in place of the warning.
    """
    # The compiler counts recompilations by code object: each function gets one of its own.
    fast = torch.compile(_alone(function), dynamic=False, fullgraph=True, options=OPTIONS)
    is_broken = False

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        nonlocal is_broken
        if is_broken:
            return function(*arguments)
        try:
            return fast(*arguments)
        except (MemoryError, torch.OutOfMemoryError):  # the next call may find more
            return function(*arguments)
        except Exception as err:  # the compiler raises all kinds
            result = function(*arguments)  # raises where it is the input that is wrong
            is_broken = True
            if on_failure is None:
                _warn_once(getattr(function, "__qualname__", repr(function)), first_line(err))
            else:
                on_failure(err)
            return result

    return cast(Function, call)


class Few(dict[Key, Value]):
    """A dict that forgets all that it holds when it would hold more than ``most``."""

    most = 64

    def __setitem__(self, key: Key, value: Value) -> None:
        if len(self) >= self.most and key not in self:
            self.clear()
        super().__setitem__(key, value)


def check_kernel(kernel: str) -> None:
    """Raise ConfigError where ``kernel`` is none that there is."""
    if kernel not in get_args(Kernel):
        raise ConfigError(f"kernel = {kernel!r}: must be one of {', '.join(get_args(Kernel))}")


def first_line(err: Exception) -> str:
    """Return the kind of ``err`` and the first line of its text, cut to a length for a log."""
    text = next((line.strip() for line in str(err).splitlines() if line.strip()), "")
    return f"{type(err).__name__}: {text}"[:300]


def _alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function with a code object that no other function has."""
    if not isinstance(function, FunctionType):
        return _alone(lambda *arguments: function(*arguments))
    code: CodeType = function.__code__.replace()
    names, defaults, closure = function.__globals__, function.__defaults__, function.__closure__
    twin = FunctionType(code, names, function.__name__, defaults, closure)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


@functools.lru_cache(maxsize=256)
def _warn_once(what: str, reason: str) -> None:
    log(WARNING, "%s cannot be compiled (%s): it goes on without, more slowly", what, reason)
