"""Data for every test: the real sets where they are, and tiny synthetic ones everywhere."""

import os
from pathlib import Path

import pytest

from tests.sim.synthetic_data import write_all
from tests.unpack_data import unpack

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Return the folder of the real data sets, or skip."""
    if chosen := os.environ.get("METABLOOM_DATA"):
        return Path(chosen)
    packed = Path(__file__).parents[2] / "shared" / "data"
    if not packed.is_dir():
        pytest.skip("the real data sets are not here: set METABLOOM_DATA to their folder")
    return unpack(packed, REPOSITORY / ".cache" / "data")


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny synthetic stand-in for each set, in that set's own formats."""
    return write_all(tmp_path_factory.mktemp("data"))
