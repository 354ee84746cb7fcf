"""From a configuration to what both ends of a run build: federation, model, algorithm.

Server and clients call the same functions on the same configuration, so they agree without sending
more than arrays.
"""

import importlib
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from . import init
from .architectures import assigned, joined
from .config import RunConfig
from .errors import ConfigError
from .execution import Device
from .keys import Scalar, key_of, parse_options
from .models import build_model, check_model, head_names, is_head
from .public import PublicData
from .sim import DataSpec, Federation, dataset_spec, load_federation
from .sim.public_sources import load_public, usual_kind
from .strategies import STRATEGIES, Recipe
from .streams import stream_seed, torch_seeded
from .teacher import teacher_config, teacher_of
from .wire import NamedArrays

STRATEGY_KEYS = (  # keys that some strategies or aggregations read and others do not
    "inner_steps",
    "order",
    "outer_lr",
    "server_optimizer",
    "local_lr",
    "local_steps",
    "local_epochs",
    "split",
    "head",
    "proximal_mu",
    "ditto_lambda",
    "pfedme_lambda",
    "pfedme_beta",
    "nova_momentum",
    "nova_mu",
    "fedopt_tau",
    "head_epochs",
    "reptile_epsilon",
    "reptile_optimizer",
    "reptile_after",
    "groups",
    "group_adapt",
    "group_rounds",
    "group_size",
    "task_weight",
    "weighting",
    "aggregation",
    "trim_beta",
    "num_malicious",
    "num_selected",
    "distill_steps",
    "distill_lr",
    "distill_batch_size",
    "public_subset",
    "digest_epochs",
    "digest_lr",
    "logits_encoding",
    "era_temperature",
    "energy_start",
    "energy_end",
    "distill_alpha",
    "distill_temperature",
    "teacher_steps",
    "teach_steps",
    "teach_lr",
    *("hypernetwork_width", "embedding_size", "hypernetwork_adapts"),
)
NEEDED = {  # keys that are read for what a recipe says that it needs
    "public": {"public_data", "public_size"},
    "validation": {"distill_validation"},
    "mentor": {"mentor"},
    "teacher": {"teacher", "teacher_model", "teacher_is_public"},
}


def recipe_of(config: RunConfig) -> Recipe:
    """Return both ends of the configured algorithm."""
    _import_plugins(config.plugins)
    return STRATEGIES[config.strategy](config)


def idle_keys(config: RunConfig) -> list[str]:
    """Return the keys that the configuration changes and its strategy, as configured, never reads.

    >>> idle_keys(RunConfig.read({"strategy": "fedavg", "order": "first", "local-lr": 0.2}))
    ['order']
    >>> idle_keys(RunConfig.read({"aggregation": "median", "weighting": "uniform"}))
    ['weighting']
    """
    read, defaults = keys_read(config), RunConfig.read({})
    keys = (*STRATEGY_KEYS, *sorted(set().union(*NEEDED.values())))
    changed = [key for key in keys if getattr(config, key) != getattr(defaults, key)]
    return [key_of(key) for key in changed if key not in read]


def keys_read(config: RunConfig) -> set[str]:
    """Return the fields that the strategy reads, as configured; of those that all read, not all.

    >>> {"local_lr", "outer_lr"} & keys_read(RunConfig.read({"strategy": "fedavg"}))
    {'local_lr'}
    """
    _import_plugins(config.plugins)
    watch = _Watch(config)
    recipe = STRATEGIES[config.strategy](cast(RunConfig, watch))
    for need in {*recipe.needs, *recipe.client_needs} & NEEDED.keys():
        watch.read |= NEEDED[need]
    return watch.read - ({"weighting"} if config.is_user_private else set())  # all count alike


def spec_of(config: RunConfig) -> DataSpec:
    """Return what a model of the configured data set takes and gives; needs no data."""
    _import_plugins(config.plugins)
    return dataset_spec(config.dataset, **_options(config))


def federation_of(config: RunConfig, num_clients: int = 0) -> Federation:
    """Return the configured federation of ``num_clients`` (0: as configured), kept in the process.

    Configurations that differ in what is no matter of the data share one.
    """
    _import_plugins(config.plugins)
    count = num_clients or config.num_clients
    options = tuple(sorted(_options(config).items()))
    return _federation(
        config.dataset, config.data_folder, config.seed, count, config.download, options
    )


@lru_cache(maxsize=2)
def _federation(
    dataset: str,
    root: Path,
    seed: int,
    num_clients: int,
    download: bool,
    options: tuple[tuple[str, Scalar], ...],
) -> Federation:
    return load_federation(
        dataset,
        root=root,
        seed=seed,
        num_clients=num_clients,
        download=download,
        **dict(options),
    )


def server_parts(config: RunConfig) -> dict[str, object]:
    """Return the keyword arguments of the strategy that its recipe says it needs.

    Raises:
        ConfigError, MissingDataError, DataError: where the public records cannot be had.
    """
    make: dict[str, Callable[[], object]] = {
        "models": lambda: models_of(config),
        "public": lambda: public_of(config),
        "validation": lambda: validation_of(config),
        "num_classes": lambda: spec_of(config).num_classes,
        "teacher": lambda: teacher_of(config, model_of(teacher_config(config))),
        "heads": lambda: heads_of(config),
    }
    return {name: make[name]() for name in recipe_of(config).needs}


def client_parts(config: RunConfig) -> dict[str, object]:
    """Return the keyword arguments of the client that its recipe says it needs.

    Raises:
        ConfigError, MissingDataError, DataError: where they cannot be had.
    """
    make: dict[str, Callable[[], object]] = {
        "public": lambda: public_of(config),
        "mentor": lambda: model_of(mentor_config(config)),
        "teacher": lambda: model_of(teacher_config(config)),
    }
    return {name: make[name]() for name in recipe_of(config).client_needs}


def mentor_config(config: RunConfig) -> RunConfig:
    """Return ``config`` with the clients' private model in the place of the shared one.

    Raises:
        ConfigError: where it is not said which model that is.
    """
    model, _, options = config.mentor.strip().partition(" ")
    if not model:
        raise ConfigError(
            f"strategy = {config.strategy!r} needs a private model for the clients: "
            "set mentor, e.g. mentor = 'mlp hidden=400'"
        )
    parse_options(options, key="mentor")
    return config.model_copy(update={"model": model, "model_args": options})


def public_kind(config: RunConfig) -> str:
    """Return which public records the run has, by the name of their kind; "" where it needs none.

    Raises:
        ConfigError: with privacy, where nobody has said that they are public.

    >>> public_kind(RunConfig.read({"strategy": "feddf", "dataset": "digits"}))
    'noise'
    """
    recipe = recipe_of(config)
    if "public" not in (*recipe.needs, *recipe.client_needs):
        return ""
    usual = usual_kind(config.dataset)
    if not config.public_data and (config.is_private or config.is_user_private):
        raise ConfigError(
            f"public-data is empty, and this run has privacy: what models say of these records "
            f"leaves the clients unprotected; public-data = {usual!r} declares them public"
        )
    return config.public_data or usual


def public_of(config: RunConfig) -> PublicData:
    """Return the public records of a run, the same at both ends."""
    return _public(config)[0]


def validation_of(config: RunConfig) -> PublicData | None:
    """Return the server's labelled records, which no client gets; None where there are none.

    Raises:
        ConfigError: they are wanted, and records of this kind have no labels.
    """
    return _public(config)[1]


@lru_cache(maxsize=2)
def _public(config: RunConfig) -> tuple[PublicData, PublicData | None]:
    kind, validation = public_kind(config), config.distill_validation
    if validation and kind != "held-out":
        raise ConfigError(
            f"distill-validation = {validation} with public-data = {kind!r}: its records have no "
            "labels of this data set's classes; use public-data = 'held-out', or 0"
        )
    public = load_public(
        kind,
        spec_of(config),
        size=config.public_size + validation,
        seed=config.seed,
        dataset=config.dataset,
        root=config.data_folder,
        download=config.download,
    )
    return public.split(validation, config.seed) if validation else (public, None)


def models_of(config: RunConfig) -> dict[str, nn.Module]:
    """Return the checked initial model of each architecture, by name; of "" where there is one."""
    return {name: model_of(config, name) for name in [one.name for one in config.kinds] or [""]}


def initial_arrays(config: RunConfig) -> dict[str, np.ndarray]:
    """Return the arrays that a run begins with: of its model, or of all architectures.

    Raises:
        ConfigError, ModelError: where the strategy needs a head, and the model has none.
    """
    recipe, arrays = recipe_of(config), {}
    for architecture, model in models_of(config).items():
        if "head" in recipe.client_options:  # clients would raise the same, each by itself
            is_head(model, str(recipe.client_options["head"]))
        own = {name: value.numpy() for name, value in model.state_dict().items()}
        arrays[architecture] = own | (recipe.more_arrays(model) if recipe.more_arrays else {})
    return joined(arrays)


def heads_of(config: RunConfig) -> dict[str, frozenset[str]]:
    """Return the names of the arrays of each architecture's head; of "" where there is one.

    Raises:
        ConfigError, ModelError: where it cannot be told, see ``models.is_head``.
    """
    return {name: head_names(model, config.head) for name, model in models_of(config).items()}


@lru_cache(maxsize=16)
def model_of(config: RunConfig, architecture: str = "") -> nn.Module:
    """Return the checked initial model, built once a process; not to be changed.

    Args:
        config: of the run.
        architecture: one of its architectures; "" where it has none.
    """
    spec, network = spec_of(config), recipe_of(config).network
    model = model_for(config, spec.num_classes, architecture)
    if network is None:
        return model
    seed, dtype = stream_seed(config.seed, "network"), getattr(torch, spec.input_dtype)
    build = partial(model_for, config, architecture=architecture, seed=seed)
    with torch_seeded(config.seed, "network"):
        return network(model, build=build, num_classes=spec.num_classes, input_dtype=dtype)


def model_for(
    config: RunConfig, num_classes: int, architecture: str = "", *, seed: int | None = None
) -> nn.Module:
    """Return a new one for any ``num_classes``, without what a ``Recipe.network`` puts around."""
    spec = spec_of(config)
    if architecture:
        (kind,) = (one for one in config.kinds if one.name == architecture)
        chosen, own = kind.model, dict(kind.options)
    else:
        chosen = config.model or spec.model
        own = parse_options(config.model_args, key="model-args")
    usual = dict(spec.model_options) if chosen == spec.model else {}
    shape, dtype = spec.input_shape, getattr(torch, spec.input_dtype)
    options = {**usual, **own}
    seed = config.seed if seed is None else seed
    model = build_model(chosen, input_shape=shape, num_classes=num_classes, seed=seed, **options)
    check_model(model, input_shape=shape, num_classes=num_classes, input_dtype=dtype)
    return model


def started(
    config: RunConfig, initial: NamedArrays
) -> tuple[dict[str, np.ndarray], init.Fit | None]:
    """Return the initial arrays with those of the key ``init`` in their place; see ``init``."""
    held_out = int(_options(config).get("held_out", 0)) if config.init else 0
    return init.started(config, initial, held_out=held_out)


@lru_cache(maxsize=4)
def architectures_of_clients(config: RunConfig, num_clients: int = 0) -> dict[str, str]:
    """Return the architecture of each client by its name: as many of each as there can be.

    Those that train, that validate and that stay unseen are shared out by themselves.
    """
    federation, names = federation_of(config, num_clients), [one.name for one in config.kinds]
    found: dict[str, str] = {}
    for role in dict.fromkeys(federation.roles):
        clients = [federation.client_ids[index] for index in federation.indices(role)]
        found |= assigned(names, clients, config.seed)
    return found


def device_of(config: RunConfig) -> Device:
    """Return "cuda" or "cpu"; raise ConfigError where cuda is wanted and there is none."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("device = 'cuda': torch finds no GPU here; use device = 'cpu' or 'auto'")
    if config.device == "auto":
        return "cuda" if available else "cpu"
    return config.device


class _Watch:
    """Stand in for a configuration and note which keys are read."""

    def __init__(self, config: RunConfig) -> None:
        self.read: set[str] = set()
        self._config = config

    def __getattr__(self, name: str) -> object:
        self.read.add(name)
        return getattr(self._config, name)


@lru_cache
def _import_plugins(names: str) -> None:
    for name in filter(None, (part.strip() for part in names.split(","))):
        try:
            importlib.import_module(name)
        except ImportError as err:
            raise ConfigError(
                f"plugins: module {name!r} cannot be imported ({err}): install it, or run in its "
                "folder with PYTHONPATH=."
            ) from err
        except Exception as err:  # a user's module can raise anything
            raise ConfigError(
                f"plugins: module {name!r} fails when it is imported: {type(err).__name__}: {err}"
            ) from err


def _options(config: RunConfig) -> dict[str, Scalar]:
    options = parse_options(config.dataset_args, key="dataset-args")
    for name in ("root", "seed", "num_clients", "download"):
        if name in options:
            key = "data-root" if name == "root" else name.replace("_", "-")
            raise ConfigError(
                f"dataset-args = {config.dataset_args!r}: {name} is a key of its own, set {key}"
            )
    if public_kind(config) == "held-out":
        options["held_out"] = config.public_size + config.distill_validation
    return options
