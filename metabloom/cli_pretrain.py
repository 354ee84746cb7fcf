"""The command line of pretraining: ``metabloom pretrain``; docs/pretrained.md tells more."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from . import __version__
from .config import RunConfig
from .errors import ConfigError
from .files import check_writable, write_atomic
from .terminal import given, progress_bar

if TYPE_CHECKING:
    from torch import nn

    from .pretraining import Epoch, Pretraining
    from .public import PublicData

console = Console()


def pretrain(
    dataset: Annotated[
        str | None, typer.Option(help="Data set of the federation that is to start there.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Epochs on the public records.")] = 5,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam at first.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Records of a step.")] = 64,
    config: Annotated[Path | None, typer.Option(help="TOML file with configuration keys.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One configuration key; repeatable."),
    ] = None,
    out: Annotated[str, typer.Option(help="Folder for the results.")] = (
        "metabloom-results/pretrained"
    ),
) -> None:
    """Train a model centrally on public records; a run starts there by --init OUT.

    The keys public-data and public-size say which records, model which model.
    """
    # Torch takes seconds to import: only the command that computes pays for it.
    from .pretraining import Pretraining

    run = RunConfig.read({**given(config, set_, {"dataset": dataset}), "out": out})
    how = Pretraining(epochs=epochs, lr=lr, batch_size=batch_size)
    check_writable(Path(out))
    _carried_out(run, how)


def _carried_out(config: RunConfig, how: "Pretraining") -> None:
    """Train as ``config`` and ``how`` say, and write the results."""
    from .pretraining import pretrained
    from .sim.public_sources import load_labelled, usual_kind
    from .streams import torch_seeded, torch_stream
    from .task import device_of, model_for, spec_of

    if config.architectures:
        raise ConfigError(
            f"architectures = {config.architectures!r}: one model is pretrained at a time: give it "
            "as model and model-args, and let the run's architectures start at its folder"
        )
    kind = config.public_data or usual_kind(config.dataset)
    public, records, classes = load_labelled(
        kind,
        spec_of(config),
        size=config.public_size,
        seed=config.seed,
        dataset=config.dataset,
        root=config.data_folder,
        download=config.download,
    )
    model, stream = model_for(config, classes), torch_stream(config.seed, "pretraining")
    with (
        progress_bar(console) as progress,
        torch_seeded(config.seed, "pretraining layers", device=device_of(config)),
    ):
        bar = progress.add_task(f"{kind} for {config.dataset}", total=how.epochs, note="")

        def advance(epoch: "Epoch") -> None:
            note = f"held back {100 * epoch.accuracy:.1f}%"
            progress.update(bar, completed=epoch.number, note=note)

        trained, best = pretrained(
            model, records, how, stream, device=device_of(config), on_epoch=advance
        )
    told = _told(config, how, kind, public, classes, best)
    _write(Path(config.out), trained, told)
    line = f"{len(public)} records of {public.name}, {classes} classes: {100 * best.accuracy:.1f}% "
    line += f"of those held back, after epoch {best.number}"
    console.print(Text(line), soft_wrap=True)
    console.print(Text(f"start there: --init {config.out}"), soft_wrap=True)


def _told(
    config: RunConfig,
    how: "Pretraining",
    kind: str,
    public: "PublicData",
    classes: int,
    best: "Epoch",
) -> dict[str, Any]:
    """Return the content of results.json: the configuration as of a run, and what was done."""
    from .sim.public_sources import source_of

    return {
        "version": __version__,
        "dataset": config.dataset,
        "seed": config.seed,
        "config": config.to_flower(),
        "pretraining": {
            "public_data": kind,
            "dataset": source_of(kind, config.dataset),
            "held_out": len(public) if kind == "held-out" else 0,
            "seed": config.seed,
            "records": len(public),
            "fingerprint": public.fingerprint,
            "classes": classes,
            **vars(how),
            "epoch": best.number,
            "accuracy": best.accuracy,
            "loss": best.loss,
        },
    }


def _write(folder: Path, model: "nn.Module", told: dict[str, Any]) -> None:
    from safetensors.torch import save

    from .sim.results import MODEL, RESULTS

    write_atomic(folder / MODEL, save(dict(model.state_dict())))
    text = json.dumps(told, indent=1, allow_nan=False)
    write_atomic(folder / RESULTS, text.encode())
