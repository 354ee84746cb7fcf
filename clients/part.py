r"""The client of FedPer, FedRep, LG-FedAvg and FedBABU: a part of its model is its own.

| | kept here | a round trains |
|---|---|---|
| FedPer 1912.00818 | the head | all, together |
| FedRep 2102.07078 | the head | the head, then the body |
| LG-FedAvg 2001.01523 | the body | all, together |
| FedBABU 2106.06042 | the head, as it was built | the body |

A server that sends the other part alone gets that part alone. One that sends whole models, as
FedAvg does, gets whole models, in which the kept part is what it sent itself. What was trained of
the kept part lasts over the rounds on the client, and is in no reply.

The kept part begins at what was received, where it was; else as the client's own module has it,
which is seeded alike on all clients. An evaluation begins at the kept part that the client has
trained, if it has, and adapts all of the model; with FedRep the kept part alone.

With privacy each step is one release of the gradient of what it moves, so that the kept part is
accounted as well: it has its share in what is sent later.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from torch import nn

from ..accounting import Event
from ..errors import ConfigError, PrivacyError, unknown_name
from ..models.head import Part, is_body, is_head
from ..streams import torch_seeded
from ..wire import SERVER_ROUND, NamedArrays
from .batches import minibatches
from .data import ClientData
from .evaluation import Advance
from .learner import Config, Learner, NDArrays
from .local_update import LocalResult, LocalUpdate
from .objective import Params
from .personal import PersonalModel
from .privacy.config import PrivacyConfig
from .privacy.releases import Releases
from .privacy.round import PrivateRounds, Training
from .privacy.updates import private_sgd_update
from .sgd import SGDClient, sgd_update
from .training import LocalTraining, Rule, run_alone

Kept = Literal["head", "body"]
Trained = Literal["all", "in-turn", "shared"]

OWN = "part"  # kinds of lasting state: parts that were trained privately alone have their own
ACCOUNTED = "part-private"


@dataclass(frozen=True)
class Phase:
    """Some of a round's steps.

    Attributes:
        moves: what they train; None: all.
        epochs: how many there are.
        purpose: of the random streams.
    """

    moves: Part | None
    epochs: int
    purpose: str = "sgd"


class PartClient(SGDClient):
    """A Flower NumPyClient that exchanges a part of its model.

    Args:
        model: see ``Learner``.
        data: see ``Learner``; training uses support and query records alike.
        head: which layers are the head, see ``models.is_head``.
        kept: the part that stays: "head" or "body".
        trained: "all" parameters together; "in-turn": the kept part, then the shared one; "shared":
            that alone.
        head_epochs: with "in-turn", the epochs of the kept part, >= 1; not used with privacy, where
            each part has ``local_steps``.
        sgd: keyword arguments of ``SGDClient``. ``context`` is needed where the kept part is
            trained: it lasts there, and in ``store``. With "in-turn", ``adapt`` is the kept part
            unless it is given.

    Raises:
        ConfigError: where a value is out of range, naming it.
        ModelError: where the model has no head beside its body.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ClientData | Callable[[], ClientData],
        *,
        head: str = "",
        kept: str = "head",
        trained: str = "all",
        head_epochs: int = 1,
        **sgd: Any,
    ) -> None:
        for key, value, known in (("kept", kept, Kept), ("trained", trained, Trained)):
            if value not in get_args(known):
                raise unknown_name(key, value, get_args(known))
        if not (isinstance(head_epochs, int) and head_epochs >= 1):
            raise ConfigError(f"head_epochs = {head_epochs!r}: must be a whole number >= 1")
        top, low = is_head(model, head), is_body(model, head)
        self.kept, self.shared = (top, low) if kept == "head" else (low, top)
        if trained == "in-turn" and sgd.get("adapt") is None:
            sgd["adapt"] = self.kept
        super().__init__(model, data, **sgd)
        self.trained = trained
        self.head_epochs = head_epochs
        self.shared_names = tuple(filter(self.shared, self.array_names))
        kind = OWN if self.private is None else ACCOUNTED
        self.own = None if trained == "shared" else self._lasting(kind)

    def fit(self, parameters: NDArrays, config: Config) -> tuple[NDArrays, int, Config]:
        """Return (shared part of the trained model, number of records, mean loss of the steps)."""
        if self.private is not None:
            return self.train_privately(self.private, parameters, config)
        result = LocalResult(self._start(self.load(parameters), config), {})
        for phase in self._phases():
            training = self._training(phase, result.params, config)
            result = run_alone(training, self.data, self.kernel)
        reply = self.dump(result.params, parameters)
        self._keep(result.params, config)  # last: a round that fails leaves nothing behind
        return reply, self.records.num_examples, {**result.metrics}

    def fit_named(
        self, arrays: NamedArrays, config: Config
    ) -> tuple[dict[str, np.ndarray], int, Config] | None:
        """Return what ``fit`` returns, by name, where the shared part alone was sent; else None."""
        if set(arrays) != set(self.shared_names):
            return None
        sent = [arrays[name] for name in self.shared_names]
        said, count, metrics = self.fit(sent, config)
        return dict(zip(self.shared_names, said, strict=True)), count, metrics

    def train_privately(
        self, private: PrivateRounds, parameters: NDArrays, config: Config
    ) -> tuple[NDArrays, int, Config]:
        """Return the shared part of the privatised model, and epsilon.

        Raises:
            PrivacyError: also where the kept part of this run was trained without privacy.
        """
        if self.own is not None and self._lasting(OWN).before(config, self.device):
            raise PrivacyError(
                f"the own part of client {self.name!r} was trained without privacy in this run, so "
                "no ledger would hold what it says of the records: start a new run"
            )
        start = self._start(self.load(parameters), config)
        training = self.private_training(config)
        with self.guarded():
            reply = private.train(start, config, training, lambda: self.data, model=self.model)
            count = self.count_told(lambda: self.data.num_examples)
            said = self.dump(reply.params, parameters)
            self._keep(reply.params, config)
        return said, count, {**reply.metrics}

    def private_training(self, config: Config) -> Training:
        """Return the steps of DP-SGD of the round: ``local_steps`` for each part in turn."""
        mu = self._proximal_mu(config)
        moves = [phase.moves for phase in self._phases() for _ in range(self.local_steps)]

        def events(privacy: PrivacyConfig) -> list[Event]:
            return [Event(privacy.noise_multiplier, privacy.sample_rate, len(moves))]

        def update(releases: Releases, privacy: PrivacyConfig) -> LocalUpdate[Any, int]:
            return private_sgd_update(
                releases,
                privacy,
                lr=self.local_lr,
                proximal_mu=mu,
                train=lambda number: moves[number],
            )

        return Training("dp-sgd", events, update, len(moves))

    def adaptation(self, params: Params, config: Config | None = None) -> tuple[Params, Advance]:
        """Return where adaptation starts, with the client's own part, and its steps."""
        own = self.own.after(config or {}, self.device) if self.own else None
        return Learner.adaptation(self, {**params, **(own or {})}, config)

    def load(self, parameters: NDArrays) -> Params:
        """Return the parameters of the whole model; see ``Learner``.

        Args:
            parameters: of the model, or of its shared part: then the kept one is the module's own.
        """
        if len(parameters) != len(self.shared_names):
            return super().load(parameters)
        received = dict(zip(self.shared_names, parameters, strict=True))
        own = self.model.state_dict()
        whole = [
            received[name] if name in received else own[name].detach().cpu().numpy()
            for name in self.array_names
        ]
        return super().load(whole)

    def dump(self, params: Params, received: NDArrays) -> NDArrays:
        """Return the shared part of ``params``, in the order and dtypes received.

        Where whole models were received, the kept part goes back as it came.
        """
        is_part = len(received) == len(self.shared_names)
        names = self.shared_names if is_part else self.array_names
        return [
            params[name].detach().cpu().numpy().astype(array.dtype, copy=False)
            if name in params and self.shared(name)
            else array
            for name, array in zip(names, received, strict=True)
        ]

    def _phases(self) -> list[Phase]:
        shared = Phase(None if self.trained == "all" else self.shared, self.local_epochs)
        if self.trained != "in-turn":
            return [shared]
        return [Phase(self.kept, self.head_epochs, "head"), shared]

    def _training(self, phase: Phase, params: Params, config: Config) -> LocalTraining:
        """Return the steps of one phase of the round that ``config`` names, from ``params``."""
        options = (
            ("lr", self.local_lr),
            ("proximal_mu", self._proximal_mu(config)),
            ("train", phase.moves),
        )
        training = self.as_training(
            Rule(sgd_update, self.model, self.loss_fn, options),
            params,
            config,
            batches=lambda data: minibatches(
                data.all,
                batch_size=self.batch_size,
                epochs=phase.epochs,
                generator=self.stream(phase.purpose, config),
            ),
            steps=lambda data: phase.epochs * self._batches_of_an_epoch(data.num_examples),
        )
        if phase.purpose == "sgd":
            return training
        number, purpose = int(config.get(SERVER_ROUND, 0)), f"layers {phase.purpose}"
        names, device = (number, self.name), self.device  # other dropout than in the next phase
        return replace(
            training, seeded=lambda: torch_seeded(self.seed, purpose, *names, device=device)
        )

    def _lasting(self, kind: str) -> PersonalModel:
        return PersonalModel(self.context, client=self.name, store=self.store, kind=kind)

    def _start(self, received: Params, config: Config) -> Params:
        """Return where training begins: the received model, with the client's own part in it."""
        own = self.own.before(config, self.device) if self.own else None
        return {**received, **(own or {})}

    def _keep(self, params: Params, config: Config) -> None:
        if self.own:
            self.own.keep(config, {n: value for n, value in params.items() if self.kept(n)})
