"""Blocks answered in Ray actors."""

import atexit
import os
from collections.abc import Sequence
from typing import Any

import ray
from flwr.clientapp import ClientApp

from ...config import DATA_ENVIRONMENT_VARIABLE
from ...errors import ConfigError
from .cluster import Place, Workers, enter
from .parcels import Settings
from .pool import Pool
from .questions import Block
from .worker import Worker


class Actors:
    """Answer blocks in Ray actors, see ``Pool``.

    Args:
        app: of every node.
        settings: what nodes have in common.
        workers: >= 1, or "auto".
        ray_address: see ``cluster.enter``, and for the next two.
        gpus_per_worker: of each.
        wants_gpus: or none.
        pool: arguments of ``Pool``.
    """

    def __init__(
        self,
        app: ClientApp,
        settings: Settings,
        *,
        workers: Workers,
        ray_address: str,
        gpus_per_worker: float,
        wants_gpus: bool,
        **pool: Any,
    ) -> None:
        place = enter(
            workers, address=ray_address, gpus_per_worker=gpus_per_worker, wants_gpus=wants_gpus
        )
        self._place: Place | None = place
        self.workers = place.size
        try:
            self._pool = _pool_at(place, app, settings, pool)
        except BaseException:
            place.leave()
            raise
        atexit.register(self.close)  # before Ray's own: a thread that waits would start another

    @property
    def fault(self) -> str:
        """Why nothing works any more."""
        return self._pool.fault

    def submit(self, blocks: Sequence[Block]) -> None:
        """Hand blocks to the actors."""
        self._pool.submit(blocks)

    def give_up(self) -> None:
        """Stop work that nobody waits for."""
        self._pool.give_up()

    def close(self) -> None:
        """Stop the actors, and a Ray of our own; may be called again."""
        atexit.unregister(self.close)
        place, self._place = self._place, None
        try:
            self._pool.close()
        finally:
            if place is not None:
                place.leave()


def _pool_at(place: Place, app: ClientApp, settings: Settings, pool: dict[str, Any]) -> Pool:
    variable = DATA_ENVIRONMENT_VARIABLE
    environment = {variable: os.environ[variable]} if variable in os.environ else {}
    options = {
        **place.options,
        "max_restarts": 0,
        "concurrency_groups": {"asides": 1},  # answers while a client runs
    }
    aside = ray.method(concurrency_group="asides")
    methods = {"in_progress": aside(Worker.in_progress), "skip": aside(Worker.skip)}
    kind = type("Worker", (Worker,), methods)
    actor: Any = ray.remote(**options)(kind)
    try:
        held = ray.put(app)  # pickled once, whatever it holds
    except TypeError as err:
        raise ConfigError(
            f"the ClientApp cannot be sent to other processes ({err}): it, or what its "
            "functions refer to, holds something like a lock or an open file; make that inside "
            "the functions, or set workers = 0"
        ) from err

    def start() -> Any:
        return actor.remote(held, settings, os.getcwd(), environment)

    return Pool(start, size=place.size, **pool)
