"""A registry name's meaning: the server's strategy and its clients' local update."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from logging import WARNING
from typing import Protocol

import torch
from flwr.common import log
from torch import nn

from ..config import RunConfig
from ..errors import ConfigError
from ..registry import Registry
from ..wire import NamedArrays
from .aggregation import median, multi_krum, trimmed_mean
from .rules import Aggregation, Arrays, Reply, Weighting, mean
from .shell import RuleStrategy


class Network(Protocol):
    """What stands in the place of the configured model, at both ends."""

    def __call__(
        self,
        base: nn.Module,
        *,
        build: Callable[[int], nn.Module],
        num_classes: int,
        input_dtype: torch.dtype,
    ) -> nn.Module:
        """Return it.

        Args:
            base: the configured model.
            build: returns another model of its architecture, with so many outputs.
            num_classes: outputs of ``base``.
            input_dtype: of the records.
        """


@dataclass(frozen=True)
class Recipe:
    """Both ends of one algorithm.

    Attributes:
        strategy: ``strategy(**shell) -> RuleStrategy``, where ``shell`` are the keyword arguments
            that all strategies share.
        client: registry name of the client (``metabloom.clients.CLIENTS``): by name, since
            strategies do not import clients.
        client_options: keyword arguments of that client beyond those that all clients share.
        needs: keyword arguments of ``strategy`` that the server makes from the configuration:
            "models" (the module of each architecture), "public" (the public records),
            "num_classes" (of the data set).
        client_needs: keyword arguments of the client that its node makes from the configuration:
            "public".
        more_arrays: ``more_arrays(model)`` gives what is learned beside a model's own arrays, as it
            is at first; None: nothing.
        network: what both ends build in the place of the configured model; None: that model.

    A recipe reads what it needs of the configuration when it is called (``partial``, no lambda):
    keys that it does not read are reported to the user as without effect.
    """

    strategy: Callable[..., RuleStrategy]
    client: str
    client_options: Mapping[str, object] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    client_needs: tuple[str, ...] = ()
    more_arrays: Callable[[nn.Module], Arrays] | None = None
    network: Network | None = None


STRATEGIES: Registry[Callable[[RunConfig], Recipe]] = Registry("strategy")


def weighting_of(config: RunConfig, usual: Weighting) -> Weighting:
    """Return the configured weighting, or the strategy's ``usual`` one where that is "auto".

    Aggregations that ignore the weighting do not read it either: it is then told to be idle.
    """
    if config.aggregation in ("median", "trimmed-mean"):
        return usual
    return usual if config.weighting == "auto" else config.weighting


def aggregation_of(config: RunConfig) -> Aggregation:
    """Return the configured aggregation; it warns, once, where replies are too few."""
    match config.aggregation:
        case "median":
            return _warning_below(3, "median", median())
        case "trimmed-mean":
            beta = config.trim_beta
            needed = math.ceil(1 / beta - 1e-9) if beta else 1  # so that one value is cut
            return _warning_below(needed, f"trimmed-mean, trim-beta {beta:g}", trimmed_mean(beta))
        case "multi-krum":
            f = config.num_malicious
            krum = multi_krum(f, config.num_selected)
            needed = 2 * f + 3 if f else 1
            return _warning_below(needed, f"multi-krum, num-malicious {f}", krum)
        case _:
            return mean


def consensus_by(config: RunConfig) -> dict[str, object]:
    """Return the configured aggregation as the options ``by`` and ``trim`` of a consensus.

    Raises:
        ConfigError: multi-krum, which chooses among updates of models.
    """
    if config.aggregation == "multi-krum":
        raise ConfigError(
            f"aggregation = 'multi-krum' with {config.strategy}: it chooses among models, and here "
            "clients send what they say of public records; use mean, median or trimmed-mean"
        )
    if config.aggregation == "trimmed-mean":
        return {"by": config.aggregation, "trim": config.trim_beta}
    return {"by": config.aggregation}


def _warning_below(needed: int, name: str, aggregate: Aggregation) -> Aggregation:
    """Return ``aggregate``, which logs a warning the first time that it gets too few replies."""
    told = False

    def warning(sent: NamedArrays, replies: Sequence[Reply], weighting: Weighting) -> Arrays:
        nonlocal told
        n = len(replies)
        if n < needed and not told:
            told = True
            log(WARNING, "%s: %d replies, it takes %d to resist a bad one", name, n, needed)
        return aggregate(sent, replies, weighting)

    return warning
