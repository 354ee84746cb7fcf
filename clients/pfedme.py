r"""pFedMe on a client (Dinh, Tran, Nguyen, 2006.08848): personal models by Moreau envelopes.

One local round, on one batch, from the client's copy w_i of the received model w:

    theta <- theta - lr * (grad f(theta; batch) + lambda * (theta - w_i))          K times
    w_i   <- w_i - eta * lambda * (w_i - theta)

The K steps approximate argmin f(theta) + (lambda / 2) ||theta - w_i||^2, and lambda (w_i - theta)
the gradient of the envelope at w_i. theta begins at w and goes on from one local round to the next,
as in the authors' code. w_i is the reply. The last theta is the client's personal model: it stays
on the client and lasts, and it is what the client is scored by.

A client that never trained adapts by the inner steps alone, from the received model, pulled to it.
"""

import math
from collections.abc import Callable
from logging import ERROR
from typing import Any, NamedTuple

import torch
from flwr.common import log
from torch import Tensor, nn

from ..accounting import Event
from ..errors import ConfigError
from .data import Batch, ClientData
from .evaluation import Advance
from .learner import Config, NDArrays
from .local_update import (
    LocalResult,
    LocalUpdate,
    mean_of,
    personal_in,
    run_update,
    with_personal,
)
from .objective import LossFn, Params, detached, grad_and_value, objective
from .personal import PersonalModel
from .privacy.config import PrivacyConfig
from .privacy.releases import Releases
from .privacy.round import PrivateRounds, Training
from .privacy.updates import private_pfedme_update
from .sgd import TRAIN_LOSS, SGDClient, sgd_update
from .training import LocalTraining, Rule


class PFedMeState(NamedTuple):
    """The copy w_i of the received model, the personal model theta, the loss of each step."""

    params: Params
    personal: Params
    losses: tuple[Tensor, ...] = ()


def pfedme_update(
    model: nn.Module, loss_fn: LossFn, *, lr: float, steps: int, local_lr: float, pull: float
) -> LocalUpdate[PFedMeState, Batch]:
    """Return the update whose every step is one local round on a batch.

    Its result holds w_i, and theta as ``personal/NAME``.

    Args:
        model: called functionally and never changed.
        loss_fn: a scalar mean over the batch.
        lr: of theta's steps, > 0.
        steps: K >= 1.
        local_lr: eta > 0.
        pull: lambda > 0.
    """
    loss = objective(model, loss_fn)

    def begin(params: Params) -> PFedMeState:
        return PFedMeState(detached(params), detached(params))

    def step(state: PFedMeState, batch: Batch) -> PFedMeState:
        w, theta, values = state.params, state.personal, []
        for _ in range(steps):
            gradient, value = grad_and_value(lambda point: loss(point, batch), theta)
            theta = {n: v - lr * (gradient[n] + pull * (v - w[n])) for n, v in theta.items()}
            values.append(value.detach())
        moved = {n: v - local_lr * pull * (v - theta[n]) for n, v in w.items()}
        return PFedMeState(moved, theta, (*state.losses, torch.stack(values).mean()))

    def finish(state: PFedMeState) -> LocalResult:
        params = with_personal(state.params, state.personal)
        return LocalResult(params, {TRAIN_LOSS: mean_of(state.losses)})

    return LocalUpdate(begin=begin, step=step, finish=finish)


class PFedMeClient(SGDClient):
    """A Flower NumPyClient with a personal model on the Moreau envelope of the shared one.

    Args:
        model: see ``Learner``.
        data: see ``Learner``; training uses support and query records alike.
        pull: lambda > 0, how close theta stays to w_i.
        inner_steps: K >= 1, steps of theta in a local round, of rate ``inner_lr``.
        sgd: keyword arguments of ``SGDClient``: ``local_lr`` is eta; local rounds are the batches
            of ``local_epochs`` epochs, with privacy ``local_steps`` with K releases each.
            ``context`` is needed: the personal model lasts in its state, and in ``store`` where
            there is one.

    Raises:
        ConfigError: where a value is out of range, or two of them make the pull alone diverge.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ClientData | Callable[[], ClientData],
        *,
        pull: float = 1.0,
        inner_steps: int = 1,
        **sgd: Any,
    ) -> None:
        super().__init__(model, data, **sgd)
        if not 0 < pull < math.inf:
            raise ConfigError(f"lambda of pFedMe = {pull!r}: must be a finite number above 0")
        if not (isinstance(inner_steps, int) and inner_steps >= 1):
            raise ConfigError(f"inner_steps = {inner_steps!r}: must be a whole number >= 1")
        for key, lr in (("inner_lr", self.inner_lr), ("local_lr", self.local_lr)):
            if lr * pull >= 2:
                raise ConfigError(
                    f"{key} = {lr:g} with a lambda of pFedMe of {pull:g}: each step multiplies the "
                    f"distance of the two models by 1 - {lr * pull:g}, so they run apart; take "
                    f"{key} well below {2 / pull:g}, or a smaller lambda"
                )
        self.pull = pull
        self.inner_steps = inner_steps
        self.own = PersonalModel(self.context, client=self.name, store=self.store)

    def training(self, params: Params, config: Config) -> LocalTraining:
        """Return the local rounds of the round that ``config`` names, from ``params``."""
        return self.as_training(
            Rule(pfedme_update, self.model, self.loss_fn, tuple(self._options().items())),
            params,
            config,
            batches=lambda data: self._batches(data, "pfedme", config),
            steps=lambda data: self.local_epochs * self._batches_of_an_epoch(data.num_examples),
        )

    def answered(
        self, result: LocalResult, parameters: NDArrays, config: Config
    ) -> tuple[NDArrays, int, Config]:
        """Return the reply, w_i, and keep the personal model."""
        reply = super().answered(result, parameters, config)
        self.own.keep(config, personal_in(result.params))  # last: a failure leaves nothing behind
        return reply

    def train_privately(
        self, private: PrivateRounds, parameters: NDArrays, config: Config
    ) -> tuple[NDArrays, int, Config]:
        """Return the privatised w_i, and epsilon; the personal model comes of the same releases."""

        def events(privacy: PrivacyConfig) -> list[Event]:
            count = self.local_steps * self.inner_steps
            return [Event(privacy.noise_multiplier, privacy.sample_rate, count)]

        def update(releases: Releases, privacy: PrivacyConfig) -> LocalUpdate[Any, int]:
            return private_pfedme_update(releases, privacy, **self._options())

        training = Training("dp-sgd", events, update, self.local_steps)
        params = self.load(parameters)
        with self.guarded():
            reply = private.train(params, config, training, lambda: self.data, model=self.model)
            count = self.count_told(lambda: self.data.num_examples)
            trained, told = self.dump(reply.params, parameters), reply.metrics
            self._keep_privately(config, personal_in(reply.params))
        return trained, count, {**told}

    def adaptation(self, params: Params, config: Config | None = None) -> tuple[Params, Advance]:
        """Return where adaptation starts, and its steps: theta's, pulled to the received model."""
        update = sgd_update(
            self.model,
            self.loss_fn,
            lr=self.inner_lr,
            proximal_mu=self.pull,
            anchor=params,
            train=self.adapted,
        )
        support = self.data.support
        start = self.own.after(config or {}, self.device) or params
        return start, lambda point, steps: run_update(update, point, [support] * steps).params

    def _options(self) -> dict[str, Any]:
        """Return what the plain and the private update share."""
        return {
            "lr": self.inner_lr,
            "steps": self.inner_steps,
            "local_lr": self.local_lr,
            "pull": self.pull,
        }

    def _keep_privately(self, config: Config, personal: Params) -> None:
        try:
            self.own.keep(config, personal)
        except Exception as err:  # what was paid for is sent all the same
            log(ERROR, "client %s: its personal model is not kept: %s", self.name, err)
