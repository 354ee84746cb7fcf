r"""FedRep (Collins et al., 2102.07078): heads are fitted to the shared body first, then the body.

    h_i <- E_h epochs of SGD on F_i(b, .) from h_i        the body is held
    b_i <- E epochs of SGD on F_i(., h_i) from b          the head, as it is now, is held
    b   <- sum_i p_i b_i                                  p_i = n_i / sum_S n

h_i never leaves client i; else as FedPer, but for the adaptation of an evaluation, which moves the
head alone: the paper's clients that never trained fit a head to the body that there is.

Difference from the paper: E_h and E are epochs over minibatches; the paper counts its updates of
the head in such epochs too, but shows its algorithm with full gradients.
"""

from functools import partial

from ..config import RunConfig
from .fedper import FedPer, options, shared_mean
from .recipe import STRATEGIES, Recipe


class FedRep(FedPer):
    """Take the weighted mean of the clients' bodies; heads are fitted first. Arguments as FedPer.

    What differs is at the clients: ``PartClient(trained="in-turn")``.
    """


@STRATEGIES.register("fedrep")
def recipe(config: RunConfig) -> Recipe:
    """Average the bodies; each client fits its own head first, then the body to it."""
    epochs = {} if config.is_private else {"head_epochs": config.head_epochs}
    return Recipe(
        strategy=partial(FedRep, **shared_mean(config)),
        client="part",
        client_options={**options(config, "head", "in-turn"), **epochs},
        needs=("heads",),
    )
