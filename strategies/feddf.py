r"""FedDF (Lin, Kong, Stich, Jaggi, 2006.07242): ensemble distillation on the server.

    w_a  <- sum_i p_i w_i                   over the clients of architecture a: the first student
    q(x)  = softmax(mean_i z_i(x))          over all clients that answered, whatever they have
    w_a  <- argmin mean_x KL(q(x) || softmax(z_a(x; w_a)))      over unlabelled public records x

Every architecture's student learns from all models, so that architectures teach each other. The
logits of each teacher are computed once a round, and their running mean alone is held in memory; a
median or trimmed mean of them (``ensemble``) needs all: 4 K N C bytes.

Where the server has a labelled validation set, models below chance on it teach nobody (drop-worst),
and of a student's states the one with the least cross-entropy there is kept.

Differences from the paper: without a validation set, stopping early looks at the distance to the
ensemble, since a server need not have labels. A student that is not made better by that measure
stays the average: with one client, or clients that agree, it is FedAvg to the bit.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from logging import INFO, WARNING
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from flwr.common import log
from torch import Tensor, nn

from ..architectures import joined, part_of
from ..config import RunConfig
from ..errors import ConfigError
from ..public import Batch, PublicData
from ..streams import torch_stream
from ..wire import NamedArrays
from .by_architecture import by_architecture
from .consensus import consensus_of
from .distilled import Distillation, distilled, logits_of
from .fedavg import local_sgd
from .recipe import STRATEGIES, Recipe, aggregation_of, consensus_by, weighting_of
from .rules import Aggregation, Arrays, Reply, Rule, State, Weighting, interpolate, mean
from .shell import RuleStrategy
from .sound_outputs import Floats, drop_worst

MEAN: Mapping[str, Any] = MappingProxyType({"by": "mean"})

Teacher = tuple[nn.Module, NamedArrays]


def ensemble_distillation(
    average: Rule,
    models: Mapping[str, nn.Module],
    public: Tensor,
    how: Distillation,
    *,
    validation: Batch | None = None,
    ensemble: Mapping[str, Any] = MEAN,
    seed: int = 0,
) -> Rule:
    """Return the rule that averages by ``average`` and then lets each architecture learn from all.

    Args:
        average: of the arrays of all architectures, see ``by_architecture``.
        models: the module of each architecture by its name; of "" where there is one.
        public: (N, ...) unlabelled records, as the models take them, where they are to be computed.
        how: students learn.
        validation: labelled records, (M, ...) and (M,) int64, where ``public`` is; None: none.
        ensemble: arguments of ``consensus_of``, whose softmax is learnt: {"by": "median"}.
        seed: of the batches.
    """
    modules = {name: deepcopy(model).to(public.device).eval() for name, model in models.items()}

    def update(state: State, sent: NamedArrays, replies: Sequence[Reply]) -> tuple[State, Arrays]:
        inner, averaged = average.update(state["average"], sent, replies)
        number = state["round"] + 1
        state = {"average": inner, "round": number}
        if (targets := _targets(modules, public, replies, validation, ensemble)) is None:
            return state, averaged
        students = {
            name: distilled(
                module,
                part_of(averaged, name),
                public,
                targets,
                how,
                torch_stream(seed, "feddf", number, name),
                validation,
            )
            for name, module in modules.items()
        }
        return state, joined(students)

    def init(arrays: NamedArrays) -> State:
        return {"average": average.init(arrays), "round": 0}

    return Rule(init, update, sees_all_architectures=True)


def _targets(
    modules: Mapping[str, nn.Module],
    public: Tensor,
    replies: Sequence[Reply],
    validation: Batch | None = None,
    ensemble: Mapping[str, Any] = MEAN,
) -> Tensor | None:
    """Return q, (N, C), of all replies that may teach; None where none may."""
    teachers: list[Teacher] = [
        (module, own)
        for reply in replies
        for name, module in modules.items()
        if (own := part_of(reply.arrays, name))
    ]
    if validation is not None:
        teachers = _above_chance(teachers, validation)
    said = (logits_of(module, own, public).double() for module, own in teachers)
    sound = (logits for logits in said if _is_sound(logits))
    if ensemble == MEAN:
        total, count = torch.zeros(()), 0
        for logits in sound:
            total, count = total.to(logits.device) + logits, count + 1
        agreed = total / count if count else None
    else:
        all_of_them = [logits.cpu().numpy() for logits in sound]
        agreed = torch.from_numpy(_agreed(all_of_them, ensemble)) if all_of_them else None
    return None if agreed is None else agreed.softmax(dim=1).to(public.device, public.dtype)


def _agreed(logits: list[Floats], ensemble: Mapping[str, Any]) -> Floats:
    return consensus_of(ensemble["by"], np.stack(logits), trim=ensemble.get("trim", 0.2))


def _is_sound(logits: Tensor) -> bool:
    if sound := bool(logits.isfinite().all()):
        return sound
    log(WARNING, "a model whose logits are not finite teaches nobody")
    return False


def _above_chance(teachers: list[Teacher], validation: Batch) -> list[Teacher]:
    """Return the teachers that reach chance on the validation set; all, where none does."""
    inputs, labels = validation
    said = [logits_of(module, own, inputs).cpu().numpy() for module, own in teachers]
    kept = drop_worst(np.stack(said), labels.cpu().numpy())
    if not kept.any():
        log(WARNING, "no model reaches chance on the validation set: all teach")
        return teachers
    if not kept.all():
        log(INFO, "%d of %d models are below chance and teach nobody", (~kept).sum(), len(kept))
    return [teacher for teacher, good in zip(teachers, kept, strict=True) if good]


class FedDF(RuleStrategy):
    """Average within each architecture, then distil the ensemble of all clients into each.

    Args:
        models: the module of each architecture by its name, of "" without ``architectures``.
        public: records that are no secret; their targets, where they have any, are not used.
        distillation: how students learn; None: the defaults.
        validation: labelled records that no client has, see the module's text; None: none.
        ensemble: arguments of ``consensus_of``: how logits of all models become one.
        device: "cpu", or anything else for a GPU where the server has one.
        weighting: "examples" (p_i = n_i / sum n) or "uniform", of the averages.
        aggregate: how models of one architecture become one: ``mean``, ``median()``, ...
        shell: see ``RuleStrategy``.

    Raises:
        ConfigError: where ``models`` are not those of ``architectures``.
        DataError: where ``validation`` has no targets.
    """

    def __init__(
        self,
        *,
        models: Mapping[str, nn.Module],
        public: PublicData,
        distillation: Distillation | None = None,
        validation: PublicData | None = None,
        ensemble: Mapping[str, Any] = MEAN,
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
            public.inputs.to(place),
            how,
            validation=None if validation is None else _labelled(validation, place),
            ensemble=ensemble,
            seed=shell.get("seed", 0),
        )
        super().__init__(rule, **shell)
        self.weighting = weighting
        self.distillation = str(how)  # a run that is resumed must have the same
        self.public = f"{public.name} {public.fingerprint}"
        self.validation = validation.fingerprint if validation else ""
        self.ensemble = str(dict(ensemble))


def _labelled(public: PublicData, device: str) -> Batch:
    inputs, targets = public.labelled_batch(np.arange(len(public)))
    return inputs.to(device), targets.to(device)


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
            ensemble=MEAN if config.aggregation == "multi-krum" else consensus_by(config),
            weighting=weighting_of(config, "examples"),
            aggregate=aggregation_of(config),
        ),
        client="sgd",
        client_options=local_sgd(config),
        needs=("models", "public", "validation"),
    )
