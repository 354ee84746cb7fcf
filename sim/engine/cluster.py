"""Where the engine's actors live: a Ray of our own, one that runs already, or a cluster."""

import logging
import math
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import ray

from ...errors import ConfigError, MetabloomError
from ...execution import cores as cores_here
from ...execution import workers_on

Workers = int | Literal["auto"]
ANSWER_S = 10.0
GRAIN = 10_000  # Ray counts GPUs in ten-thousandths
OWN: dict[str, Any] = {  # of a Ray that only this run uses
    "include_dashboard": False,
    # It would keep every task for a dashboard that is not there: 0.1 MB a round of 32 blocks.
    "_system_config": {"task_events_report_interval_ms": 0},
}


@dataclass(frozen=True)
class Place:
    """Where actors are started.

    Attributes:
        size: how many actors.
        options: of each, for Ray.
        is_ours: whether this process connected to Ray for it, and is to disconnect.
    """

    size: int
    options: dict[str, Any]
    is_ours: bool

    def leave(self) -> None:
        """Disconnect; a Ray of our own ends with all its processes."""
        if self.is_ours and ray.is_initialized():
            ray.shutdown()


def enter(
    workers: Workers, *, address: str = "", gpus_per_worker: float = 0.0, wants_gpus: bool = True
) -> Place:
    """Return a place for so many workers.

    Args:
        workers: >= 1, or "auto": one for each processor core.
        address: of a Ray cluster, "auto" for one on this machine; empty: the Ray of this process,
            started where there is none.
        gpus_per_worker: >= 0, may be a fraction; 0: all GPUs shared out equally, at most one each.
        wants_gpus: False hides all GPUs from the workers.

    Raises:
        ConfigError: where the cluster cannot be reached, or has less than was asked for.
    """
    is_ours, is_shared = not ray.is_initialized(), bool(address)
    if address and not is_ours:
        raise ConfigError(
            f"ray-address = {address!r}: this process is connected to a Ray already and can have "
            "one only; leave the address out, inside Flower's simulation too"
        )
    if is_ours:
        count = cores_here() if workers == "auto" else workers
        _connect(address, None if address else count)
    try:
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        cores, gpus = int(resources.get("CPU", 0)), resources.get("GPU", 0.0)
        size = max(1, cores) if workers == "auto" else workers
        if is_shared and size > cores:
            raise ConfigError(
                f"workers = {size}: the Ray cluster at {address!r} has {cores} processor cores, "
                "and each worker needs one; lower workers or add machines"
            )
        share = _share_of_gpus(size, gpus, gpus_per_worker) if wants_gpus else 0.0
        # In a Ray that others use, or Flower itself, cores may be taken for good: we do not wait.
        return Place(size, {"num_cpus": int(is_ours), "num_gpus": share}, is_ours)
    except BaseException:
        if is_ours:
            ray.shutdown()
        raise


def _share_of_gpus(size: int, gpus: float, wanted: float) -> float:
    """Return the share of a worker: what is less than a GPU lies on one GPU."""
    if not wanted:
        return int(GRAIN / math.ceil(size / gpus)) / GRAIN if gpus >= 1 else 0.0
    if size > workers_on(int(gpus), wanted):
        raise ConfigError(
            f"gpus-per-worker = {wanted:g} for {size} workers: Ray has {gpus:g} GPUs; lower one of "
            "the two"
        )
    return wanted


def _connect(address: str, cores: int | None) -> None:
    # An empty machine reports its use and warns of variables: neither is our user's matter.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    here: dict[str, Any] = {} if address else {"num_cpus": cores, **OWN}
    if address and address != "auto":
        _check_answers(address)
    try:
        with _signals_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                **here,
            )
    except Exception as err:
        if address and isinstance(err, ConnectionError | ValueError):
            raise _nobody_at(address, err) from err
        raise MetabloomError(
            f"Ray does not start: {type(err).__name__}: {err}; workers = 0 needs no Ray"
        ) from err


def _check_answers(address: str) -> None:
    """Raise ConfigError where nothing listens: Ray itself would end the whole process."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()) or "//" in host:
        raise ConfigError(
            f"ray-address = {address!r}: 'auto', or host:port of the cluster's head is needed, as "
            "'ray start --head' prints it"
        )
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except OSError as err:
        raise _nobody_at(address, err) from err


def _nobody_at(address: str, err: Exception) -> ConfigError:
    return ConfigError(
        f"ray-address = {address!r}: no Ray cluster answers there ({err}); start one by 'ray start "
        "--head', or leave the address out"
    )


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Keep the handler of SIGTERM, in whose place Ray puts its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
