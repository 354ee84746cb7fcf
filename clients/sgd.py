r"""Local SGD: the client of FedAvg, FedProx, Reptile and Ditto.

Papers: FedAvg 1602.05629, FedProx 1812.06127, Reptile 1803.02999, Ditto 2012.04221.

    w <- w - lr * (grad L(w; batch) + mu * (w - anchor))

FedProx: the anchor is the received model. Ditto: a second, personal model v takes the same steps
with the received model as its anchor,
    v <- v - lr * (grad L(v; batch) + lambda * (v - w)),
and stays on the client. mu = 0 is plain SGD.
"""

import math
from collections.abc import Callable, Iterator
from logging import ERROR
from typing import Any, NamedTuple

from flwr.common import log
from torch import Tensor, nn

from ..accounting import Event
from ..errors import BudgetExhaustedError, ConfigError
from .batches import minibatches
from .data import Batch, ClientData
from .evaluation import Advance
from .learner import Config, Learner, NDArrays
from .local_update import LocalResult, LocalUpdate, mean_of, run_update
from .meta_gradient import Predicate
from .objective import LossFn, Params, detached, grad_and_value, objective
from .personal import PersonalModel
from .privacy.config import PrivacyConfig
from .privacy.releases import Releases
from .privacy.round import PrivateRounds, Training
from .privacy.updates import private_sgd_update
from .training import LocalTraining, Rule

TRAIN_LOSS = "train-loss"
PROXIMAL_MU_KEYS = ("proximal-mu", "proximal_mu")  # of Flower's FedProx, new and legacy


class SGDState(NamedTuple):
    """Parameters so far, the parameters that they are pulled to, and the loss of each step."""

    params: Params
    anchor: Params
    losses: tuple[Tensor, ...] = ()


def sgd_update(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    lr: float,
    proximal_mu: float = 0.0,
    anchor: Params | None = None,
    train: Predicate | None = None,
) -> LocalUpdate[SGDState, Batch]:
    """Return the update whose every step is one (proximal) SGD step.

    Args:
        model: called functionally and never changed.
        loss_fn: a scalar mean over the batch.
        lr: > 0.
        proximal_mu: >= 0, weight of (mu / 2) ||w - anchor||^2.
        anchor: None means the parameters that training begins with.
        train: which parameter names move; None means all. The others are held (FedRep's phases,
            FedBABU's head).
    """
    loss = objective(model, loss_fn)

    def begin(params: Params) -> SGDState:
        return SGDState(detached(params), detached(params if anchor is None else anchor))

    def step(state: SGDState, batch: Batch) -> SGDState:
        moving = {n: w for n, w in state.params.items() if train is None or train(n)}
        gradient, value = grad_and_value(lambda part: loss({**state.params, **part}, batch), moving)
        if proximal_mu:
            gradient = {
                n: g + proximal_mu * (state.params[n] - state.anchor[n])
                for n, g in gradient.items()
            }
        moved = {n: state.params[n] - lr * g for n, g in gradient.items()}
        losses = (*state.losses, value.detach())
        return SGDState({**state.params, **moved}, state.anchor, losses)

    def finish(state: SGDState) -> LocalResult:
        return LocalResult(state.params, {TRAIN_LOSS: mean_of(state.losses)})

    return LocalUpdate(begin=begin, step=step, finish=finish)


class SGDClient(Learner):
    """A Flower NumPyClient that trains by epochs of SGD and evaluates with fine-tuning.

    Args:
        model: see ``Learner``.
        data: see ``Learner``; training uses support and query records alike.
        local_lr: learning rate of training, > 0.
        local_epochs: epochs of a round, >= 1; not used with privacy.
        local_steps: with privacy, the steps of a round, >= 1, each on a Poisson batch of its own.
        proximal_mu: FedProx's mu >= 0. The mu that Flower's FedProx strategies send in the train
            config takes its place.
        ditto_lambda: None for no personal model; else Ditto's lambda >= 0, and ``context`` is
            needed: the personal model lasts in its state, and in ``store`` where there is one.
        learner: keyword arguments of ``Learner``: inner_lr (of the fine-tuning at evaluation),
            batch_size, loss_fn, eval_steps, adapt, seed, name, device, context, store, privacy.

    Raises:
        ConfigError: where a value is out of range, naming it.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ClientData | Callable[[], ClientData],
        *,
        local_lr: float = 0.1,
        local_epochs: int = 1,
        local_steps: int = 1,
        proximal_mu: float = 0.0,
        ditto_lambda: float | None = None,
        **learner: Any,
    ) -> None:
        super().__init__(model, data, **learner)
        if not 0 < local_lr < math.inf:
            raise ConfigError(f"local_lr = {local_lr!r}: must be a finite number above 0")
        for key, count in (("local_epochs", local_epochs), ("local_steps", local_steps)):
            if not (isinstance(count, int) and count >= 1):
                raise ConfigError(f"{key} = {count!r}: must be a whole number >= 1")
        for key, value in (("proximal_mu", proximal_mu), ("ditto_lambda", ditto_lambda or 0.0)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"{key} = {value!r}: must be a finite number of at least 0")
        self.local_lr = local_lr
        self.local_epochs = local_epochs
        self.local_steps = local_steps
        self.proximal_mu = proximal_mu
        self.ditto_lambda = ditto_lambda
        self.personal = (
            None
            if ditto_lambda is None
            else PersonalModel(self.context, client=self.name, store=self.store)
        )

    def training(self, params: Params, config: Config) -> LocalTraining:
        """Return the epochs of SGD of the round that ``config`` names, from ``params``."""
        options = (("lr", self.local_lr), ("proximal_mu", self._proximal_mu(config)))
        return self.as_training(
            Rule(sgd_update, self.model, self.loss_fn, options),
            params,
            config,
            batches=lambda data: self._batches(data, "sgd", config),
            steps=lambda data: self.local_epochs * self._batches_of_an_epoch(data.num_examples),
        )

    def answered(
        self, result: LocalResult, parameters: NDArrays, config: Config
    ) -> tuple[NDArrays, int, Config]:
        """Return the reply; with Ditto, train the personal model too, which is not in it."""
        reply = super().answered(result, parameters, config)
        self._personalise(parameters, config)  # last: a round that fails leaves nothing behind
        return reply

    def train_privately(
        self, private: PrivateRounds, parameters: NDArrays, config: Config
    ) -> tuple[NDArrays, int, Config]:
        """Return the privatised model, and epsilon; with Ditto, train the personal model too."""
        training = self.private_training(config)
        try:
            reply = self.fit_privately(private, training, parameters, config)
        except BudgetExhaustedError:  # nothing is released any more; the device goes on for itself
            self._personalise(parameters, config)
            raise
        self._personalise(parameters, config)
        return reply

    def private_training(self, config: Config) -> Training:
        """Return the steps of DP-SGD of the round that ``config`` names."""
        mu = self._proximal_mu(config)

        def events(privacy: PrivacyConfig) -> list[Event]:
            return [Event(privacy.noise_multiplier, privacy.sample_rate, self.local_steps)]

        def update(releases: Releases, privacy: PrivacyConfig) -> LocalUpdate[Any, int]:
            return private_sgd_update(releases, privacy, lr=self.local_lr, proximal_mu=mu)

        return Training("dp-sgd", events, update, self.local_steps)

    def _personalise(self, parameters: NDArrays, config: Config) -> None:
        """Train the personal model, where there is one; it stays on the client."""
        if self.personal is None:
            return
        try:
            received = self.load(parameters)
            with self.seeded(config):
                own = run_update(
                    self._pulled_to(received, self.local_lr),
                    self.personal.before(config, self.device) or received,
                    self._batches(self.data, "ditto", config),
                )
            self.personal.keep(config, own.params)
        except Exception as err:
            if self.private is None:
                raise
            # What was paid for is sent all the same: that it fails would tell of the records.
            log(ERROR, "client %s: its personal model is not trained: %s", self.name, err)

    def adaptation(self, params: Params, config: Config | None = None) -> tuple[Params, Advance]:
        """Return where adaptation starts, and its steps; see ``Learner``.

        Ditto starts at its personal model and is pulled to the received one.
        """
        if self.personal is None:
            return super().adaptation(params, config)
        update = self._pulled_to(params, self.inner_lr, train=self.adapted)
        support = self.data.support
        start = self.personal.after(config or {}, self.device) or params
        return start, lambda point, steps: run_update(update, point, [support] * steps).params

    def _proximal_mu(self, config: Config) -> float:
        for key in PROXIMAL_MU_KEYS:
            value = config.get(key, 0.0)
            if not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise ConfigError(
                    f"{key} = {value!r} in the train config: must be a finite number of at least 0"
                )
        sent = [float(config[key]) for key in PROXIMAL_MU_KEYS if key in config]
        value = sent[0] if sent else self.proximal_mu
        return value

    def _pulled_to(
        self, anchor: Params, lr: float, train: Predicate | None = None
    ) -> LocalUpdate[SGDState, Batch]:
        return sgd_update(
            self.model,
            self.loss_fn,
            lr=lr,
            proximal_mu=self.ditto_lambda or 0.0,
            anchor=anchor,
            train=train,
        )

    def _batches_of_an_epoch(self, records: int) -> int:
        return math.ceil(records / self.batch_size) if self.batch_size else 1

    def _batches(self, data: ClientData, purpose: str, config: Config) -> Iterator[Batch]:
        return minibatches(
            data.all,
            batch_size=self.batch_size,
            epochs=self.local_epochs,
            generator=self.stream(purpose, config),
        )
