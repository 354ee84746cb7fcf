r"""LG-FedAvg (Liang et al., 2001.01523): each client its own representation, one model on top.

    (l_i, g_i) <- E epochs of SGD on F_i from (l_i, g)
    g          <- sum_i p_i g_i                           p_i = n_i / sum_S n

g, the top of the network (the head), is shared; the low layers l_i are the client's own and never
leave it, so that what travels is small. Clients may have low layers of different forms:
architectures whose heads are the same share one (``shared_part``).

Differences from the paper: both parts begin as the model is initialised, where the paper's
experiments begin at a model of FedAvg. A client that never trained begins with those low layers and
adapts all of its model; in the paper all clients' models answer for it, which would make the low
layers leave.
"""

from functools import partial
from typing import ClassVar, Literal

from ..config import RunConfig
from .fedper import FedPer, options, shared_mean
from .recipe import STRATEGIES, Recipe


class LGFedAvg(FedPer):
    """Take the weighted mean of the clients' heads; bodies stay with the clients.

    Arguments as ``FedPer``.
    """

    shares: ClassVar[Literal["body", "head"]] = "head"


@STRATEGIES.register("lg-fedavg")
def recipe(config: RunConfig) -> Recipe:
    """Average the heads; each client's low layers are its own, and stay."""
    return Recipe(
        strategy=partial(LGFedAvg, **shared_mean(config)),
        client="part",
        client_options=options(config, "body"),
        needs=("heads",),
    )
