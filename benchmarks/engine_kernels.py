"""The rows of kernels: what one client's training takes, eager, compiled, and many at once.

Clients train in one process with one thread, one after another or, with vmap, together, the kernels
in turn (``engine_steps``). Where there is a GPU its rows follow.
"""

import re
import sys
from collections.abc import Iterator
from statistics import median
from typing import Any

import engine_work
import torch
from engine_rows import Setting
from engine_turns import HERE, Line, line_of, usual

KERNELS = ("eager", "compiled", "vmap")
CLIENTS = 16
NEAR = 1e-2  # of two kernels' replies, as a share of the update's length: see the page on kinks
TURNS = 15
MODELS = {"small CNN": {}, "mlp 64": {"model": "mlp", "model_args": "hidden=64"}}
LEAF = {"LEAF's CNN, dense 128": {"model": "cnn", "model_args": "dense=128"}}
GPU_CLIENTS = (8, 32, 128, 200, 512)
FRACTIONS = (1.0, 0.5, 0.25, 0.1)  # of a GPU, for each of Flower's clients


def lines(setting: Setting) -> Iterator[Line]:
    """Yield the lines of the CPU, then those of a GPU."""
    for work in ("FedAvg", "MAML"):
        for name, keys in (MODELS | (LEAF if work == "FedAvg" else {})).items():
            yield from _on_cpu(setting, work, name, keys)
            if setting.quick:
                break
    yield from _on_gpu(setting)


def _on_cpu(setting: Setting, work: str, name: str, keys: dict[str, Any]) -> Iterator[Line]:
    clients = 2 if setting.quick else CLIENTS
    kernels = ("eager", "vmap") if setting.quick else KERNELS  # compiling takes its time
    job = {
        "config": engine_work.config_of(work, clients, **keys),
        "clients": clients,
        "kernels": kernels,
        "turns": setting.turns_of(TURNS),
        # Empty at first. Without spaces, which the compiler's command line does not survive.
        "compile_cache": str(setting.turns.work / re.sub(r"\W+", "-", f"cache-{work}-{name}")),
    }
    found = setting.turns.run(job, 0, (sys.executable, str(HERE / "engine_steps.py")))
    if not found["apart"] <= NEAR:
        raise RuntimeError(f"{work}, {name}: replies differ by {found['apart']:.2g} of an update")
    each, first = found["ms"], found["first"]
    told = ", ".join(f"{kernel} {median(took):.2f}" for kernel, took in each.items())
    for kernel in kernels[1:]:
        bar, aim = (1.3, 2.0) if kernel == "compiled" else (None, None)
        yield line_of(
            f"{work}, {name}, CPU, {kernel} against eager",
            [slow / fast for slow, fast in zip(each["eager"], each[kernel], strict=True)],
            bar=bar,
            aim=aim,
            note=f"milliseconds of a client: {told}; seconds of the first {clients} clients, "
            f"{kernel}: {first[kernel]:.1f}; replies differ by {found['apart']:.1g} of an update",
        )


def _job(work: str, clients: int, rounds: int, kernel: str, **keys: Any) -> dict[str, Any]:
    config = engine_work.config_of(work, clients, kernel=kernel, **keys)
    job = {"engine": "cohort", "workers": 0, "rounds": rounds, "keep": [1]}
    return {**job, "config": config}


def _on_gpu(setting: Setting) -> Iterator[Line]:
    what = "GPU, {} clients, best kernel against Flower's engine, best share of a GPU"
    if not torch.cuda.is_available():
        bars = {"bar": 20.0, "aim": 50.0}
        yield Line(what.format(200), None, None, None, **bars, note="no GPU on this machine")
        return
    for clients in GPU_CLIENTS:
        jobs = {kernel: _job("FedAvg", clients, 6, kernel, device="cuda") for kernel in KERNELS}
        theirs = {
            f"Flower, {share:g}": {
                "engine": "flower",
                "rounds": 4,
                "gpus": share,
                "keep": [],
                "config": engine_work.config_of("FedAvg", clients, kernel="eager", device="cuda"),
            }
            for share in FRACTIONS
        }
        found = setting.turns.take({**jobs, **theirs}, setting.turns_of(2))
        took = {side: median(map(usual, turns)) for side, turns in found.items()}
        ours, flowers = (min(sides, key=lambda side: took[side]) for sides in (jobs, theirs))
        yield line_of(
            what.format(clients),
            [usual(b) / usual(a) for a, b in zip(found[ours], found[flowers], strict=True)],
            bar=20.0 if clients == 200 else None,
            aim=50.0 if clients == 200 else None,
            note=", ".join(f"{side} {seconds:.3g} s" for side, seconds in took.items()),
        )
