r"""The client of SCAFFOLD (Karimireddy et al., 1910.06378): SGD corrected for the client's drift.

    y   <- y - eta * (grad L(y; batch) - c_i + c)         K steps from y = x
    c_i <- c_i - c + (x - y) / (K eta)                    option II of the paper
    reply: y,  and  c + (c_i after - c_i before)

x and c are the server's model and control variate. c_i, 0 at first, lasts over the rounds on the
client: it says which way this client's gradients differ from the mean of all, and what leaves of it
is its change alone. A reply is what was sent and what is to be added to it, as everywhere here.

With privacy each gradient is a release; all else is made of what was released before.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..accounting import Event
from ..architectures import full_name, names_of
from ..errors import ConfigError, PrivacyError
from ..wire import CONTROL, NamedArrays
from .data import Batch, ClientData
from .learner import Config
from .local_update import LocalResult, LocalUpdate, mean_of
from .objective import LossFn, Params, detached, grad_and_value, objective
from .personal import PersonalModel
from .privacy.config import PrivacyConfig
from .privacy.releases import Releases
from .privacy.round import PrivateRounds, Training
from .privacy.updates import private_sgd_update
from .sgd import TRAIN_LOSS, SGDClient
from .training import Rule, run_alone

DRIFT = "drift/"  # prefix of c - c_i among the parameters of a training, which it leaves
VARIATE = "variate"  # kinds of lasting state: variates of private training have their own
ACCOUNTED = "variate-private"
MARK = "control-mark"  # in a private question: which control variates it is about


class CorrectedState(NamedTuple):
    """Parameters so far with c - c_i beside each, and the loss of each step."""

    params: Params
    losses: tuple[Tensor, ...] = ()


def corrected_update(
    model: nn.Module, loss_fn: LossFn, *, lr: float
) -> LocalUpdate[CorrectedState, Batch]:
    """Return the update whose every step is y <- y - lr * (grad L(y) + drift).

    Its parameters hold each y and, under ``drift/NAME``, c - c_i of the same shape; its result
    holds each y alone.

    Args:
        model: called functionally and never changed.
        loss_fn: a scalar mean over the batch.
        lr: eta > 0.
    """
    loss = objective(model, loss_fn)

    def step(state: CorrectedState, batch: Batch) -> CorrectedState:
        at = _own(state.params)
        gradient, value = grad_and_value(lambda point: loss(point, batch), at)
        moved = {n: w - lr * (gradient[n] + state.params[f"{DRIFT}{n}"]) for n, w in at.items()}
        return CorrectedState({**state.params, **moved}, (*state.losses, value.detach()))

    def finish(state: CorrectedState) -> LocalResult:
        return LocalResult(_own(state.params), {TRAIN_LOSS: mean_of(state.losses)})

    return LocalUpdate(
        begin=lambda params: CorrectedState(detached(params)), step=step, finish=finish
    )


def new_variate(own: Params, control: Params, x: Params, y: Params, scale: float) -> Params:
    """Return c_i - c + (x - y) / (K eta), by name.

    Args:
        own: c_i.
        control: c.
        x: where training began.
        y: where it ended.
        scale: K eta > 0.
    """
    return {n: own[n] - control[n] + (x[n] - y[n]) / scale for n in own}


class ScaffoldClient(SGDClient):
    """A Flower NumPyClient that corrects its steps by control variates.

    A server that is not SCAFFOLD's gets what ``SGDClient`` trains, and no variate is kept.

    Args:
        model: see ``Learner``.
        data: see ``Learner``; training uses support and query records alike.
        sgd: keyword arguments of ``SGDClient``; not ``proximal_mu`` and ``ditto_lambda``.
            ``context`` is needed: c_i lasts in its state, and in ``store`` where there is one.

    Raises:
        ConfigError: where a value is out of range, or there is no context.
    """

    def __init__(
        self, model: nn.Module, data: ClientData | Callable[[], ClientData], **sgd: Any
    ) -> None:
        super().__init__(model, data, **sgd)
        if self.context is None:
            raise ConfigError(
                "SCAFFOLD needs context=: a control variate lasts over rounds in Context.state"
            )
        held = {name for name, value in model.state_dict().items() if value.is_floating_point()}
        self.control_names = tuple(n for n in self.array_names if n in held)
        self.variate = self._lasting(VARIATE if self.private is None else ACCOUNTED)

    def fit_named(
        self, arrays: NamedArrays, config: Config
    ) -> tuple[dict[str, np.ndarray], int, Config] | None:
        """Return (y and c + change of c_i, number of records, metrics); None for other servers."""
        controls = {full_name(CONTROL, name) for name in self.control_names}
        if set(arrays) != {*self.array_names, *controls}:
            return None
        received = [arrays[name] for name in self.array_names]
        x = self.load(received)
        control = self._control(arrays, x)
        own = self.variate.before(config, self.device)
        own = {n: torch.zeros_like(value) for n, value in x.items()} if own is None else own
        drift = {name: control[name] - own[name] for name in x}
        if self.private is None:
            result, count, metrics = self._trained(x, drift, config)
            steps = self.local_epochs * self._batches_of_an_epoch(self.records.num_examples)
        else:
            marked = {**config, MARK: _digest({**control, **_prefixed(own)})}
            result, count, metrics = self._trained_privately(self.private, x, drift, marked)
            steps = self.local_steps
        after = new_variate(own, control, x, result, max(steps, 1) * self.local_lr)
        reply = dict(zip(self.array_names, self.dump(result, received), strict=True))
        change = {n: control[n] + after[n] - own[n] for n in x}
        self.variate.keep(config, after)  # last: a round that fails leaves nothing behind
        return {**reply, **self._as_sent(change, arrays)}, count, metrics

    def _trained(
        self, x: Params, drift: Params, config: Config
    ) -> tuple[Params, int, dict[str, Any]]:
        options = (("lr", self.local_lr),)
        training = self.as_training(
            Rule(corrected_update, self.model, self.loss_fn, options),
            x,
            config,
            batches=lambda data: self._batches(data, "sgd", config),
            steps=lambda data: self.local_epochs * self._batches_of_an_epoch(data.num_examples),
        )
        training = replace(training, params={**x, **_prefixed(drift)})
        result = run_alone(training, self.data, self.kernel)
        return dict(result.params), self.records.num_examples, {**result.metrics}

    def _trained_privately(
        self, private: PrivateRounds, x: Params, drift: Params, config: Config
    ) -> tuple[Params, int, dict[str, Any]]:
        if self._lasting(VARIATE).before(config, self.device):
            raise PrivacyError(
                f"the control variate of client {self.name!r} was made without privacy in this "
                "run, so no ledger would hold what it says of the records: start a new run"
            )

        def events(privacy: PrivacyConfig) -> list[Event]:
            return [Event(privacy.noise_multiplier, privacy.sample_rate, self.local_steps)]

        def update(releases: Releases, privacy: PrivacyConfig) -> LocalUpdate[Any, int]:
            return private_sgd_update(releases, privacy, lr=self.local_lr, drift=drift)

        training = Training("dp-sgd", events, update, self.local_steps)
        with self.guarded():
            reply = private.train(x, config, training, lambda: self.data, model=self.model)
            count = self.count_told(lambda: self.data.num_examples)
        return dict(reply.params), count, {**reply.metrics}

    def _control(self, arrays: NamedArrays, x: Params) -> Params:
        """Return c of each parameter, in its dtype and place."""
        return {
            name: torch.from_numpy(np.array(arrays[full_name(CONTROL, name)])).to(
                value.device, value.dtype
            )
            for name, value in x.items()
        }

    def _as_sent(self, control: Params, arrays: NamedArrays) -> dict[str, np.ndarray]:
        """Return control variates under their names, in the dtypes received; the rest as it came.

        What is not trained (buffers, frozen parameters) has variates that nobody moves.
        """
        return {
            full: control[name].detach().cpu().numpy().astype(arrays[full].dtype, copy=False)
            if name in control
            else arrays[full]
            for full, name in names_of(arrays, CONTROL).items()
        }

    def _lasting(self, kind: str) -> PersonalModel:
        return PersonalModel(self.context, client=self.name, store=self.store, kind=kind)


def _own(params: Params) -> Params:
    return {name: value for name, value in params.items() if not name.startswith(DRIFT)}


def _prefixed(drift: Params) -> Params:
    return {f"{DRIFT}{name}": value for name, value in drift.items()}


def _digest(params: Params) -> str:
    digest = hashlib.sha256()
    for name, value in params.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
