r"""Reptile over federations: a task is a group of clients, trained by FedAvg within the group.

    theta_i^0     = theta
    theta_i^{r+1} = sum_j w_ij theta_ij^r      theta_ij^r: local SGD of member j from theta_i^r
    theta        <- theta + epsilon * sum_i W_i (theta_i^R - theta)

A round has R = ``rounds`` exchanges with the same members; one that drops out is named, and its
group goes on with the others. With R = 1, or groups of one client, W_i w_ij is all that is left of
the groups: epsilon = 1 is then FedAvg with these weights.

A new group adapts by rounds of FedAvg over its members' support sets. Groups: see ``group_rounds``.
"""

from functools import partial
from typing import Any

from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from ..config import RunConfig
from ..errors import ConfigError
from .fedavg import local_sgd
from .group_maml import group_options
from .group_rounds import GroupStrategy
from .recipe import STRATEGIES, Recipe, aggregation_of
from .rules import Aggregation, interpolate, mean


class GroupReptile(GroupStrategy):
    """Step from the global model towards the mean of the groups' models.

    Args:
        epsilon: length of the step, > 0.
        rounds: R >= 1, of FedAvg within a group.
        aggregate: how members become one in each exchange, and how models become one.
        groups: keyword arguments of ``GroupStrategy``: weighting, task_weight, groups, group_size,
            eval_steps; and of ``RuleStrategy``.

    Raises:
        ConfigError: where a value is out of range, or with user_privacy and R > 1.
    """

    def __init__(
        self,
        *,
        epsilon: float = 1.0,
        rounds: int = 1,
        aggregate: Aggregation = mean,
        **groups: Any,
    ) -> None:
        if rounds < 1:
            raise ConfigError(f"rounds = {rounds} of a group: must be at least 1")
        rule = interpolate(epsilon, weighting="examples", aggregate=aggregate)
        super().__init__(rule, several=rounds > 1, aggregate=aggregate, **groups)
        self.epsilon = epsilon
        self.rounds = rounds

    def further(self, grid: Grid, messages: list[Message], config: ConfigRecord) -> list[Message]:
        """Return the messages of the last round of FedAvg within the groups."""
        for number in range(1, self.rounds):
            for task, point in self._answered(grid, messages):
                task.move(point)
            messages = self._ask(config, "", number)
        return messages


@STRATEGIES.register("group-reptile")
def recipe(config: RunConfig) -> Recipe:
    """Rounds of FedAvg within groups of clients, then a step towards the groups' mean."""
    return Recipe(
        strategy=partial(
            GroupReptile,
            epsilon=config.reptile_epsilon,
            rounds=config.group_rounds,
            aggregate=aggregation_of(config),
            **group_options(config),
            eval_steps=() if config.is_private else config.adaptation_steps,
        ),
        client="group-sgd",
        client_options=local_sgd(config),
    )
