"""From a configuration to what both ends of a run build: the federation, the model, the algorithm.

Server and clients call the same functions on the same configuration, so they agree without sending
more than arrays.
"""

from functools import lru_cache

import torch
from torch import nn

from .config import RunConfig, Scalar, parse_options
from .errors import ConfigError
from .models import build_model, check_model
from .sim import DataSpec, Federation, dataset_spec, load_federation
from .strategies import STRATEGIES, Recipe


def recipe_of(config: RunConfig) -> Recipe:
    """Return both ends of the configured algorithm."""
    return STRATEGIES[config.strategy](config)


def spec_of(config: RunConfig) -> DataSpec:
    """Return what a model of the configured data set takes and gives; needs no data."""
    return dataset_spec(config.dataset, **_options(config))


@lru_cache(maxsize=8)
def federation_of(config: RunConfig, num_clients: int = 0) -> Federation:
    """Return the configured federation of ``num_clients`` (0: as configured).

    One for each process.
    """
    return load_federation(
        config.dataset,
        root=config.data_folder,
        seed=config.seed,
        num_clients=num_clients or config.num_clients,
        download=config.download,
        **_options(config),
    )


@lru_cache(maxsize=8)
def model_of(config: RunConfig) -> nn.Module:
    """Return the configured model with its initial weights, checked against the data set.

    One for each process, not to be changed.
    """
    spec = spec_of(config)
    chosen = config.model or spec.model
    usual = dict(spec.model_options) if chosen == spec.model else {}
    options = {**usual, **parse_options(config.model_args, key="model-args")}
    shape, classes = spec.input_shape, spec.num_classes
    model = build_model(chosen, input_shape=shape, num_classes=classes, seed=config.seed, **options)
    dtype = getattr(torch, spec.input_dtype)
    check_model(model, input_shape=shape, num_classes=classes, input_dtype=dtype)
    return model


def device_of(config: RunConfig) -> str:
    """Return "cuda" or "cpu"; raise ConfigError where cuda is wanted and there is none."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("device = 'cuda': torch finds no GPU here; use device = 'cpu' or 'auto'")
    if config.device == "auto":
        return "cuda" if available else "cpu"
    return config.device


def _options(config: RunConfig) -> dict[str, Scalar]:
    options = parse_options(config.dataset_args, key="dataset-args")
    for name in ("root", "seed", "num_clients", "download"):
        if name in options:
            key = "data-root" if name == "root" else name.replace("_", "-")
            raise ConfigError(
                f"dataset-args = {config.dataset_args!r}: {name} is a key of its own, set {key}"
            )
    return options
