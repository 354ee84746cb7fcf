"""Omniglot, 5-way 1-shot, unseen alphabets.

Exact MAML against first-order MAML and FedAvg with fine-tuning.

    python benchmarks/omniglot.py --data-root DATA --model mlp     (then --model conv4)

Every method gets the same federations, rounds, clients per round and initial model. Learning rates
are chosen on the VALIDATION clients of seed 0 alone: the grid of training settings below, and for
each trained model the learning rate of adaptation. The chosen settings then run with seeds 1, 2 and
3 (other alphabets, tasks, label permutations and initial weights each), and unseen clients are
scored once. Finished runs are kept in --work, so that a benchmark that was stopped goes on where it
stood.
"""

import hashlib
import json
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

Settings = Mapping[str, Any]
EVAL_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SEEDS = (1, 2, 3)
STEPS = (1, 5)

MODELS: dict[str, Settings] = {
    "mlp": {
        "model": "mlp",
        "model-args": "hidden=64",
        "dataset-args": "image_size=15",
        "rounds": 800,
    },
    "conv4": {
        "model": "conv4",
        "model-args": "width=32",
        "dataset-args": "image_size=28",
        "rounds": 400,
    },
}
META = {"strategy": "fedmeta", "inner-lr": (0.3, 1.0, 3.0), "inner-steps": (1, 5)}
METHODS: dict[str, Settings] = {
    "FedAvg + fine-tuning": {
        "strategy": "fedavg",
        "local-lr": (0.1, 0.3, 1.0),
        "local-epochs": (1, 5),
    },
    "first-order MAML": {**META, "order": "first", "outer-lr": (0.003, 0.01)},
    "exact MAML": {**META, "order": "exact", "outer-lr": (0.003, 0.01)},
}


def settings_of(model: str, method: str) -> list[dict[str, Any]]:
    """Return every point of a method's grid as a flat configuration."""
    fixed = {**MODELS[model], **METHODS[method]}
    axes = {key: value if isinstance(value, tuple) else (value,) for key, value in fixed.items()}
    return [dict(zip(axes, point, strict=True)) for point in product(*axes.values())]


def run_job(settings: dict[str, Any], seed: int, data_root: str, work: str) -> dict[str, Any]:
    """Train once and score every learning rate of adaptation.

    {role: {rate: [before, after 1, after 5]}}.
    """
    key = hashlib.sha256(json.dumps([settings, seed], sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(work) / key
    if (folder / "scores.json").exists():
        return json.loads((folder / "scores.json").read_text())
    import torch
    from safetensors.torch import load_file

    from metabloom.client_app import app
    from metabloom.config import RunConfig
    from metabloom.server_app import run
    from metabloom.sim import CohortGrid
    from metabloom.task import federation_of

    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    config = RunConfig.read(
        {
            **settings,
            "dataset": "omniglot",
            "data-root": data_root,
            "seed": seed,
            "eval-every": 0,
            "out": str(folder),
        }
    )
    grid = CohortGrid(app, num_nodes=len(federation_of(config)), run_config=config.to_flower())
    start = time.perf_counter()
    run(grid, config)
    seconds = time.perf_counter() - start
    params = load_file(folder / "model.safetensors")
    scores = {role: score(config, params, role) for role in ("validation", "unseen")}
    found = {"settings": settings, "seed": seed, "seconds": seconds, **scores}
    (folder / "scores.json").write_text(json.dumps(found))
    return found


def score(config: Any, params: dict[str, Any], role: str) -> dict[str, list[float]]:
    """Return, for each rate, the mean accuracy over the clients of ``role`` before and after each number of steps."""
    from torch.nn.functional import cross_entropy

    from metabloom.clients import adapt, adaptation_curve
    from metabloom.task import federation_of, model_of

    federation, model = federation_of(config), model_of(config)
    table = {}
    for rate in EVAL_RATES:
        curves = []
        for index in federation.indices(role):
            data = federation.client(index)

            def advance(point, steps, support=data.support, rate=rate):
                return adapt(model, cross_entropy, point, support, inner_lr=rate, steps=steps)

            curve = adaptation_curve(
                model, cross_entropy, params, data.query, steps=STEPS, advance=advance
            )
            names = ("accuracy-before", *(f"accuracy-after-{n}" for n in STEPS))
            curves.append([curve[name] for name in names])
        table[str(rate)] = [statistics.fmean(column) for column in zip(*curves, strict=True)]
    return table


def best(runs: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """Return the run and the rate with the best validation accuracy, averaged over after 1 and after 5 steps."""
    points = [(run, rate) for run in runs for rate in run["validation"]]
    return max(points, key=lambda point: statistics.fmean(point[0]["validation"][point[1]][1:]))


def main(
    data_root: Annotated[Path, typer.Option(help="Folder of data sets.")],
    model: Annotated[str, typer.Option(help="mlp or conv4.")] = "mlp",
    work: Annotated[Path, typer.Option(help="Folder for finished runs.")] = Path(".cache/omniglot"),
    out: Annotated[Path, typer.Option(help="Folder for the table.")] = Path("benchmarks/results"),
    workers: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
) -> None:
    """Choose on validation clients, run three seeds, write the table."""
    os.environ["OMP_NUM_THREADS"] = "1"
    place = (str(data_root.resolve()), str(work.resolve()))
    rows = []
    with ProcessPoolExecutor(workers) as pool:
        tuning = {
            method: [pool.submit(run_job, s, 0, *place) for s in settings_of(model, method)]
            for method in METHODS
        }
        chosen = {method: best([job.result() for job in jobs]) for method, jobs in tuning.items()}
        finals = {
            method: [pool.submit(run_job, run["settings"], seed, *place) for seed in SEEDS]
            for method, (run, _) in chosen.items()
        }
        for method, (run, rate) in chosen.items():
            results = [job.result() for job in finals[method]]
            rows.append(row_of(method, run, rate, results))
    out.mkdir(parents=True, exist_ok=True)
    (out / f"omniglot-{model}.json").write_text(json.dumps(rows, indent=1))
    (out / f"omniglot-{model}.md").write_text(page_of(model, rows))
    print(page_of(model, rows))


def row_of(
    method: str, run: dict[str, Any], rate: str, results: list[dict[str, Any]]
) -> dict[str, Any]:
    grid = [key for key, value in METHODS[method].items() if isinstance(value, tuple)]
    return {
        "method": method,
        "chosen": {**{key: run["settings"][key] for key in grid}, "adaptation rate": float(rate)},
        "validation": run["validation"][rate],
        "unseen": [result["unseen"][rate] for result in results],
        "seconds": [result["seconds"] for result in results],
    }


def page_of(model: str, rows: list[dict[str, Any]]) -> str:
    """Return the table as Markdown, with the command, the machine and the margins over FedAvg + fine-tuning."""
    fixed = MODELS[model]
    lines = [
        f"# Omniglot, 5-way 1-shot, unseen alphabets: {model}",
        "",
        f"`python benchmarks/omniglot.py --data-root DATA --model {model}`, "
        f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}",
        "",
        f"{fixed['rounds']} rounds of 8 clients for every method; {fixed['model-args']}, {fixed['dataset-args']}; 320 training, 40 validation "
        f"and 40 unseen clients; seeds {', '.join(map(str, SEEDS))} (mean ± standard deviation over seeds, %); settings chosen on the "
        "validation clients of seed 0.",
        "",
        "| method | before | after 1 step | after 5 steps | seconds a run | chosen |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [_cell([seed[i] for seed in row["unseen"]]) for i in range(3)]
        chosen = ", ".join(f"{key} {value}" for key, value in row["chosen"].items())
        seconds = f"{statistics.fmean(row['seconds']):.0f}"
        lines.append(f"| {row['method']} | {' | '.join(cells)} | {seconds} | {chosen} |")
    base = rows[0]["unseen"]
    for row in rows[1:]:
        gaps = [
            _cell([own[i] - other[i] for own, other in zip(row["unseen"], base, strict=True)])
            for i in (1, 2)
        ]
        lines += [
            "",
            f"{row['method']} minus {rows[0]['method']}: {gaps[0]} points after one step, {gaps[1]} after five.",
        ]
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    return f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


if __name__ == "__main__":
    sys.exit(typer.run(main))
