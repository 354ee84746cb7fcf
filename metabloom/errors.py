"""Errors that a user can act on: what failed, the value received, why it matters, what to do."""

import difflib
from collections.abc import Iterable

BUDGET_EXHAUSTED = "the privacy budget of this client is exhausted"


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


class CheckpointError(MetabloomError):
    """A checkpoint cannot be written, or none of those that are there can be read."""


class PrivacyError(MetabloomError):
    """Something would cost more privacy than was booked for it."""


class RefusedError(PrivacyError):
    """A private client refuses what it is asked for; the text says nothing of its records."""


class BudgetExhaustedError(PrivacyError):
    """The privacy budget of a data set is spent: its text is a constant and says nothing of it."""

    def __init__(self) -> None:
        super().__init__(BUDGET_EXHAUSTED)


class LedgerError(PrivacyError):
    """A privacy ledger cannot be read, or is not the one that it should be: nothing is released."""


def shortened(text: object, longest: int = 500) -> str:
    """Return a text that others wrote, cut to so many characters and made fit for any file.

    >>> shortened("abcdef", longest=4)
    'abcd...'
    """
    whole = str(text).encode(errors="replace").decode()
    return whole if len(whole) <= longest else f"{whole[:longest]}..."


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for a name that is not among ``known``, with the nearest one that is.

    >>> print(unknown_name("data set", "omnigolt", ["digits", "omniglot"]))
    unknown data set 'omnigolt': did you mean 'omniglot'? Known: digits, omniglot
    """
    names = sorted(known)
    hint = nearest(name, names)
    return ConfigError(f"unknown {kind} {name!r}: {hint}Known: {', '.join(names)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'? "`` for the nearest of ``known``, or nothing where none is near.

    >>> nearest("inner-lrr", ["inner-lr", "rounds"])
    "did you mean 'inner-lr'? "
    """
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""
