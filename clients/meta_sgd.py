r"""Meta-SGD on a client (Li et al., 1707.09835), federated as in FedMeta (1802.07876).

The rates alpha of the inner loop, one for each parameter, are learned with the parameters. One
local meta-step, for k = 0..K-1 on the support and then on the query batch:

    theta_{k+1}    = theta_k - alpha o grad L_support(theta_k)
    (theta, alpha) <- (theta, alpha) - beta * d/d(theta, alpha) L_query(theta_K)

with dL/dalpha = - sum_k grad L_support(theta_k) o v_{k+1}, v_K = grad L_query(theta_K) and v_k by
the recursion of ``meta_gradient``: the exact chain rule through all K steps. At K = 1 that is
- grad L_support(theta) o grad L_query(theta_1).

Rates may become negative: the paper allows it, for they give the direction of the step as well as
its length. Nothing here clips them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import WireError
from ..inner_rates import initial_rates, rate_name, rated_names, split_rates
from .data import ClientData
from .evaluation import Advance
from .learner import Config, NDArrays
from .local_update import LocalUpdate
from .maml import MAMLClient, MetaBatch, MetaState, finished
from .meta_gradient import Order, Predicate, adapt, meta_gradient
from .objective import LossFn, Params
from .privacy.config import PrivacyConfig
from .privacy.releases import Releases
from .privacy.updates import PrivateOrder, private_meta_sgd_update
from .training import Rule


def meta_sgd_update(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    outer_lr: float,
    inner_steps: int = 1,
    order: Order = "exact",
    adapt: Predicate | None = None,
) -> LocalUpdate[MetaState, MetaBatch]:
    """Return the update whose every step moves parameters and rates by their meta-gradients.

    Its parameters hold the rates too, under ``inner_lr/NAME``. Arguments as in ``meta_gradient``.
    """

    def step(state: MetaState, batch: MetaBatch) -> MetaState:
        own, rates = split_rates(state.params)
        found = meta_gradient(
            model,
            loss_fn,
            own,
            batch.support,
            batch.query,
            inner_lr=rates,
            steps=inner_steps,
            order=order,
            adapt=adapt,
            curvature=batch.curvature,
        )
        of_rates = found.inner_lr_grads or {}
        gradient = found.grads | {rate_name(name): value for name, value in of_rates.items()}
        moved = {name: w - outer_lr * gradient[name] for name, w in state.params.items()}
        return MetaState(moved, (*state.losses, found.query_loss))

    return LocalUpdate(begin=MetaState, step=step, finish=finished)


class MetaSGDClient(MAMLClient):
    """A Flower NumPyClient that trains a model together with the rates of its adaptation.

    It exchanges the model's arrays, and after them ``inner_lr/NAME`` for each adapted parameter:
    ``metabloom.inner_rates.initial_rates`` gives the first ones to a server. Evaluation adapts by
    the rates that were received.

    Args:
        model: see ``Learner``.
        data: see ``Learner``.
        maml: keyword arguments of ``MAMLClient``. ``inner_lr`` is what the rates are in
            ``get_parameters``; in training and evaluation those that were received count.
    """

    def __init__(
        self, model: nn.Module, data: ClientData | Callable[[], ClientData], **maml: Any
    ) -> None:
        super().__init__(model, data, **maml)
        self.rated = rated_names(model, self.adapted)
        self.array_names += tuple(map(rate_name, self.rated))

    def get_parameters(self, config: Config) -> NDArrays:
        """Return the arrays of the model as it was given, and rates that are all ``inner_lr``."""
        rates = initial_rates(self.model, self.inner_lr, self.adapted)
        return [*super().get_parameters(config), *rates.values()]

    def load(self, parameters: NDArrays) -> Params:
        """Return what was received: the model's parameters, and their rates.

        Raises:
            WireError: where their number or a shape is not that of the model and its rates.
        """
        count = len(self.array_names) - len(self.rated)
        own, rates = super().load(parameters[:count]), parameters[count:]
        if len(rates) != len(self.rated):
            raise WireError(
                f"client {self.name!r} received {len(rates)} arrays of inner rates, its "
                f"{type(self.model).__name__} has {len(self.rated)}: the server must begin with "
                "those of metabloom.inner_rates.initial_rates beside the model's"
            )
        found: Params = {}
        for name, rate in zip(self.rated, rates, strict=True):
            value = own[name]
            if tuple(rate.shape) != tuple(value.shape):
                raise WireError(
                    f"client {self.name!r} received {rate_name(name)!r} of shape "
                    f"{tuple(rate.shape)}, its parameter's is {tuple(value.shape)}: both ends must "
                    "build the same model"
                )
            found[rate_name(name)] = torch.from_numpy(np.array(rate)).to(value.device, value.dtype)
        return own | found

    def rule(self) -> Rule:
        """Return how one meta-step is made."""
        options = (
            ("outer_lr", self.outer_lr),
            ("inner_steps", self.inner_steps),
            ("order", self.order),
            ("adapt", self.adapted),
        )
        return Rule(meta_sgd_update, self.model, self.loss_fn, options)

    def private_update(
        self, releases: Releases, privacy: PrivacyConfig, order: PrivateOrder
    ) -> LocalUpdate[Params, int]:
        """Return the private meta-steps: the rates' gradients are products of releases."""
        return private_meta_sgd_update(
            releases,
            privacy,
            outer_lr=self.outer_lr,
            inner_steps=self.inner_steps,
            order=order,
            adapt=self.adapted,
        )

    def adaptation(self, params: Params, config: Config | None = None) -> tuple[Params, Advance]:
        """Return where adaptation starts, and gradient steps by the learned rates."""
        del config
        own, rates = split_rates(params)
        support = self.data.support
        return own, lambda point, steps: adapt(
            self.model,
            self.loss_fn,
            point,
            support,
            inner_lr=rates,
            steps=steps,
            adapt=self.adapted,
        )
