"""The scripts are made for processes of their own: what they set in one is put back."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def level_of_the_log() -> Iterator[None]:
    """Put back what the scripts set for their own process."""
    logger = logging.getLogger("flwr")
    level = logger.level
    yield
    logger.setLevel(level)
