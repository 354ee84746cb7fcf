"""The command line: ``metabloom simulate``, ``metabloom list``, ``metabloom config``."""

import json
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from . import __version__
from .cli_privacy import app as privacy
from .config import RunConfig
from .errors import ConfigError, MetabloomError
from .keys import key_of, parse_value

if TYPE_CHECKING:
    from .strategies import RoundReport

app = typer.Typer(
    name="metabloom",
    help="Federated meta-learning on Flower: models that adapt to clients they have never seen.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()
app.add_typer(privacy, name="privacy")


@app.command()
def simulate(
    strategy: Annotated[str | None, typer.Option(help="Registry name of the strategy.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Registry name of the data set.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with configuration keys.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One configuration key; repeatable."),
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder for the results.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in that folder.")
    ] = False,
    verbose: Annotated[bool, typer.Option(help="Show Flower's log.")] = False,
) -> None:
    """Run a federation on this machine; write results.json, model.safetensors, report.html."""
    values = RunConfig.read_toml(config) if config else {}
    values |= dict(_assignment(text) for text in set_ or [])
    chosen = {"strategy": strategy, "dataset": dataset, "out": out}
    values |= {key: value for key, value in chosen.items() if value is not None}
    if resume:
        values["resume"] = True
    run_config = RunConfig.read(values)
    try:
        with _terminated_as_interrupted():
            folder = _run(run_config, verbose=verbose)
    except KeyboardInterrupt:
        _print_interrupted(run_config)
        raise typer.Exit(130) from None
    _print_outcome(folder)


@app.command("list")
def list_names() -> None:
    """List the strategies, data sets and models that have a registry name."""
    from .models import MODELS
    from .sim import DATASETS
    from .strategies import STRATEGIES

    for registry in (STRATEGIES, DATASETS, MODELS):
        console.print(f"[bold]{registry.kind}[/bold]: {', '.join(registry)}")


@app.command("config")
def list_keys() -> None:
    """List every configuration key with its default and what it means."""
    key, default = Column("key", no_wrap=True), Column("default", overflow="fold")
    table = Table(key, default, Column("meaning", overflow="fold"))
    for name, field in RunConfig.model_fields.items():
        table.add_row(key_of(name), repr(field.default), field.description)
    console.print(table)


@app.command()
def version() -> None:
    """Print the version."""
    console.print(__version__)


def main() -> None:
    """Run the command line; a user's mistake ends with one message and status 2."""
    try:
        app()
    except MetabloomError as err:
        # Text: brackets and :names: in a message are the user's own, not markup.
        message = Text(str(err))
        Console(stderr=True).print(Text("error:", style="bold red"), message, soft_wrap=True)
        sys.exit(2)


def _assignment(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ConfigError(f"--set {text!r}: write key=value, e.g. --set rounds=20")
    return key.strip(), parse_value(value.strip())


def _run(config: RunConfig, *, verbose: bool) -> Path:
    """Run ``config`` on a grid with a node for each client; return the folder of the results."""
    # Torch takes seconds to import: only the command that computes pays for it.
    from .server_app import run
    from .simulation import as_carried_out, cohort_grid
    from .task import federation_of, idle_keys, models_of, recipe_of

    config = as_carried_out(config)
    recipe_of(config), models_of(config)  # refuse before data are read
    for key in idle_keys(config):
        console.print(f"{key} has no effect under {config.strategy}")
    federation = federation_of(config)
    if federation.dropped:
        console.print(f"{federation.dropped} clients are too small for the split and left out")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        cohort_grid(config) as grid,
        Progress(
            *columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console
        ) as progress,
        _log_above_the_bar(logging.INFO if verbose else logging.WARNING),
    ):
        console.print(f"workers: {grid.workers}, kernel: {config.kernel}")
        label = f"{config.strategy} on {config.dataset}"
        bar = progress.add_task(label, total=config.rounds, note="")
        metric = f"accuracy-after-{config.adaptation_steps[-1]}"

        def advance(report: "RoundReport") -> None:
            scores = [one.metrics[metric] for one in report.validation if metric in one.metrics]
            if scores:
                progress.update(bar, note=f"validation {100 * fmean(scores):.1f}%")
            progress.update(bar, completed=report.round)

        return run(grid, config, on_round=advance)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C: the last whole round is saved, and the process ends."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_interrupted(config: RunConfig) -> None:
    from .server_app import CHECKPOINTS
    from .strategies import Checkpoints

    saved = config.checkpoint_every and Checkpoints(Path(config.out) / CHECKPOINTS).oldest()
    how = "the whole rounds are saved, --resume goes on from them"
    console.print(f"interrupted: {how if saved else 'no round is saved'}")


@contextmanager
def _log_above_the_bar(level: int) -> Iterator[None]:
    """Let Flower's log through from ``level`` on.

    Its handler writes to the stderr that there was when it was imported; the bar redirects today's.
    """
    logger = logging.getLogger("flwr")
    logger.setLevel(level)
    handlers = [one for one in logger.handlers if isinstance(one, logging.StreamHandler)]
    streams = [handler.stream for handler in handlers]
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler, stream in zip(handlers, streams, strict=True):
            handler.setStream(stream)


def _print_outcome(folder: Path) -> None:
    from .sim.report import privacy_lines

    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    unseen = results["unseen"]
    table = Table("unseen clients", "accuracy")
    for label, value in (
        ("before adaptation", unseen["accuracy_before"]),
        *((f"after {n} step(s)", value) for n, value in unseen["accuracy_after"].items()),
    ):
        table.add_row(label, "-" if value is None else f"{100 * value:.1f}%")
    console.print(table)
    for line in privacy_lines(results):
        console.print(Text(line), soft_wrap=True)
    bad = []
    for fate, label in (("failures", "failed"), ("quarantined", "were quarantined")):
        found = [one for entry in (*results["history"], unseen) for one in entry[fate]]
        if found:
            first = f"{found[0]['client']}: {found[0]['reason']}"
            console.print(Text(f"{len(found)} replies {label}; the first: {first}"), soft_wrap=True)
        bad += found
    if results["skipped"]:
        console.print(f"{results['skipped']} rounds were skipped for want of good replies")
    if any("NaN" in one["reason"] for one in bad):
        console.print("NaN or infinity in replies: lower the learning rates")
    models = ", ".join(sorted(file.name for file in folder.glob("model*.safetensors")))
    where = Text(f"results: {folder}/results.json, {models}, report.html")
    console.print(where, soft_wrap=True)
