r"""SCAFFOLD (Karimireddy et al., 1910.06378): control variates take the drift out of local steps.

    y_i from x by K steps  y <- y - eta * (grad F_i(y) - c_i + c)         on the client
    x <- x + eta_g * sum_i p_i (y_i - x)
    c <- c + |S| / N * sum_i p_i (change of c_i)                          p_i = 1 / |S|

Where clients differ, FedAvg with several local steps comes to rest beside the optimum of the mean
of their losses; SCAFFOLD at it, for c_i and c come to be the gradients there. N is the number of
training clients that there are; c, 0 at first, travels beside the model (``control/NAME``), and a
reply holds c + the change of c_i there. So a client that knows nothing of it and gives it back
takes part as one of FedAvg.

Costs: twice the bytes, both ways, and a lasting variate on each client. The largest update that
the firewall allows, and the norm that user-level privacy clips to, are of model and variate
together. Where a reply is lost or refused, c lacks the change that its client has made.

Differences from the paper: weighting "examples" (p_i = n_i / sum n) is there too, for a mean of
losses over records; N counts the clients that are connected in a round.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..architectures import full_name, names_of
from ..config import RunConfig
from ..wire import CONTROL, NamedArrays
from .by_architecture import by_architecture
from .fedavg import local_sgd
from .recipe import STRATEGIES, Recipe, aggregation_of, weighting_of
from .rules import (
    Aggregation,
    Arrays,
    Reply,
    Rule,
    State,
    Weighting,
    interpolate,
    is_floating,
    mean,
)
from .shell import RuleStrategy
from .shell.roll_call import Node


def controlled_average(
    clients: Callable[[], int],
    *,
    lr: float = 1.0,
    cohort: float | None = None,
    weighting: Weighting = "uniform",
    aggregate: Aggregation = mean,
) -> Rule:
    """Return the rule that moves model and control variate.

    Args:
        clients: gives N, how many training clients there are now.
        lr: eta_g > 0; 1: x becomes the aggregate of the models.
        cohort: |S|, where replies do not tell it (user-level privacy); None: their number.
        weighting: "uniform" or "examples".
        aggregate: how replies become one, models and variates alike.

    Raises:
        ConfigError: where lr is not a finite number above 0, or the weighting is unknown.
    """
    average = interpolate(lr, weighting=weighting, aggregate=aggregate)

    def update(state: State, sent: NamedArrays, replies: Sequence[Reply]) -> tuple[State, Arrays]:
        controls = names_of(sent, CONTROL)
        model = {name: value for name, value in sent.items() if name not in controls}
        state, new = average.update(state, model, replies)
        answered = sum(reply.clients for reply in replies) if cohort is None else cohort
        share = min(1.0, answered / max(clients(), 1))
        control = {name: sent[name] for name in controls}
        moved = aggregate(control, replies, weighting)
        for name, value in control.items():
            step = share * (moved[name] - value)
            new[name] = np.asarray(value.astype(np.float64) + step, dtype=value.dtype)
        return state, {name: new[name] for name in sent}

    return Rule(average.init, update, mean_by=average.mean_by, beside=_controls)


def _controls(model: NamedArrays) -> Arrays:
    """Return c before the first round: 0 for each floating array of a model."""
    return {
        full_name(CONTROL, name): np.zeros_like(value)
        for name, value in model.items()
        if is_floating(value)
    }


class SCAFFOLD(RuleStrategy):
    """Average the clients' models, and the changes of their control variates.

    Args:
        lr: the server's step eta_g, > 0.
        weighting: "uniform" or "examples".
        aggregate: how models, and variates, become one: ``mean``, ``median()``, ...
        shell: see ``RuleStrategy``.

    Raises:
        ConfigError: where lr is not a finite number above 0.
    """

    def __init__(
        self,
        *,
        lr: float = 1.0,
        weighting: Weighting = "uniform",
        aggregate: Aggregation = mean,
        **shell: Any,
    ) -> None:
        self._training: Counter[str] = Counter()  # clients that there are, by architecture
        privacy, names = shell.get("user_privacy"), tuple(shell.get("architectures", ()))

        def rule_of(kind: str) -> Rule:
            return controlled_average(
                lambda: self._training[kind],
                lr=lr,
                cohort=privacy.expected_clients if privacy else None,
                weighting=weighting,
                aggregate=aggregate,
            )

        rule = rule_of("")
        if names:
            each = by_architecture({kind: rule_of(kind) for kind in names}, names)
            rule = replace(each, sees_all_architectures=True, beside=_controls)
        super().__init__(rule, **shell)
        self.lr = lr
        self.weighting = weighting

    def _sample(self, candidates: list[Node], server_round: int) -> list[Node]:
        kinds = self._kinds.names
        self._training = Counter(node.architecture if kinds else "" for node in candidates)
        return super()._sample(candidates, server_round)


@STRATEGIES.register("scaffold")
def recipe(config: RunConfig) -> Recipe:
    """Local SGD corrected for each client's drift by control variates, averaged."""
    return Recipe(
        strategy=partial(
            SCAFFOLD,
            lr=config.outer_lr or 1.0,
            weighting=weighting_of(config, "uniform"),
            aggregate=aggregation_of(config),
        ),
        client="scaffold",
        client_options=local_sgd(config),
    )
