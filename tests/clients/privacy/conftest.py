"""Where the ledgers of these tests lie."""

from pathlib import Path

import pytest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "anna.jsonl"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledgers" / "anna.jsonl"  # the folder is for the ledger to make
