"""The base of our clients: model, data, exchange of arrays, evaluation by adaptation."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from flwr.app import Context
from flwr.client import NumPyClient
from torch import nn

from ..errors import ConfigError, WireError
from ..models import check_layers
from ..streams import torch_seeded, torch_stream
from ..wire import PARTITION_ID, SERVER_ROUND
from .data import ClientData
from .evaluation import LOSS, LOSS_BEFORE, Advance, adaptation_curve, loss_after
from .kernel import Kernel, check_kernel
from .local_update import LocalResult
from .meta_gradient import Predicate, adapt, check_inner_loop
from .objective import LossFn, Params
from .privacy.config import PrivacyConfig
from .privacy.round import PrivateRounds, Training, errors_kept
from .store import ClientStore
from .training import LocalTraining, Rule, run_alone

NDArrays = list[np.ndarray]
Scalar = bool | bytes | float | int | str
Config = dict[str, Scalar]


class Learner(NumPyClient):
    """A Flower NumPyClient that evaluates a model by adapting it to the client's support set.

    Args:
        model: called functionally and never changed; its state_dict says which arrays are
            exchanged, in its order. Parameters without requires_grad stay as they are received.
        data: the client's support and query sets, or a function that loads them when they are first
            needed.
        loss_fn: ``loss_fn(output, target)``, a scalar mean over the batch.
        inner_lr: learning rate of the adaptation, > 0.
        eval_steps: ascending numbers of adaptation steps that an evaluation reports, each >= 1.
        adapt: which parameter names the adaptation moves; None means all.
        batch_size: records of a training batch; 0 means all.
        seed: of the client's random streams, which also depend on ``name`` and the round.
        name: identity of the client; empty: its partition or node, where there is a context.
        device: where to compute.
        context: Flower's Context of this message, for clients that keep state over the rounds.
        store: where such state outlives the context; None: nowhere. Other clients never touch it.
        privacy: parameters of private training; None: training is not private. A private client
            trains on privatised sums over all its records, sends what its ``PrivacyConfig`` allows,
            and raises ``BudgetExhaustedError`` in training once its budget is spent.
        kernel: how training is computed: "eager"; "compiled", which takes seconds to begin with;
            or "vmap", whole cohorts at once, where clients are asked together (``answer_all`` of
            ``client_app``). What cannot take a kernel (layers that draw random numbers, buffers,
            frozen parameters) runs eagerly; private training has kernels of its own (``Releases``).
            Results are the same up to rounding.

    Raises:
        ConfigError: where a value is out of range, naming it.
        ModelError: where the model has layers that cannot be adapted, e.g. BatchNorm.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ClientData | Callable[[], ClientData],
        *,
        loss_fn: LossFn = nn.functional.cross_entropy,
        inner_lr: float = 0.1,
        eval_steps: Sequence[int] = (1, 5),
        adapt: Predicate | None = None,
        batch_size: int = 0,
        seed: int = 0,
        name: str = "",
        device: str = "cpu",
        context: Context | None = None,
        store: ClientStore | None = None,
        privacy: PrivacyConfig | None = None,
        kernel: Kernel = "eager",
    ) -> None:
        check_layers(model)
        check_kernel(kernel)
        check_inner_loop(inner_lr, 1, dict(model.named_parameters()), adapt)
        counts = all(isinstance(n, int) and n >= 1 for n in eval_steps)
        if not counts or list(eval_steps) != sorted(set(eval_steps)):
            raise ConfigError(
                f"eval_steps = {tuple(eval_steps)!r}: ascending counts of at least 1 are needed"
            )
        if not (isinstance(batch_size, int) and batch_size >= 0):
            raise ConfigError(
                f"batch_size = {batch_size!r}: must be a whole number >= 0 (0: all records)"
            )
        self.model = model
        self.loss_fn = loss_fn
        self.inner_lr = inner_lr
        self.eval_steps = tuple(eval_steps)
        self.adapted = adapt
        self.batch_size = batch_size
        self.seed = seed
        self.name = name or _name_in(context)
        self.device = device
        self.context = context
        self.store = store
        self.kernel = kernel
        self.private = (
            None
            if privacy is None
            else PrivateRounds(
                privacy,
                model=model,
                loss_fn=loss_fn,
                name=self.name,
                device=device,
                context=context,
                kernel=kernel,
            )
        )
        self.array_names = tuple(model.state_dict())
        self._data = data
        self._placed = self.device == "cpu"

    @property
    def records(self) -> ClientData:
        """The client's support and query sets, wherever they are."""
        if not isinstance(self._data, ClientData):
            self._data = self._data()
        return self._data

    @property
    def data(self) -> ClientData:
        """The client's support and query sets, on the client's device."""
        if not self._placed:
            self._data, self._placed = self.records.to(self.device), True
        return self.records

    @property
    def is_for_cohorts(self) -> bool:
        """Whether its training may be computed together with that of other clients."""
        is_plain = type(self).fit is Learner.fit and not hasattr(self, "fit_named")
        return self.kernel == "vmap" and self.private is None and is_plain

    def get_properties(self, config: Config) -> Config:
        """Return what this client is: its class and its model's architecture."""
        del config
        return {"client": type(self).__name__, "architecture": type(self.model).__name__}

    def get_parameters(self, config: Config) -> NDArrays:
        """Return the arrays of the model as it was given."""
        del config
        return [value.detach().cpu().numpy() for value in self.model.state_dict().values()]

    def fit(self, parameters: NDArrays, config: Config) -> tuple[NDArrays, int, Config]:
        """Return (trained model, number of the client's records, mean loss of the steps)."""
        if self.private is not None:
            return self.train_privately(self.private, parameters, config)
        training = self.training(self.load(parameters), config)
        result = run_alone(training, self.data, self.kernel)
        return self.answered(result, parameters, config)

    def training(self, params: Params, config: Config) -> LocalTraining:
        """Return the local training of the round that ``config`` names, from ``params``."""
        raise NotImplementedError(f"{type(self).__name__} does not train")

    def answered(
        self, result: LocalResult, parameters: NDArrays, config: Config
    ) -> tuple[NDArrays, int, Config]:
        """Return the reply to a train message, from what its training came to."""
        del config
        return self.dump(result.params, parameters), self.records.num_examples, {**result.metrics}

    def train_privately(
        self, private: PrivateRounds, parameters: NDArrays, config: Config
    ) -> tuple[NDArrays, int, Config]:
        """Return the reply of a private client to a train message."""
        raise NotImplementedError(f"{type(self).__name__} does not train privately")

    def as_training(
        self,
        rule: Rule,
        params: Params,
        config: Config,
        *,
        batches: Callable[[ClientData], Iterator[Any]],
        steps: Callable[[ClientData], int],
    ) -> LocalTraining:
        """Return a training on this client's records; its other parts are seen from the client."""
        trained = all(name in params for name, _ in self.model.named_parameters())
        held = any(True for _ in self.model.buffers())
        is_plain = trained and not held and not draws_random_numbers(self.model)
        return LocalTraining(
            rule,
            params,
            records=lambda: self.records,
            batches=batches,
            steps=steps,
            seeded=lambda: self.seeded(config),
            batch_size=self.batch_size,
            is_plain=is_plain,
        )

    def evaluate(self, parameters: NDArrays, config: Config) -> tuple[float, int, Config]:
        """Return (query loss after the most steps, number of query records, adaptation curve).

        Where records are held back, those are what it judges by. A private client returns the
        metrics that it was told to leave unprotected, and NaN in the place of a loss that is none
        of them.
        """
        params = self.load(parameters)
        if self.private is not None and self.private.tells_nothing:
            return math.nan, 1, {}  # not even whether it would have failed
        with self.guarded():
            self.model = copy.deepcopy(self.model).eval()  # without dropout: the same each time
            query = self.data.judging
            start, advance = self.adaptation(params, config)
            curve = adaptation_curve(
                self.model, self.loss_fn, start, query, steps=self.eval_steps, advance=advance
            )
            last = loss_after(self.eval_steps[-1]) if self.eval_steps else LOSS_BEFORE
            told = {name: value for name, value in curve.items() if self.tells(name)}
            loss = curve[last] if self.tells(LOSS) else math.nan
            return loss, self.count_told(lambda: len(query[1])), {**told}

    def tells(self, metric: str) -> bool:
        """Return whether an evaluation metric may leave the client."""
        return self.private is None or self.private.privacy.tells(metric)

    def count_told(self, count: Callable[[], int]) -> int:
        """Return a number of records as the server may know it: 1 where it is the client's own."""
        if self.private is None or self.private.privacy.public_counts:
            return count()
        return 1

    def guarded(self) -> AbstractContextManager[None]:
        """Return a block whose errors say nothing of the data, where the client is private."""
        return nullcontext() if self.private is None else errors_kept(self.name)

    def adaptation(self, params: Params, config: Config | None = None) -> tuple[Params, Advance]:
        """Return where adaptation starts, and gradient steps on the whole support set.

        ``config`` names the round, for clients whose start is a state of their own.
        """
        del config
        support = self.data.support
        return params, lambda point, steps: adapt(
            self.model,
            self.loss_fn,
            point,
            support,
            inner_lr=self.inner_lr,
            steps=steps,
            adapt=self.adapted,
        )

    def fit_privately(
        self, private: PrivateRounds, training: Training, parameters: NDArrays, config: Config
    ) -> tuple[NDArrays, int, Config]:
        """Return the privatised model, the number of records that may be told, and epsilon.

        Raises:
            BudgetExhaustedError: where the budget is spent.
            PrivacyError: where the server asks for too much; with a constant text for all that
                could say something of the data.
        """
        params = self.load(parameters)
        with self.guarded():
            model = self.model  # with the frozen parameters and buffers just received
            reply = private.train(params, config, training, lambda: self.data, model=model)
            count = self.count_told(lambda: self.data.num_examples)
            return self.dump(reply.params, parameters), count, {**reply.metrics}

    def load(self, parameters: NDArrays) -> Params:
        """Return the received arrays as the model's parameters, in its dtypes, on the device.

        What is not trained (buffers, frozen parameters) goes into a copy of the model.

        Raises:
            WireError: where their number or a shape is not the model's.
        """
        own = self.model.state_dict()
        if len(parameters) != len(own):
            raise WireError(
                f"client {self.name!r} received {len(parameters)} arrays, its "
                f"{type(self.model).__name__} has {len(own)}: both ends must build the same model"
            )
        for (name, value), array in zip(own.items(), parameters, strict=True):
            if tuple(array.shape) != tuple(value.shape):
                raise WireError(
                    f"client {self.name!r} received {name!r} of shape {tuple(array.shape)}, its "
                    f"model's is {tuple(value.shape)}: both ends must build the same model"
                )
        received = {
            name: torch.from_numpy(np.array(array)).to(self.device, own[name].dtype)
            for name, array in zip(own, parameters, strict=True)
        }
        trainable = {name for name, p in self.model.named_parameters() if p.requires_grad}
        rest = {name: value for name, value in received.items() if name not in trainable}
        if rest or any(True for _ in self.model.buffers()):
            self.model = copy.deepcopy(self.model).to(self.device)
            self.model.load_state_dict(rest, strict=False)
        return {name: value for name, value in received.items() if name in trainable}

    def dump(self, params: Params, received: NDArrays) -> NDArrays:
        """Return ``params`` as arrays in the order and dtypes received; the rest as it came."""
        return [
            params[name].detach().cpu().numpy().astype(array.dtype, copy=False)
            if name in params
            else array
            for name, array in zip(self.array_names, received, strict=True)
        ]

    def stream(self, purpose: str, config: Config) -> torch.Generator:
        """Return this client's random stream for ``purpose`` in the round that ``config`` names."""
        return torch_stream(self.seed, purpose, int(config.get(SERVER_ROUND, 0)), self.name)

    def seeded(self, config: Config) -> AbstractContextManager[None]:
        """Return a block in which layers that draw random numbers (dropout) use this stream."""
        number = int(config.get(SERVER_ROUND, 0))
        return torch_seeded(self.seed, "layers", number, self.name, device=self.device)


def draws_random_numbers(model: nn.Module) -> bool:
    """Return whether a layer of ``model`` draws random numbers in training.

    Known by kind: dropout layers, attention with dropout, RReLU. A call of ``F.dropout`` inside a
    forward pass cannot be seen.
    """

    def draws(module: nn.Module) -> bool:
        if isinstance(module, nn.modules.dropout._DropoutNd):
            return module.p > 0
        return isinstance(module, nn.RReLU) or (
            isinstance(module, nn.MultiheadAttention) and module.dropout > 0
        )

    return any(module.training and draws(module) for module in model.modules())


def _name_in(context: Context | None) -> str:
    if context is None:
        return ""
    return str(context.node_config.get(PARTITION_ID, context.node_id))
