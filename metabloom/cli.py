"""The command line: ``metabloom simulate``, ``list``, ``config``, and what has files of its own."""

import json
import logging
import sys
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from . import __version__
from .cli_compare import compare
from .cli_pretrain import pretrain
from .cli_privacy import app as privacy
from .config import RunConfig
from .errors import MetabloomError
from .keys import key_of
from .terminal import given, log_above_the_bar, progress_bar, terminated_as_interrupted

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
    init: Annotated[
        str | None,
        typer.Option(help="Start at trained weights: a results folder, a file, torchvision:NAME."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in that folder.")
    ] = False,
    verbose: Annotated[bool, typer.Option(help="Show Flower's log.")] = False,
) -> None:
    """Run a federation on this machine; write results.json, model.safetensors, report.html."""
    options = {"strategy": strategy, "dataset": dataset, "out": out, "init": init}
    values = given(config, set_, options)
    if resume:
        values["resume"] = True
    run_config = RunConfig.read(values)
    try:
        with terminated_as_interrupted():
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


app.command()(compare)
app.command()(pretrain)


def main() -> None:
    """Run the command line; a user's mistake ends with one message and status 2."""
    try:
        app()
    except MetabloomError as err:
        # Text: brackets and :names: in a message are the user's own, not markup.
        message = Text(str(err))
        Console(stderr=True).print(Text("error:", style="bold red"), message, soft_wrap=True)
        sys.exit(2)


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
    with (
        cohort_grid(config) as grid,
        progress_bar(console) as progress,
        log_above_the_bar(logging.INFO if verbose else logging.WARNING),
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


def _print_interrupted(config: RunConfig) -> None:
    from .server_app import CHECKPOINTS
    from .strategies import Checkpoints

    saved = config.checkpoint_every and Checkpoints(Path(config.out) / CHECKPOINTS).oldest()
    how = "the whole rounds are saved, --resume goes on from them"
    console.print(f"interrupted: {how if saved else 'no round is saved'}")


def _print_outcome(folder: Path) -> None:
    from .sim.report import ending_line, privacy_lines

    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    unseen = results["unseen"]
    table = Table("unseen clients", "accuracy")
    for label, value in (
        ("before adaptation", unseen["accuracy_before"]),
        *((f"after {n} step(s)", value) for n, value in unseen["accuracy_after"].items()),
    ):
        table.add_row(label, "-" if value is None else f"{100 * value:.1f}%")
    console.print(table)
    if line := ending_line(results):
        console.print(Text(f"ended {line}"), soft_wrap=True)
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
