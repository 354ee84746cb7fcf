"""What a pretrained start is worth: rounds of FedAvg until it is where a random start ends.

    python benchmarks/pretrained.py --data-root DATA

Starts come from ``metabloom pretrain`` and enter runs by the key ``init``, which refuses weights
whose images the clients hold. Federations are those of the distillation benchmark. The learning
rate of each start is chosen on the validation client of seed 0 alone, from the same grid and by the
same figure for all: the mean accuracy of the last rounds. Seeds 1, 2 and 3 are then scored after
each round on MNIST's test images.
"""

import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from distillation_runs import COMMON, LAST, TUNING_SEED
from groups import spread

Settings = Mapping[str, Any]
Curve = list[float]  # accuracy, by the number of rounds from 0

ROUNDS = 40
SHOWN = (0, 1, 5, 10, 20, ROUNDS)
SEEDS = (1, 2, 3)
RATES = (0.05, 0.1, 0.2, 0.4, 0.8)  # of the clients' local steps
RANDOM = "random"
PUBLIC = 4000  # images that no client has, for all starts alike
FEDERATION: Settings = {
    **COMMON,
    "strategy": "fedavg",
    "dataset": "bench-mnist",
    "dataset-args": f"judges=1 held_out={PUBLIC}",
    "model": "mlp",
    "model-args": "hidden=64",
    "clients-per-round": 10,
    "local-epochs": 1,
    "batch-size": 50,
    "eval-every": 0,
    "score-unseen": False,
}
STARTS: dict[str, Settings] = {  # of metabloom pretrain
    "4,000 held-out MNIST images": {"kind": "held-out", "size": 4000, "epochs": 30},
    "1,000 held-out MNIST images": {"kind": "held-out", "size": 1000, "epochs": 30},
    "100 held-out MNIST images": {"kind": "held-out", "size": 100, "epochs": 100},
    "1,000 Fashion-MNIST images": {"kind": "dataset:fashion-mnist", "size": 1000, "epochs": 30},
    "10,000 Fashion-MNIST images": {"kind": "dataset:fashion-mnist", "size": 10_000, "epochs": 10},
}
QUICK: Settings = {
    "rounds": 2,
    "clients-per-round": 4,
    "num-clients": 6,
    "dataset-args": "judges=1 held_out=40 limit=120 proof=40 reserve=60 least=1",
}
QUICK_IMAGES = 40
TOP = (
    "# A pretrained start against a random one",
    "",
    "`python benchmarks/pretrained.py --data-root DATA`",
    "",
    "20 clients share 10,000 MNIST images by Dirichlet(0.3) and train an MLP of 64 units "
    f"by FedAvg: {ROUNDS} rounds of 10 clients, one local epoch, batches of 50. Pretrained starts "
    "come from `metabloom pretrain` with its usual rate and batches, on images that no client "
    f"holds, in {', '.join(str(how['epochs']) for how in STARTS.values())} epochs as they stand "
    "below, and begin at the same weights as the random start of their seed. The local learning "
    f"rate of each start was chosen from {{{', '.join(map(str, RATES))}}} on 1,000 validation "
    f"images of seed 0, by the mean of the last {LAST} rounds (*the end*), for pretrained starts "
    f"also by that of the {LAST} rounds up to round {ROUNDS // 2} (*half*). Accuracy in % on "
    "MNIST's 10,000 test images, mean ± standard deviation over seeds 1, 2 and 3, which change "
    "division, public images and initial weights. The final accuracy is the mean of the last "
    f"{LAST} rounds; the "
    "goal of a seed is that of its random start, and rounds are counted to the first model that is "
    f"as good. Wanted: at most half the rounds, {ROUNDS // 2}, with each seed. Seconds are the "
    "processor's, for pretraining. Lines that lose are shown like those that win.",
    "",
)


class Bench:
    """Pretrains and runs.

    Args:
        data_root: folder of data sets.
        work: folder for pretrained weights.
        quick: a size that means nothing, with one rate.
    """

    def __init__(self, data_root: Path, work: Path, *, quick: bool) -> None:
        self._root, self._work, self._quick = str(data_root), work, quick
        self.rates = RATES[:1] if quick else RATES

    def _keys(self, seed: int) -> dict[str, Any]:
        small = QUICK if self._quick else {}
        return {"rounds": ROUNDS, **FEDERATION, **small, "data-root": self._root, "seed": seed}

    def start(self, how: Settings | None, seed: int) -> str:
        """Return the key ``init``: the folder of pretrained weights, or "" without ``how``."""
        from metabloom.cli_pretrain import pretrain

        if not how:
            return ""
        own = {"public-data": how["kind"], "public-size": how["size"]}
        epochs = how["epochs"]
        if self._quick:
            own["public-size"], epochs = QUICK_IMAGES, 1
        out = self._work / f"{how['kind'].replace(':', '-')}-{how['size']}-{seed}"
        keys = {**self._keys(seed), **own}
        # JSON writes false as the command line takes it, and texts in quotes, which it drops.
        told = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
        pretrain(dataset=None, epochs=epochs, config=None, set_=told, out=str(out))
        return str(out)

    def curve(self, init: str, rate: float, seed: int, role: str) -> Curve:
        """Return the accuracy on the images of a client that never trains, by rounds from 0.

        Args:
            init: the key.
            rate: of the local steps.
            seed: of the run.
            role: of that client.
        """
        from flwr.app import MetricRecord
        from torch.nn.functional import cross_entropy

        from metabloom.clients.evaluation import score
        from metabloom.config import RunConfig
        from metabloom.server_app import ending_of
        from metabloom.simulation import as_carried_out, cohort_grid
        from metabloom.strategies import Firewall
        from metabloom.task import federation_of, initial_arrays, model_of, recipe_of, started
        from metabloom.wire import to_record

        keys = {**self._keys(seed), "local-lr": rate, "init": init}
        config = as_carried_out(RunConfig.read(keys))
        federation, model = federation_of(config), model_of(config)
        (judge,) = federation.indices(role)
        images = federation.client(judge).query
        found: Curve = []

        def scored(_: int, arrays: Any) -> MetricRecord:
            found.append(score(model, cross_entropy, arrays.to_torch_state_dict(), images)[1] or 0)
            return MetricRecord()

        strategy = recipe_of(config).strategy(
            seed=config.seed,
            clients_per_round=config.clients_per_round,
            eval_every=config.eval_every,
            firewall=Firewall(max_share=config.max_share),
            ending=ending_of(config),
            min_train_nodes=1,
            min_evaluate_nodes=1,
            min_available_nodes=1,
        )
        arrays, _ = started(config, initial_arrays(config))
        with cohort_grid(config) as grid:
            result = strategy.start(
                grid, to_record(arrays), num_rounds=config.rounds, evaluate_fn=scored
            )
        faults = [one for r in result.rounds for one in (*r.failures, *r.quarantined)]
        if faults or any(report.skipped for report in result.rounds):
            raise RuntimeError(f"rate {rate}, seed {seed}: a whole run is needed; {faults[:3]}")
        return found


def final(curve: Sequence[float]) -> float:
    """Return the mean accuracy of the last rounds.

    >>> final([0.0, 0.1, 0.5, 0.5, 0.5, 0.5, 0.5])
    0.5
    """
    return fmean(curve[-LAST:])


def at_half(curve: Sequence[float]) -> float:
    """Return the mean accuracy of the rounds up to half of them; ``curve`` begins at round 0.

    >>> at_half([0.0] + [0.1] * 3 + [0.5] * 5 + [0.9] * 8)
    0.5
    """
    return final(curve[: (len(curve) - 1) // 2 + 1])


END = "the end"
AIMS = {END: final, "half": at_half}  # by what rates are chosen


def reached_after(curve: Sequence[float], goal: float) -> int | None:
    """Return the first number of rounds whose accuracy is at least ``goal``; None: never.

    >>> reached_after([0.2, 0.5, 0.9], 0.8), reached_after([0.2, 0.5], 0.8)
    (2, None)
    """
    return next((n for n, accuracy in enumerate(curve) if accuracy >= goal), None)


def measured(bench: Bench, name: str, how: Settings | None) -> Iterator[dict[str, Any]]:
    """Yield a start's rows, one for each choice: what each rate came to, and each seed's curve."""
    init = bench.start(how, TUNING_SEED)
    curves = {rate: bench.curve(init, rate, TUNING_SEED, "validation") for rate in bench.rates}
    begin = time.process_time()
    starts = {seed: bench.start(how, seed) for seed in SEEDS}
    seconds = (time.process_time() - begin) / len(SEEDS)
    chosen: dict[float, str] = {}  # rate -> by what
    tried = {}
    for aim, quality in AIMS.items() if how else [(END, final)]:
        tried[aim] = {str(rate): quality(curve) for rate, curve in curves.items()}
        best = max(bench.rates, key=lambda one, aim=aim: tried[aim][str(one)])
        chosen[best] = f"{chosen[best]} and {aim}" if best in chosen else aim
    for rate, aims in chosen.items():
        found = [
            [round(one, 4) for one in bench.curve(init, rate, seed, "unseen")]
            for seed, init in starts.items()
        ]
        row = {"start": name, "chosen by": aims, "rate": rate, "tries": tried}
        yield {**row, "curves": found, "seconds": seconds}


def rounds_of(rows: Sequence[Mapping[str, Any]]) -> list[list[int | None]]:
    """Return, row by row, after how many rounds each seed is where its random start ends."""
    goals = [final(curve) for row in rows if row["start"] == RANDOM for curve in row["curves"]]
    return [
        [reached_after(c, g) for c, g in zip(row["curves"], goals, strict=True)] for row in rows
    ]


def page_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table as Markdown."""
    last = len(rows[0]["curves"][0]) - 1
    shown, reached = [n for n in SHOWN if n <= last], rounds_of(rows)
    heads = [
        "start",
        "before",
        *(f"{n} round{'s' * (n > 1)}" for n in shown[1:]),
        "final",
        "rounds until the random start's final accuracy, by seed",
        "at most half the rounds",
        "rate, chosen by",
        "seconds",
    ]
    lines = [*TOP, f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row, after in zip(rows, reached, strict=True):
        curves = row["curves"]
        cells = [spread([curve[n] for curve in curves]) for n in shown]
        cells.append(spread([final(curve) for curve in curves]))
        cells.append(", ".join("never" if n is None else str(n) for n in after))
        fast = all(n is not None and 2 * n <= last for n in after)
        is_random = row["start"] == RANDOM
        cells.append("-" if is_random else "reached" if fast else "MISSED")
        cells += [f"{row['rate']}, {row['chosen by']}"]
        cells += ["-" if is_random else f"{row['seconds']:.1f}"]
        lines.append(f"| {row['start']} | {' | '.join(cells)} |")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "flwr"))
    lines += ["", f"Python {platform.python_version()}, {packages}; one thread."]
    return "\n".join(lines) + "\n"


def main(
    data_root: Annotated[Path | None, typer.Option(help="Folder; METABLOOM_DATA, ./data.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the table.")] = Path("benchmarks/results"),
    *,
    quick: Annotated[bool, typer.Option(help="A size that means nothing.")] = False,
) -> None:
    """Choose rates on the validation client, run three seeds, write the table."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import flwr  # noqa: F401  # sets the level when it is imported
    import torch

    from metabloom.config import data_folder

    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    starts: dict[str, Settings | None] = {RANDOM: None, **STARTS}
    rows = []
    with TemporaryDirectory() as work:
        bench = Bench((data_root or data_folder()).resolve(), Path(work), quick=quick)
        for name, how in starts.items():
            for row in measured(bench, name, how):
                rows.append(row)
                print(row, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "pretrained.json").write_text(json.dumps(rows, indent=1) + "\n")
    (out / "pretrained.md").write_text(page_of(rows))
    print(page_of(rows))


if __name__ == "__main__":
    typer.run(main)
