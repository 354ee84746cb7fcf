"""The rows that compare whole rounds: against Flower's engine, against pfl, over many clients."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import engine_work
import numpy as np
import torch
from engine_turns import HERE, Line, Turns, difference, line_of, usual
from safetensors.torch import save_file

from metabloom.streams import torch_stream
from metabloom.task import federation_of, model_of

Found = dict[str, list[dict[str, Any]]]
TOLERANCE = 1e-5  # of two sides' models, largest difference of a weight
KERNELS = ("eager", "compiled")


@dataclass(frozen=True)
class Setting:
    """Where and how much is measured.

    Attributes:
        turns: what runs the sides.
        workers: actors of our engine; 0 with ``quick``.
        quick: tiny sizes, nothing that means anything: for tests.
        most_turns: of any comparison; 0: as many as it has.
        pfl_python: the interpreter that has pfl; empty: no row of it.
        data_root: folder of data sets.
        clients: of a round, where Flower's engine is compared; empty: all that are planned.
    """

    turns: Turns
    workers: int = 2
    quick: bool = False
    pfl_python: str = ""
    data_root: str = ""
    most_turns: int = 0
    clients: tuple[int, ...] = ()

    def turns_of(self, usual: int) -> int:
        """Return how many turns a comparison takes."""
        wanted = 1 if self.quick else usual
        return min(wanted, self.most_turns or wanted)


def ratios(
    found: Found, slow: str, fast: str, of: Callable[[dict[str, Any]], float] = usual
) -> list[float]:
    """Return, turn by turn, how many times less ``fast`` takes than ``slow``."""
    return [of(a) / of(b) for a, b in zip(found[slow], found[fast], strict=True)]


def processors(one: dict[str, Any]) -> float:
    """Return the processor seconds of a round, of all processes of a side."""
    return float(one["later_cpu"])


def agreed(found: Found, number: int) -> float:
    """Return the largest difference of any two sides' models after round ``number``.

    Raises:
        RuntimeError: where it is above the tolerance: then they did not do the same work.
    """
    sides = [side for turns in found.values() for side in turns]
    worst = max(difference(sides[0], other, number) for other in sides[1:])
    if not worst <= TOLERANCE:
        raise RuntimeError(f"models after round {number} differ by {worst:.2g}: {list(found)}")
    return worst


def seconds(found: Found) -> str:
    """Return each side's seconds of a round, and of its first one, in words."""
    parts = []
    for side, turns in found.items():
        later, first = median(map(usual, turns)), median(one["first"] for one in turns)
        parts.append(f"{side} {later:.3g} (first {first:.3g})")
    return "seconds of a round: " + ", ".join(parts)


def against_flower(setting: Setting) -> Iterator[Line]:
    """Yield the lines of each work and number of clients."""
    plan = {100: (6, 3), 1000: (3, 2), 10: (6, 3), 500: (3, 2)}  # clients: rounds, turns
    bars = {100: (3.0, 5.0), 1000: (6.0, 12.0)}
    for clients, (rounds, repeats) in ({4: (3, 1)} if setting.quick else plan).items():
        if setting.clients and clients not in setting.clients:
            continue
        for work in ("FedAvg", "MAML"):
            kernels = KERNELS[:1] if setting.quick else KERNELS
            jobs = {k: _ours(setting, work, clients, rounds, k) for k in kernels}
            jobs["Flower"] = jobs["eager"] if setting.quick else _flowers(work, clients, rounds)
            found = setting.turns.take(jobs, setting.turns_of(repeats))
            apart = agreed(found, 1)
            agreed({side: found[side] for side in ("eager", "Flower")}, rounds)
            for kernel in kernels:
                bar, aim = (
                    bars.get(clients, (None, None)) if kernel == kernels[-1] else (None, None)
                )
                by_cpu = median(ratios(found, "Flower", kernel, processors))
                yield line_of(
                    f"Flower's engine, {work}, {clients} clients, {kernel}",
                    ratios(found, "Flower", kernel),
                    bar=bar,
                    aim=aim,
                    note=f"{seconds(found)}; {by_cpu:.2f} by processor seconds of all processes; "
                    f"models differ by {apart:.1g}",
                )


def _ours(
    setting: Setting, work: str, clients: int, rounds: int, kernel: str, **keys: Any
) -> dict[str, Any]:
    return {
        "engine": "cohort",
        "workers": setting.workers,
        "rounds": rounds,
        "config": engine_work.config_of(work, clients, kernel=kernel, **keys),
        "keep": [1, rounds],
    }


def _flowers(work: str, clients: int, rounds: int) -> dict[str, Any]:
    config = engine_work.config_of(work, clients, kernel="eager")
    return {"engine": "flower", "rounds": rounds, "config": config, "keep": [1, rounds]}


def against_pfl(setting: Setting) -> Iterator[Line]:
    """Yield the lines against pfl-research: the same clients, batches and steps."""
    if not setting.pfl_python:
        return
    plan = {(100, 1): 3, (1000, 1): 2, (100, 2): 3, (1000, 2): 2}  # (clients, processes): turns
    script = {"pfl": (setting.pfl_python, str(HERE / "engine_pfl.py"))}
    for (clients, processes), repeats in plan.items():
        rounds = 6 if clients == 100 else 3
        data = setting.turns.work / f"pfl-data-{clients}"
        work = write_for_pfl(data, clients)
        apart = Setting(setting.turns, workers=processes)
        jobs: dict[str, Mapping[str, Any]] = {
            **{kernel: _ours(apart, "FedAvg", clients, rounds, kernel) for kernel in KERNELS},
            "pfl": {
                "data": str(data),
                "rounds": rounds,
                "processes": processes,
                "port": 29411,
                "lr": work["local-lr"],
                "batch": work["batch-size"],
            },
        }
        found = setting.turns.take(jobs, setting.turns_of(repeats), script=script)
        differ = agreed(found, 1)  # later rounds have other batches: pfl keeps their order
        for kernel in KERNELS:
            by_cpu = median(ratios(found, "pfl", kernel, processors))
            yield line_of(
                f"pfl-research, FedAvg, {clients} clients, {processes} process(es), {kernel}",
                ratios(found, "pfl", kernel),
                bar=1.2 if kernel == KERNELS[-1] else None,
                aim=2.0 if kernel == KERNELS[-1] else None,
                note=f"{seconds(found)}; {by_cpu:.2f} by processor seconds of all processes; "
                f"models differ by {differ:.1g}",
            )


def write_for_pfl(folder: Path, clients: int) -> dict[str, Any]:
    """Write the clients' records, each in the order of its first round, and the first model."""
    given = engine_work.config_of("FedAvg", clients)
    config = engine_work.read(given)
    federation = federation_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    inputs, targets = [], []
    for index in federation.indices("train"):
        x, y = federation.client(index).all
        name = federation.client_ids[index]
        order = torch.randperm(len(y), generator=torch_stream(config.seed, "sgd", 1, name))
        inputs.append(x[order].numpy())
        targets.append(y[order].numpy())
    np.save(folder / "inputs.npy", np.stack(inputs))
    np.save(folder / "targets.npy", np.stack(targets))
    first = {name: value.clone() for name, value in model_of(config).state_dict().items()}
    save_file(first, folder / "first.safetensors")
    return given


def over_clients(setting: Setting) -> Iterator[Line]:
    """Yield how the cost of one client grows with the clients of a round."""
    sizes = (4, 8) if setting.quick else (100, 1000, 10_000)
    rounds = {100: 21, 1000: 6, 10_000: 3}
    works: dict[str, Callable[[int], dict[str, Any]]] = {
        "echo, 0.4 MB": lambda clients: {"clients": clients, "megabytes": 0.4, "step": 1.0},
        "FedAvg": lambda clients: {
            "config": engine_work.config_of("FedAvg", clients, kernel="eager")
        },
    }
    for what, work in works.items():
        jobs = {
            str(clients): {
                "engine": "cohort",
                "workers": setting.workers,
                "rounds": rounds.get(clients, 3),
                **work(clients),
            }
            for clients in sizes
        }
        found = setting.turns.take(jobs, setting.turns_of(2))
        each = {size: [usual(one) / int(size) for one in turns] for size, turns in found.items()}
        told = ", ".join(
            f"{size}: {1e3 * median(cost):.2f}, of processors "
            f"{1e3 * median(map(processors, found[size])) / int(size):.2f}"
            for size, cost in each.items()
        )
        first, *others = each
        for size in others:
            yield line_of(
                f"cost of a client, {what}, {size} clients against {first}",
                [large / small for large, small in zip(each[size], each[first], strict=True)],
                bar=1.2 if size == others[-1] else None,
                aim=1.0 if size == others[-1] else None,
                upper=True,
                note=f"milliseconds of a client: {told}",
            )


def in_memory(setting: Setting) -> Iterator[Line]:
    """Yield how resident memory grows with the clients: the same records, cut among them."""
    few, many, records = (4, 8, 240) if setting.quick else (100, 10_000, 60_000)
    works = {
        "FedAvg": ("FedAvg", {}),
        "stateful (Ditto)": ("Ditto", {"model": "mlp", "model_args": "hidden=32"}),
    }
    for what, (work, keys) in works.items():
        jobs = {
            str(clients): {
                "engine": "cohort",
                "workers": setting.workers,
                "rounds": 3,
                "peak": True,
                "config": engine_work.config_of(
                    work, clients, kernel="eager", dataset_args=f"total={records}", **keys
                ),
            }
            for clients in (few, many)
        }
        found = setting.turns.take(jobs, setting.turns_of(2))
        peaks = {size: [one["peak_mb"] for one in turns] for size, turns in found.items()}
        told = ", ".join(f"{size} clients: {median(peak):.0f}" for size, peak in peaks.items())
        small, large = peaks.values()
        yield line_of(
            f"memory, {what}, {many} clients against {few}",
            [b / a for a, b in zip(small, large, strict=True)],
            bar=1.5 if work == "FedAvg" else None,
            aim=1.0 if work == "FedAvg" else None,
            upper=True,
            note=f"peak of all processes in MB (PSS): {told}",
        )


def over_rounds(setting: Setting) -> Iterator[Line]:
    """Yield whether resident memory grows over a long run."""
    clients, rounds, every = (4, 6, 2) if setting.quick else (200, 1000, 50)
    job = {
        "engine": "cohort",
        "workers": setting.workers,
        "rounds": rounds,
        "config": engine_work.config_of(
            work="FedAvg",
            clients=clients,
            kernel="eager",
            dataset_args="records=10 size=8",
            model="mlp",
            model_args="hidden=16",
        ),
        "memory_every": every,
    }
    (found,) = setting.turns.take({"ours": job}, 1)["ours"]
    for name, column in (("driver", 1), ("actors and Ray", 2)):
        seen = [moment[column] for moment in found["memory"]]
        if not seen[0]:
            continue  # nothing runs beside this process
        yield Line(
            f"memory of {name}, {rounds} rounds of {clients} clients: most after round {every} "
            f"against round {every}",
            max(seen) / seen[0],
            min(seen) / seen[0],
            max(seen) / seen[0],
            bar=1.05,
            aim=1.0,
            upper=True,
            note=f"MB after each {every} rounds: {', '.join(f'{mb:.0f}' for mb in seen)}",
        )


def all_writers(setting: Setting) -> Iterator[Line]:
    """Yield the memory of the command line with every writer of MNIST in each round."""
    if setting.quick:
        return
    keys = {
        "clients-per-round": 539,  # so all that train do, and the others are evaluated
        "rounds": 3,
        "eval-every": 1,
        "workers": setting.workers,
        "model": "cnn",
        "model-args": "dense=128",
        "batch-size": 10,
    }
    told = [f"{key}={value}" for key, value in keys.items()]
    sets = [part for one in (*told, f"data-root={setting.data_root}") for part in ("--set", one)]
    command = (sys.executable, str(HERE / "engine_command.py"))
    argv = ["simulate", "--strategy", "fedavg", "--dataset", "mnist-writers", *sets]
    job = {"argv": argv, "peak": True}
    found = setting.turns.run(job, 0, command)
    yield Line(
        "memory, `metabloom simulate --dataset mnist-writers`, all 539 writers in each round",
        found["peak_mb"],
        found["peak_mb"],
        found["peak_mb"],
        bar=4 * 1024**3 / 1e6,
        upper=True,
        unit="MB",
        note=f"peak of all processes (PSS); {found['seconds']:.0f} s; {', '.join(told)}",
    )
