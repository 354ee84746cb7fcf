"""New groups of clients: federated rounds from a fresh start, FedAvg's, and meta-learned ones.

    python benchmarks/groups.py --data-root DATA

Groups name digits each in its own way (``groups_data``). A start is trained over the training
groups; then each new group, by itself, runs rounds of FedAvg from it over its members' support
sets, and its members are scored on their query sets after each few rounds. Everything is chosen on
the new groups that prove, with seed 0 alone: a point of a start's grid by their accuracy after
``CHOSEN_AT`` rounds, and the learning rate of those rounds beside it (for a fresh start by its
accuracy after ``GOAL`` rounds). The chosen settings then run with seeds 1, 2 and 3.
"""

import json
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import numpy as np
import typer

Settings = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]
Curve = dict[str, float]  # rounds of a new group -> mean accuracy of its members

ROUNDS = (1, 2, 3, 5, 10, 20)  # after which new groups are scored
CHOSEN_AT, GOAL = 5, 20
TUNING_SEED, SEEDS = 0, (1, 2, 3)
NEW_RATES = (0.1, 0.3, 1.0)  # of the local steps in a new group
FRESH = "a fresh start"
COMMON: Settings = {
    "plugins": "groups_data",
    "dataset": "renamed-digits",
    "model": "mlp",
    "model-args": "hidden=64",
    "batch-size": 10,
    "clients-per-round": 15,
    "eval-every": 0,
    "kernel": "vmap",
    "workers": 0,
    "device": "cpu",
}
NEW: Settings = {"strategy": "group-reptile", "local-epochs": 1}  # a new group's own rounds
# Each has 300 exchanges (rounds x exchanges of a round) with as many clients. A tuple is an axis of
# the grid; all have six points.
STARTS: dict[str, Settings] = {
    "FedAvg": {
        "strategy": "fedavg",
        "rounds": 300,
        "local-lr": (0.1, 0.3, 1.0),
        "local-epochs": (1, 3),
    },
    "group Reptile": {
        "strategy": "group-reptile",
        "rounds": 60,
        "group-rounds": 5,
        "local-epochs": (1, 3),
        "local-lr": (0.3, 1.0, 3.0),
        "reptile-epsilon": 1.0,
    },
    "group MAML": {
        "strategy": "group-maml",
        "group-adapt": "group",
        "rounds": 100,
        "inner-steps": 1,
        "split": "fresh",
        "inner-lr": (0.3, 1.0, 3.0),
        "outer-lr": (0.003, 0.01),
    },
}
QUICK: Settings = {
    "rounds": 2,
    "dataset-args": "training=2 new=1 members=2 support=6 query=5",
    "clients-per-round": 4,
}
TOP = (
    "# New groups of clients, from four starts",
    "",
    "`python benchmarks/groups.py --data-root DATA`",
    "",
    "A group is five clients that call five of MNIST's digits by names of their own: one "
    "group's 0 is another's 3. 24 groups train. Each of 6 new groups then runs rounds of "
    "FedAvg by itself, one local epoch on 20 images of each member, and its members are "
    "scored on 20 further images each. MLP of 64 units on 14 x 14 pixels. Trained starts had "
    "300 exchanges with 15 clients and six points of settings each. Points, and the learning "
    "rate of the new groups' rounds, were chosen within the grids that stand beside them, on 6 "
    f"other groups of seed 0, by accuracy after {CHOSEN_AT} rounds, and for {FRESH} after {GOAL}. "
    "Accuracy in %, mean ± standard deviation "
    "over seeds 1, 2 and 3, which change groups, images and initial weights. Seconds are the "
    "processor's, for one start. Lines that lose are shown like those that win. The grids were "
    "widened once, as the best points stood at their ends: upwards for all, and by local epochs "
    "for group Reptile, which had three further points with reptile-epsilon 0.3, none as good.",
    "",
)


def grid_of(method: Settings) -> list[dict[str, Any]]:
    """Return every point of a grid; a tuple is an axis."""
    axes = {key: value if isinstance(value, tuple) else (value,) for key, value in method.items()}
    return [dict(zip(axes, point, strict=True)) for point in product(*axes.values())]


class Bench:
    """Trains starts and runs new groups from them.

    Args:
        data_root: folder of data sets.
        more: settings that come after all others.
    """

    def __init__(self, data_root: Path, more: Settings) -> None:
        self._root, self._more = data_root, more
        self.is_quick = bool(more)
        self.rates = NEW_RATES[:1] if more else NEW_RATES

    def _config(self, settings: Settings, seed: int, *, proving: bool = False) -> Any:
        from metabloom.config import RunConfig
        from metabloom.simulation import as_carried_out

        keys = {**COMMON, **settings, "data-root": str(self._root), "seed": seed}
        keys |= {key: value for key, value in self._more.items() if key in keys}
        options = f"{self._more.get('dataset-args', '')} proving={int(proving)}"
        return as_carried_out(RunConfig.read({**keys, "dataset-args": options.strip()}))

    def _run(self, config: Any, arrays: Arrays, rounds: int) -> Any:
        from metabloom.simulation import cohort_grid
        from metabloom.task import recipe_of
        from metabloom.wire import to_record

        strategy = recipe_of(config).strategy(
            seed=config.seed,
            clients_per_round=config.clients_per_round,
            eval_every=0,
            min_train_nodes=1,
            min_evaluate_nodes=1,
            min_available_nodes=1,
        )
        with cohort_grid(config) as grid:
            result = strategy.start(grid, to_record(arrays), num_rounds=rounds)
        failed = [*result.final_failures, *(one for r in result.rounds for one in r.failures)]
        if failed or any(report.skipped for report in result.rounds):
            raise RuntimeError(f"{config.strategy}: a run that is whole is needed; {failed[:3]}")
        return result

    def start(self, settings: Settings | None, seed: int) -> Arrays:
        """Return a trained start, or without settings the initial weights of the seed."""
        from metabloom.task import initial_arrays
        from metabloom.wire import from_record

        config = self._config(settings or NEW, seed)
        arrays = initial_arrays(config)
        if not settings:
            return arrays
        return from_record(self._run(config, arrays, config.rounds).arrays)

    def curve(
        self, arrays: Arrays, rate: float, seed: int, *, proving: bool, last: int = GOAL
    ) -> Curve:
        """Return the mean accuracy of new groups after their own rounds from ``arrays``."""
        rounds = [n for n in ROUNDS if n <= last]
        steps = {"eval-steps": ",".join(map(str, rounds))}
        config = self._config({**NEW, **steps, "local-lr": rate}, seed, proving=proving)
        scores = self._run(config, arrays, 0).unseen
        names = {"0": "accuracy-before", **{str(n): f"accuracy-after-{n}" for n in rounds}}
        return {n: fmean(one.metrics[name] for one in scores) for n, name in names.items()}


def chosen(bench: Bench, name: str, points: Sequence[Settings | None]) -> dict[str, Any]:
    """Return the best point of a start and rate of its new groups, by the proving groups."""
    by = GOAL if name == FRESH else CHOSEN_AT
    found = []
    for point in points:
        arrays = bench.start(point, TUNING_SEED)
        for rate in bench.rates:
            curve = bench.curve(arrays, rate, TUNING_SEED, proving=True, last=by)
            found.append({"settings": point or {}, "rate": rate, "validation": curve})
    return max(found, key=lambda one: one["validation"][str(by)])


def measured(bench: Bench, name: str, method: Settings | None) -> dict[str, Any]:
    """Return a start's row: what was chosen, and its curve with each seed."""
    points = grid_of(method) if method else [None]
    best = chosen(bench, name, points[:1] if bench.is_quick else points)
    curves, seconds = [], []
    for seed in SEEDS:
        begin = time.process_time()
        arrays = bench.start(best["settings"] or None, seed)
        seconds.append(time.process_time() - begin)
        curves.append(bench.curve(arrays, best["rate"], seed, proving=False))
    return {"start": name, **best, "curves": curves, "seconds": seconds}


def reached_after(curve: Curve, goal: float) -> int | None:
    """Return the first number of rounds whose accuracy is at least ``goal``; None: never.

    >>> reached_after({"0": 0.2, "1": 0.5, "5": 0.9}, 0.8)
    5
    """
    return next((int(n) for n, accuracy in curve.items() if accuracy >= goal), None)


def verdict_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[int | None]]:
    """Return, by start, after how many rounds each seed is where a fresh start ends."""
    goals = [curve[str(GOAL)] for row in rows if row["start"] == FRESH for curve in row["curves"]]
    return {
        row["start"]: [reached_after(c, g) for c, g in zip(row["curves"], goals, strict=True)]
        for row in rows
    }


def page_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table as Markdown."""
    columns, reached = ["0", *map(str, ROUNDS)], verdict_of(rows)
    heads = ["start", "before", *(f"{n} round{'s' * (n > 1)}" for n in ROUNDS), "chosen", "seconds"]
    lines = [*TOP, f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [spread([curve[n] for curve in row["curves"]]) for n in columns]
        axes = {k: v for k, v in STARTS.get(row["start"], {}).items() if isinstance(v, tuple)}
        found = {**row["settings"], "rate in a new group": row["rate"]}
        told = [
            f"{key} {found[key]} of {{{', '.join(map(str, values))}}}"
            for key, values in {**axes, "rate in a new group": NEW_RATES}.items()
            if key in found
        ]
        seconds = f"{fmean(row['seconds']):.0f}"
        lines.append(f"| {row['start']} | {' | '.join([*cells, ', '.join(told), seconds])} |")
    lines += ["", f"Rounds to where {FRESH} is after {GOAL}, by seed:", ""]
    for name, after in reached.items():
        said = [", ".join("never" if n is None else str(n) for n in after)]
        if name.startswith("group"):
            fast = all(n is not None and n <= CHOSEN_AT for n in after)
            said.append(f"at most {CHOSEN_AT} wanted: {'reached' if fast else 'MISSED'}")
        lines.append(f"- {name}: {'; '.join(said)}")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "flwr"))
    lines += ["", f"Python {platform.python_version()}, {packages}; one thread."]
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation in %.

    >>> spread([0.5, 0.6])
    '55.0 ± 7.1'
    """
    return f"{100 * fmean(values):.1f} ± {100 * stdev(values):.1f}"


def main(
    data_root: Annotated[Path | None, typer.Option(help="Folder; METABLOOM_DATA, ./data.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the table.")] = Path("benchmarks/results"),
    *,
    quick: Annotated[bool, typer.Option(help="A size that means nothing.")] = False,
) -> None:
    """Choose on the groups that prove, run three seeds, write the table."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import flwr  # noqa: F401  # sets the level when it is imported
    import torch

    from metabloom.config import data_folder

    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    bench = Bench((data_root or data_folder()).resolve(), QUICK if quick else {})
    methods: dict[str, Settings | None] = {FRESH: None, **STARTS}
    rows = []
    for name, method in methods.items():
        rows.append(measured(bench, name, method))
        print(name, rows[-1], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "groups.json").write_text(json.dumps(rows, indent=1) + "\n")
    (out / "groups.md").write_text(page_of(rows))
    print(page_of(rows))


if __name__ == "__main__":
    typer.run(main)
