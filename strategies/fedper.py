r"""FedPer (Arivazhagan et al., 1912.00818): a shared body, a head of each client's own.

    (b_i, h_i) <- E epochs of SGD on F_i from (b, h_i)
    b          <- sum_i p_i b_i                           p_i = n_i / sum_S n

h_i is trained with the body and never leaves client i: neither end sends heads. Clients may have
heads of different forms, for different tasks: architectures whose bodies are the same share one
(``shared_part``).

After the last round the clients that trained are scored with their own heads. Of a client that
never trained, the head begins at the model's own seeded one, which all clients began with; its
adaptation moves body and head.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid

from ..architectures import full_name
from ..config import RunConfig
from ..errors import ConfigError
from ..wire import from_record, to_record
from .fedavg import local_sgd
from .recipe import STRATEGIES, Recipe, aggregation_of, weighting_of
from .rules import Aggregation, Weighting, interpolate, mean
from .shared_part import over_groups, with_equal_parts
from .shell import RuleStrategy
from .shell.reports import RunResult
from .shell.resume import EvaluateFn


class FedPer(RuleStrategy):
    """Take the weighted mean of the clients' bodies; heads stay with the clients.

    The arrays of a run are whole models: their heads are those that the run began with, where
    clients without a head of their own begin.

    Args:
        heads: names of the arrays of each architecture's head (``models.is_head``), by the name of
            the architecture, of "" without ``architectures``.
        weighting: "examples" (p_i = n_i / sum n) or "uniform".
        aggregate: how bodies become one: ``mean``, ``median()``, ...
        shell: see ``RuleStrategy``.

    Raises:
        ConfigError: where ``heads`` are not those of ``architectures``, or one is empty.
    """

    scores_training_clients = True
    shares: ClassVar[Literal["body", "head"]] = "body"

    def __init__(
        self,
        *,
        heads: Mapping[str, Collection[str]],
        weighting: Weighting = "examples",
        aggregate: Aggregation = mean,
        **shell: Any,
    ) -> None:
        names = tuple(shell.get("architectures", ()))
        if set(heads) != set(names or ("",)) or not all(heads.values()):
            raise ConfigError(
                f"heads of {', '.join(map(repr, heads))}, architectures {', '.join(names)!r}: "
                "the arrays of each one's head are needed, and without architectures those of ''"
            )
        of_heads = {full_name(kind, name) for kind, own in heads.items() for name in own}
        shares_heads = self.shares == "head"
        rule = interpolate(weighting=weighting, aggregate=aggregate)
        super().__init__(
            replace(
                over_groups(rule, names) if names else rule,
                trains=lambda name: (name in of_heads) is shares_heads,
            ),
            **shell,
        )
        self.weighting = weighting
        self.heads = ", ".join(sorted(of_heads))  # a run that is resumed must have the same
        self._architectures = names

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> RunResult:
        """Run; see ``RuleStrategy.start``. Architectures that share begin with the same part."""
        if self._architectures:
            arrays = from_record(initial_arrays)
            shared = self._kinds.trained(arrays)
            initial_arrays = to_record({**arrays, **with_equal_parts(shared, self._architectures)})
        return super().start(
            grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn
        )


def options(config: RunConfig, kept: str, trained: str = "all") -> dict[str, object]:
    """Return the options of clients that keep a part of the model to themselves."""
    return {**local_sgd(config), "head": config.head, "kept": kept, "trained": trained}


def shared_mean(config: RunConfig) -> dict[str, Any]:
    """Return the options of the strategy that FedPer and its kin share."""
    return {
        "weighting": weighting_of(config, "examples"),
        "aggregate": aggregation_of(config),
    }


@STRATEGIES.register("fedper")
def recipe(config: RunConfig) -> Recipe:
    """Average the bodies; each client's head is trained with its body, and stays."""
    return Recipe(
        strategy=partial(FedPer, **shared_mean(config)),
        client="part",
        client_options=options(config, "head"),
        needs=("heads",),
    )
