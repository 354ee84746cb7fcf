r"""FedBABU (Oh, Kim, Yun, 2106.06042): the body alone is trained, under a head that never moves.

    b_i <- E epochs of SGD on F_i(., h) from b            h: the seeded initial head, of all clients
    b   <- sum_i p_i b_i                                  p_i = n_i / sum_S n

Heads do not travel: each client builds the same one. In evaluation a client fine-tunes all of its
model, body and head, on its support set: that is where heads become the clients' own. After the
last round the clients that trained are scored in this way too.
"""

from functools import partial

from ..config import RunConfig
from .fedper import FedPer, options, shared_mean
from .recipe import STRATEGIES, Recipe


class FedBABU(FedPer):
    """Take the weighted mean of the clients' bodies, which they train under one fixed head.

    Arguments as ``FedPer``; what differs is at the clients: ``PartClient(trained="shared")``.
    """


@STRATEGIES.register("fedbabu")
def recipe(config: RunConfig) -> Recipe:
    """Train and average the body under a fixed random head; fine-tune all at evaluation."""
    return Recipe(
        strategy=partial(FedBABU, **shared_mean(config)),
        client="part",
        client_options=options(config, "head", "shared"),
        needs=("heads",),
    )
