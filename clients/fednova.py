r"""The client of FedNova (Wang et al., 2007.07481): local SGD whose reply is normalised.

    v <- rho * v + grad L(w; batch) + mu * (w - w^t),    w <- w - eta * v        tau steps, v = 0

    w^t - w = eta * sum_k a_k g_k:    reply  w^t - (w^t - w) / ||a||_1   and   tau

so that a reply is one step of mean gradient, however many steps the client took. a is the weight
of each local gradient in the sum: ones for SGD; with momentum rho and a proximal term mu it follows
from the recursion above, see ``normaliser``.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..accounting import Event
from ..errors import ConfigError
from ..wire import NOVA_STEPS, NamedArrays
from .data import Batch, ClientData
from .learner import Config, NDArrays
from .local_update import LocalResult, LocalUpdate, mean_of
from .objective import LossFn, Params, detached, grad_and_value, objective
from .privacy.config import PrivacyConfig
from .privacy.releases import Releases
from .privacy.round import Training
from .privacy.updates import private_sgd_update
from .sgd import TRAIN_LOSS, SGDClient
from .training import LocalTraining, Rule


class NovaState(NamedTuple):
    """Parameters so far, the received ones, their velocity, and the loss of each step."""

    params: Params
    anchor: Params
    velocity: Params
    losses: tuple[Tensor, ...] = ()


def nova_update(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    lr: float,
    momentum: float = 0.0,
    proximal_mu: float = 0.0,
) -> LocalUpdate[NovaState, Batch]:
    """Return the update whose every step is one of SGD with momentum, pulled to where it began.

    Args:
        model: called functionally and never changed.
        loss_fn: a scalar mean over the batch.
        lr: eta > 0.
        momentum: rho in [0, 1); the velocity is 0 when training begins.
        proximal_mu: mu >= 0, weight of (mu / 2) ||w - w^t||^2.
    """
    loss = objective(model, loss_fn)

    def begin(params: Params) -> NovaState:
        # Other tensors for the anchor: what is compiled for two that are one takes them for one.
        still = {name: torch.zeros_like(value) for name, value in params.items()}
        return NovaState(detached(params), detached(params), still)

    def step(state: NovaState, batch: Batch) -> NovaState:
        gradient, value = grad_and_value(lambda point: loss(point, batch), state.params)
        velocity = {
            name: momentum * state.velocity[name]
            + g
            + proximal_mu * (state.params[name] - state.anchor[name])
            for name, g in gradient.items()
        }
        params = {name: w - lr * velocity[name] for name, w in state.params.items()}
        return NovaState(params, state.anchor, velocity, (*state.losses, value.detach()))

    def finish(state: NovaState) -> LocalResult:
        return LocalResult(state.params, {TRAIN_LOSS: mean_of(state.losses)})

    return LocalUpdate(begin=begin, step=step, finish=finish)


def normaliser(steps: int, *, lr: float, momentum: float = 0.0, proximal_mu: float = 0.0) -> float:
    """Return ||a||_1, the sum of the weights of ``steps`` local gradients in w^t - w.

    tau for SGD; [tau - rho (1 - rho^tau) / (1 - rho)] / (1 - rho) with momentum;
    (1 - (1 - eta mu)^tau) / (eta mu) with a proximal term. With both, the weight of the gradient
    that came j steps before the last one is x_j of x <- x + v, v <- rho v - eta mu x, from one.

    Args:
        steps: tau >= 0.
        lr: eta > 0.
        momentum: rho in [0, 1).
        proximal_mu: mu >= 0.

    >>> f"{normaliser(2, lr=0.1, momentum=0.9):g}, {normaliser(3, lr=0.1, proximal_mu=1.0):g}"
    '2.9, 2.71'
    """
    if not (momentum or proximal_mu):
        return float(steps)
    total = displacement = 0.0
    velocity = 1.0  # of one gradient of size 1 / eta
    for _ in range(steps):
        displacement += velocity
        total += abs(displacement)
        velocity = momentum * velocity - lr * proximal_mu * displacement
    return total


class NovaClient(SGDClient):
    """A Flower NumPyClient that sends normalised updates and how many steps it took.

    A server that is not FedNova's gets the trained model, as from ``SGDClient``.

    Args:
        model: see ``Learner``.
        data: see ``Learner``; training uses support and query records alike.
        momentum: rho in [0, 1); the velocity begins at 0 in each round.
        nova_mu: mu >= 0 of the proximal term.
        sgd: keyword arguments of ``SGDClient``; not ``proximal_mu`` and ``ditto_lambda``.

    Raises:
        ConfigError: where a value is out of range, naming it.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ClientData | Callable[[], ClientData],
        *,
        momentum: float = 0.0,
        nova_mu: float = 0.0,
        **sgd: Any,
    ) -> None:
        super().__init__(model, data, **sgd)
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum = {momentum!r}: must be at least 0 and below 1")
        if not 0 <= nova_mu < math.inf:
            raise ConfigError(f"nova_mu = {nova_mu!r}: must be a finite number of at least 0")
        self.momentum = momentum
        self.nova_mu = nova_mu

    def training(self, params: Params, config: Config) -> LocalTraining:
        """Return the epochs of SGD of the round that ``config`` names, from ``params``."""
        options = (
            ("lr", self.local_lr),
            ("momentum", self.momentum),
            ("proximal_mu", self.nova_mu),
        )
        return self.as_training(
            Rule(nova_update, self.model, self.loss_fn, options),
            params,
            config,
            batches=lambda data: self._batches(data, "sgd", config),
            steps=self._steps,
        )

    def private_training(self, config: Config) -> Training:
        """Return the steps of DP-SGD of the round that ``config`` names."""
        del config

        def events(privacy: PrivacyConfig) -> list[Event]:
            return [Event(privacy.noise_multiplier, privacy.sample_rate, self.local_steps)]

        def update(releases: Releases, privacy: PrivacyConfig) -> LocalUpdate[Any, int]:
            return private_sgd_update(
                releases,
                privacy,
                lr=self.local_lr,
                proximal_mu=self.nova_mu,
                momentum=self.momentum,
            )

        return Training("dp-sgd", events, update, self.local_steps)

    def fit_named(
        self, arrays: NamedArrays, config: Config
    ) -> tuple[dict[str, np.ndarray], int, Config] | None:
        """Return (normalised model and tau, number of records, metrics); None for other servers."""
        if set(arrays) != {*self.array_names, NOVA_STEPS}:
            return None
        received = [arrays[name] for name in self.array_names]
        trained, count, metrics = self.fit(received, config)
        steps = self._steps(self.records) if self.private is None else self.local_steps
        whole = normaliser(
            steps, lr=self.local_lr, momentum=self.momentum, proximal_mu=self.nova_mu
        )
        reply = dict(zip(self.array_names, normalised(trained, received, whole), strict=True))
        tau = np.array(max(steps, 1), dtype=arrays[NOVA_STEPS].dtype)
        return {**reply, NOVA_STEPS: tau}, count, metrics

    def _steps(self, data: ClientData) -> int:
        return self.local_epochs * self._batches_of_an_epoch(data.num_examples)


def normalised(trained: NDArrays, received: NDArrays, whole: float) -> NDArrays:
    """Return w^t - (w^t - w) / ||a||_1 of floating arrays, in their dtypes; others as they are.

    Args:
        trained: w.
        received: w^t, of the same shapes and dtypes.
        whole: ||a||_1 > 0; 0, of no steps, leaves w.
    """
    if whole in (0.0, 1.0):
        return trained
    return [
        np.asarray(start + (new.astype(np.float64) - start) / whole, dtype=start.dtype)
        if np.issubdtype(start.dtype, np.floating)
        else new
        for new, start in zip(trained, received, strict=True)
    ]
