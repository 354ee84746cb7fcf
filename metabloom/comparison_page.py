"""What a comparison writes: compare.json and compare.md, of values alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .comparison import (
    BEFORE,
    Method,
    Spread,
    accuracy_of,
    clients_of,
    columns_of,
    own_models_of,
)
from .keys import Scalar
from .tuning import Budget, Settings, on_edge


@dataclass(frozen=True)
class Comparison:
    """What compare.json, compare.md and compare.html tell.

    Attributes:
        dataset: registry name.
        command: that does it again.
        budget: of each run.
        tune_budget: of each try.
        tuning_seed: of the tries.
        seeds: of the runs of the chosen settings.
        machine: in words.
        version: of metabloom.
        settings: what the user set for all methods.
        methods: in the order that the user gave.
    """

    dataset: str
    command: str
    budget: Budget
    tune_budget: Budget
    tuning_seed: int
    seeds: Sequence[int]
    machine: str
    version: str
    settings: Mapping[str, Scalar]
    methods: Sequence[Method]

    def data(self) -> dict[str, Any]:
        """Return the content of compare.json."""
        return {
            "version": self.version,
            "dataset": self.dataset,
            "command": self.command,
            "machine": self.machine,
            "budget": str(self.budget),
            "tune_budget": str(self.tune_budget),
            "tuning_seed": self.tuning_seed,
            "seeds": list(self.seeds),
            "settings": dict(self.settings),
            "methods": [_method(one) for one in self.methods],
        }

    def page(self) -> str:
        """Return compare.md."""
        return "\n".join([*self._head(), *self._table(), *self._choices(), *self._limits(), ""])

    def _head(self) -> list[str]:
        first = next(iter(self.methods[0].runs.values()))
        counts = ", ".join(f"{count} {role}" for role, count in first["clients"].items())
        common = ", ".join(f"`{key}={value}`" for key, value in self.settings.items())
        tries = len(self.methods[0].tries)
        own = "" if self.tune_budget == self.budget else f" with a budget of {self.tune_budget}"
        return [
            f"# {self.dataset}: {', '.join(one.strategy for one in self.methods)}",
            "",
            f"`{self.command}`",
            "",
            f"{self.machine}; metabloom {self.version}. Every run had the budget {self.budget}, "
            f"on clients {counts}{f'; for all {common}' if common else ''}. Each method had "
            f"{_some(tries, 'try', 'tries')}{own}, judged on the validation clients of seed "
            f"{self.tuning_seed} alone; the chosen setting ran with "
            f"{'seeds' if len(self.seeds) > 1 else 'seed'} {', '.join(map(str, self.seeds))}, and "
            "the unseen clients scored it once. Accuracy in %, each client counting once: mean ± "
            "standard deviation over seeds. *As chosen* is after the number of adaptation steps "
            "that the validation clients of the tries did best with, none among them, and the 10th "
            "percentile is of the clients of all seeds after so many. Bytes of arrays that "
            "training exchanged, down and up, and seconds of all rounds, validation among them, "
            "for one run.",
            "",
        ]

    def _table(self) -> list[str]:
        """Return the rows; what training clients keep has a column where any of them keep some."""
        columns = columns_of(next(iter(self.methods[0].runs.values())))
        keep = any(run.get("trained") for one in self.methods for run in one.runs.values())
        titles = [*map(name_of, columns), "as chosen", "steps"]
        titles += ["10th percentile", *(["own models", "own, adapted"] if keep else [])]
        titles += ["MB", "seconds", "rounds"]
        lines = [f"| strategy | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
        for method in self.methods:
            found = method.summary
            cells = [cell_of(Spread(**found["accuracy"][column])) for column in columns]
            cells += [cell_of(Spread(**found["accuracy"][found["steps"]])), steps_of(found)]
            low = found["tenth_percentile"]
            cells.append("-" if low is None else f"{100 * low:.1f}")
            own = [found["own_models"][column] for column in (BEFORE, columns[-1])]
            cells += [cell_of(Spread(**one)) for one in own] if keep else []
            cells += [f"{found['bytes'] / 1e6:.2f}", f"{found['seconds']:.1f}"]
            lines.append(f"| `{method.strategy}` | {' | '.join(cells)} | {found['rounds']:g} |")
        if keep:
            back = bool(self.settings.get("held-back"))
            lines += ["", OWN_MODELS.format(HELD_BACK if back else PERHAPS_SEEN)]
        return lines

    def _choices(self) -> list[str]:
        lines = ["", "| strategy | chosen | on validation | tried of |", "|---|---|---|---|"]
        for one in self.methods:
            grid = "; ".join(f"{key} {_listed(values)}" for key, values in one.grid.items())
            accuracy = one.chosen.validation.accuracy
            told = "-" if accuracy is None else f"{100 * accuracy:.1f}"
            lines.append(
                f"| `{one.strategy}` | {settings_text(one.chosen.settings)} | {told} | {grid} |"
            )
        return lines

    def _limits(self) -> list[str]:
        notes = []
        edges = {one.strategy: on_edge(one.chosen.settings, one.grid) for one in self.methods}
        told = [f"`{name}` ({', '.join(keys)})" for name, keys in edges.items() if keys]
        if told:
            notes.append(
                f"On the edge of its grid lies what was chosen for {', '.join(told)}: a wider grid "
                "may do better."
            )
        for one in self.methods:
            if skipped := sum(run["skipped"] for run in one.runs.values()):
                notes.append(f"`{one.strategy}` skipped {_some(skipped, 'round', 'rounds')}.")
        if any(key.startswith(("privacy.", "user-privacy.")) for key in self.settings):
            runs = sum(len(one.tries) + len(one.runs) for one in self.methods)
            notes.append(
                f"Privacy is accounted for each run by itself: what all {runs} runs tell together "
                "is more."
            )
        notes.append(
            "Roles are drawn by the seed where the data set does not fix them: a client that is "
            "unseen under one seed may have validated under the seed of the tries."
        )
        return ["", " ".join(notes)]


OWN_MODELS = (
    "*Own models* are what training clients have at the end, scored by them: models that they keep "
    "for themselves, else the shared one, as they are and *adapted* by the most steps. These are "
    "other clients than the unseen ones, and {}. They say how well clients that train are served, "
    "not how a method does on new ones."
)
HELD_BACK = "they score by records that were held back from all training"
PERHAPS_SEEN = "where the method trains on all records of a client, records that the model has seen"


def steps_of(found: Mapping[str, Any]) -> str:
    """Return the chosen number of adaptation steps of a method's summary.

    >>> steps_of({"steps": "before"}), steps_of({"steps": "5"})
    ('0', '5')
    """
    return "0" if found["steps"] == BEFORE else str(found["steps"])


def name_of(column: str) -> str:
    """Return the title of a column.

    >>> name_of("before"), name_of("1"), name_of("5")
    ('before', 'after 1 step', 'after 5 steps')
    """
    return column if column == BEFORE else f"after {_some(int(column), 'step', 'steps')}"


def cell_of(spread: Spread) -> str:
    """Return a mean and a deviation in per cent.

    >>> cell_of(Spread(0.5, 0.01)), cell_of(Spread(0.5, None)), cell_of(Spread(None, None))
    ('50.0 ± 1.0', '50.0', '-')
    """
    if spread.mean is None:
        return "-"
    return f"{100 * spread.mean:.1f}" + ("" if spread.sd is None else f" ± {100 * spread.sd:.1f}")


def settings_text(settings: Settings) -> str:
    """Return a setting in words, keys as users write them."""
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "the defaults"


def _method(one: Method) -> dict[str, Any]:
    return {
        "strategy": one.strategy,
        "fixed": dict(one.fixed),
        "grid": {key: list(values) for key, values in one.grid.items()},
        "tries": [
            {"settings": dict(each.settings), "folder": each.folder, **vars(each.validation)}
            for each in one.tries
        ],
        "chosen": dict(one.chosen.settings),
        **one.summary,
        "runs": [
            {
                "seed": seed,
                "folder": one.folders[seed],
                "accuracy": {name: accuracy_of(run, name) for name in columns_of(run)},
                "clients": clients_of(run, one.chosen.validation.steps),
                "own_models": {name: own_models_of(run, name) for name in columns_of(run)},
                "bytes": run["bytes_training"],
                "seconds": run["seconds"],
                "rounds": len(run["history"]),
                "ended": run.get("ending", {}).get("reason", ""),
            }
            for seed, run in one.runs.items()
        ],
    }


def _listed(values: Sequence[Scalar]) -> str:
    return ", ".join(map(str, values))


def _some(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"
