r"""Ditto (Li et al., 2012.04221).

The global model w is FedAvg's. Each client also keeps a personal model v_i, pulled to the global
one:

    v_i <- v_i - eta * (grad F_i(v_i) + lambda * (v_i - w))

v_i never leaves its client. An unseen client starts its own at w when it is evaluated.
"""

from functools import partial

from ..config import RunConfig
from .fedavg import FedAvg, local_sgd
from .recipe import STRATEGIES, Recipe, aggregation_of, weighting_of


class Ditto(FedAvg):
    """FedAvg on the server; the personal models are the clients' own. Arguments as ``FedAvg``.

    After the last round the training clients score their personal models (``RunResult.trained``).
    """

    scores_training_clients = True


@STRATEGIES.register("ditto")
def recipe(config: RunConfig) -> Recipe:
    """FedAvg, with a personal model on each client that is pulled to the global one."""
    return Recipe(
        strategy=partial(
            Ditto,
            weighting=weighting_of(config, "examples"),
            aggregate=aggregation_of(config),
        ),
        client="sgd",
        client_options={**local_sgd(config), "ditto_lambda": config.ditto_lambda},
    )
