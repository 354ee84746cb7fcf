r"""FedMD (Li, Wang, 1910.03581): clients of any architecture agree on logits.

    c(x) = mean_i z_i(x)                    unweighted, over the clients of the round
    w_i <- digest: minimise mean |z(x; w_i) - c(x)|     over the public records of the round
    w_i <- revisit: local SGD on the client's own records

One exchange a round: what clients of a round agree on is digested by those of the next.

Differences from the paper: public records need no labels (there is no training on them before the
first round), they may be of another data set, and the server too has a student of each
architecture, for clients that never trained. ``aggregation`` median or trimmed-mean resists
clients that lie.
"""

from functools import partial
from typing import Any

from ..config import RunConfig
from .consensus import consensus_of
from .distilled import Distillation
from .fedavg import local_sgd
from .public_consensus import PublicConsensus
from .recipe import STRATEGIES, Recipe, consensus_by


class FedMD(PublicConsensus):
    """Agree on the mean of the clients' logits.

    Args:
        by: "mean", "median" or "trimmed-mean" of the clients, coordinate by coordinate.
        trim: share that "trimmed-mean" cuts at each end, in [0, 0.5).
        others: see ``PublicConsensus``.
    """

    def __init__(self, *, by: str = "mean", trim: float = 0.2, **others: Any) -> None:
        super().__init__(partial(consensus_of, by, trim=trim), **others)
        self.consensus = f"{by}, trim {trim}"


@STRATEGIES.register("fedmd")
def recipe(config: RunConfig) -> Recipe:
    """Clients of any architecture teach each other by the mean of their logits."""
    return Recipe(
        strategy=partial(FedMD, **agreement(config)),
        client="logits",
        client_options=digest(config, "absolute-error"),
        needs=("models", "public", "num_classes"),
        client_needs=("public",),
    )


def agreement(config: RunConfig) -> dict[str, Any]:
    """Return the options of the server that FedMD and DS-FL share."""
    return {
        **consensus_by(config),
        "public_subset": config.public_subset,
        "encoding": config.logits_encoding,
        "device": config.device,
        "distillation": Distillation(
            steps=config.distill_steps,
            lr=config.distill_lr,
            batch_size=config.distill_batch_size,
        ),
    }


def digest(config: RunConfig, loss: str) -> dict[str, object]:
    """Return the options of the client that FedMD and DS-FL share."""
    return {
        **local_sgd(config),
        "public_subset": config.public_subset,
        "encoding": config.logits_encoding,
        "digest": loss,
        "digest_epochs": config.digest_epochs,
        "digest_lr": config.digest_lr,
        "digest_batch_size": config.distill_batch_size,
    }
