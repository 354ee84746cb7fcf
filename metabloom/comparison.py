"""The pure parts of a comparison: which setting is chosen, and the statistics.

A choice sees ``Validation`` alone, which holds nothing of unseen clients.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, quantiles, stdev
from typing import Any

from .errors import MetabloomError
from .tuning import Grid, Settings

Results = Mapping[str, Any]  # the content of results.json

BEFORE = "before"


@dataclass(frozen=True)
class Validation:
    """What the validation clients said of the model that a run leaves: all that a choice sees.

    Attributes:
        accuracy: mean over clients after ``steps``, in [0, 1]; None: untold.
        loss: the same of their loss.
        round: whose model they judged; 0: none was.
        steps: the column that they liked best: "before", or a number of adaptation steps.
    """

    accuracy: float | None = None
    loss: float | None = None
    round: int = 0
    steps: str = BEFORE

    @property
    def order(self) -> tuple[float, float]:
        """Sort key, the greater the better: accuracy, then a lower loss."""
        return (
            -math.inf if self.accuracy is None else self.accuracy,
            -math.inf if self.loss is None else -self.loss,
        )


@dataclass(frozen=True)
class Try:
    """One setting of a method, and how it did.

    Attributes:
        settings: the point of the grid.
        validation: of its run.
        folder: of that.
    """

    settings: Settings
    validation: Validation
    folder: str


@dataclass(frozen=True)
class Method:
    """One method of a comparison.

    Attributes:
        strategy: registry name, with the keys that are the method's own: see ``tuning.Entry``.
        grid: that was searched.
        tries: at the points that were tried, in the order of the grid.
        chosen: the best of them.
        runs: the results of the chosen setting, by seed.
        folders: of these, by seed.
        fixed: keys of its own that are not tuned.
    """

    strategy: str
    grid: Grid
    tries: Sequence[Try]
    chosen: Try
    runs: Mapping[int, Results]
    folders: Mapping[int, str]
    fixed: Settings = field(default_factory=dict)

    @property
    def summary(self) -> dict[str, Any]:
        """The statistics of its runs."""
        return summary_of(list(self.runs.values()), self.chosen.validation.steps)


def validation_of(results: Results) -> Validation:
    """Return what a choice may see of a run: the validation of the model that it leaves.

    That is the best validated one where the run looked for it (``patience``), else the last one;
    where its last rounds were not validated, the last round before them that was. Of the numbers
    of adaptation steps, none among them, it is the one with which these clients do best.
    """
    model_round = results.get("ending", {}).get("model_round")
    validated = [entry for entry in results["history"] if entry["validation"]]
    if model_round is not None:
        validated = [entry for entry in validated if entry["round"] == model_round]
    if not validated:
        return Validation()
    told, number = validated[-1]["validation"], validated[-1]["round"]
    columns = [Validation(told["accuracy_before"], told["loss_before"], number, BEFORE)]
    for steps in sorted(told["accuracy_after"], key=int):
        accuracy, loss = (told[f"{name}_after"][steps] for name in ("accuracy", "loss"))
        columns.append(Validation(accuracy, loss, number, steps))
    return max(columns, key=lambda one: one.order)  # of equal ones the fewest steps


def chosen_of(strategy: str, tries: Sequence[Try]) -> Try:
    """Return the try with the best validation; of equal ones the first.

    Raises:
        MetabloomError: where no validation client said anything of any of them.
    """
    best = max(tries, key=lambda one: one.validation.order)  # the first of equal ones
    if best.validation.order == Validation().order:
        raise MetabloomError(
            f"{strategy}: in none of {len(tries)} tries did validation clients tell an accuracy or "
            "a loss, so no setting can be chosen: lower the rates of --grid where models diverged, "
            "and name privacy.unprotected-metrics where clients are private"
        )
    return best


# -- statistics ------------------------------------------------------------------------------------


def columns_of(results: Results) -> list[str]:
    """Return the columns of a table: "before", then the numbers of adaptation steps."""
    return [BEFORE, *results["unseen"]["accuracy_after"]]


def accuracy_of(results: Results, column: str) -> float | None:
    """Return the mean accuracy of the unseen clients of one run in a column."""
    unseen = results["unseen"]
    value = unseen["accuracy_before"] if column == BEFORE else unseen["accuracy_after"][column]
    return None if value is None else float(value)


def clients_of(results: Results, column: str) -> list[float]:
    """Return the accuracy of each unseen client that told one, in a column."""
    metric = "accuracy-before" if column == BEFORE else f"accuracy-after-{column}"
    told = [one.get(metric) for one in results["unseen"]["per_client"]]
    return [float(value) for value in told if value is not None]


@dataclass(frozen=True)
class Spread:
    """A mean and the sample standard deviation of some numbers; None where there are too few."""

    mean: float | None
    sd: float | None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread":
        """Return the spread of ``values``; of none of them where one is None.

        >>> Spread.of([1.0, 2.0, 3.0]), Spread.of([1.0])
        (Spread(mean=2.0, sd=1.0), Spread(mean=1.0, sd=None))
        """
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return cls(None, None)
        return cls(fmean(known), stdev(known) if len(known) > 1 else None)


def tenth_percentile(values: Sequence[float]) -> float | None:
    """Return what a tenth of ``values`` lie below, linear between neighbours; None of none.

    >>> tenth_percentile([0.0, 10.0]), tenth_percentile([3.0])
    (1.0, 3.0)
    """
    if len(values) < 2:
        return values[0] if values else None
    return quantiles(values, n=10, method="inclusive")[0]


def own_models_of(results: Results, column: str) -> float | None:
    """Return the mean accuracy of training clients' own models in a column; None: untold."""
    trained = results.get("trained")
    if not trained:
        return None
    value = trained["accuracy_before"] if column == BEFORE else trained["accuracy_after"][column]
    return None if value is None else float(value)


def summary_of(runs: Sequence[Results], steps: str) -> dict[str, Any]:
    """Return the statistics of one method over the runs of its chosen setting, one a seed.

    Accuracies are of unseen clients, each client counting once. The 10th percentile is of all
    clients of all seeds.

    Args:
        runs: their results.
        steps: the column that validation clients chose.
    """
    columns = columns_of(runs[0])
    spreads = {name: Spread.of([accuracy_of(run, name) for run in runs]) for name in columns}
    clients = [value for run in runs for value in clients_of(run, steps)]
    return {
        "steps": steps,
        "accuracy": {name: vars(spread) for name, spread in spreads.items()},
        "own_models": {
            name: vars(Spread.of([own_models_of(run, name) for run in runs])) for name in columns
        },
        "tenth_percentile": tenth_percentile(clients),
        "clients": len(clients),
        "bytes": fmean(run["bytes_training"] for run in runs),
        "seconds": fmean(run["seconds"] for run in runs),
        "rounds": fmean(len(run["history"]) for run in runs),
        "skipped": sum(run["skipped"] for run in runs),
    }
