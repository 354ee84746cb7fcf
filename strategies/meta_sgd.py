r"""Meta-SGD (Li et al., 1707.09835), federated as in FedMeta (Chen et al., 1802.07876).

    theta_i = theta - alpha o grad L_support(theta)                   on client i, K steps
    (theta, alpha) <- (theta, alpha) - Optimiser(sum_i q_i d/d(theta, alpha) L_query(theta_i))

alpha holds one learning rate for each parameter. The rates travel with the model, as arrays
``inner_lr/NAME``: they are averaged, checkpointed and written to the results with it, and unseen
clients adapt by them. They may become negative (they say the direction of a step too), as the paper
allows.

Differences from the papers: alpha begins as one number (``inner-lr``), the paper draws it from an
interval; the server optimiser is any of torch.optim and keeps its state (see ``fedmeta``). Weight
decay, where the optimiser has it, pulls the rates to 0 as it does the weights.
"""

from functools import partial

from ..config import RunConfig
from ..inner_rates import initial_rates
from .fedmeta import FedMeta, meta_step, server_of
from .recipe import STRATEGIES, Recipe


class MetaSGD(FedMeta):
    """FedMeta over the parameters and the learning rates of their adaptation.

    The initial arrays must hold the rates beside the model's arrays:

        {**arrays, **metabloom.inner_rates.initial_rates(model, 0.1)}

    Arguments as ``FedMeta``.
    """


@STRATEGIES.register("meta-sgd")
def recipe(config: RunConfig) -> Recipe:
    """FedMeta that learns the learning rate of each parameter's adaptation too."""
    return Recipe(
        strategy=partial(MetaSGD, **server_of(config)),
        client="meta-sgd",
        client_options=meta_step(config),
        more_arrays=partial(initial_rates, inner_lr=config.inner_lr),
    )
