"""Where and how much the distillation benchmark measures, and what all of its rows do."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distillation_page import Line, line_of
from distillation_runs import Found, Runs, Settings, quality, sized

Accuracy = Callable[[Sequence[Found]], Mapping[str, list[float]]]


@dataclass(frozen=True)
class Setting:
    """Where and how much is measured.

    Attributes:
        runs: what runs configurations.
        seeds: of the runs that are shown.
        quick: tiny sizes, nothing that means anything: for tests.
    """

    runs: Runs
    seeds: tuple[int, ...] = (0, 1, 2)
    quick: bool = False

    def sized(self, settings: Settings) -> dict[str, Any]:
        """Return settings in the size that is measured; a tuple is an axis of a grid."""
        return sized(settings, quick=self.quick)

    def chosen(
        self,
        methods: Mapping[str, Settings],
        better: Callable[[Found], float] | Mapping[str, Callable[[Found], float]] = quality,
    ) -> dict[str, dict[str, Any]]:
        """Return the best point of each method's grid by validation; see ``Runs.chosen``."""
        return self.runs.chosen({k: self.sized(v) for k, v in methods.items()}, better)

    def started(self, settings: Settings) -> "Started":
        """Start the runs of all seeds with settings that are sized already."""
        return Started(self, dict(settings))


class Started:
    """The runs of one line, which may not be over.

    Args:
        setting: whose seeds they have.
        settings: of each.
    """

    def __init__(self, setting: Setting, settings: dict[str, Any]) -> None:
        self.settings = settings
        self._waiting = [setting.runs.submit(settings, seed) for seed in setting.seeds]

    @property
    def found(self) -> list[Found]:
        """What they found, seed by seed; waits for them."""
        return [one.result() for one in self._waiting]

    def line(
        self,
        what: str,
        method: Settings,
        accuracy: Accuracy,
        figures: Accuracy | None = None,
    ) -> Line:
        """Return their line; waits for them.

        Args:
            what: see ``Line``.
            method: the grid from which the settings were chosen.
            accuracy: of what they found.
            figures: likewise.
        """
        found = self.found
        shown = figures(found) if figures else {}
        return line_of(what, method, self.settings, accuracy(found), found, figures=shown)


def by_architecture(found: Sequence[Found]) -> dict[str, list[float]]:
    """Return the accuracy of each architecture's global model on the test images."""
    return {name: [one["unseen"][name] for one in found] for name in found[0]["unseen"]}


def of_one_model(found: Sequence[Found]) -> dict[str, list[float]]:
    """Return the accuracy of the global model on the test images."""
    return {"accuracy": [one["unseen"][""] for one in found]}


def of_personal_models(found: Sequence[Found]) -> dict[str, list[float]]:
    """Return the mean accuracy of the training clients' own models on the test images."""
    return {
        "accuracy": [
            sum(client["unseen"] for client in one["personal"].values()) / len(one["personal"])
            for one in found
        ]
    }


def megabytes(found: Sequence[Found]) -> dict[str, list[float]]:
    """Return the MB of arrays that went up and down in training, over all rounds.

    They are of runs without validation, which would be counted too.
    """
    return {
        "MB up": [sum(one["bytes_up"]) / 1e6 for one in found],
        "MB down": [sum(one["bytes_down"]) / 1e6 for one in found],
    }
