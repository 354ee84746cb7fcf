r"""FedAvg (McMahan et al., 1602.05629).

    w <- sum_i p_i w_i,    p_i = n_i / sum_S n

over the clients that answered. Differences from ``flwr.serverapp.strategy.FedAvg``: seeded
sampling, roles, float64 accumulation, and integer arrays keep their value and dtype. Another
aggregation (``aggregation``) can stand in the mean's place.
"""

from functools import partial
from typing import Any

from ..config import RunConfig
from .recipe import STRATEGIES, Recipe, aggregation_of, weighting_of
from .rules import Aggregation, Weighting, interpolate, mean
from .shell import RuleStrategy


class FedAvg(RuleStrategy):
    """Take the weighted mean of the clients' models.

    Args:
        weighting: "examples" (p_i = n_i / sum n) or "uniform".
        aggregate: how the models become one: ``mean``, ``median()``, ...
        shell: see ``RuleStrategy``.
    """

    def __init__(
        self,
        *,
        weighting: Weighting = "examples",
        aggregate: Aggregation = mean,
        **shell: Any,
    ) -> None:
        super().__init__(interpolate(weighting=weighting, aggregate=aggregate), **shell)
        self.weighting = weighting


def local_sgd(config: RunConfig) -> dict[str, object]:
    """Return the options of plain local SGD that FedAvg and its family share."""
    if config.is_private:
        return {"local_lr": config.local_lr, "local_steps": config.local_steps}
    return {
        "local_lr": config.local_lr,
        "local_epochs": config.local_epochs,
        "batch_size": config.batch_size,
    }


@STRATEGIES.register("fedavg")
def recipe(config: RunConfig) -> Recipe:
    """Weighted mean of locally trained models; fine-tuned on the support set at evaluation."""
    return Recipe(
        strategy=partial(
            FedAvg,
            weighting=weighting_of(config, "examples"),
            aggregate=aggregation_of(config),
        ),
        client="sgd",
        client_options=local_sgd(config),
    )
