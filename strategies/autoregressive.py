r"""A generator of adapted models, trained by a federation: adaptation is one forward pass of it.

    z       = mean over the support set of psi(x, y)
    theta_l = base_l + U_l(s_{l-1}),    s_0 = z
    s_l     = GRU(s_{l-1}, E_l(theta_l))

The parameters of a client's model are generated layer by layer, from its support set and from the
layers already generated. Clients train w = (psi, U, GRU, E, base) by local SGD on their query loss;
the server gives the mean of w - w_i to its optimiser (FedMeta's, or Adam of 2003.00295):

    w <- w - Optimiser(sum_i q_i (w - w_i))

``server-optimizer = "sgd"`` with ``outer-lr = 1`` is FedAvg of w. The generator runs on the client,
so no summary of data leaves it. See ``models/hypernetworks.py`` and ``clients/generator.py``.

Nearest published: HyperTransformer (2201.04182). Differences: trained by a federation; a mean over
records and a recurrent state stand where it has a transformer; every layer is generated, and what
is generated is added to base parameters, which train too.
"""

from functools import partial
from typing import Any

from ..config import RunConfig
from ..errors import ConfigError
from ..models.hypernetworks import with_generator
from .fedmeta import FedMeta
from .recipe import STRATEGIES, Recipe, aggregation_of, weighting_of


class Autoregressive(FedMeta):
    """Give the clients' mean update of a generator to a server optimiser that keeps its state.

    The arrays are those of a ``GeneratedModel``: the base model and its generator.

    Args:
        lr: the server's learning rate, > 0.
        fedmeta: arguments of ``FedMeta``.
    """

    def __init__(self, *, lr: float = 0.003, **fedmeta: Any) -> None:
        super().__init__(lr=lr, **fedmeta)


@STRATEGIES.register("autoregressive")
def recipe(config: RunConfig) -> Recipe:
    """A generator of adapted models: one forward pass on the support set, no gradient step."""
    if config.is_private:
        raise ConfigError(
            "privacy.* with strategy 'autoregressive': the gradient of a generator depends on the "
            "support set as a whole, so no record has a gradient of its own that could be clipped; "
            "use user-privacy.*, or another strategy"
        )
    return Recipe(
        strategy=partial(
            Autoregressive,
            optimizer=config.server_optimizer,
            lr=config.outer_lr or 0.003,
            weighting=weighting_of(config, "uniform"),
            aggregate=aggregation_of(config),
        ),
        client="generator",
        client_options={
            "local_lr": config.local_lr,
            "local_steps": config.local_steps,
            "batch_size": config.batch_size,
            "split": config.split,
        },
        network=partial(with_generator, width=config.hypernetwork_width),
    )
