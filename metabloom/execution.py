"""How a run is carried out: in how many processes, and by which kernel; decided before it starts.

Neither changes what is computed, beyond rounding.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal, cast

from .config import RunConfig
from .errors import ConfigError
from .keys import key_of

Kernel = Literal["eager", "compiled", "vmap"]
Device = Literal["cpu", "cuda"]

AUTO: Final = "auto"
COHORT_KEYS = ("workers", "ray_address", "gpus_per_worker", "client_timeout_s")
FEWEST_CLIENTS = 8  # of a round: with fewer, most workers would wait for the others
FEWEST_UPDATES = 2000  # of a run: fewer are over before Ray has started
COMPILED_FROM = 6000  # local steps of one worker: fewer do not earn what compiling costs


@dataclass(frozen=True)
class Machine:
    """Where a run is started.

    Attributes:
        device: where clients compute.
        cores: that this process may use; at least 1.
        gpus: that torch finds.
    """

    device: Device
    cores: int = 1
    gpus: int = 0


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def workers_on(gpus: int, share: float) -> int:
    """Return how many workers of ``share`` GPUs each there is place for; a share lies on one GPU.

    >>> workers_on(2, 0.4), workers_on(4, 2.0)
    (4, 2)
    """
    return int(1 / share + 1e-9) * gpus if share <= 1 else int(gpus / share + 1e-9)


def resolved(config: RunConfig, machine: Machine) -> RunConfig:
    """Return ``config`` as the cohort engine carries it out: every "auto" of it is decided.

    Only the workers of a run that joins a Ray cluster stay "auto": the cluster knows its cores.
    """
    workers = workers_of(config, machine)
    kernel = kernel_of(config, machine.device, machine.cores if workers is None else workers)
    chosen = {"engine": "cohort", "kernel": kernel}
    chosen["workers"] = AUTO if workers is None else str(workers)
    return config.model_copy(update=chosen)


def workers_of(config: RunConfig, machine: Machine) -> int | None:
    """Return the number of workers, 0: in this process; None: one for each core of a cluster.

    "auto" is 0 below ``FEWEST_CLIENTS`` clients a round or ``FEWEST_UPDATES`` training replies in
    all, and where there is one core; else one for each core, on GPUs one for each GPU or share of
    one. Keys that only workers heed (``ray-address``, ``gpus-per-worker``, ``client-timeout-s``)
    ask for workers however small the run is.

    >>> workers_of(RunConfig.read({"clients-per-round": 100}), Machine("cpu", cores=4))
    4
    """
    if config.workers != AUTO:
        return int(config.workers)
    if config.ray_address:
        return None
    if machine.device == "cuda":
        most = max(workers_on(machine.gpus, config.gpus_per_worker or 1.0), 1)
    else:
        most = machine.cores
    if config.gpus_per_worker or config.client_timeout_s:
        return most
    is_small = (
        config.clients_per_round < FEWEST_CLIENTS
        or config.rounds * config.clients_per_round < FEWEST_UPDATES
    )
    return 0 if is_small or most == 1 else most


def kernel_of(config: RunConfig, device: Device, workers: int) -> Kernel:
    """Return the kernel of the cohort engine's clients.

    "auto" is "vmap" on a GPU; on a CPU "compiled" where each of ``workers`` (0 counts as 1) is to
    make ``COMPILED_FROM`` local steps or more, else "eager".

    >>> kernel_of(RunConfig.read({}), "cpu", workers=0)
    'eager'
    """
    if config.kernel != AUTO:
        return config.kernel
    if device == "cuda":
        return "vmap"
    return "compiled" if local_steps(config) >= COMPILED_FROM * max(workers, 1) else "eager"


def kernel_under_flower(config: RunConfig) -> Kernel:
    """Return the kernel of clients under Flower's own engine, which asks one client at a time.

    "auto" is "eager": a SuperNode answers each message in a new process, which would compile anew.

    Raises:
        ConfigError: where it is "vmap".
    """
    if config.kernel == "vmap":
        raise ConfigError(
            "kernel = 'vmap' computes many clients at once, and Flower's engine asks one at a "
            "time: set engine = 'cohort', or kernel = 'compiled' or 'eager'"
        )
    return "eager" if config.kernel == AUTO else cast(Kernel, config.kernel)


def idle_under_flower(config: RunConfig) -> list[str]:
    """Return the keys that ``config`` changes and Flower's own engine does not heed.

    >>> idle_under_flower(RunConfig.read({"workers": 4}))
    ['workers']
    """
    defaults = RunConfig.read({})
    changed = [name for name in COHORT_KEYS if getattr(config, name) != getattr(defaults, name)]
    return [key_of(name) for name in changed]


def local_steps(config: RunConfig) -> int:
    """Return how many local steps the training of a run takes at least.

    Each epoch counts as one step, whatever its number of batches: that depends on the data.
    """
    updates = config.rounds * config.clients_per_round
    return updates * config.local_epochs * config.local_steps * config.inner_steps


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Run a block in which torch adds up on one thread: the same bits on any number of cores."""
    import torch  # takes seconds, which the configuration alone is not to cost

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
