"""The simulator as a configuration describes it: one node for each client of the federation."""

import torch

from .client_app import app
from .config import RunConfig
from .errors import ConfigError
from .execution import AUTO, Device, Machine, cores, resolved
from .sim import CohortGrid
from .task import device_of, federation_of


def as_carried_out(config: RunConfig) -> RunConfig:
    """Return ``config`` with its engine, workers and kernel as this machine decides them.

    Raises:
        ConfigError: where it asks for Flower's engine or for a GPU that is not there.
    """
    if config.engine == "flower":
        raise ConfigError(
            "engine = 'flower': the simulator has the cohort engine only; leave engine out, or "
            "start Flower's own with flwr run . --run-config \"engine='flower'\""
        )
    machine = Machine(_device(config), cores=cores(), gpus=torch.cuda.device_count())
    return resolved(config, machine)


def cohort_grid(config: RunConfig) -> CohortGrid:
    """Return the grid for ``config`` as carried out: to be closed, so a context manager."""
    return CohortGrid(
        app,
        num_nodes=len(federation_of(config)),
        run_config=config.to_flower(),
        seed=config.seed,
        workers=AUTO if config.workers == AUTO else int(config.workers),
        ray_address=config.ray_address,
        gpus_per_worker=config.gpus_per_worker,
        client_timeout_s=config.client_timeout_s or None,
    )


def _device(config: RunConfig) -> Device:
    if config.device == "cuda" and config.ray_address:
        return "cuda"  # of the cluster: this machine may have none
    return device_of(config)
