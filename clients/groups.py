r"""Members of groups that share a task: their part in the exchanges of one round.

A message names its exchange (``exchange`` in its config); without one a client trains as its base
class does. The replies of GroupMAMLClient, at the point theta that is received:

| exchange | reply |
|---|---|
| adapt | theta - alpha * grad L_support(theta) |
| query | theta - grad L_query(theta) |
| curvature | v - alpha * H_support(theta) v, of the direction v that is received too |
| join | theta - alpha * grad L(theta), over the client's own support set |

The batches of a round are the same in all its exchanges. "join" is how a new group adapts: no
record that it is judged by takes part. GroupSGDClient joins by its local SGD on the support set.

An evaluation whose exchange is "score" scores what is received, without any adaptation.

Private clients train, each by itself; the exchanges of a group are refused: members would be sent
what others say of their records.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Generator, nn

from ..architectures import names_of
from ..errors import RefusedError, WireError
from ..streams import torch_stream
from ..wire import (
    ADAPT,
    CURVATURE,
    DIRECTION,
    EXCHANGE,
    EXCHANGE_NUMBER,
    JOIN,
    QUERY,
    SCORE,
    SERVER_ROUND,
    NamedArrays,
)
from .batches import minibatches
from .data import Batch, ClientData
from .learner import Config, Learner, NDArrays
from .local_update import LocalResult
from .maml import QUERY_LOSS, MAMLClient, MetaBatch
from .objective import Params, gradient_and_pullback, objective
from .privacy.round import PrivateRounds
from .sgd import TRAIN_LOSS, SGDClient, sgd_update
from .training import LocalTraining, Rule

Named = tuple[dict[str, np.ndarray], int, Config]
REFUSED = (
    "exchange {0!r} with privacy: the members of a group would be sent what this client says of "
    "its records as they are; use group-adapt = 'client': each client then trains privately by "
    "itself"
)


class _Member(Learner):
    """What members of a group have in common, whatever they train by."""

    def train_privately(
        self, private: PrivateRounds, parameters: NDArrays, config: Config
    ) -> tuple[NDArrays, int, Config]:
        """Return the reply of a private client, which takes part in no exchange of a group."""
        if name := config.get(EXCHANGE):
            raise RefusedError(REFUSED.format(str(name)))
        return super().train_privately(private, parameters, config)

    def evaluate(self, parameters: NDArrays, config: Config) -> tuple[float, int, Config]:
        """Return the evaluation of ``Learner``, or where it is asked to score, that alone."""
        if config.get(EXCHANGE) != SCORE:
            return super().evaluate(parameters, config)
        judge = copy.copy(self)
        judge.eval_steps = ()
        return super(_Member, judge).evaluate(parameters, config)


class GroupMAMLClient(_Member, MAMLClient):
    """A Flower NumPyClient that trains by local meta-steps, or in the exchanges of its group.

    Args:
        model: see ``Learner``.
        data: see ``Learner``.
        directions: whether exchange "curvature" may come; then the client is computed alone.
        maml: keyword arguments of ``MAMLClient``; ``inner_lr`` is the group's alpha too.

    Raises (when asked):
        RefusedError: an exchange of a group, where the client is private.
        WireError: an exchange that it does not know.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ClientData | Callable[[], ClientData],
        *,
        directions: bool = True,
        **maml: Any,
    ) -> None:
        super().__init__(model, data, **maml)
        self.directions = directions

    @property
    def is_for_cohorts(self) -> bool:
        """Whether its training may be computed together with that of other clients."""
        return super().is_for_cohorts and not self.directions

    def training(self, params: Params, config: Config) -> LocalTraining:
        """Return the training that the exchange asks for, from ``params``."""
        asked = str(config.get(EXCHANGE, ""))
        if not asked:
            return super().training(params, config)
        if asked not in (ADAPT, QUERY, JOIN):
            raise WireError(
                f"client {self.name!r} is asked for exchange {asked!r}: it knows {ADAPT}, {QUERY}, "
                f"{CURVATURE} and {JOIN}; server and client must be of the same version"
            )
        options: tuple[tuple[str, Any], ...] = (
            (("lr", 1.0),) if asked == QUERY else (("lr", self.inner_lr), ("train", self.adapted))
        )
        return self.as_training(
            Rule(sgd_update, self.model, self.loss_fn, options),
            params,
            config,
            batches=lambda data: iter([self._batch_of(asked, data, config)]),
            steps=lambda data: 1,
        )

    def answered(
        self, result: LocalResult, parameters: NDArrays, config: Config
    ) -> tuple[NDArrays, int, Config]:
        """Return the reply; the loss of exchange "query" is a query loss."""
        if config.get(EXCHANGE) == QUERY:
            result = LocalResult(result.params, {QUERY_LOSS: result.metrics[TRAIN_LOSS]})
        return super().answered(result, parameters, config)

    def fit_named(self, arrays: NamedArrays, config: Config) -> Named | None:
        """Return the reply to exchange "curvature", by names; None for any other message."""
        if config.get(EXCHANGE) != CURVATURE:
            return None
        if self.private is not None:
            raise RefusedError(REFUSED.format(CURVATURE))
        return self._pulled_back(arrays, config), self.records.num_examples, {}

    def _pulled_back(self, arrays: NamedArrays, config: Config) -> dict[str, np.ndarray]:
        """Return v - alpha H v of the direction in ``arrays``, at the point in them."""
        held = {own: arrays[name] for name, own in names_of(arrays, DIRECTION).items()}
        missing = [n for n in self.array_names if n not in held or n not in arrays]
        if missing:
            raise WireError(
                f"client {self.name!r} is asked for a Hessian-vector product without {missing[0]!r}"
                " in the point or in the direction: server and client must build the same model"
            )
        point = self.load([arrays[name] for name in self.array_names])
        v = {
            name: torch.from_numpy(np.array(held[name])).to(value.device, value.dtype)
            for name, value in point.items()
        }
        batch = self._batch_of(ADAPT, self.data, config)
        loss, moving = objective(self.model, self.loss_fn), tuple(filter(self._moves, point))
        with self.seeded(config):
            _, product = gradient_and_pullback(lambda one: loss(one, batch), point, moving)
            along = product({name: self.inner_lr * v[name] for name in moving})
        pulled = {name: v[name] - along[name] for name in v}
        received = [held[name] for name in self.array_names]
        return dict(zip(self.array_names, self.dump(pulled, received), strict=True))

    def _moves(self, name: str) -> bool:
        return self.adapted is None or self.adapted(name)

    def _batch_of(self, exchange: str, data: ClientData, config: Config) -> Batch:
        """Return the batch of an exchange, the same one whenever it is asked for in a round."""
        if exchange == JOIN:
            return data.support
        batch: MetaBatch = next(self._batches(data, self.stream("maml", config)))
        return batch.query if exchange == QUERY else batch.support


class GroupSGDClient(_Member, SGDClient):
    """A Flower NumPyClient that trains by epochs of SGD, several times in a round where asked.

    Args:
        model: see ``Learner``.
        data: see ``Learner``.
        sgd: keyword arguments of ``SGDClient``.
    """

    def training(self, params: Params, config: Config) -> LocalTraining:
        """Return the epochs that ``config`` asks for; to join a group, on the support set alone."""
        if config.get(EXCHANGE) != JOIN:
            return super().training(params, config)

        def batches(data: ClientData) -> Iterator[Batch]:
            return minibatches(
                data.support,
                batch_size=self.batch_size,
                epochs=self.local_epochs,
                generator=self.stream("join", config),
            )

        def steps(data: ClientData) -> int:
            size = self.batch_size or max(len(data.support[1]), 1)
            return self.local_epochs * math.ceil(len(data.support[1]) / size)

        options = (("lr", self.local_lr), ("proximal_mu", self.proximal_mu))
        rule = Rule(sgd_update, self.model, self.loss_fn, options)
        return self.as_training(rule, params, config, batches=batches, steps=steps)

    def stream(self, purpose: str, config: Config) -> Generator:
        """Return the random stream of an exchange; that of the first is the round's."""
        if not (number := int(config.get(EXCHANGE_NUMBER, 0))):
            return super().stream(purpose, config)
        return torch_stream(self.seed, purpose, int(config.get(SERVER_ROUND, 0)), self.name, number)
