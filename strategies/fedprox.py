r"""FedProx (Li et al., 1812.06127).

Each client minimises F_i(w) + (mu / 2) ||w - w^t||^2; the server takes FedAvg's mean. The server
sends mu as ``proximal-mu``, the key of Flower's own FedProx, so foreign clients that know that key
work too.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from ..config import RunConfig
from ..errors import ConfigError
from .fedavg import FedAvg, local_sgd
from .recipe import STRATEGIES, Recipe, aggregation_of, weighting_of


class FedProx(FedAvg):
    """FedAvg whose clients add a proximal term.

    Args:
        proximal_mu: mu >= 0; 0 is FedAvg.
        shell: see ``FedAvg`` and ``RuleStrategy``.

    Raises:
        ConfigError: where mu is negative or not finite.
    """

    def __init__(self, *, proximal_mu: float = 0.1, **shell: Any) -> None:
        if not 0 <= proximal_mu < math.inf:
            raise ConfigError(f"proximal_mu = {proximal_mu!r}: must be a finite number >= 0")
        super().__init__(**shell)
        self.proximal_mu = proximal_mu

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the round's train messages with ``proximal-mu`` in their config."""
        with_mu = ConfigRecord({**config, "proximal-mu": self.proximal_mu})
        return super().configure_train(server_round, arrays, with_mu, grid)


@STRATEGIES.register("fedprox")
def recipe(config: RunConfig) -> Recipe:
    """FedAvg with a proximal term that holds clients near the global model."""
    return Recipe(
        strategy=partial(
            FedProx,
            proximal_mu=config.proximal_mu,
            weighting=weighting_of(config, "examples"),
            aggregate=aggregation_of(config),
        ),
        client="sgd",
        client_options=local_sgd(config),
    )
