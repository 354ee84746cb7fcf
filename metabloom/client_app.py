"""The Flower ClientApp: one client of the configured federation for each node."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from flwr.app import Context

from .clients import CLIENTS, ClientData, ClientStore, Learner, client_app
from .clients.data import with_held_back
from .clients.kernel import Kernel
from .clients.privacy.round import DEPENDENT, errors_kept
from .config import RunConfig
from .errors import ConfigError, MissingDataError
from .pins import KEYS, ROOT, privacy_of
from .sim import Federation
from .strategies import Recipe
from .streams import torch_stream
from .task import (
    architectures_of_clients,
    client_parts,
    device_of,
    federation_of,
    model_of,
    recipe_of,
)
from .wire import ARCHITECTURE, CLIENT_NAME, DROPPED, GROUP, NUM_PARTITIONS, PARTITION_ID, ROLE

FEWEST = 3  # nodes
STATE_ROOT = "state-root"  # a key of the run config, and of a node's own
STATE_FOLDER = "clients"  # in that of the results
SURPLUS = "surplus"  # the role of a node for which the federation has no client


@dataclass(frozen=True)
class _Task:
    """What all clients of a run have in common."""

    config: RunConfig
    recipe: Recipe
    device: str
    kernel: Kernel

    @cached_property
    def parts(self) -> dict[str, object]:
        """What the recipe says that each client needs, the same for all."""
        return client_parts(self.config)


def _items(context: Context) -> tuple[tuple[str, type, object], ...]:
    """Return the run config as a key; with types, for 1 == True."""
    return tuple((key, type(value), value) for key, value in context.run_config.items())


@lru_cache(maxsize=4)
def _task(run_config: tuple[tuple[str, type, object], ...]) -> _Task:
    """Return the task of a run config, built once a process."""
    config = RunConfig.read({key: value for key, _, value in run_config})
    recipe = recipe_of(config)
    return _Task(config, recipe, device_of(config), kernel_of(config))


def client_fn(context: Context) -> Learner:
    """Return the client of this node's partition."""
    # One thread a node: nodes share the machine, and sums then have the same bits everywhere.
    torch.set_num_threads(1)
    task = _task(_items(context))
    config, recipe = task.config, task.recipe
    with _guarded(context, config):
        federation, index = _place(context, config)
        architecture = _architecture(context, config, federation, index)
    return CLIENTS[recipe.client](
        model_of(config, architecture),  # its own alone: a weak node builds no other
        lambda: _data(config, federation, index),
        inner_lr=config.inner_lr,
        eval_steps=config.adaptation_steps,
        seed=config.seed,
        name=federation.client_ids[index],
        device=task.device,
        context=context,
        store=store_of(context, config),
        privacy=privacy_of(context.node_config, config, federation.client_ids[index]),
        kernel=task.kernel,
        **recipe.client_options,
        **task.parts,
    )


def _data(config: RunConfig, federation: Federation, index: int) -> ClientData:
    """Return a client's records; of a training client a share may be held back from training."""
    data = federation.client(index)
    if not config.held_back or federation.roles[index] != "train":
        return data
    drawn = torch_stream(config.seed, "held-back", federation.client_ids[index])
    return with_held_back(data, config.held_back, drawn)


def properties(context: Context) -> dict[str, str | int | float | bool]:
    """Return what this node answers at the roll call: its role and its client's name.

    What cannot work (an unknown name, a missing file, no GPU, a pin that the run would break) is
    raised here, before any round.
    """
    config = _task(_items(context)).config
    with _guarded(context, config):
        federation, index = _place(context, config)
    if index >= len(federation):
        return {ROLE: SURPLUS, CLIENT_NAME: f"surplus-{index}"}
    privacy = privacy_of(context.node_config, config, federation.client_ids[index])
    if privacy is not None and federation.has_fixed_split(index):
        raise ConfigError(f"{config.dataset}: {DEPENDENT}")
    if config.held_back and federation.has_fixed_split(index):
        raise ConfigError(
            f"held-back = {config.held_back:g} on {config.dataset}: its records depend on each "
            "other, so what is held back would not be unseen; set held-back = 0"
        )
    architecture = _architecture(context, config, federation, index)
    model_of(config, architecture)  # raises where it cannot be built
    _ = _task(_items(context)).parts  # as that
    return {
        ROLE: federation.roles[index],
        CLIENT_NAME: federation.client_ids[index],
        DROPPED: federation.dropped,
        **({ARCHITECTURE: architecture} if architecture else {}),
        **({GROUP: group} if (group := str(context.node_config.get(GROUP, ""))) else {}),
    }


def kernel_of(config: RunConfig) -> Kernel:
    """Return how this node's client computes; "auto" was decided before the run on most engines."""
    if config.kernel == "auto":
        return "vmap" if device_of(config) == "cuda" else "eager"
    return config.kernel


def store_of(context: Context, config: RunConfig) -> ClientStore | None:
    """Return where this node keeps clients' lasting state; None for a run that saves nothing.

    A node's own ``state-root`` comes before the run's: on a SuperNode, paths are the machine's.
    """
    if not (config.checkpoint_every or config.resume):
        return None
    root = str(context.node_config.get(STATE_ROOT, "")) or config.state_root
    return ClientStore(Path(root).expanduser() if root else Path(config.out) / STATE_FOLDER)


def _architecture(context: Context, config: RunConfig, federation: Federation, index: int) -> str:
    """Return the architecture of a node, its own word first; "" where all have one model.

    Raises:
        ConfigError: where the node's is none of the run's.
    """
    own, names = str(context.node_config.get(ARCHITECTURE, "")), [one.name for one in config.kinds]
    if not names:
        return ""
    if own and own not in names:
        raise ConfigError(
            f"this node's config says architecture = {own!r}, the run's architectures are "
            f"{', '.join(names)}: correct the node's, or add it to the run's"
        )
    nodes = int(context.node_config[NUM_PARTITIONS])
    return own or architectures_of_clients(config, nodes)[federation.client_ids[index]]


def _guarded(context: Context, config: RunConfig) -> AbstractContextManager[None]:
    """Return a block in which a private node reads its data: errors about them stay on it."""
    if not (config.is_private or set(context.node_config) & (KEYS - {ROOT})):
        return nullcontext()
    return errors_kept(f"on node {context.node_id}", but=(ConfigError, MissingDataError))


def _place(context: Context, config: RunConfig) -> tuple[Federation, int]:
    """Return the federation, with no more clients than nodes, and this node's index in it."""
    index = int(context.node_config[PARTITION_ID])
    nodes = int(context.node_config[NUM_PARTITIONS])
    if nodes < FEWEST:
        raise ConfigError(
            f"{nodes} nodes are too few: one client each is needed to train, to validate and to "
            'stay unseen; with flwr run, --federation-config "num-supernodes=60" starts more'
        )
    return _federation(config, nodes), index


@lru_cache(maxsize=1)
def _federation(config: RunConfig, nodes: int) -> Federation:
    federation = federation_of(config)
    return federation_of(config, nodes) if nodes < len(federation) else federation


app = client_app(client_fn, properties=properties)
