r"""MAML over federations: a task is a group of clients. Two readings, ``adapt``.

adapt = "client": every client adapts by itself; the mean is over members, then over groups.

    theta <- theta - Optimiser(sum_i W_i sum_j w_ij d/dtheta L_ij(theta - alpha grad L_ij(theta)))

adapt = "group": the members of a group adapt together, and each is scored by what they came to.

    theta_i = theta - alpha sum_j w_ij grad L_ij(theta)                            (support)
    theta  <- theta - Optimiser(sum_i W_i d/dtheta sum_j w_ij L_ij(theta_i))       (query)

The gradient of a group takes three exchanges with the same members:

    adapt      members send theta - alpha grad L_ij(theta); their mean is theta_i
    query      they send theta_i - grad L_ij(theta_i); so gbar_i = sum_j w_ij grad L_ij(theta_i)
    curvature  they send gbar_i - alpha H_ij(theta) gbar_i, whose mean is the group's gradient

With K = ``inner_steps`` there are K exchanges to adapt and K for the curvature, backwards; the
order "first" has none of the latter. Groups of one client make both readings the same.

The gradient is exact where the members of the round stay. One that drops out between exchanges is
named, and the sums go on over those that are left, each an estimate of the same sum: its support
gradient stays in theta_i where the other members have been sent that.

A new group adapts by exchanges of the first kind, over its members' support sets.
"""

from functools import partial
from typing import Any, Literal, get_args

import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from ..config import RunConfig
from ..errors import ConfigError, unknown_name
from ..wire import ADAPT, CURVATURE, QUERY, NamedArrays
from .fedmeta import meta_step, optimizer_of, server_of
from .group_rounds import GroupStrategy
from .recipe import STRATEGIES, Recipe, weighting_of
from .rules import Aggregation, Arrays, OptimizerFactory, is_floating, mean, server_optimizer

Adapt = Literal["client", "group"]
ORDERS = ("exact", "first")


class GroupMAML(GroupStrategy):
    """Give the mean over groups of their meta-gradients to a server optimiser that keeps its state.

    Args:
        adapt: "client" or "group", see the module's text.
        order: of the groups' gradients: "exact" or "first".
        inner_steps: K >= 1 of a group, the number of its exchanges to adapt.
        optimizer: a name in ``fedmeta.OPTIMIZERS``, or
            ``factory(parameters) -> torch.optim.Optimizer`` (then ``lr`` is not used).
        lr: the server's learning rate (beta), > 0.
        aggregate: how members become one in each exchange, and how gradients become one.
        groups: keyword arguments of ``GroupStrategy``: weighting, task_weight, groups, group_size,
            eval_steps; and of ``RuleStrategy``.

    Raises:
        ConfigError: where a value is out of range, or with user_privacy and adapt = "group".
    """

    def __init__(
        self,
        *,
        adapt: Adapt = "client",
        order: str = "exact",
        inner_steps: int = 1,
        optimizer: str | OptimizerFactory = "adam",
        lr: float = 0.01,
        aggregate: Aggregation = mean,
        **groups: Any,
    ) -> None:
        if adapt not in get_args(Adapt):
            raise unknown_name("adapt", adapt, get_args(Adapt))
        if order not in ORDERS:
            raise ConfigError(
                f"order = {order!r} of a group: must be 'exact' or 'first'; a member sends exact "
                "Hessian-vector products"
            )
        if inner_steps < 1:
            raise ConfigError(f"inner_steps = {inner_steps}: must be at least 1")
        factory = optimizer_of(optimizer, lr) if isinstance(optimizer, str) else optimizer
        rule = server_optimizer(factory, weighting="examples", aggregate=aggregate)
        together = adapt == "group"
        super().__init__(rule, several=together, aggregate=aggregate, **groups)
        self.first_exchange = ADAPT if together else ""
        self.adapt = adapt
        self.order = order
        self.inner_steps = inner_steps
        self.optimizer = optimizer
        self.lr = lr

    def further(self, grid: Grid, messages: list[Message], config: ConfigRecord) -> list[Message]:
        """Return the messages of the last exchange: "query", or "curvature" at the first point."""
        if self.adapt == "client":
            return messages
        for left in reversed(range(self.inner_steps)):
            for task, point in self._answered(grid, messages):
                task.move(point)
            messages = self._ask(config, ADAPT if left else QUERY)
        if self.order == "first":
            for task in self._tasks:
                task.as_model = partial(_against, task.points[0], task.points[-1])
            return messages
        found = [(t, _difference(t.points[-1], said)) for t, said in self._answered(grid, messages)]
        for k in reversed(range(self.inner_steps)):
            for task, direction in found:
                task.aim(task.points[k], direction)
                task.as_model = partial(_less, task.points[0])
            messages = self._ask(config, CURVATURE)
            found = self._answered(grid, messages) if k else []
        return messages


def _difference(one: NamedArrays, other: NamedArrays) -> Arrays:
    """Return one - other in the dtypes of ``one``; what is no float as it is."""
    less = _less(one, other)
    return {name: less[name].astype(value.dtype) for name, value in one.items()}


def _less(model: NamedArrays, gradient: NamedArrays) -> Arrays:
    """Return model - gradient, in float64; what is no float as it is."""
    return {
        name: value.astype(np.float64) - gradient[name] if is_floating(value) else value
        for name, value in model.items()
    }


def _against(first: NamedArrays, point: NamedArrays, said: NamedArrays) -> Arrays:
    """Return ``first`` less the gradient in a reply ``said``, which is ``point`` less it."""
    return _less(first, _less(point, said))


@STRATEGIES.register("group-maml")
def recipe(config: RunConfig) -> Recipe:
    """MAML over groups of clients: each adapts by itself, or its group does together."""
    together = config.group_adapt == "group"
    if together and config.is_private:
        raise ConfigError(
            "group-adapt = 'group' with privacy: the members of a group are sent each other's "
            "gradients as a model, and the exchanges are no releases; use group-adapt = 'client'"
        )
    order = {"auto": "exact"}.get(config.order, config.order) if together else "exact"
    return Recipe(
        strategy=partial(
            GroupMAML,
            adapt=config.group_adapt,
            order=order,
            inner_steps=config.inner_steps,
            **{**server_of(config), **group_options(config)},
            eval_steps=config.adaptation_steps if together else (),
        ),
        client="group-maml",
        client_options={**meta_step(config), "directions": together and order == "exact"},
    )


def group_options(config: RunConfig) -> dict[str, Any]:
    """Return the options of the server that strategies over groups share."""
    members = weighting_of(config, "uniform")
    told = config.aggregation in ("median", "trimmed-mean") or config.task_weight == "auto"
    return {
        "weighting": members,
        "task_weight": members if told else config.task_weight,
        "groups": config.groups,
        "group_size": config.group_size,
    }
