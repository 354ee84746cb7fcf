"""One Ray for all tests of the engine in a process, since starting it takes seconds."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator

import pytest

from metabloom.sim import CohortGrid
from tests.sim.engine.clients import app


@pytest.fixture(scope="package")
def ray_here() -> Iterator[None]:
    """A Ray of four cores in this process: grids of two workers start at once."""
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.ERROR,
        )
    yield
    ray.shutdown()


@pytest.fixture
def grid_of(ray_here: None) -> Iterator[Callable[..., CohortGrid]]:
    """Return what makes grids of two workers, which are closed in the end."""
    made: list[CohortGrid] = []

    def make(num_nodes: int = 8, workers: int = 2, **options: object) -> CohortGrid:
        options.setdefault("app", app)
        grid = CohortGrid(num_nodes=num_nodes, workers=workers, **options)  # type: ignore[arg-type]
        made.append(grid)
        return grid

    yield make
    for grid in made:
        grid.close()


@pytest.fixture(scope="package")
def grid(ray_here: None) -> Iterator[CohortGrid]:
    """One grid of 200 nodes and two workers, which a test may kill: they are replaced."""
    with CohortGrid(app, num_nodes=200, workers=2) as made:
        yield made


@pytest.fixture(scope="package")
def impatient(ray_here: None) -> Iterator[CohortGrid]:
    """One of 80 nodes and two workers, whose clients have 1.5 seconds each."""
    with CohortGrid(app, num_nodes=80, workers=2, client_timeout_s=1.5) as made:
        yield made
