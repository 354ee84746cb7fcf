"""Several runs at once, each in a process of its own with one thread.

Processes are forked from a server that has only imported what they need, so that they start in no
time, and are kept: one that loaded a data set has it for the next run. What they find lies on the
disk, where ``trials`` puts it; nothing but configurations and errors passes between processes.
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from .config import RunConfig
from .errors import MetabloomError
from .keys import Scalar
from .trials import finished, run_once

IN_ONE_PROCESS: Mapping[str, Scalar] = {"workers": "0"}


@contextmanager
def trial_pool(
    workers: int, root: Path, log_level: int, *, on_end: Callable[[], None]
) -> Iterator[Callable[[RunConfig], Callable[[], dict[str, Any]]]]:
    """Yield ``submit(config)``, which returns a function that waits for the results of a run.

    Where the block is left by an error, runs that are under way are stopped; each goes on from its
    checkpoint when it is asked for again.

    Args:
        workers: processes, >= 1.
        root: where runs have their folders.
        log_level: of Flower's log in these processes.
        on_end: called, in this process, when a run is over.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin, initargs=(log_level,)
    )

    def submit(config: RunConfig) -> Callable[[], dict[str, Any]]:
        if (results := finished(config, root)) is not None:
            on_end()
            return lambda: results
        future = pool.submit(_play, dict(config.to_flower()), str(root))
        future.add_done_callback(_told(on_end))
        return lambda: _results(future, config, root)

    try:
        yield submit
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown()


def _told(on_end: Callable[[], None]) -> Callable[[Future[None]], None]:
    return lambda future: None if future.cancelled() else on_end()


def _results(future: Future[None], config: RunConfig, root: Path) -> dict[str, Any]:
    try:
        future.result()
    except BrokenProcessPool as err:
        raise MetabloomError(
            f"a process that ran {config.strategy} or another method ended of itself ({err}): was "
            "memory short? the same command goes on; fewer --workers need less"
        ) from err
    results = finished(config, root)
    if results is None:
        raise MetabloomError(f"{config.strategy}: its run left no results in {str(root)!r}")
    return results


def _play(values: Mapping[str, Scalar], root: str) -> None:
    """Do one run, in a process of the pool."""
    run_once(RunConfig.read({**values, **IN_ONE_PROCESS}), Path(root))


def _begin(log_level: int) -> None:
    """Make this process one of the pool's: it ends by its parent alone, and with it."""
    torch.set_num_threads(1)  # the others have the other cores
    logging.getLogger("flwr").setLevel(log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which decides
    parent = multiprocessing.parent_process()
    if parent is not None:
        # Else, with the parent killed, it would write into folders that the next one goes on with.
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(parent: int) -> None:
    wait([parent])
    os._exit(1)
