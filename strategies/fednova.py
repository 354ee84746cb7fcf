r"""FedNova (Wang et al., 2007.07481): clients that take more steps do not pull the model to them.

    w <- w - tau_eff * sum_i p_i Delta_i / ||a_i||_1,     tau_eff = sum_i p_i tau_i

Delta_i = w - w_i is what client i moved in tau_i local steps, and ||a_i||_1 the sum of the weights
of its gradients in that: tau_i for SGD, another number with momentum or a proximal term. FedAvg,
which adds the Delta_i as they are, comes to rest where clients of many steps want it.

A client replies w - Delta_i / ||a_i||_1, and tau_i beside it (``wire.NOVA_STEPS``, an array that
holds a whole number). The question holds a 1 there: a client that knows nothing of it, and answers
with its trained model and that 1, counts as one step.

tau_eff is aggregated as the models are, by the same weighting, so that a median resists clients
that lie about tau_i too; counts outside 1 to ``MOST_STEPS`` are refused. With user-level privacy
tau_eff is 1: how many steps clients take would leave unprotected, so a larger ``local-lr`` has to
stand in for it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from logging import WARNING
from typing import Any, Final

import numpy as np
from flwr.app import Message
from flwr.common import log

from ..config import RunConfig
from ..wire import NOVA_STEPS, NamedArrays
from .fedavg import local_sgd
from .recipe import STRATEGIES, Recipe, aggregation_of, weighting_of
from .rules import Aggregation, Arrays, Reply, Rule, State, Weighting, check_weighting, mean
from .shell import RuleStrategy
from .shell.firewall import Judged
from .shell.partial_sums import Part
from .shell.roll_call import Node

MOST_STEPS: Final = 10**6  # of a client's round


def normalised_average(*, weighting: Weighting = "examples", aggregate: Aggregation = mean) -> Rule:
    """Return the rule w <- w + tau_eff (x - w), with x the aggregate of normalised models.

    Replies hold tau_i as ``NOVA_STEPS``, a whole number; sent and next arrays hold 1 there.

    Raises:
        ConfigError: where the weighting is unknown.
    """
    check_weighting(weighting)

    def update(state: State, sent: NamedArrays, replies: Sequence[Reply]) -> tuple[State, Arrays]:
        tau = _effective_steps(replies)
        new = aggregate(sent, replies, weighting)
        return state, {
            name: np.asarray(
                value.astype(np.float64) + tau * (new[name] - value), dtype=value.dtype
            )
            if np.issubdtype(value.dtype, np.floating)
            else value
            for name, value in sent.items()
        }

    def _effective_steps(replies: Sequence[Reply]) -> float:
        """Return tau_eff, the aggregate of the numbers of steps."""
        counts = [
            replace(reply, arrays={NOVA_STEPS: reply.arrays[NOVA_STEPS].astype(np.float64)})
            for reply in replies
        ]
        return float(aggregate({NOVA_STEPS: np.ones(())}, counts, weighting)[NOVA_STEPS])

    return Rule(lambda _: {}, update, beside=lambda _: {NOVA_STEPS: np.array(1, dtype=np.int64)})


class FedNova(RuleStrategy):
    """Average the clients' updates, each divided by the steps that it took.

    Args:
        weighting: "examples" (p_i = n_i / sum n) or "uniform".
        aggregate: how normalised models become one: ``mean``, ``median()``, ...
        shell: see ``RuleStrategy``; replies are never summed beside the clients, for the server
            needs the number of steps of each.
    """

    def __init__(
        self,
        *,
        weighting: Weighting = "examples",
        aggregate: Aggregation = mean,
        **shell: Any,
    ) -> None:
        super().__init__(normalised_average(weighting=weighting, aggregate=aggregate), **shell)
        self.weighting = weighting

    def _good(
        self, replies: Iterable[Message], sent: NamedArrays | None, parts: Sequence[Part] = ()
    ) -> list[tuple[Node, Judged]]:
        """Return the good replies; of trainings, those whose number of steps can be."""
        found = super()._good(replies, sent, parts)
        if sent is None:
            return found
        good = []
        for node, judged in found:
            steps = judged.arrays[NOVA_STEPS]
            if 1 <= steps <= MOST_STEPS:
                good.append((node, judged))
                continue
            number = self._round.number
            reason = f"it took {steps} local steps: 1 to {MOST_STEPS} can be"
            log(WARNING, "round %d: %s is quarantined: %s", number, node.name, reason)
            self._round.quarantined.append((node.name, reason))
            self._history.offences[node.name] += 1
        return good


@STRATEGIES.register("fednova")
def recipe(config: RunConfig) -> Recipe:
    """FedAvg of updates that are divided by the local steps that each client took."""
    return Recipe(
        strategy=partial(
            FedNova,
            weighting=weighting_of(config, "examples"),
            aggregate=aggregation_of(config),
        ),
        client="fednova",
        client_options={
            **local_sgd(config),
            "momentum": config.nova_momentum,
            "nova_mu": config.nova_mu,
        },
    )
