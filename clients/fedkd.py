r"""The client of FedKD (Wu et al., 2108.13323): a private mentor t and the shared mentee s.

A round, from the received mentee and the client's own mentor, over minibatches of its records:

    t <- t - lr_t * grad_t L_t,    s <- s - lr_s * grad_s L_s       L_t, L_s: ``mutual_losses``

Each step moves both, by one batch. The mentor begins at the arrays of its module, lasts over the
rounds and never leaves its client. What leaves is s - s_received alone, compressed to the share of
its energy that the question asks for; the server's own update comes down in the same way, to
clients that hold the mentee of the round before (``sent_updates``).

Evaluation: the adaptation curve is the mentee's, so that it compares with other strategies. A
client that has trained its mentor tells the mentor's loss and accuracy beside it.

Differences from the paper: the term of the hidden states, L_hid, is left out, since the two models
need not have any of one meaning; only classes or probabilities can be targets, whatever
``loss_fn`` scores.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.func import functional_call

from ..compression import compress_update
from ..errors import ConfigError, WireError
from ..models import check_layers
from ..models.mutual_distillation import mutual_losses
from ..sent_updates import BASE_ROUND, DIGEST, ENERGY, REPLY, UPDATE, applied, digest_of, update_of
from ..wire import SERVER_ROUND, NamedArrays
from .batches import minibatches
from .data import Batch, ClientData
from .evaluation import score
from .learner import Config, Learner, NDArrays
from .local_update import LocalResult, LocalUpdate, mean_of, run_update
from .objective import Params, detached, grad_and_value
from .personal import PersonalModel
from .sgd import TRAIN_LOSS
from .store import LastingState

MENTOR_LOSS, MENTOR_ACCURACY = "mentor-loss", "mentor-accuracy"
MENTOR, MENTEE = "mentor/", "mentee/"  # prefixes of parameters that are trained together
ROUND = "round"  # beside a mentee that is kept: of which round it is


class MutualState(NamedTuple):
    """Parameters of both models so far, by prefix, and L_t + L_s of each step."""

    params: Params
    losses: tuple[Tensor, ...] = ()


def mutual_update(
    mentor: nn.Module, mentee: nn.Module, *, mentor_lr: float, mentee_lr: float
) -> LocalUpdate[MutualState, Batch]:
    """Return the update whose every step is one step of SGD of both models on one batch.

    Its parameters are those of ``paired``. L_t has gradients in t alone and L_s in s alone, so that
    their sum is differentiated at once.

    Args:
        mentor: t, called functionally and never changed; logits (B, C).
        mentee: s, likewise.
        mentor_lr: lr_t > 0.
        mentee_lr: lr_s > 0.
    """
    outputs = {MENTOR: _outputs(mentor), MENTEE: _outputs(mentee)}
    rates = {MENTOR: mentor_lr, MENTEE: mentee_lr}

    def loss(params: Params, batch: Batch) -> Tensor:
        inputs, targets = batch
        mentors, mentees = (of(part_of(params, kind), inputs) for kind, of in outputs.items())
        losses = mutual_losses(mentors, mentees, targets)
        return losses.mentor + losses.mentee

    def begin(params: Params) -> MutualState:
        return MutualState(detached(params))

    def step(state: MutualState, batch: Batch) -> MutualState:
        gradient, value = grad_and_value(lambda both: loss(both, batch), state.params)
        moved = {
            name: state.params[name] - lr * gradient[name]
            for kind, lr in rates.items()
            for name in state.params
            if name.startswith(kind)
        }
        return MutualState(moved, (*state.losses, value.detach()))

    def finish(state: MutualState) -> LocalResult:
        return LocalResult(state.params, {TRAIN_LOSS: mean_of(state.losses)})

    return LocalUpdate(begin=begin, step=step, finish=finish)


def paired(mentor: Params, mentee: Params) -> Params:
    """Return the parameters of both, as ``mutual_update`` takes them."""
    both = ((MENTOR, mentor), (MENTEE, mentee))
    return {f"{kind}{name}": value for kind, params in both for name, value in params.items()}


def part_of(params: Params, kind: str) -> Params:
    """Return the parameters of ``MENTOR`` or ``MENTEE`` under their own names."""
    return {n.removeprefix(kind): value for n, value in params.items() if n.startswith(kind)}


class FedKDClient(Learner):
    """A Flower NumPyClient that trains the shared model together with a private, larger one.

    A FedKD server gets compressed updates. To any other server it sends its mentee whole, as every
    client does. It computes eagerly, whatever ``kernel`` says.

    Args:
        model: the mentee, see ``Learner``.
        data: see ``Learner``; training uses support and query records alike.
        mentor: of any architecture with the mentee's inputs and outputs; never changed.
        local_lr: learning rate of the mentee, > 0.
        local_epochs: epochs of a round, >= 1.
        mentor_lr: learning rate of the mentor, > 0; None: ``local_lr``.
        learner: keyword arguments of ``Learner``; ``context`` is needed: mentor and mentee last in
            its state, and in ``store`` where there is one.

    Raises:
        ConfigError: where a value is out of range, naming it; with ``privacy``, since the mentee
            learns from a mentor whose training nobody accounts.
        ModelError: where one of the models has layers that cannot be trained, e.g. BatchNorm.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ClientData | Callable[[], ClientData],
        *,
        mentor: nn.Module,
        local_lr: float = 0.1,
        local_epochs: int = 1,
        mentor_lr: float | None = None,
        **learner: Any,
    ) -> None:
        if learner.get("privacy") is not None:
            raise ConfigError(
                f"FedKD with privacy (client {learner.get('name', '')!r}): the mentee that is sent "
                "learns from the mentor, which is trained on the records without noise, so that no "
                "ledger would hold what leaves; leave privacy out, or use 'fedavg'"
            )
        check_layers(mentor)
        super().__init__(model, data, **learner)
        if self.context is None:
            raise ConfigError(
                "FedKD needs context=: mentor and mentee last over rounds in Context.state"
            )
        mentor_lr = local_lr if mentor_lr is None else mentor_lr
        for key, rate in (("local_lr", local_lr), ("mentor_lr", mentor_lr)):
            if not 0 < rate < math.inf:
                raise ConfigError(f"{key} = {rate!r}: must be a finite number above 0")
        if not (isinstance(local_epochs, int) and local_epochs >= 1):
            raise ConfigError(f"local_epochs = {local_epochs!r}: must be a whole number >= 1")
        self.mentor = mentor if self.device == "cpu" else copy.deepcopy(mentor).to(self.device)
        self.local_lr = local_lr
        self.local_epochs = local_epochs
        self.mentor_lr = mentor_lr
        of_client: dict[str, Any] = {"client": self.name, "store": self.store}
        self._mentors = PersonalModel(self.context, kind="mentor", **of_client)
        self._mentees = LastingState(self.context, kind="mentee", **of_client)

    def fit(self, parameters: NDArrays, config: Config) -> tuple[NDArrays, int, Config]:
        """Return (trained mentee, number of records, mean L_t + L_s); the mentor is kept here."""
        received = self.load(parameters)
        mentor = self._mentors.before(config, self.device) or {
            name: value for name, value in self.mentor.named_parameters() if value.requires_grad
        }
        update = mutual_update(
            self.mentor, self.model, mentor_lr=self.mentor_lr, mentee_lr=self.local_lr
        )
        with self.seeded(config):
            result = run_update(update, paired(mentor, received), self._batches(config))
        trained = self.dump(part_of(result.params, MENTEE), parameters)
        self._mentors.keep(config, part_of(result.params, MENTOR))
        return trained, self.records.num_examples, {**result.metrics}

    def fit_named(
        self, arrays: NamedArrays, config: Config
    ) -> tuple[dict[str, np.ndarray], int, Config] | None:
        """Return the compressed update of the mentee by name, and what ``fit`` returns beside it.

        Args:
            arrays: the mentee, or the server's compressed update of one that is held here.
            config: of the message; see ``sent_updates``.

        Returns:
            None where the server does not ask for updates: it gets what ``fit`` returns.

        Raises:
            WireError: where the mentee that is to be updated is not here, or becomes another one.
        """
        if ENERGY not in config:
            return None
        mentee = self._received(arrays, config)
        sent = [mentee[name] for name in self.array_names]
        trained, count, metrics = self.fit(sent, config)
        new = dict(zip(self.array_names, trained, strict=True))
        reply = compress_update(update_of(new, mentee), float(config[ENERGY]))
        held = {f"{MENTEE}{name}": value for name, value in mentee.items()}
        number = np.array(int(config.get(SERVER_ROUND, 0)))
        self._mentees.keep(config, {ROUND: number, **held})  # last: a round that fails keeps none
        return reply, count, {**metrics, REPLY: UPDATE}

    def evaluate(self, parameters: NDArrays, config: Config) -> tuple[float, int, Config]:
        """Return the mentee's adaptation, see ``Learner``, and the mentor's loss and accuracy.

        A client that has never trained has no mentor of its own.
        """
        loss, count, metrics = super().evaluate(parameters, config)
        mentor = self._mentors.after(config, self.device)
        if mentor is None:
            return loss, count, metrics
        judged = copy.deepcopy(self.mentor).eval()
        its_loss, accuracy = score(judged, self.loss_fn, mentor, self.data.judging)
        told: Config = {MENTOR_LOSS: its_loss}
        if accuracy is not None:
            told[MENTOR_ACCURACY] = accuracy
        return loss, count, {**metrics, **told}

    def _received(self, arrays: NamedArrays, config: Config) -> NamedArrays:
        """Return the mentee of a question, which came whole or as an update of one held here."""
        if BASE_ROUND not in config:
            if wrong := sorted(set(arrays) ^ set(self.array_names)):
                raise WireError(
                    f"the mentee of the server and that of client {self.name!r} differ in "
                    f"{', '.join(wrong)}: both ends must build the same model"
                )
            return arrays
        held, base = dict(self._mentees.before(config) or {}), config[BASE_ROUND]
        number = held.pop(ROUND, None)
        if number is None or int(number) != base:
            there = "none" if number is None else f"that of round {int(number)}"
            raise WireError(
                f"client {self.name!r} was sent an update of the mentee of round {base!r}, and "
                f"holds {there}: its lasting state was lost (state-root keeps it); this round is "
                "left out, and the server sends the whole mentee with the next question"
            )
        mentee = applied({n.removeprefix(MENTEE): value for n, value in held.items()}, arrays)
        if digest_of(mentee) != config.get(DIGEST):
            raise WireError(
                f"client {self.name!r} comes to another mentee than the server by the update of "
                f"round {base!r}: the state or the arithmetic of this machine differs; this round "
                "is left out, and the server sends the whole mentee with the next question"
            )
        return mentee

    def _batches(self, config: Config) -> Iterator[Batch]:
        """Return the very batches that ``SGDClient`` would take."""
        return minibatches(
            self.data.all,
            batch_size=self.batch_size,
            epochs=self.local_epochs,
            generator=self.stream("sgd", config),
        )


def _outputs(model: nn.Module) -> Callable[[Params, Tensor], Tensor]:
    """Return ``f(params, inputs) = model(inputs; params)``; the model's buffers stay."""
    buffers = {name: value.detach().clone() for name, value in model.named_buffers()}

    def outputs(params: Params, inputs: Tensor) -> Tensor:
        found: Tensor = functional_call(model, (params, buffers), (inputs,))
        return found

    return outputs
