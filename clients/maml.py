r"""Local meta-steps: MAML on a client, federated as FedMeta or Per-FedAvg.

Papers: MAML 1703.03400, FedMeta 1802.07876, Per-FedAvg 2002.07948.

Each local meta-step, on a support and a query batch:

    w <- w - beta * d/dw L_query(w - alpha * grad L_support(w))

FedMeta is one meta-step with beta = 1: the difference between the model sent and the model returned
is then the meta-gradient, which the server gives to an optimiser of its own. Per-FedAvg is tau
meta-steps with three independent batches D (inner), D' (query), D'' (Hessian) each, and the server
takes the mean of the models.
"""

import math
from collections.abc import Callable, Iterator
from logging import WARNING
from typing import Any, Literal, NamedTuple, cast

import torch
from flwr.common import log
from torch import Tensor, nn

from ..accounting import Event
from ..errors import ConfigError
from ..models import is_body, is_head
from ..planning import NOISY, noise_to_signal
from ..wire import SERVER_ROUND
from .batches import draw, resplit
from .data import Batch, ClientData
from .learner import Config, Learner, NDArrays, draws_random_numbers
from .local_update import LocalResult, LocalUpdate, mean_of
from .meta_gradient import (
    InnerLR,
    Order,
    Predicate,
    check_inner_loop,
    check_order,
    meta_gradient,
)
from .objective import LossFn, Params
from .privacy.config import USUAL_RECORDS, PrivacyConfig
from .privacy.releases import Releases
from .privacy.round import PrivateRounds, Training
from .privacy.updates import (
    PrivateOrder,
    check_private_order,
    meta_events,
    private_maml_update,
)
from .training import LocalTraining, Rule

QUERY_LOSS = "query-loss"
PARTS = ("all", "head", "body")


class MetaBatch(NamedTuple):
    """The batches of one meta-step.

    Attributes:
        support: to adapt on.
        query: to score on.
        curvature: of the Hessian; None for the support batch.
    """

    support: Batch
    query: Batch
    curvature: Batch | None = None


class MetaState(NamedTuple):
    """Parameters so far, and the query loss of each meta-step."""

    params: Params
    losses: tuple[Tensor, ...] = ()


def maml_update(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    inner_lr: InnerLR,
    outer_lr: float,
    inner_steps: int = 1,
    order: Order = "exact",
    adapt: Predicate | None = None,
) -> LocalUpdate[MetaState, MetaBatch]:
    """Return the update whose every step is w <- w - outer_lr * meta-gradient.

    Arguments as in ``meta_gradient``.
    """

    def step(state: MetaState, batch: MetaBatch) -> MetaState:
        found = meta_gradient(
            model,
            loss_fn,
            state.params,
            batch.support,
            batch.query,
            inner_lr=inner_lr,
            steps=inner_steps,
            order=order,
            adapt=adapt,
            curvature=batch.curvature,
        )
        moved = {name: w - outer_lr * found.grads[name] for name, w in state.params.items()}
        return MetaState(moved, (*state.losses, found.query_loss))

    return LocalUpdate(begin=MetaState, step=step, finish=finished)


def finished(state: MetaState) -> LocalResult:
    """Return what the meta-steps came to: parameters, and their mean query loss."""
    return LocalResult(state.params, {QUERY_LOSS: mean_of(state.losses)})


class MAMLClient(Learner):
    """A Flower NumPyClient that trains by local meta-steps and evaluates by adaptation.

    Args:
        model: see ``Learner``.
        data: see ``Learner``.
        outer_lr: beta > 0. With 1 and one local step the reply is w - g: what ``FedMeta`` expects.
        inner_steps: K >= 1.
        local_steps: meta-steps of a round, >= 1.
        order: "exact", "first" or "hf"; "auto" is "exact", and "first" with privacy, where exact
            second order takes private Hessian-vector products and most often costs more than it
            gives.
        split: how a meta-step gets its batches. "fixed": from the client's support and query sets;
            "fresh": from a new split of all its records, with as many support records of each
            class (data with a ``fixed_split`` keep theirs); "independent": three independent
            batches of all its records (Per-FedAvg). With privacy every gradient has a Poisson batch
            of its own from all records.
        part: what the inner loop adapts, in training and at evaluation: "all"; "head" (ANIL,
            1909.09157); "body", all but the head (BOIL, 2008.08882). The meta-gradient covers all
            parameters in each case.
        head: which layers are the head, see ``metabloom.models.is_head``.
        learner: keyword arguments of ``Learner``: inner_lr, batch_size, loss_fn, eval_steps, adapt,
            seed, name, device, context, privacy.

    Raises:
        ConfigError: where a value is out of range, naming it.
        ModelError: where a part is to be adapted and the head is all that the model has.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ClientData | Callable[[], ClientData],
        *,
        outer_lr: float = 1.0,
        inner_steps: int = 1,
        local_steps: int = 1,
        order: Order | Literal["auto"] = "auto",
        split: str = "fixed",
        part: str = "all",
        head: str = "",
        **learner: Any,
    ) -> None:
        adapt = _adapted(model, part, head, learner.pop("adapt", None))
        super().__init__(model, data, adapt=adapt, **learner)
        check_inner_loop(self.inner_lr, inner_steps, dict(model.named_parameters()), self.adapted)
        order = _usual(self.private is not None) if order == "auto" else order
        check_order(order)
        if self.private is not None:
            check_private_order(order)
        if order == "hf" and draws_random_numbers(model):
            raise ConfigError(
                "order = 'hf' takes the difference of two gradients, and dropout draws another "
                "mask for each: use order = 'exact', or dropout of p = 0"
            )
        if not 0 < outer_lr < math.inf:
            raise ConfigError(f"outer_lr = {outer_lr!r}: must be a finite number above 0")
        if not (isinstance(local_steps, int) and local_steps >= 1):
            raise ConfigError(
                f"local_steps = {local_steps!r}: must be a whole number of at least 1"
            )
        if split not in _SPLITS:
            raise ConfigError(f"split = {split!r}: must be one of {', '.join(_SPLITS)}")
        self.local_steps = local_steps
        self.split = split
        self.outer_lr = outer_lr
        self.inner_steps = inner_steps
        self.order: Order = order

    def training(self, params: Params, config: Config) -> LocalTraining:
        """Return the meta-steps of the round that ``config`` names, from ``params``."""
        return self.as_training(
            self.rule(),
            params,
            config,
            batches=lambda data: self._batches(data, self.stream("maml", config)),
            steps=lambda data: self.local_steps,
        )

    def rule(self) -> Rule:
        """Return how one meta-step is made."""
        options = (
            ("inner_lr", self.inner_lr),
            ("outer_lr", self.outer_lr),
            ("inner_steps", self.inner_steps),
            ("order", self.order),
            ("adapt", self.adapted),
        )
        return Rule(maml_update, self.model, self.loss_fn, options)

    def train_privately(
        self, private: PrivateRounds, parameters: NDArrays, config: Config
    ) -> tuple[NDArrays, int, Config]:
        """Return the privatised model, and epsilon."""
        order = cast(PrivateOrder, self.order)
        begins = config.get(SERVER_ROUND, 0) in (0, 1)
        if order == "exact" and begins and isinstance(self.inner_lr, int | float):
            self._warn_of_noise(private.privacy)

        def events(privacy: PrivacyConfig) -> list[Event]:
            step = meta_events(privacy, steps=self.inner_steps, order=order)
            return [event._replace(count=event.count * self.local_steps) for event in step]

        def update(releases: Releases, privacy: PrivacyConfig) -> LocalUpdate[Params, int]:
            return self.private_update(releases, privacy, order)

        mechanism = "fomaml" if order == "first" else "second-order"
        training = Training(mechanism, events, update, self.local_steps)
        return self.fit_privately(private, training, parameters, config)

    def private_update(
        self, releases: Releases, privacy: PrivacyConfig, order: PrivateOrder
    ) -> LocalUpdate[Params, int]:
        """Return the private meta-steps."""
        return private_maml_update(
            releases,
            privacy,
            inner_lr=self.inner_lr,
            outer_lr=self.outer_lr,
            inner_steps=self.inner_steps,
            order=order,
            adapt=self.adapted,
        )

    def _warn_of_noise(self, privacy: PrivacyConfig) -> None:
        """Log where a Hessian-vector product would be mostly noise."""
        ratio = noise_to_signal(
            inner_lr=self.inner_lr,
            hvp_noise=privacy.hvp_noise,
            hvp_max_norm=privacy.hvp_max_norm,
            num_parameters=sum(value.numel() for value in self.model.parameters()),
            batch_size=privacy.expected_batch_size or privacy.sample_rate * USUAL_RECORDS,
        )
        if ratio > NOISY:
            log(
                WARNING,
                "the noise of a Hessian-vector product is %.2g times its direction (above %g it "
                "drowns the second order): use order = 'first', or lower privacy.hvp-max-norm",
                ratio,
                NOISY,
            )

    def _batches(self, data: ClientData, generator: torch.Generator) -> Iterator[MetaBatch]:
        for _ in range(self.local_steps):
            yield _SPLITS[self.split](data, self.batch_size, generator)


def _usual(is_private: bool) -> Order:
    return "first" if is_private else "exact"


def _adapted(model: nn.Module, part: str, head: str, adapt: Predicate | None) -> Predicate | None:
    """Return which names the inner loop moves; None: all."""
    if part not in PARTS:
        raise ConfigError(f"part = {part!r}: must be one of {', '.join(PARTS)}")
    if part == "all":
        return adapt
    if adapt is not None:
        raise ConfigError(f"part = {part!r} beside adapt: both say what is adapted; leave one out")
    return is_head(model, head) if part == "head" else is_body(model, head)


def _fixed(data: ClientData, size: int, generator: torch.Generator) -> MetaBatch:
    return MetaBatch(
        support=draw(data.support, size=size, generator=generator),
        query=draw(data.query, size=size, generator=generator),
    )


def _fresh(data: ClientData, size: int, generator: torch.Generator) -> MetaBatch:
    mixed = data if data.fixed_split else resplit(data, generator=generator)
    return _fixed(mixed, size, generator)


def _independent(data: ClientData, size: int, generator: torch.Generator) -> MetaBatch:
    records = data.all
    inner, query, curvature = (draw(records, size=size, generator=generator) for _ in range(3))
    # Where all records are each batch, the Hessian is that of the support batch: None says so.
    return MetaBatch(inner, query, None if curvature is inner else curvature)


_SPLITS = {"fixed": _fixed, "fresh": _fresh, "independent": _independent}
