"""The cohort engine inside Flower's own simulation, which keeps a Ray in the same process."""

import time

from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid

from ..errors import MetabloomError

START_S = 120.0
POLL_S = 0.1


def await_ray_of(grid: Grid, *, timeout_s: float = START_S) -> None:
    """Wait until the Ray of Flower's simulation runs, where ``grid`` is that of one.

    Flower starts it in another thread while the ServerApp already runs. A process has one Ray: two
    threads that start one get in each other's way.

    Raises:
        MetabloomError: after ``timeout_s`` seconds.
    """
    if not isinstance(grid, InMemoryGrid):
        return
    import ray  # takes a second, and only a run of that kind needs it here

    until = time.monotonic() + timeout_s
    while not ray.is_initialized():
        if time.monotonic() > until:
            raise MetabloomError(
                f"Flower's simulation has not started its Ray within {timeout_s:g} s; its log says "
                "why, and workers = 0 needs no Ray"
            )
        time.sleep(POLL_S)
