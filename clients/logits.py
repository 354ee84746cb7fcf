r"""The client of FedMD (1910.03581) and DS-FL (2008.06180): a personal model of any architecture.

A round r, from what the clients of an earlier round r' agreed on, the logits c of its records:

    digest    w <- w - lr * grad mean_x l(z(x; w), c(x))    over minibatches of the records of r'
    revisit   w <- w - lr * grad L(w; batch)                 local SGD on the client's own records
    answer    z(x; w) of the records of r

    l = mean_c |z - c|  "absolute-error" (FedMD),   l = H(softmax(c), softmax(z))  "cross-entropy"

w never leaves its client: a reply holds logits of public records alone. The first round has nothing
to digest. What is said of other records than this client holds is an error, before any training.

With privacy the revisit is DP-SGD and w starts at the initial model, so that all that was done
with the client's records is accounted, and digest and answer are post-processing of it.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError, PrivacyError, unknown_name
from ..models.distillation import soft_cross_entropy
from ..public import PublicData
from ..public_logits import Subsets, round_of
from ..wire import SERVER_ROUND
from .batches import minibatches
from .data import ClientData
from .evaluation import CHUNK, Advance
from .learner import Config, Learner, NDArrays
from .local_update import run_update
from .objective import Params, predict
from .personal import PERSONAL, PersonalModel
from .privacy.round import PrivateRounds
from .sgd import TRAIN_LOSS, SGDClient, sgd_update
from .training import run_alone

Digest = Literal["absolute-error", "cross-entropy"]

ACCOUNTED = "personal-private"  # kind of state: models that were trained privately alone
DIGEST_LOSS = "digest-loss"


class LogitsClient(SGDClient):
    """A Flower NumPyClient that exchanges logits of public records.

    Args:
        model: see ``Learner``; the personal model begins with its parameters.
        data: see ``Learner``.
        public: the public records, the same as the server's.
        public_subset: how many of them a round is about; 0: all. As the server's.
        encoding: of logits that travel: "float32", "float16" or "int8". As the server's.
        digest: "absolute-error" or "cross-entropy".
        digest_epochs: epochs on what was agreed, >= 0; 0: the client learns nothing of others.
        digest_lr: their learning rate, > 0.
        digest_batch_size: records of a batch there; 0: all.
        sgd: keyword arguments of ``SGDClient``; ``context`` is needed, ``seed`` is the server's.

    Raises:
        ConfigError: where a value is out of range, naming it.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ClientData | Callable[[], ClientData],
        *,
        public: PublicData,
        public_subset: int = 0,
        encoding: str = "float32",
        digest: str = "cross-entropy",
        digest_epochs: int = 1,
        digest_lr: float = 0.1,
        digest_batch_size: int = 128,
        **sgd: Any,
    ) -> None:
        super().__init__(model, data, **sgd)
        if digest not in get_args(Digest):
            raise unknown_name("digest", digest, get_args(Digest))
        for key, count in (("epochs", digest_epochs), ("batch_size", digest_batch_size)):
            if not (isinstance(count, int) and count >= 0):
                raise ConfigError(f"digest_{key} = {count!r}: must be a whole number >= 0")
        if not 0 < digest_lr < math.inf:
            raise ConfigError(f"digest_lr = {digest_lr!r}: must be a finite number above 0")
        self.subsets = Subsets(public, public_subset, self.seed, encoding)
        self.digest = digest
        self.digest_epochs = digest_epochs
        self.digest_lr = digest_lr
        self.digest_batch_size = digest_batch_size
        kind = PERSONAL if self.private is None else ACCOUNTED
        self.own = self._personal(kind)
        self.exchanged_names = tuple(self.subsets.nothing(1))

    def fit(self, parameters: NDArrays, config: Config) -> tuple[NDArrays, int, Config]:
        """Return (what the trained personal model says of this round's records, ...).

        Raises:
            WireError: what was received is of other public records, or malformed.
            PrivacyError: the client trains privately, and its model of this run did not.
        """
        start, digested = self._digested(parameters, config)
        if self.private is None:
            result = run_alone(self.training(start, config), self.data, self.kernel)
            params, count = result.params, self.records.num_examples
            metrics: Config = {**result.metrics}
        else:
            params, count, metrics = self._trained_privately(self.private, start, config)
        answer = self._answer(params, config)
        self.own.keep(config, params)  # last: a round that fails leaves nothing behind
        return [answer[name] for name in self.exchanged_names], count, {**metrics, **digested}

    def adaptation(self, params: Params, config: Config | None = None) -> tuple[Params, Advance]:
        """Return where adaptation starts, the personal model, and its steps; see ``Learner``.

        A client that never trained starts at the received model, the server's student.
        """
        own = self.own.after(config or {}, self.device)
        return Learner.adaptation(self, params if own is None else own, config)

    def _personal(self, kind: str) -> PersonalModel:
        return PersonalModel(self.context, client=self.name, store=self.store, kind=kind)

    def _trained_privately(
        self, private: PrivateRounds, start: Params, config: Config
    ) -> tuple[Params, int, Config]:
        with self.guarded():
            reply = private.train(
                start, config, self.private_training(config), lambda: self.data, model=self.model
            )
            return reply.params, self.count_told(lambda: self.data.num_examples), {**reply.metrics}

    def _start(self, config: Config) -> Params:
        """Return the personal model of the rounds before; at first the initial one."""
        if self.private is not None and self._personal(PERSONAL).before(config, self.device):
            raise PrivacyError(
                f"the personal model of client {self.name!r} was trained without privacy in this "
                "run, so it may not answer for a private client: start a new run"
            )
        own = self.own.before(config, self.device)
        return self.load(self.get_parameters({})) if own is None else own

    def _digested(self, parameters: NDArrays, config: Config) -> tuple[Params, dict[str, float]]:
        """Return the personal model after the digest, and the metrics of that."""
        said = dict(zip(self.exchanged_names, parameters, strict=True))
        agreed = self.subsets.unpacked(said, parameters[0].shape[-1])  # raises for other records
        start = self._start(config)
        if not (number := round_of(said)) or not self.digest_epochs:
            return start, {}
        loss = absolute_error if self.digest == "absolute-error" else _to_softmax
        update = sgd_update(self.model, loss, lr=self.digest_lr)
        batches = minibatches(
            (self._inputs(number), torch.from_numpy(agreed).to(self.device)),
            batch_size=self.digest_batch_size,
            epochs=self.digest_epochs,
            generator=self.stream("digest", config),
        )
        with self.seeded(config):
            result = run_update(update, start, batches)
        return result.params, {DIGEST_LOSS: result.metrics[TRAIN_LOSS]}

    def _answer(self, params: Params, config: Config) -> dict[str, np.ndarray]:
        """Return what the model says of this round's records, as it travels."""
        number = int(config.get(SERVER_ROUND, 0))
        logits = outputs(self.model, params, self._inputs(number))
        if logits.ndim != 2:
            raise ModelError(
                f"{type(self.model).__name__} gives outputs of shape {tuple(logits.shape)}: "
                "logits (records, classes) are exchanged"
            )
        return self.subsets.packed(logits.cpu().numpy(), number)

    def _inputs(self, server_round: int) -> Tensor:
        return self.subsets.public.batch(self.subsets.rows(server_round)).to(self.device)


def absolute_error(output: Tensor, agreed: Tensor) -> Tensor:
    """Return mean |z - c| over records and classes, a scalar: FedMD's digest."""
    return (output - agreed).abs().mean()


def _to_softmax(output: Tensor, agreed: Tensor) -> Tensor:
    return soft_cross_entropy(output, agreed.softmax(dim=1))


def outputs(model: nn.Module, params: Params, inputs: Tensor) -> Tensor:
    """Return what a model says of ``inputs``, (N, C), in evaluation mode and by chunks."""
    judge = copy.deepcopy(model).eval()
    return torch.cat([predict(judge, params, part) for part in torch.split(inputs, CHUNK)])
