"""The Flower ClientApp: one client of the configured federation for each node."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from flwr.app import Context

from .clients import CLIENTS, ClientStore, Learner, client_app
from .clients.privacy.round import DEPENDENT, errors_kept
from .config import RunConfig
from .errors import ConfigError, MissingDataError
from .pins import KEYS, ROOT, privacy_of
from .sim import Federation
from .task import device_of, federation_of, model_of, recipe_of
from .wire import CLIENT_NAME, DROPPED, NUM_PARTITIONS, PARTITION_ID, ROLE

FEWEST = 3  # nodes
STATE_ROOT = "state-root"  # a key of the run config, and of a node's own
STATE_FOLDER = "clients"  # in that of the results
SURPLUS = "surplus"  # the role of a node for which the federation has no client


def client_fn(context: Context) -> Learner:
    """Return the client of this node's partition."""
    # One thread a node: nodes share the machine, and sums then have the same bits everywhere.
    torch.set_num_threads(1)
    config = RunConfig.read(context.run_config)
    recipe = recipe_of(config)
    with _guarded(context, config):
        federation, index = _place(context, config)
    return CLIENTS[recipe.client](
        model_of(config),
        lambda: federation.client(index),
        inner_lr=config.inner_lr,
        eval_steps=config.adaptation_steps,
        seed=config.seed,
        name=federation.client_ids[index],
        device=device_of(config),
        context=context,
        store=store_of(context, config),
        privacy=privacy_of(context.node_config, config, federation.client_ids[index]),
        **recipe.client_options,
    )


def properties(context: Context) -> dict[str, str | int | float | bool]:
    """Return what this node answers at the roll call: its role and its client's name.

    What cannot work (an unknown name, a missing file, no GPU, a pin that the run would break) is
    raised here, before any round.
    """
    config = RunConfig.read(context.run_config)
    recipe_of(config), model_of(config), device_of(config)
    with _guarded(context, config):
        federation, index = _place(context, config)
    if index >= len(federation):
        return {ROLE: SURPLUS, CLIENT_NAME: f"surplus-{index}"}
    privacy = privacy_of(context.node_config, config, federation.client_ids[index])
    if privacy is not None and federation.has_fixed_split(index):
        raise ConfigError(f"{config.dataset}: {DEPENDENT}")
    return {
        ROLE: federation.roles[index],
        CLIENT_NAME: federation.client_ids[index],
        DROPPED: federation.dropped,
    }


def store_of(context: Context, config: RunConfig) -> ClientStore | None:
    """Return where this node keeps clients' lasting state; None for a run that saves nothing.

    A node's own ``state-root`` comes before the run's: on a SuperNode, paths are the machine's.
    """
    if not (config.checkpoint_every or config.resume):
        return None
    root = str(context.node_config.get(STATE_ROOT, "")) or config.state_root
    return ClientStore(Path(root).expanduser() if root else Path(config.out) / STATE_FOLDER)


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
    federation = federation_of(config)
    return (federation_of(config, nodes) if nodes < len(federation) else federation), index


app = client_app(client_fn, properties=properties)
