r"""BOIL (Oh et al., 2008.08882), federated as FedMeta: the inner loop adapts the body alone.

    b_i     = b - alpha * grad_b L_support(b, h)                      on client i, K steps
    (b, h) <- (b, h) - Optimiser(sum_i q_i d/d(b, h) L_query(b_i, h))

The outer step moves all parameters. Evaluation adapts the body alone. ``head`` says which
layers are the head h; usually the one that the model calls so, or its last.
"""

from functools import partial

from ..config import RunConfig
from .fedmeta import FedMeta, meta_step, server_of
from .recipe import STRATEGIES, Recipe


class BOIL(FedMeta):
    """FedMeta on the server; its clients adapt all but their head. Arguments as ``FedMeta``."""


@STRATEGIES.register("boil")
def recipe(config: RunConfig) -> Recipe:
    """FedMeta whose adaptation moves all but the head."""
    return Recipe(
        strategy=partial(BOIL, **server_of(config)),
        client="maml",
        client_options={**meta_step(config), "part": "body", "head": config.head},
    )
