r"""FedDF (Lin, Kong, Stich, Jaggi, 2006.07242): ensemble distillation on the server.

    w_a  <- sum_i p_i w_i                   over the clients of architecture a: the first student
    q(x)  = softmax(mean_i z_i(x))          over all clients that answered, whatever they have
    w_a  <- argmin mean_x KL(q(x) || softmax(z_a(x; w_a)))      over unlabelled public records x

Every architecture's student learns from all models, so that architectures teach each other. The
logits of each teacher are computed once a round, and their running mean alone is held in memory.

Differences from the paper: a student that the distillation does not bring nearer to the ensemble
stays the average (with one client, or clients that agree, it is FedAvg to the bit), and stopping
early looks at that distance, since a server need not have labels.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from logging import WARNING
from typing import Any

import torch
from flwr.common import log
from torch import Tensor, nn

from ..architectures import joined, part_of
from ..config import RunConfig
from ..errors import ConfigError
from ..streams import torch_stream
from ..wire import NamedArrays
from .by_architecture import by_architecture
from .distilled import Distillation, distilled, logits_of
from .fedavg import local_sgd
from .recipe import STRATEGIES, Recipe, aggregation_of, weighting_of
from .rules import Aggregation, Arrays, Reply, Rule, State, Weighting, interpolate, mean
from .shell import RuleStrategy


def ensemble_distillation(
    average: Rule,
    models: Mapping[str, nn.Module],
    public: Tensor,
    how: Distillation,
    *,
    seed: int = 0,
) -> Rule:
    """Return the rule that averages by ``average`` and then lets each architecture learn from all.

    Args:
        average: of the arrays of all architectures, see ``by_architecture``.
        models: the module of each architecture by its name; of "" where there is one.
        public: (N, ...) unlabelled records, as the models take them, where they are to be computed.
        how: students learn.
        seed: of the batches.
    """
    modules = {name: deepcopy(model).to(public.device).eval() for name, model in models.items()}

    def update(state: State, sent: NamedArrays, replies: Sequence[Reply]) -> tuple[State, Arrays]:
        inner, averaged = average.update(state["average"], sent, replies)
        number = state["round"] + 1
        state = {"average": inner, "round": number}
        if (targets := _targets(modules, public, replies)) is None:
            return state, averaged
        students = {
            name: distilled(
                module,
                part_of(averaged, name),
                public,
                targets,
                how,
                torch_stream(seed, "feddf", number, name),
            )
            for name, module in modules.items()
        }
        return state, joined(students)

    def init(arrays: NamedArrays) -> State:
        return {"average": average.init(arrays), "round": 0}

    return Rule(init, update, sees_all_architectures=True)


def _targets(
    modules: Mapping[str, nn.Module], public: Tensor, replies: Sequence[Reply]
) -> Tensor | None:
    """Return q, (N, C), of all replies whose logits are finite; None where none are."""
    total, count = torch.zeros(()), 0
    for reply in replies:
        for name, module in modules.items():
            if own := part_of(reply.arrays, name):
                logits = logits_of(module, own, public).double()
                if bool(logits.isfinite().all()):
                    total, count = total.to(logits.device) + logits, count + 1
                else:
                    log(WARNING, "a model whose logits are not finite teaches nobody")
    return (total / count).softmax(dim=1).to(public.dtype) if count else None


class FedDF(RuleStrategy):
    """Average within each architecture, then distil the ensemble of all clients into each.

    Args:
        models: the module of each architecture by its name, of "" without ``architectures``.
        public: (N, ...) unlabelled records that are no secret, as the models take them.
        distillation: how students learn; None: the defaults.
        device: "cpu", or anything else for a GPU where the server has one.
        weighting: "examples" (p_i = n_i / sum n) or "uniform", of the averages.
        aggregate: how models of one architecture become one: ``mean``, ``median()``, ...
        shell: see ``RuleStrategy``.

    Raises:
        ConfigError: where ``models`` are not those of ``architectures``.
    """

    def __init__(
        self,
        *,
        models: Mapping[str, nn.Module],
        public: Tensor,
        distillation: Distillation | None = None,
        device: str = "auto",
        weighting: Weighting = "examples",
        aggregate: Aggregation = mean,
        **shell: Any,
    ) -> None:
        names = tuple(shell.get("architectures", ()))
        if set(models) != set(names or ("",)):
            raise ConfigError(
                f"models of {', '.join(map(repr, models))}, architectures {', '.join(names)!r}: "
                "FedDF computes with the module of each, and without architectures with that of ''"
            )
        place = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        how = distillation or Distillation()
        average = interpolate(weighting=weighting, aggregate=aggregate)
        rule = ensemble_distillation(
            by_architecture(average, names) if names else average,
            models,
            public.to(place),
            how,
            seed=shell.get("seed", 0),
        )
        super().__init__(rule, **shell)
        self.weighting = weighting
        self.distillation = str(how)  # a run that is resumed must have the same


@STRATEGIES.register("feddf")
def recipe(config: RunConfig) -> Recipe:
    """FedAvg, then the ensemble of all clients' models taught to each architecture."""
    return Recipe(
        strategy=partial(
            FedDF,
            distillation=Distillation(
                steps=config.distill_steps,
                lr=config.distill_lr,
                batch_size=config.distill_batch_size,
            ),
            device=config.device,
            weighting=weighting_of(config, "examples"),
            aggregate=aggregation_of(config),
        ),
        client="sgd",
        client_options=local_sgd(config),
        needs=("models", "public"),
    )
