r"""pFedMe (Dinh, Tran, Nguyen, 2006.08848): personal models by Moreau envelopes.

    theta_i <- argmin f_i(theta) + (lambda / 2) ||theta - w_i||^2      by K gradient steps
    w_i     <- w_i - eta * lambda * (w_i - theta_i)                    R times on client i
    w       <- (1 - beta) * w + beta * sum_i q_i w_i                   on the server

theta_i is the client's personal model and never leaves it.

``inner-lr`` and ``inner-steps`` are theta's, ``local-lr`` is eta, and the R local rounds are the
batches of ``local-epochs`` epochs.

Differences from the paper: clients can be weighed by their records (``weighting``), as in the
authors' code; the paper's mean is uniform.
"""

import math
from functools import partial
from typing import Any

from ..config import RunConfig
from ..errors import ConfigError
from .fedavg import local_sgd
from .recipe import STRATEGIES, Recipe, aggregation_of, weighting_of
from .rules import Aggregation, Weighting, interpolate, mean
from .shell import RuleStrategy


class PFedMe(RuleStrategy):
    """Step from the global model towards the clients' mean; their personal models are their own.

    After the last round the training clients score their personal models (``RunResult.trained``).

    Args:
        beta: length of the step, > 0; 1 takes the mean.
        weighting: "uniform" or "examples".
        aggregate: how the models become one: ``mean``, ``median()``, ...
        shell: see ``RuleStrategy``.

    Raises:
        ConfigError: where beta is not a finite number above 0.
    """

    scores_training_clients = True

    def __init__(
        self,
        *,
        beta: float = 1.0,
        weighting: Weighting = "uniform",
        aggregate: Aggregation = mean,
        **shell: Any,
    ) -> None:
        if not 0 < beta < math.inf:
            raise ConfigError(f"beta = {beta!r}: must be a finite number above 0")
        super().__init__(interpolate(beta, weighting=weighting, aggregate=aggregate), **shell)
        self.beta = beta
        self.weighting = weighting


@STRATEGIES.register("pfedme")
def recipe(config: RunConfig) -> Recipe:
    """Personal models on the Moreau envelopes of the clients' losses around a shared model."""
    return Recipe(
        strategy=partial(
            PFedMe,
            beta=config.pfedme_beta,
            weighting=weighting_of(config, "uniform"),
            aggregate=aggregation_of(config),
        ),
        client="pfedme",
        client_options={
            **local_sgd(config),
            "inner_steps": config.inner_steps,
            "pull": config.pfedme_lambda,
        },
    )
