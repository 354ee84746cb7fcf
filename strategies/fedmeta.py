r"""FedMeta (Chen et al., 1802.07876) with MAML clients.

    g_i   = grad_theta L_query(theta - alpha * grad L_support(theta))
    theta <- theta - Optimiser(sum_i q_i g_i)

The client replies w_i = theta - g_i (one meta-step of rate 1), so g_i = theta - w_i: a client that
knows nothing of meta-learning and replies with its trained model works as well, its difference is
then the pseudo-gradient (adaptive federated optimisation, 2003.00295).

Differences from the paper: the server optimiser is any of torch.optim, and its state persists over
the rounds; rebuilding Adam in each round would turn each step into about beta * sign(g).
"""

import math
from functools import partial
from typing import Any

import torch

from ..config import RunConfig
from ..errors import ConfigError, unknown_name
from .recipe import STRATEGIES, Recipe, aggregation_of, weighting_of
from .rules import Aggregation, OptimizerFactory, Weighting, mean, server_optimizer
from .shell import RuleStrategy

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}


class FedMeta(RuleStrategy):
    """Give the mean of the clients' meta-gradients to a server optimiser that keeps its state.

    Args:
        optimizer: a name in ``OPTIMIZERS``, or ``factory(parameters) -> torch.optim.Optimizer``
            (then ``lr`` is not used).
        lr: the server's learning rate (beta), > 0.
        weighting: "uniform" (q_i = 1/n) or "examples".
        aggregate: how the meta-gradients become one: ``mean``, ``median()``, ...
        shell: see ``RuleStrategy``.

    Raises:
        ConfigError: where the optimiser's name is unknown or lr is not a finite number above 0.
    """

    def __init__(
        self,
        *,
        optimizer: str | OptimizerFactory = "adam",
        lr: float = 0.01,
        weighting: Weighting = "uniform",
        aggregate: Aggregation = mean,
        **shell: Any,
    ) -> None:
        factory = optimizer_of(optimizer, lr) if isinstance(optimizer, str) else optimizer
        rule = server_optimizer(factory, weighting=weighting, aggregate=aggregate)
        super().__init__(rule, **shell)
        self.optimizer = optimizer
        self.lr = lr
        self.weighting = weighting


def optimizer_of(name: str, lr: float) -> OptimizerFactory:
    """Return what makes the optimiser of that name in ``OPTIMIZERS``.

    Raises:
        ConfigError: where the name is unknown or lr is not a finite number above 0.
    """
    if name not in OPTIMIZERS:
        raise unknown_name("server optimiser", name, OPTIMIZERS)
    if not 0 < lr < math.inf:
        raise ConfigError(f"lr = {lr!r}: must be a finite number above 0")
    return lambda params: OPTIMIZERS[name](params, lr=lr)  # type: ignore[call-arg]  # each takes lr


def server_of(config: RunConfig) -> dict[str, Any]:
    """Return the options of the server that FedMeta and its family share."""
    return {
        "optimizer": config.server_optimizer,
        "lr": config.outer_lr or 0.01,
        "weighting": weighting_of(config, "uniform"),
        "aggregate": aggregation_of(config),
    }


def meta_step(config: RunConfig) -> dict[str, object]:
    """Return the options of the one meta-step of a client that FedMeta and its family share."""
    return {
        "outer_lr": 1.0,
        "local_steps": 1,
        "inner_steps": config.inner_steps,
        "order": config.order,
        "batch_size": config.batch_size,
        "split": config.split,
    }


@STRATEGIES.register("fedmeta")
def recipe(config: RunConfig) -> Recipe:
    """MAML across clients: meta-gradients of adaptation, averaged into a server optimiser."""
    return Recipe(
        strategy=partial(FedMeta, **server_of(config)),
        client="maml",
        client_options=meta_step(config),
    )
