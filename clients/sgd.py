r"""Local SGD: the client of FedAvg, FedProx, Reptile and Ditto.

Papers: FedAvg 1602.05629, FedProx 1812.06127, Reptile 1803.02999, Ditto 2012.04221.

    w <- w - lr * (grad L(w; batch) + mu * (w - anchor))

FedProx: the anchor is the received model. Ditto: a second, personal model v takes the same steps
with the received model as its anchor,
    v <- v - lr * (grad L(v; batch) + lambda * (v - w)),
and stays on the client. mu = 0 is plain SGD.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from flwr.app import Context
from torch import Tensor, nn

from ..errors import ConfigError
from .batches import minibatches
from .data import Batch, ClientData
from .evaluation import Advance
from .learner import Config, Learner, NDArrays
from .local_update import LocalResult, LocalUpdate, mean_of, run_update
from .meta_gradient import Predicate
from .objective import LossFn, Params, detached, objective
from .personal import PersonalModel

TRAIN_LOSS = "train-loss"
PROXIMAL_MU = "proximal-mu"  # the key by which Flower's own FedProx strategy sends mu


@dataclass(frozen=True)
class SGDState:
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
        start = detached(params)
        return SGDState(start, start if anchor is None else detached(anchor))

    def step(state: SGDState, batch: Batch) -> SGDState:
        moving = {n: w for n, w in state.params.items() if train is None or train(n)}
        gradient, value = torch.func.grad_and_value(
            lambda part: loss({**state.params, **part}, batch)
        )(moving)
        if proximal_mu:
            gradient = {
                n: g + proximal_mu * (state.params[n] - state.anchor[n])
                for n, g in gradient.items()
            }
        moved = {n: state.params[n] - lr * g for n, g in gradient.items()}
        return replace(
            state, params={**state.params, **moved}, losses=(*state.losses, value.detach())
        )

    def finish(state: SGDState) -> LocalResult:
        return LocalResult(state.params, {TRAIN_LOSS: mean_of(state.losses)})

    return LocalUpdate(begin=begin, step=step, finish=finish)


class SGDClient(Learner):
    """A Flower NumPyClient that trains by epochs of SGD and evaluates with fine-tuning.

    Args:
        model: see ``Learner``, also for ``loss_fn``, ``eval_steps``, ``adapt``, ``batch_size``,
            ``seed``, ``name`` and ``device``.
        data: see ``Learner``; training uses support and query records alike.
        inner_lr: learning rate of the fine-tuning at evaluation, > 0.
        local_lr: learning rate of training, > 0.
        local_epochs: epochs of a round, >= 1.
        proximal_mu: FedProx's mu >= 0. A ``proximal-mu`` in the train config (Flower's FedProx
            strategy sends it) takes its place.
        ditto_lambda: None for no personal model; else Ditto's lambda >= 0, and ``context`` is
            needed.
        context: Flower's Context, in whose state the personal model lasts over the rounds.

    Raises:
        ConfigError: where a value is out of range, naming it.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ClientData | Callable[[], ClientData],
        *,
        loss_fn: LossFn = nn.functional.cross_entropy,
        inner_lr: float = 0.1,
        local_lr: float = 0.1,
        local_epochs: int = 1,
        batch_size: int = 0,
        proximal_mu: float = 0.0,
        ditto_lambda: float | None = None,
        context: Context | None = None,
        adapt: Predicate | None = None,
        eval_steps: Sequence[int] = (1, 5),
        seed: int = 0,
        name: str = "",
        device: str = "cpu",
    ) -> None:
        super().__init__(
            model,
            data,
            loss_fn=loss_fn,
            inner_lr=inner_lr,
            eval_steps=eval_steps,
            adapt=adapt,
            batch_size=batch_size,
            seed=seed,
            name=name,
            device=device,
            context=context,
        )
        if not 0 < local_lr < math.inf:
            raise ConfigError(f"local_lr = {local_lr!r}: must be a finite number above 0")
        if not (isinstance(local_epochs, int) and local_epochs >= 1):
            raise ConfigError(f"local_epochs = {local_epochs!r}: must be a whole number >= 1")
        for key, value in (("proximal_mu", proximal_mu), ("ditto_lambda", ditto_lambda or 0.0)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"{key} = {value!r}: must be a finite number of at least 0")
        self.local_lr = local_lr
        self.local_epochs = local_epochs
        self.proximal_mu = proximal_mu
        self.ditto_lambda = ditto_lambda
        self.personal = None if ditto_lambda is None else PersonalModel(context)

    def fit(self, parameters: NDArrays, config: Config) -> tuple[NDArrays, int, Config]:
        """Return (the trained model, the client's records, {"train-loss": mean over the steps}).

        Ditto also trains its own.
        """
        received = self.load(parameters)
        update = sgd_update(
            self.model,
            self.loss_fn,
            lr=self.local_lr,
            proximal_mu=self._proximal_mu(config),
        )
        result = run_update(update, received, self._batches("sgd", config))
        if self.personal is not None:
            own = run_update(
                self._pulled_to(received, self.local_lr),
                self.personal.load(self.device) or received,
                self._batches("ditto", config),
            )
            self.personal.keep(own.params)
        return self.dump(result.params, parameters), self.data.num_examples, dict(result.metrics)

    def adaptation(self, params: Params) -> tuple[Params, Advance]:
        """Return where adaptation starts, and its steps.

        Ditto starts at its personal model, pulled to the received one.
        """
        if self.personal is None:
            return super().adaptation(params)
        update, support = self._pulled_to(params, self.inner_lr), self.data.support
        start = self.personal.load(self.device) or params
        return start, lambda point, steps: run_update(update, point, [support] * steps).params

    def _proximal_mu(self, config: Config) -> float:
        value = float(config.get(PROXIMAL_MU, self.proximal_mu))
        if not 0 <= value < math.inf:
            raise ConfigError(f"{PROXIMAL_MU} = {value!r} in the train config: must be at least 0")
        return value

    def _pulled_to(self, anchor: Params, lr: float) -> LocalUpdate[SGDState, Batch]:
        return sgd_update(
            self.model,
            self.loss_fn,
            lr=lr,
            proximal_mu=self.ditto_lambda or 0.0,
            anchor=anchor,
        )

    def _batches(self, purpose: str, config: Config) -> Iterator[Batch]:
        return minibatches(
            self.data.all,
            batch_size=self.batch_size,
            epochs=self.local_epochs,
            generator=self.stream(purpose, config),
        )
