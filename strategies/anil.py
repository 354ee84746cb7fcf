r"""ANIL (Raghu et al., 1909.09157), federated as FedMeta: the inner loop adapts the head alone.

    h_i     = h - alpha * grad_h L_support(b, h)                      on client i, K steps
    (b, h) <- (b, h) - Optimiser(sum_i q_i d/d(b, h) L_query(b, h_i))

The outer step moves all parameters: the body b has a gradient through the head's inner steps as
well. Evaluation adapts the head alone. ``head`` says which layers it is; usually the one that the
model calls so, or its last.
"""

from functools import partial

from ..config import RunConfig
from .fedmeta import FedMeta, meta_step, server_of
from .recipe import STRATEGIES, Recipe


class ANIL(FedMeta):
    """FedMeta on the server; its clients adapt their head alone. Arguments as ``FedMeta``."""


@STRATEGIES.register("anil")
def recipe(config: RunConfig) -> Recipe:
    """FedMeta whose adaptation moves the head alone."""
    return Recipe(
        strategy=partial(ANIL, **server_of(config)),
        client="maml",
        client_options={**meta_step(config), "part": "head", "head": config.head},
    )
