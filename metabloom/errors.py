"""Errors that a user can act on: what failed, the value received, why it matters, what to do."""

import difflib
from collections.abc import Iterable


class MetabloomError(Exception):
    """Base of every error that this project raises on purpose.

    The command line prints it without a traceback.
    """


class ConfigError(MetabloomError, ValueError):
    """A setting has a value that cannot work, or a name that nobody knows."""


class DataError(MetabloomError, ValueError):
    """A data set cannot be turned into the clients that were asked for."""


class MissingDataError(DataError, FileNotFoundError):
    """A data file is not there: says which one, where it was looked for and how to get it."""


class ModelError(MetabloomError, ValueError):
    """A model does not fit its data, or cannot be trained in the way that was asked for."""


class WireError(MetabloomError, ValueError):
    """A message does not hold what the wire contract promises."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for a name that is not among ``known``, with the nearest one that is.

    >>> print(unknown_name("data set", "omnigolt", ["digits", "omniglot"]))
    unknown data set 'omnigolt': did you mean 'omniglot'? Known: digits, omniglot
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return ConfigError(f"unknown {kind} {name!r}: {hint}Known: {', '.join(names)}")
