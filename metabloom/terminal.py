"""What the commands that compute share: their settings, their signals, and the log above a bar."""

import logging
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .config import RunConfig
from .errors import ConfigError
from .keys import parse_value


def given(
    config: Path | None, assignments: Sequence[str] | None, options: Mapping[str, str | None]
) -> dict[str, object]:
    """Return the keys that a user gave: those of a TOML file, then of --set, then of options.

    Args:
        config: the file; None: there is none.
        assignments: texts key=value.
        options: None: not given.

    Raises:
        ConfigError: where the file cannot be read, or a text is no assignment.
    """
    values = RunConfig.read_toml(config) if config else {}
    values |= dict(assignment(text) for text in assignments or [])
    return values | {key: value for key, value in options.items() if value is not None}


def assignment(text: str) -> tuple[str, object]:
    """Return the key and the value of ``key=value``; raise ConfigError for another text."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ConfigError(f"--set {text!r}: write key=value, e.g. --set rounds=20")
    return key.strip(), parse_value(value.strip())


def progress_bar(console: Console) -> Progress:
    """Return a progress bar that shows a ``note`` of each task at the end of its line."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    note = TextColumn("{task.fields[note]}")
    return Progress(*columns, TimeRemainingColumn(), note, console=console)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C: the last whole round is saved, and the process ends."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def log_above_the_bar(level: int) -> Iterator[None]:
    """Let Flower's log through from ``level`` on.

    Its handler writes to the stderr that there was when it was imported; the bar redirects today's.
    """
    logger = logging.getLogger("flwr")
    logger.setLevel(level)
    handlers = [one for one in logger.handlers if isinstance(one, logging.StreamHandler)]
    streams = [handler.stream for handler in handlers]
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler, stream in zip(handlers, streams, strict=True):
            handler.setStream(stream)
