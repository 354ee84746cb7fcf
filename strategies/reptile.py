r"""Reptile, federated (Nichol et al., 1803.02999; FedReptile, 1909.12488).

    w <- w - epsilon * sum_i p_i (w - w_i)

with w_i after local SGD. epsilon = 1 with weighting "examples" is FedAvg, to the bit.
"""

from functools import partial
from typing import Any

from ..config import RunConfig
from .fedavg import local_sgd
from .recipe import STRATEGIES, Recipe, aggregation_of, weighting_of
from .rules import Aggregation, Weighting, interpolate, mean
from .shell import RuleStrategy


class Reptile(RuleStrategy):
    """Step from the global model towards the mean of locally trained ones.

    Args:
        epsilon: length of the step, > 0.
        weighting: "uniform" or "examples".
        aggregate: how the models become one: ``mean``, ``median()``, ...
        shell: see ``RuleStrategy``.

    Raises:
        ConfigError: where epsilon is not a finite number above 0.
    """

    def __init__(
        self,
        *,
        epsilon: float = 1.0,
        weighting: Weighting = "uniform",
        aggregate: Aggregation = mean,
        **shell: Any,
    ) -> None:
        super().__init__(interpolate(epsilon, weighting=weighting, aggregate=aggregate), **shell)
        self.epsilon = epsilon
        self.weighting = weighting


@STRATEGIES.register("reptile")
def recipe(config: RunConfig) -> Recipe:
    """Local SGD, then a step of length epsilon towards the clients' mean."""
    return Recipe(
        strategy=partial(
            Reptile,
            epsilon=config.reptile_epsilon,
            weighting=weighting_of(config, "uniform"),
            aggregate=aggregation_of(config),
        ),
        client="sgd",
        client_options=local_sgd(config),
    )
