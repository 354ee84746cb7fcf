r"""Reptile, federated (Nichol et al., 1803.02999; FedReptile, Jiang et al., 1909.12488).

    w <- w - epsilon * sum_i q_i (w - w_i)

with w_i after local SGD. epsilon = 1 with weighting "examples" is FedAvg, to the bit. With another
server optimiser (1803.02999 uses Adam too) sum_i q_i (w - w_i) is its gradient and epsilon its
learning rate; its state lasts.

Personalised FedAvg (1909.12488): the first ``fedavg_rounds`` rounds are FedAvg's, then come
Reptile's with a small epsilon, which make the model easier to adapt.

Differences from the second paper: clients do the same local SGD in both parts, where the paper
takes fewer steps in the second; its first part may have momentum on the server, ours has not.
Rounds that were skipped count in neither.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from ..config import RunConfig
from ..errors import ConfigError
from ..wire import NamedArrays
from .fedavg import local_sgd
from .fedmeta import optimizer_of
from .recipe import STRATEGIES, Recipe, aggregation_of, weighting_of
from .rules import (
    Aggregation,
    Arrays,
    OptimizerFactory,
    Reply,
    Rule,
    State,
    Weighting,
    interpolate,
    mean,
    server_optimizer,
)
from .shell import RuleStrategy


def first_then(rounds: int, first: Rule, then: Rule) -> Rule:
    """Return the rule that is ``first`` for so many rounds and ``then`` in those after them.

    A round counts where the rule was asked: not where the model stayed for want of replies.
    """

    def init(arrays: NamedArrays) -> State:
        return {"round": 0, "first": first.init(arrays), "then": then.init(arrays)}

    def update(state: State, sent: NamedArrays, replies: Sequence[Reply]) -> tuple[State, Arrays]:
        part, rule = ("first", first) if state["round"] < rounds else ("then", then)
        inner, new = rule.update(state[part], sent, replies)
        return {**state, part: inner, "round": state["round"] + 1}, new

    return Rule(init, update, mean_by=first.mean_by if first.mean_by == then.mean_by else None)


class Reptile(RuleStrategy):
    """Step from the global model towards the mean of locally trained ones.

    Args:
        epsilon: length of the step, or the learning rate of another optimiser than "sgd", > 0.
        optimizer: "sgd", another name in ``fedmeta.OPTIMIZERS``, or
            ``factory(parameters) -> torch.optim.Optimizer`` (then epsilon is not used).
        fedavg_rounds: rounds of FedAvg before the first one of Reptile, >= 0.
        weighting: "uniform" or "examples", in the rounds of Reptile.
        fedavg_weighting: in those of FedAvg.
        aggregate: how the models become one: ``mean``, ``median()``, ...
        shell: see ``RuleStrategy``.

    Raises:
        ConfigError: where epsilon is not a finite number above 0, the optimiser's name is unknown,
            or fedavg_rounds is negative.
    """

    def __init__(
        self,
        *,
        epsilon: float = 1.0,
        optimizer: str | OptimizerFactory = "sgd",
        fedavg_rounds: int = 0,
        weighting: Weighting = "uniform",
        fedavg_weighting: Weighting = "examples",
        aggregate: Aggregation = mean,
        **shell: Any,
    ) -> None:
        if fedavg_rounds < 0:
            raise ConfigError(f"fedavg_rounds = {fedavg_rounds}: must be at least 0")
        if optimizer == "sgd":  # the same step, without the roundings of an optimiser
            rule = interpolate(epsilon, weighting=weighting, aggregate=aggregate)
        else:
            make = optimizer_of(optimizer, epsilon) if isinstance(optimizer, str) else optimizer
            rule = server_optimizer(make, weighting=weighting, aggregate=aggregate)
        if fedavg_rounds:
            fedavg = interpolate(weighting=fedavg_weighting, aggregate=aggregate)
            rule = first_then(fedavg_rounds, fedavg, rule)
        super().__init__(rule, **shell)
        self.epsilon = epsilon
        self.optimizer = optimizer
        self.fedavg_rounds = fedavg_rounds
        self.weighting = weighting
        self.fedavg_weighting = fedavg_weighting


@STRATEGIES.register("reptile")
def recipe(config: RunConfig) -> Recipe:
    """Local SGD, then a step of length epsilon towards the clients' mean."""
    return Recipe(
        strategy=partial(
            Reptile,
            epsilon=config.reptile_epsilon,
            optimizer=config.reptile_optimizer,
            fedavg_rounds=config.reptile_after,
            weighting=weighting_of(config, "uniform"),
            fedavg_weighting=weighting_of(config, "examples"),
            aggregate=aggregation_of(config),
        ),
        client="sgd",
        client_options=local_sgd(config),
    )
