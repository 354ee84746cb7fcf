"""Runs that are done once: each in a folder of its own, which its configuration names.

A finished run is read back and never done again; one that was stopped goes on from its newest
checkpoint.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from logging import getLogger
from pathlib import Path
from typing import Any

from .config import RunConfig
from .errors import ConfigError, MetabloomError
from .server_app import CHECKPOINTS, run
from .sim.results import RESULTS
from .simulation import as_carried_out, cohort_grid
from .strategies import Checkpoints, RoundReport

BUDGET = ("rounds", "max-bytes", "max-seconds")  # a run that is resumed may have more of it


def key_of_run(config: RunConfig) -> str:
    """Return 12 hexadecimal digits that stand for all that decides what a run computes.

    >>> one, other = (RunConfig.read({"rounds": n, "out": "x"}) for n in (1, 2))
    >>> key_of_run(one) == key_of_run(other)
    False
    >>> key_of_run(one) == key_of_run(RunConfig.read({"rounds": 1, "workers": 0}))
    True
    """
    everything = config.to_flower()
    told = {**config.identity(), **{key: everything[key] for key in BUDGET}}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def folder_of(config: RunConfig, root: Path) -> Path:
    """Return the folder of a run under ``root``."""
    return root / f"{config.strategy}-seed{config.seed}-{key_of_run(config)}"


def finished(config: RunConfig, root: Path) -> dict[str, Any] | None:
    """Return the results of a run that is over; None where it is not.

    Raises:
        ConfigError: where a file in the place of its results is none of this run.
    """
    file = folder_of(config, root) / RESULTS
    if not file.exists():
        return None
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        is_its_own = key_of_run(RunConfig.read(results["config"])) == key_of_run(config)
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ConfigError(
            f"{str(file)!r} cannot be read as the results of a run ({type(err).__name__}: {err}): "
            "remove its folder, and the run is done again"
        ) from err
    if not is_its_own:
        raise ConfigError(
            f"{str(file)!r} has the results of another configuration than its folder says: remove "
            "the folder, and the run is done again"
        )
    return results


def run_once(
    config: RunConfig, root: Path, *, on_round: Callable[[RoundReport], None] | None = None
) -> dict[str, Any]:
    """Return the results of a run, which is done, gone on with, or read back.

    A run whose rounds all failed has results too: those of its initial model. The checkpoints of a
    run are removed once it is over.

    Args:
        config: of the run; its ``out`` and ``resume`` are not looked at.
        root: where runs have their folders.
        on_round: called after each round that is played.

    Raises:
        MetabloomError: where it cannot be done.
    """
    if (results := finished(config, root)) is not None:
        return results
    folder = folder_of(config, root)
    begun = Checkpoints(folder / CHECKPOINTS).oldest() > 0
    own = as_carried_out(config.model_copy(update={"out": str(folder), "resume": begun}))
    try:
        with cohort_grid(own) as grid:
            run(grid, own, on_round=on_round)
    except MetabloomError as err:
        if not (folder / RESULTS).exists():
            raise
        getLogger("flwr").warning("%s: %s", folder.name, err)  # where the run logs
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    results = finished(config, root)
    if results is None:
        raise MetabloomError(f"{str(folder)!r} has no results after its run: is the disk full?")
    return results
