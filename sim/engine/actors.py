"""Blocks answered in Ray actors."""

import os
from collections.abc import Sequence
from typing import Any

import ray
from flwr.clientapp import ClientApp

from ...config import DATA_ENVIRONMENT_VARIABLE
from .cluster import Workers, enter
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
        self._place = enter(
            workers, address=ray_address, gpus_per_worker=gpus_per_worker, wants_gpus=wants_gpus
        )
        self.workers = self._place.size
        variable = DATA_ENVIRONMENT_VARIABLE
        environment = {variable: os.environ[variable]} if variable in os.environ else {}
        options = {
            **self._place.options,
            "max_restarts": 0,
            "concurrency_groups": {"asides": 1},  # answers while a client runs
        }
        aside = ray.method(concurrency_group="asides")
        methods = {"in_progress": aside(Worker.in_progress), "skip": aside(Worker.skip)}
        kind = type("Worker", (Worker,), methods)
        actor: Any = ray.remote(**options)(kind)
        held = ray.put(app)  # pickled once, whatever it holds

        def start() -> Any:
            return actor.remote(held, settings, os.getcwd(), environment)

        try:
            self._pool = Pool(start, size=self.workers, **pool)
        except BaseException:
            self._place.leave()
            raise

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
        """Stop the actors, and a Ray of our own."""
        try:
            self._pool.close()
        finally:
            self._place.leave()
