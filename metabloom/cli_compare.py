"""The command line of comparisons: ``metabloom compare``.

Each method is tuned on validation clients, all with the same number of tries and the same budget;
what was chosen runs with several seeds, and unseen clients score it. docs/comparing.md tells more.
"""

import json
import logging
import os
import platform
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from . import __version__
from .comparison import BEFORE, Method, Spread, Try, chosen_of, validation_of
from .comparison_page import Comparison, cell_of, settings_text, steps_of
from .config import RunConfig
from .errors import ConfigError
from .files import check_writable, write_atomic
from .keys import Scalar
from .terminal import given, log_above_the_bar, progress_bar, terminated_as_interrupted
from .tuning import Budget, entries_of

if TYPE_CHECKING:
    from .comparison_plan import Plan
    from .strategies import RoundReport

Results = dict[str, Any]
Pending = Callable[[], Results]  # waits for a run, or does it
Submit = Callable[[RunConfig, str], Pending]

console = Console()


def compare(
    strategies: Annotated[
        str,
        typer.Option(
            help="Strategies with commas between them; fedmeta:order=first has a key of its own."
        ),
    ],
    dataset: Annotated[str | None, typer.Option(help="Registry name of the data set.")] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds the chosen settings run with.")] = 3,
    budget: Annotated[
        str, typer.Option(help="Of each run: rounds=50, bytes=5e6 or seconds=60.")
    ] = "rounds=50",
    tune_budget: Annotated[
        str | None, typer.Option(help="Of each try, where it is another: rounds=20, say.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(help='What is tried, e.g. "local-lr=0.01,0.1 fedmeta:outer-lr=0.003".'),
    ] = None,
    tries: Annotated[
        int | None, typer.Option(help="Tries of each method; usual: its smallest grid's points.")
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Runs at once, each in a process with one thread; 1: here.")
    ] = 1,
    config: Annotated[Path | None, typer.Option(help="TOML file with keys for all runs.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One key for all runs; repeatable."),
    ] = None,
    out: Annotated[str, typer.Option(help="Folder for the runs, and for compare.*.")] = (
        "metabloom-results/compare"
    ),
    verbose: Annotated[bool, typer.Option(help="Show Flower's log.")] = False,
) -> None:
    """Tune strategies on validation clients, run the best settings, compare on unseen clients.

    Write compare.json, compare.md and compare.html. The same command again goes on where it was
    stopped; finished runs are never done again.
    """
    entries = entries_of(strategies)
    values = given(config, set_, {"dataset": dataset})
    own = None if tune_budget is None else Budget.of(tune_budget)
    if workers < 1:
        raise ConfigError(f"--workers {workers}: must be at least 1")
    if workers > 1 and str(values.get("workers", 0)) != "0":
        raise ConfigError(
            f"workers = {values['workers']!r} beside --workers {workers}: runs that go on at once "
            "have one process each; leave one of the two out"
        )
    # Torch takes seconds to import: only the command that computes pays for it.
    from .comparison_plan import planned

    plan = planned(
        values,
        entries,
        Budget.of(budget),
        seeds=seeds,
        out=Path(out),
        tune_budget=own,
        grid=grid or [],
        tries=tries,
    )
    for note in plan.notes():
        console.print(Text(note), soft_wrap=True)
    options: dict[str, object] = {"dataset": dataset}
    options["strategies"] = ",".join(one.name for one in entries)
    options |= {"seeds": seeds, "budget": str(plan.budget), "tune-budget": own, "tries": tries}
    options |= {"workers": workers if workers > 1 else None, "config": config}
    command = _command(options, {"grid": grid, "set": set_}, out)
    check_writable(Path(out))
    try:
        with terminated_as_interrupted():
            methods = _carried_out(plan, workers, verbose=verbose)
    except KeyboardInterrupt:
        told = f"interrupted: what is finished lies in {plan.root}, the same command goes on"
        console.print(Text(told), soft_wrap=True)
        raise typer.Exit(130) from None
    keys = {key: {**plan.base, **plan.of_runs}.get(key) for key in (*values, "eval-every")}
    keys["dataset-args"] = plan.base.get("dataset-args")
    common = {k: v for k, v in keys.items() if isinstance(v, Scalar) and k != "dataset"}
    at_once = f", {workers} runs at once" if workers > 1 else ""
    comparison = Comparison(
        dataset=str(plan.base["dataset"]),
        command=command,
        budget=plan.budget,
        tune_budget=plan.tune_budget,
        tuning_seed=plan.tuning_seed,
        seeds=plan.seeds,
        machine=f"{os.cpu_count()} CPU cores ({platform.machine()}), "
        f"Python {platform.python_version()}{at_once}",
        version=__version__,
        settings=common,
        methods=methods,
    )
    _write(comparison, Path(out))
    _print(comparison, Path(out))


def _command(
    options: Mapping[str, object], lists: Mapping[str, Sequence[str] | None], out: str
) -> str:
    """Return the command as a user would write it."""
    words = ["metabloom", "compare"]
    for name, value in options.items():
        words += [f"--{name}", str(value)] if value is not None else []
    for name, values in lists.items():
        words += [word for value in values or () for word in (f"--{name}", value)]
    return shlex.join([*words, "--out", out])


# -- the runs --------------------------------------------------------------------------------------


class _Bar:
    """Lines of progress: runs of the comparison; rounds of the run, where it goes on here."""

    def __init__(self, progress: Progress, runs: int) -> None:
        self._progress = progress
        self._runs = progress.add_task("runs", total=runs, note="")
        self._rounds: TaskID | None = None
        self._metric = ""

    def begin(self, config: RunConfig, what: str) -> None:
        """Show the run that begins."""
        self._metric = f"accuracy-after-{config.adaptation_steps[-1]}"
        total = config.rounds
        self._rounds = self._progress.add_task(f"  {config.strategy}", total=total, note=what)

    def advance(self, report: "RoundReport") -> None:
        """Show a round that was played."""
        if self._rounds is None:
            return
        self._progress.update(self._rounds, completed=report.round)
        told = [one.metrics.get(self._metric) for one in report.validation]
        if scores := [score for score in told if score is not None]:
            note = f"validation {100 * fmean(scores):.1f}%"
            self._progress.update(self._rounds, note=note)

    def end(self) -> None:
        """Count the run as finished."""
        if self._rounds is not None:
            self._progress.remove_task(self._rounds)
            self._rounds = None
        self._progress.advance(self._runs)


def _carried_out(plan: "Plan", workers: int, *, verbose: bool) -> list[Method]:
    level = logging.INFO if verbose else logging.WARNING
    with (
        progress_bar(console) as progress,
        log_above_the_bar(level),
        _player(plan, _Bar(progress, plan.num_runs), workers, level) as submit,
    ):
        return _tuned_and_run(plan, submit)


def _tuned_and_run(plan: "Plan", submit: Submit) -> list[Method]:
    """Submit all tries, and the runs of a method as soon as its tries are done."""
    from .trials import folder_of

    def name(config: RunConfig) -> str:
        return folder_of(config, plan.root).name

    asked: dict[str, list[tuple[RunConfig, Pending]]] = {}
    for entry in plan.entries:
        configs = [plan.config_of_try(entry, one) for one in plan.tries[entry.name]]
        notes = [f"try {number} of {len(configs)}" for number in range(1, len(configs) + 1)]
        pairs = zip(configs, notes, strict=True)
        asked[entry.name] = [(config, submit(config, note)) for config, note in pairs]
    tried, runs = {}, {}
    for entry in plan.entries:
        found = [
            Try(settings, validation_of(wait()), name(config))
            for settings, (config, wait) in zip(
                plan.tries[entry.name], asked[entry.name], strict=True
            )
        ]
        chosen = chosen_of(entry.name, found)
        told = f"{settings_text(chosen.settings)}, of {len(found)} tries"
        console.print(Text(f"{entry.name}: {told}"), soft_wrap=True)
        tried[entry.name] = found, chosen
        of_seed = {seed: plan.config_of_run(entry, chosen.settings, seed) for seed in plan.seeds}
        runs[entry.name] = {
            seed: (config, submit(config, f"seed {seed}")) for seed, config in of_seed.items()
        }
    return [
        Method(
            entry.name,
            plan.grids[entry.name],
            *tried[entry.name],
            runs={seed: wait() for seed, (_, wait) in runs[entry.name].items()},
            folders={seed: name(config) for seed, (config, _) in runs[entry.name].items()},
            fixed=entry.fixed,
        )
        for entry in plan.entries
    ]


@contextmanager
def _player(plan: "Plan", bar: _Bar, workers: int, level: int) -> Iterator[Submit]:
    """Yield what has runs done: here, one after another, or in processes of their own."""
    from .trial_pool import trial_pool
    from .trials import run_once

    def here(config: RunConfig, note: str) -> Pending:
        def play() -> Results:
            bar.begin(config, note)
            try:
                return run_once(config, plan.root, on_round=bar.advance)
            finally:
                bar.end()

        return play

    if workers == 1:
        yield here
        return
    with trial_pool(workers, plan.root, level, on_end=bar.end) as submit:
        yield lambda config, note: submit(config)


# -- what comes out --------------------------------------------------------------------------------


def _write(comparison: Comparison, out: Path) -> None:
    from .sim.compare_report import render_comparison

    write_atomic(out / "compare.html", render_comparison(comparison).encode())
    write_atomic(out / "compare.md", comparison.page().encode())
    text = json.dumps(comparison.data(), indent=1, allow_nan=False)
    write_atomic(out / "compare.json", text.encode())


def _print(comparison: Comparison, out: Path) -> None:
    """Print what fits on a narrow terminal; the page has the other columns."""
    table = Table("unseen clients", box=SIMPLE_HEAD)
    for title in ("before", "as chosen", "steps", "10th %", "MB", "seconds"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in comparison.methods:
        found = one.summary
        told = [cell_of(Spread(**found["accuracy"][name])) for name in (BEFORE, found["steps"])]
        low = found["tenth_percentile"]
        told += [steps_of(found), "-" if low is None else f"{100 * low:.1f}"]
        table.add_row(one.strategy, *told, f"{found['bytes'] / 1e6:.2f}", f"{found['seconds']:.1f}")
    console.print(table)
    where = Text(f"results: {out}/compare.md, compare.json, compare.html")
    console.print(where, soft_wrap=True)
