"""One strategy, one ClientApp: the same model in process, on actors and on Flower's own engine."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from metabloom.sim import CohortGrid
from tests.app.engine_cases import NODES, STRATEGIES, app_of, cohort_app, model_of

SCRIPT = Path(__file__).with_name("engine_cases.py")
ROOT = Path(__file__).parents[2]
OURS = [case for case in STRATEGIES if "flowers" not in case]
Model = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the models of Flower's own engine."""
    out = tmp_path_factory.mktemp("flowers")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "FLWR_HOME": str(out),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, SCRIPT, out / "models"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out / "models"


@pytest.fixture(scope="module")
def here() -> dict[str, Model]:
    """Return the model of each case, in this process."""
    with CohortGrid(app_of(), num_nodes=NODES) as grid:
        return {case: model_of(case, grid) for case in STRATEGIES}


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    """Keep one Ray for the module: starting it takes seconds."""
    with CohortGrid(app_of(), num_nodes=1, workers=2):
        yield


def difference(one: Model, other: Model) -> float:
    assert sorted(one) == sorted(other)
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


@pytest.mark.parametrize("case", STRATEGIES)
def test_flowers_own_engine_gives_the_same_model(case: str, flowers: Path, here: dict[str, Model]):
    theirs = load_file(flowers / f"{case}.safetensors")
    gap = difference(theirs, here[case])
    if case.endswith("in-order"):
        assert gap == 0.0
    else:  # replies come in any order there, and sums round
        assert gap < (1e-5 if case in OURS else 1e-6)


def test_training_changes_the_model_in_every_case(here: dict[str, Model]):
    values = [np.concatenate([v.ravel() for v in model.values()]) for model in here.values()]
    for number, one in enumerate(values[:-3]):  # the last three are those before, in order
        for other in values[number + 1 : -3]:
            assert np.abs(one - other).max() > 1e-3


@pytest.mark.parametrize("workers", [1, 2])
def test_actors_give_the_same_model_to_the_bit(one_ray, workers: int, here: dict[str, Model]):
    with CohortGrid(app_of(), num_nodes=NODES, workers=workers) as grid:
        for case in STRATEGIES:
            assert difference(model_of(case, grid), here[case]) == 0.0, case


@pytest.mark.parametrize("case", OURS)
@pytest.mark.parametrize("kernel", ["compiled", "vmap"])
def test_every_kernel_gives_the_same_model(kernel: str, case: str, here: dict[str, Model]):
    with CohortGrid(cohort_app(case, kernel), num_nodes=NODES) as grid:
        assert difference(model_of(case, grid), here[case]) < 1e-5


def test_kernels_in_actors_give_what_they_give_here(one_ray):
    models = []
    for workers in (0, 2):
        with CohortGrid(cohort_app("fedavg", "vmap"), num_nodes=NODES, workers=workers) as grid:
            models.append(model_of("fedavg", grid))
    assert difference(*models) == 0.0
