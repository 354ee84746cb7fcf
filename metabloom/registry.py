"""Names for strategies, clients, models and data sets: a registry each, filled by discovery."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from .errors import ConfigError, unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """A table from registry names to values that refuses a second owner of a name.

    >>> sizes = Registry[int]("size")
    >>> sizes.add("small", 1)
    >>> sizes["small"]
    1
    >>> sizes["smal"]
    Traceback (most recent call last):
    metabloom.errors.ConfigError: unknown size 'smal': did you mean 'small'? Known: small
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, value: T) -> None:
        """Give ``name`` to ``value``; raise ConfigError where another value has it already."""
        if name in self._entries and self._entries[name] != value:
            raise ConfigError(f"{self.kind} {name!r} is registered twice: choose another name")
        self._entries[name] = value

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that gives ``name`` to what it decorates."""

        def decorate(value: T) -> T:
            self.add(name, value)
            return value

        return decorate

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)


def discover(package: str, path: list[str]) -> None:
    """Import every public module in the folders ``path`` of ``package``, so that it registers."""
    for module in sorted(pkgutil.iter_modules(path), key=lambda found: found.name):
        if not module.name.startswith("_"):
            importlib.import_module(f"{package}.{module.name}")
