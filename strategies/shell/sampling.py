"""Which nodes take part in a round: by seed, purpose and round alone, or by secret coins."""

from logging import WARNING

import numpy as np
from flwr.common import log

from ...streams import numpy_stream
from .roll_call import Node


class Sampler:
    """Draw nodes without replacement, from a stream of their own for each purpose and round.

    Args:
        seed: of the streams.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._fewest_told = -1

    def sample(self, nodes: list[Node], size: int, purpose: str, server_round: int) -> list[Node]:
        """Return ``size`` of ``nodes`` in their order; all of them, with a warning, if too few."""
        if size > len(nodes) != self._fewest_told and nodes:
            self._fewest_told = len(nodes)
            log(WARNING, "%d clients wanted, %d there are: all of them take part", size, len(nodes))
        picks = numpy_stream(self._seed, purpose, server_round).choice(
            len(nodes), size=min(size, len(nodes)), replace=False
        )
        return [nodes[pick] for pick in sorted(picks)]


def poisson_sample(nodes: list[Node], rate: float, coins: np.random.Generator) -> list[Node]:
    """Return each of ``nodes`` with chance ``rate``, whatever becomes of the others; often none.

    Args:
        nodes: in an order that they keep.
        rate: q in [0, 1].
        coins: with a state that nobody knows, where the sample is to amplify privacy.
    """
    return [node for node, coin in zip(nodes, coins.random(len(nodes)), strict=True) if coin < rate]
