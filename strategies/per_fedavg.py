r"""Per-FedAvg (Fallah et al., 2002.07948).

tau local meta-steps, each with three independent batches D, D', D'':

    w <- w - beta * (I - alpha H(w; D'')) grad f(w - alpha grad f(w; D); D')

The server takes the uniform mean of the clients' models. ``order`` gives the paper's variants:
"exact", "first" (FO, without H) and "hf".
"""

from functools import partial
from typing import Any

from ..config import RunConfig
from .fedavg import FedAvg
from .recipe import STRATEGIES, Recipe, aggregation_of, weighting_of
from .rules import Weighting


class PerFedAvg(FedAvg):
    """Take the mean, uniform by default, of models that took local meta-steps.

    See ``FedAvg`` and ``RuleStrategy`` for the arguments.
    """

    def __init__(self, *, weighting: Weighting = "uniform", **shell: Any) -> None:
        super().__init__(weighting=weighting, **shell)


@STRATEGIES.register("per-fedavg")
def recipe(config: RunConfig) -> Recipe:
    """Local meta-steps with three independent batches each, then the mean of the models."""
    return Recipe(
        strategy=partial(
            PerFedAvg,
            weighting=weighting_of(config, "uniform"),
            aggregate=aggregation_of(config),
        ),
        client="maml",
        client_options={
            "outer_lr": config.outer_lr or 0.1,
            "local_steps": config.local_steps,
            "inner_steps": config.inner_steps,
            "order": config.order,
            "batch_size": config.batch_size,
            "split": "independent",
        },
    )
