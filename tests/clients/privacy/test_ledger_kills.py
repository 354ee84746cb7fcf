"""kill -9 at any moment: the ledger holds at least what was released."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLED = Path(__file__).with_name("killed_releases.py")
ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forks")


def kill(folder: Path, kills: int, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(KILLED), str(folder), str(kills), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_after_two_hundred_kills_the_ledger_holds_at_least_what_was_released(tmp_path):
    done = kill(tmp_path, 200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("200 kills")


def test_to_book_after_the_release_is_caught(tmp_path):
    """A third of the kills falls into a round: that all of 60 miss has a chance below 1e-10."""
    done = kill(tmp_path, 60, "late")
    assert done.returncode == 1
    assert "releases were made" in done.stderr
