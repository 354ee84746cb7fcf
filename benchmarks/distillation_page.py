"""Lines and verdicts of the distillation benchmark, and its page as Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any

from distillation_runs import Settings, axes_of

TITLE = "# What distillation between clients is worth"
COMMAND = "`python benchmarks/distillation.py --data-root DATA`"


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
        what: the method and where it ran.
        accuracy: column -> accuracy with each seed, in [0, 1].
        figures: column -> other numbers with each seed, in the unit that the column names.
        settings: of its runs, keys of ``metabloom simulate --set``.
        grid: the axes within which its settings were chosen.
        seconds: of the processor, for each run.
    """

    what: str
    accuracy: Mapping[str, Sequence[float]]
    figures: Mapping[str, Sequence[float]] = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    seconds: Sequence[float] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the line as a dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """One comparison of two lines, seed by seed.

    Attributes:
        what: the comparison, e.g. "mnist: FedDF minus FedAvg".
        figures: column -> its figure with each seed.
        bar: what the mean of every column has to reach; None: only shown.
        unit: of the figures.
        note: what else is to be said.
    """

    what: str
    figures: Mapping[str, Sequence[float]]
    bar: float | None = None
    unit: str = "points"
    note: str = ""

    @property
    def said(self) -> str:
        """Return "reached", "MISSED", or nothing where there is no bar."""
        if self.bar is None:
            return ""
        least = min(fmean(values) for values in self.figures.values())
        return "reached" if least >= self.bar else "MISSED"

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as a dictionary."""
        return {**asdict(self), "verdict": self.said}


def line_of(
    what: str,
    method: Settings,
    settings: Settings,
    accuracy: Mapping[str, Sequence[float]],
    found: Sequence[Mapping[str, Any]],
    **others: Any,
) -> Line:
    """Return the line of a method with its chosen settings.

    Args:
        what: see ``Line``.
        method: its grid.
        settings: the point that was chosen.
        accuracy: see ``Line``.
        found: its runs, one for each seed.
        others: further attributes.
    """
    seconds = [one["seconds"] for one in found]
    grid = axes_of(method)
    return Line(what, accuracy, settings=settings, grid=grid, seconds=seconds, **others)


def minus(
    what: str, one: Line, other: Line, *, bar: float | None = None, note: str = ""
) -> Verdict:
    """Return by how many points ``one`` is above ``other`` in each column that both have."""
    gains = {
        column: [
            100 * (ours - theirs)
            for ours, theirs in zip(values, other.accuracy[column], strict=True)
        ]
        for column, values in one.accuracy.items()
        if column in other.accuracy
    }
    return Verdict(what, gains, bar, note=note)


def page_of(rows: Mapping[str, Mapping[str, Any]], about: Mapping[str, tuple[str, str]]) -> str:
    """Return the page of ``rows`` as distillation.json holds them.

    Args:
        rows: name -> machine, lines, verdicts.
        about: name -> title and text, in the order of the page.
    """
    lines = [TITLE, "", COMMAND, "", ABOUT]
    for name, (title, text) in about.items():
        if name not in rows:
            continue
        row = rows[name]
        lines += ["", f"## {title}", "", f"`--rows {name}`. {machine_of(row['machine'])}"]
        lines += ["", text, "", *_table(row["lines"]), "", *map(_verdict, row["verdicts"])]
    return "\n".join(lines) + "\n"


ABOUT = (
    "Accuracy in %, mean ± standard deviation over seeds, without adaptation, on all test images "
    "of the data set, whose classes are balanced, unless a row says otherwise. Seeds change the "
    "division of the data, the initial weights and the sampling. Settings were chosen on the "
    "validation clients (images that nobody trains on) of seed 0 alone, within the grids that "
    "stand beside what was chosen; the methods of a comparison had as many tries each. Seconds "
    "are the processor's, for one run. Lines that lose are shown like those that win. "
    "`distillation.json` has all keys of each line, for `metabloom simulate --set`, with "
    "`benchmarks` in `PYTHONPATH` for the plug-in `distillation_data`."
)


def _table(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    accuracies = list(dict.fromkeys(column for one in lines for column in one["accuracy"]))
    figures = list(dict.fromkeys(column for one in lines for column in one["figures"]))
    head = ["", *accuracies, *figures, "seconds", "seeds", "chosen"]
    table = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for one in lines:
        cells = [one["what"]]
        cells += [_cell(one["accuracy"].get(column), 100) for column in accuracies]
        cells += [_cell(one["figures"].get(column)) for column in figures]
        cells += [f"{fmean(one['seconds']):.0f}" if one["seconds"] else "-"]
        cells += [str(len(next(iter(one["accuracy"].values())))), _chosen(one)]
        table.append("| " + " | ".join(cells) + " |")
    return table


def _verdict(one: Mapping[str, Any]) -> str:
    shown = "; ".join(
        f"{f'{column} ' if column else ''}{_cell(values)}"
        for column, values in one["figures"].items()
    )
    text = f"- {one['what']}: {shown} {one['unit']}."
    if one["bar"] is not None:
        text += f" At least {one['bar']:g} wanted: {one['verdict']}."
    return f"{text} {one['note']}".rstrip()


def _chosen(line: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {line['settings'][key]} of {{{', '.join(map(str, axis))}}}"
        for key, axis in line["grid"].items()
    )


def _cell(values: Sequence[float] | None, times: float = 1.0) -> str:
    if not values:
        return "-"
    spread = f" ± {times * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{times * fmean(values):.1f}{spread}"


def machine_of(found: Mapping[str, Any]) -> str:
    """Return the machine in words."""
    return (
        f"{found['cores']} CPU cores ({found['processor']}), {found['memory_gb']} GB; Python "
        f"{found['python']}, torch {found['torch']}, flwr {found['flwr']}; one thread a run."
    )
