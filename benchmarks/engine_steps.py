"""Local training by each kernel, the kernels in turn in one process: what its speed is, drifts.

    python benchmarks/engine_steps.py JOB.json OUT

JOB says ``config``, ``clients``, ``kernels`` (the first is the base) and ``turns``. Seconds are the
processor's, of one thread; those of the first turn are by the clock and stand apart.
"""

import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import engine_work
import numpy as np
import torch

from metabloom.clients import CLIENTS, Learner
from metabloom.clients.cohort import run_cohort
from metabloom.task import federation_of, model_of, recipe_of

ROUND = {"server-round": 1}
Reply = list[np.ndarray]


def run_job(job: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Return the milliseconds of a client by each kernel, turn by turn; it writes no file."""
    torch.set_num_threads(1)
    config = engine_work.read(job["config"])
    federation, model, recipe = federation_of(config), model_of(config), recipe_of(config)
    sent = [value.numpy() for value in model.state_dict().values()]
    indices = federation.indices("train")[: job["clients"]]

    def clients(kernel: str) -> list[Learner]:
        return [
            CLIENTS[recipe.client](
                model,
                federation.client(index),
                inner_lr=config.inner_lr,
                seed=config.seed,
                name=federation.client_ids[index],
                kernel=kernel,
                **recipe.client_options,
            )
            for index in indices
        ]

    def replies(kernel: str) -> list[Reply]:
        asked = clients(kernel)
        if kernel != "vmap":
            return [one.fit(sent, ROUND)[0] for one in asked]
        trainings = [one.training(one.load(sent), ROUND) for one in asked]
        found = zip(asked, run_cohort(trainings), strict=True)
        return [one.answered(result, sent, ROUND)[0] for one, result in found]

    complaints = Complaints()
    logging.getLogger("flwr").addHandler(complaints)
    first, taken, said = {}, {kernel: [] for kernel in job["kernels"]}, {}
    for kernel in job["kernels"]:
        began = time.perf_counter()
        said[kernel] = replies(kernel)
        first[kernel] = time.perf_counter() - began
    for turn in range(job["turns"]):
        for kernel in taken if turn % 2 == 0 else reversed(taken):
            began = time.process_time()
            replies(kernel)
            taken[kernel].append(1e3 * (time.process_time() - began) / len(indices))
    base, *others = said.values()
    apart = max(
        _length(reply, wanted) / _length(wanted, sent)
        for found in others
        for reply, wanted in zip(found, base, strict=True)
    )
    return {"ms": taken, "first": first, "apart": apart, "failures": complaints.said}


def _length(ours: Reply, theirs: Reply) -> float:
    """Return the L2 norm of the difference of two models."""
    return math.sqrt(sum(float(((a - b) ** 2).sum()) for a, b in zip(ours, theirs, strict=True)))


class Complaints(logging.Handler):
    """Keep warnings: a kernel that cannot be had is replaced by another with one."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what it says."""
        self.said.append(record.getMessage())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    given, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    (folder / "found.json").write_text(json.dumps(run_job(given, folder)) + "\n")
