"""Where blocks are answered: in this process, or in Ray actors."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from flwr.app import UserConfig
from flwr.clientapp import ClientApp

from .mailbox import Mailbox
from .parcels import Settings
from .questions import Block, Delivery, failed
from .runner import Runner

CLOSED = "the grid is closed"

Deliver = Callable[[Delivery], None]


class Backend(Protocol):
    """Answers blocks, and delivers what they came to.

    Attributes:
        workers: how many processes work on them; 0: this one.
    """

    workers: int

    @property
    def fault(self) -> str:
        """Why nothing works any more."""

    def submit(self, blocks: Sequence[Block]) -> None:
        """Take blocks to work on."""

    def give_up(self) -> None:
        """Stop work that nobody waits for any more."""

    def close(self) -> None:
        """Stop all work."""


def backend_of(
    app: ClientApp,
    mail: Mailbox,
    lock: threading.Condition,
    *,
    num_nodes: int,
    run_config: UserConfig,
    workers: int | Literal["auto"],
    ray_address: str,
    gpus_per_worker: float,
    client_timeout_s: float | None,
) -> Backend:
    """Return what answers the blocks of ``mail``; arguments as of ``CohortGrid``."""

    def deliver(delivery: Delivery) -> None:
        mail.take(delivery)
        with lock:
            if blocks := mail.blocks():
                backend.submit(blocks)

    backend: Backend = InProcess(app, deliver)
    if workers != 0:
        from .actors import Actors  # with Ray, which takes a second to import

        backend = Actors(
            app,
            Settings(num_nodes, run_config),
            workers=workers,
            ray_address=ray_address,
            gpus_per_worker=gpus_per_worker,
            wants_gpus=run_config.get("device") != "cpu",
            run_id=lambda: mail.run_id,
            deliver=deliver,
            is_wanted=mail.is_wanted,
            lock=lock,
            client_timeout_s=client_timeout_s,
        )
    return backend


class InProcess:
    """Answer blocks at once, in the thread that submits them."""

    workers = 0

    def __init__(self, app: ClientApp, deliver: Deliver) -> None:
        self.fault = ""
        self._runner = Runner(app)
        self._deliver = deliver
        self._waiting: deque[Block] = deque()
        self._is_busy = False

    def submit(self, blocks: Sequence[Block]) -> None:
        """Answer blocks; a delivery may submit more of them."""
        self._waiting.extend(blocks)
        if self._is_busy:
            return
        self._is_busy = True
        try:
            while self._waiting:
                block = self._waiting.popleft()
                try:
                    answers, part = self._runner.answers(block.questions, block.reducer)
                except Exception as err:  # of a reducer: clients' own are answers
                    self._deliver(failed(block, f"the worker raised {err!r}"))
                else:
                    self._deliver((block, answers, part))
        finally:
            self._waiting.clear()
            self._is_busy = False

    def give_up(self) -> None:
        """Nothing is ever left to do."""

    def close(self) -> None:
        """Answer nothing any more."""
        self.fault = CLOSED
