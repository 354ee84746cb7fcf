r"""A generator of parameters on a client: adaptation is one forward pass, and no gradient step.

    theta_i = generated(support set of i)        see ``models/hypernetworks.py``
    w <- w - lr * grad_w L_query(theta_i(w))     every local step, a new split of the records each

w are the parameters of the generator and of the base model, which all train alike. They are what
travels: what the generator makes of the support set, its summary z and the adapted parameters,
never leaves the client.

Nearest published: HyperTransformer (2201.04182), trained on one machine.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError
from ..models.hypernetworks import BASE, GeneratedModel, generated
from .batches import draw, resplit
from .data import ClientData
from .evaluation import Advance
from .learner import Config, Learner
from .local_update import LocalResult, LocalUpdate, mean_of
from .maml import QUERY_LOSS, MetaBatch
from .meta_gradient import adapt
from .objective import LossFn, Params, detached, grad_and_value, objective
from .training import LocalTraining, Rule

SPLITS = ("fixed", "fresh")


class GeneratorState(NamedTuple):
    """Parameters so far, and the query loss of each step."""

    params: Params
    losses: tuple[Tensor, ...] = ()


def generator_update(
    model: GeneratedModel, loss_fn: LossFn, *, lr: float
) -> LocalUpdate[GeneratorState, MetaBatch]:
    """Return the update whose every step is w <- w - lr * grad L_query(generated(w, support)).

    Args:
        model: called functionally and never changed.
        loss_fn: a scalar mean over the query batch.
        lr: > 0.
    """
    loss = objective(model, loss_fn)

    def step(state: GeneratorState, batch: MetaBatch) -> GeneratorState:
        def query_loss(params: Params) -> Tensor:
            return loss(generated(model, params, batch.support), batch.query)

        gradient, value = grad_and_value(query_loss, state.params)
        moved = {name: w - lr * gradient[name] for name, w in state.params.items()}
        return GeneratorState(moved, (*state.losses, value.detach()))

    def finish(state: GeneratorState) -> LocalResult:
        return LocalResult(state.params, {QUERY_LOSS: mean_of(state.losses)})

    return LocalUpdate(
        begin=lambda params: GeneratorState(detached(params)), step=step, finish=finish
    )


class GeneratorClient(Learner):
    """A Flower NumPyClient that trains a generator of parameters, and adapts by it.

    Its evaluation curve: "before" is the base model, the first adaptation step is one forward pass
    of the generator on the support set, without any gradient; each further one is a gradient step
    of rate ``inner_lr`` from there.

    Args:
        model: a ``GeneratedModel``; see ``Learner``.
        data: see ``Learner``.
        local_lr: learning rate of training, > 0.
        local_steps: steps of a round, >= 1.
        split: "fixed": the client's own support and query sets; "fresh": a new split of all its
            records each step, with as many support records of each class (data with a
            ``fixed_split`` keep theirs). The support set is used whole, ``batch_size`` is that of
            the query.
        learner: keyword arguments of ``Learner`` but privacy.

    Raises:
        ConfigError: where a value is out of range, the model has no generator, or with privacy.
    """

    model: GeneratedModel

    def __init__(
        self,
        model: nn.Module,
        data: ClientData | Callable[[], ClientData],
        *,
        local_lr: float = 0.1,
        local_steps: int = 1,
        split: str = "fresh",
        **learner: Any,
    ) -> None:
        check_not_private(learner.get("privacy") is not None)
        if not isinstance(model, GeneratedModel):
            raise ConfigError(
                f"{type(model).__name__} has no generator of its parameters: wrap it by "
                "metabloom.models.hypernetworks.with_generator"
            )
        super().__init__(model, data, **learner)
        if not 0 < local_lr < math.inf:
            raise ConfigError(f"local_lr = {local_lr!r}: must be a finite number above 0")
        if not (isinstance(local_steps, int) and local_steps >= 1):
            raise ConfigError(
                f"local_steps = {local_steps!r}: must be a whole number of at least 1"
            )
        if split not in SPLITS:
            raise ConfigError(f"split = {split!r}: must be one of {', '.join(SPLITS)}")
        self.local_lr = local_lr
        self.local_steps = local_steps
        self.split = split

    def training(self, params: Params, config: Config) -> LocalTraining:
        """Return the steps of the round that ``config`` names, from ``params``."""
        return self.as_training(
            Rule(generator_update, self.model, self.loss_fn, (("lr", self.local_lr),)),
            params,
            config,
            batches=lambda data: self._batches(data, self.stream("generator", config)),
            steps=lambda data: self.local_steps,
        )

    def adaptation(self, params: Params, config: Config | None = None) -> tuple[Params, Advance]:
        """Return the base model, and the steps that lead from it; see the class's text."""
        del config
        support = self._checked(self.data).support

        def advance(point: Params, steps: int) -> Params:
            if point is params:  # the base model: the generator comes first
                with torch.no_grad():
                    point = generated(self.model, params, support)
                steps -= 1
            if not steps:
                return point
            model, loss_fn, rate = self.model, self.loss_fn, self.inner_lr
            return adapt(
                model, loss_fn, point, support, inner_lr=rate, steps=steps, adapt=self._is_adapted
            )

        return params, advance

    def _is_adapted(self, name: str) -> bool:
        """Return whether a gradient step moves a parameter: none of the generator's."""
        return name.startswith(BASE) and (self.adapted is None or self.adapted(name))

    def _batches(self, data: ClientData, draws: torch.Generator) -> Iterator[MetaBatch]:
        self._checked(data)
        for _ in range(self.local_steps):
            is_kept = self.split == "fixed" or data.fixed_split
            mixed = data if is_kept else resplit(data, generator=draws)
            yield MetaBatch(mixed.support, draw(mixed.query, size=self.batch_size, generator=draws))

    def _checked(self, data: ClientData) -> ClientData:
        """Return ``data``; raise DataError where nothing can be generated from its support set."""
        targets, columns = data.support[1], len(self.model.generator.encoder.classes)
        if not len(targets):
            raise DataError(
                f"client {self.name!r} has no support records: parameters are generated from them"
            )
        if targets.is_floating_point():
            if targets[0].numel() != columns:
                raise DataError(
                    f"client {self.name!r}: targets have {targets[0].numel()} numbers, the "
                    f"generator takes {columns}"
                )
        elif not 0 <= int(targets.min()) <= int(targets.max()) < columns:
            raise DataError(
                f"client {self.name!r}: support targets go from {int(targets.min())} to "
                f"{int(targets.max())}, the generator knows the classes 0 to {columns - 1}"
            )
        return data


def check_not_private(is_private: bool) -> None:
    """Raise ConfigError where training is to be private."""
    if is_private:
        raise ConfigError(
            "privacy.* with a generator of parameters: its gradient depends on the support set as "
            "a whole, so no record has a gradient of its own that could be clipped; use "
            "user-privacy.*, or another strategy"
        )
