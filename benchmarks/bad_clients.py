"""Aggregations under attack: what two bad clients of ten do to each, and what each costs in peace.

    python benchmarks/bad_clients.py

``digits``, 60 rounds of 10 clients. In every round two of them send ten times their update with its
sign turned. The unseen clients' accuracy after five steps of adaptation, mean and standard
deviation over three seeds. Nothing was tuned: every setting is the default, but for what the table
says and ``num-malicious = 2``.
"""

import json
import logging
import os
import platform
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated

import typer

AGGREGATIONS = ("mean", "median", "trimmed-mean", "multi-krum")
STRATEGIES = ("fedavg", "fedmeta")
SEEDS = (0, 1, 2)


def accuracy(strategy: str, aggregation: str, bad: int, seed: int, rounds: int) -> float:
    """Return the accuracy of the unseen clients where so many clients of each round are bad."""
    import torch
    from flwr.app import Message

    from metabloom.client_app import app
    from metabloom.config import RunConfig
    from metabloom.server_app import run
    from metabloom.sim import CohortGrid
    from metabloom.task import federation_of
    from metabloom.wire import from_record, to_record

    class Attacked(CohortGrid):
        """A grid on which the first ``bad`` replies of each round go the other way, and far."""

        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> Iterable[Message]:
            asked = list(messages)
            replies = list(super().send_and_receive(asked, timeout=timeout))
            if not asked or asked[0].metadata.message_type != "train":
                return replies
            sent = from_record(asked[0].content["arrays"])
            for reply in replies[:bad]:
                honest = from_record(reply.content["arrays"])
                turned = {name: w - 10 * (honest[name] - w) for name, w in sent.items()}
                reply.content["arrays"] = to_record(turned)
            return replies

    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as out:
        config = RunConfig.read(
            {
                "strategy": strategy,
                "aggregation": aggregation,
                "seed": seed,
                "rounds": rounds,
                "clients-per-round": 10,
                "num-malicious": 2,
                "eval-every": 0,
                "checkpoint-every": 0,
                "device": "cpu",
                "out": out,
            }
        )
        grid = Attacked(
            app, num_nodes=len(federation_of(config)), run_config=config.to_flower(), seed=seed
        )
        results = json.loads((run(grid, config) / "results.json").read_text())
    if results["failures"] or results["quarantined"]:
        raise RuntimeError("replies were refused: the clients differ between aggregations")
    found: float = results["unseen"]["accuracy_after"]["5"]
    return found


def page_of(accuracies: dict[tuple[str, int, str], list[float]], rounds: int) -> str:
    """Return the table."""
    lines = [
        "# Aggregations under attack",
        "",
        "`python benchmarks/bad_clients.py`",
        "",
        f"digits, {rounds} rounds of 10 clients, {os.cpu_count()} CPU cores "
        f"({platform.machine()}), Python {platform.python_version()}. Accuracy of unseen clients "
        f"after 5 steps in %, mean ± standard deviation over seeds {', '.join(map(str, SEEDS))}.",
        "",
        f"| | {' | '.join(AGGREGATIONS)} |",
        "|---|---|---|---|---|",
    ]
    for strategy in STRATEGIES:
        for bad, label in ((0, "nobody bad"), (2, "2 of 10 bad")):
            cells = [_cell(accuracies[strategy, bad, one]) for one in AGGREGATIONS]
            lines.append(f"| {strategy}, {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    return f"{100 * fmean(values):.1f} ± {100 * stdev(values):.1f}"


def main(
    out: Annotated[Path, typer.Option(help="Folder for the table.")] = Path("benchmarks/results"),
    rounds: Annotated[int, typer.Option(help="Of each run.")] = 60,
    workers: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
) -> None:
    """Run every pair with every seed and write the table."""
    os.environ["OMP_NUM_THREADS"] = "1"
    cells = [(s, bad, one) for s in STRATEGIES for bad in (0, 2) for one in AGGREGATIONS]
    with ProcessPoolExecutor(workers) as pool:
        jobs = {
            (s, bad, one): [pool.submit(accuracy, s, one, bad, seed, rounds) for seed in SEEDS]
            for s, bad, one in cells
        }
        accuracies = {cell: [job.result() for job in row] for cell, row in jobs.items()}
    page = page_of(accuracies, rounds)
    out.mkdir(parents=True, exist_ok=True)
    (out / "bad-clients.md").write_text(page)
    print(page)


if __name__ == "__main__":
    typer.run(main)
