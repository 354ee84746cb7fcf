r"""DS-FL (Itahara et al., 2008.06180): agreement on probabilities, sharpened.

    p_i(x) = softmax(z_i(x))
    q(x)   = softmax(mean_i p_i(x) / T)        entropy reduction, T = 0.1
    w_i <- minimise mean H(q(x), softmax(z(x; w_i)))   over the unlabelled public records of a round
    w_i <- local SGD on the client's own records

The server's students learn q too. One exchange a round: q of a round is learnt with the next.

Differences from the paper: what travels are the logits of p_i and q, whose softmax is what the
paper sends; their bytes are the same, and int8 keeps small probabilities apart.
"""

from functools import partial
from typing import Any

from ..config import RunConfig
from .consensus import check_temperature, era_logits
from .fedmd import agreement, digest
from .public_consensus import PublicConsensus
from .recipe import STRATEGIES, Recipe


class DSFL(PublicConsensus):
    """Agree on the sharpened mean of the clients' probabilities.

    Args:
        temperature: T of the entropy reduction, > 0; the smaller the sharper.
        by: "mean", "median" or "trimmed-mean" of the clients' probabilities.
        trim: share that "trimmed-mean" cuts at each end, in [0, 0.5).
        others: see ``PublicConsensus``.
    """

    def __init__(
        self, *, temperature: float = 0.1, by: str = "mean", trim: float = 0.2, **others: Any
    ) -> None:
        check_temperature(temperature)
        super().__init__(partial(era_logits, temperature=temperature, by=by, trim=trim), **others)
        self.temperature = temperature
        self.consensus = f"{by}, trim {trim}"


@STRATEGIES.register("ds-fl")
def recipe(config: RunConfig) -> Recipe:
    """Clients of any architecture teach each other by sharpened mean probabilities."""
    return Recipe(
        strategy=partial(DSFL, temperature=config.era_temperature, **agreement(config)),
        client="logits",
        client_options=digest(config, "cross-entropy"),
        needs=("models", "public", "num_classes"),
        client_needs=("public",),
    )
