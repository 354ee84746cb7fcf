"""One side of a comparison, in a process of its own: some rounds on one engine, timed.

    python benchmarks/engine_side.py JOB.json OUT

``engine_turns.in_process_of_its_own`` calls it. JOB says what to run (``Job``); OUT gets found.json
and, with ``keep``, the model after each round that it names.
"""

import json
import logging
import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict
from unittest.mock import patch

import engine_work
import numpy as np
from engine_processes import OWN, cpu_of, pss_of, tree_of
from flwr.app import ArrayRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from safetensors.numpy import save_file

from metabloom.sim import CohortGrid
from metabloom.strategies import FedAvg, RoundReport
from metabloom.strategies.shell import RuleStrategy
from metabloom.task import model_of, recipe_of
from metabloom.wire import from_record, to_record

REPOSITORY = Path(__file__).resolve().parents[1]


class Job(TypedDict, total=False):
    """What a side runs.

    ``engine``: "cohort" or "flower". ``workers``: of the cohort engine, actors; 0: in this process.
    ``rounds``. ``config``: of metabloom's app. Without it the app echoes: then ``clients``,
    ``megabytes`` of the model, ``step`` that clients add to it. ``summed``: False: without partial
    sums. ``keep``: rounds whose model is written. ``memory_every``:
    rounds after which resident memory is noted; 0: never. ``compile_cache``: where the compiler
    keeps what it made, heeded by ``Turns``, as is ``peak``: whether the peak of memory is measured,
    which takes time. ``gpus``: share of a GPU for each of Flower's clients.
    """

    engine: str
    workers: int
    rounds: int
    config: dict[str, Any]
    clients: int
    megabytes: float
    step: float
    summed: bool
    keep: list[int]
    memory_every: int
    compile_cache: str
    peak: bool
    gpus: float


class Clock:
    """Note when each round ended, and now and then processor seconds and resident memory.

    What the clock itself takes is left out of the seconds.

    Args:
        rounds: how many there will be.
        memory_every: rounds after which memory is noted; 0: never.
    """

    def __init__(self, rounds: int, memory_every: int = 0) -> None:
        self.began = time.perf_counter()
        self.marks: list[float] = []
        self.cpu: list[float] = []  # after the first round and after the last
        self.memory: list[tuple[int, float, float]] = []  # round, this process, the others (MB)
        self.failures: list[str] = []
        self._rounds, self._every = rounds, memory_every

    def round_ended(self, report: RoundReport) -> None:
        """Take the times of one round."""
        now = time.perf_counter()
        self.marks.append(now - self.began)
        self.failures += [f"{who}: {why}" for who, why in (*report.failures, *report.quarantined)]
        if report.round in (1, self._rounds):
            self.cpu.append(cpu_of(tree_of(os.getpid())))
        if self._every and report.round % self._every == 0:
            own, *others = (pss_of(pid, OWN) for pid in tree_of(os.getpid()))
            self.memory.append((report.round, own, sum(others)))
        self.began += time.perf_counter() - now


class Watched:
    """Hand on replies as they come, and count the seconds that they let one wait."""

    def __init__(self, replies: Iterable[Message]) -> None:
        self.waited = 0.0
        self._replies = iter(replies)

    def __iter__(self) -> "Watched":
        return self

    def __next__(self) -> Message:
        began = time.perf_counter()
        try:
            return next(self._replies)
        finally:
            self.waited += time.perf_counter() - began


def run_job(job: Job, out: Path) -> dict[str, Any]:
    """Return what one side took: seconds until each round ended, processor seconds, memory."""
    clock = Clock(job["rounds"], job.get("memory_every", 0))
    strategy, app, arrays, nodes = _parts(job, clock)

    def keep(number: int, record: ArrayRecord) -> None:
        if number in job.get("keep", []):
            save_file(from_record(record), out / f"round-{number}.safetensors")

    def start(grid: Grid) -> None:
        strategy.start(grid, arrays, num_rounds=job["rounds"], evaluate_fn=keep)

    engine = {"flower": _on_flower, "cohort": _on_cohort}[job["engine"]]
    with aggregation_timed() as aggregation:
        engine(job, app, nodes, start)
    return {
        "first": clock.marks[0],
        "later": np.diff(clock.marks).tolist(),
        "later_cpu": (clock.cpu[-1] - clock.cpu[0]) / max(1, job["rounds"] - 1),
        "aggregation": aggregation,
        "memory": clock.memory,
        "failures": clock.failures[:5],
    }


@contextmanager
def aggregation_timed() -> Iterator[list[float]]:
    """Collect the seconds that strategies aggregate, without those that they wait for replies.

    In the class: a strategy whose instance was changed gets no partial sums.
    """
    taken: list[float] = []
    inner = RuleStrategy.aggregate_train

    def aggregate(self: RuleStrategy, number: int, replies: Iterable[Message]) -> Any:
        watched = Watched(replies)
        began = time.perf_counter()
        result = inner(self, number, watched)
        taken.append(time.perf_counter() - began - watched.waited)
        return result

    with patch.object(RuleStrategy, "aggregate_train", aggregate):
        yield taken


def _parts(job: Job, clock: Clock) -> tuple[Any, Any, ArrayRecord, int]:
    """Return the strategy, the ClientApp, the first model and the number of nodes."""
    shell: dict[str, Any] = {
        "partial_sums": job.get("summed", True),
        "eval_every": 0,
        "on_round": clock.round_ended,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
        "min_available_nodes": 1,
    }
    if "config" not in job:
        one_mb = 250_000 // 10
        shapes = {f"a{i}": max(1, round(job["megabytes"] * one_mb)) for i in range(10)}
        arrays = {name: np.zeros(size, np.float32) for name, size in shapes.items()}
        strategy = FedAvg(clients_per_round=job["clients"], **shell)
        return strategy, engine_work.echo_app, to_record(arrays), job["clients"]
    from metabloom.client_app import app

    config = engine_work.read(job["config"])
    shell |= {"seed": config.seed, "clients_per_round": config.clients_per_round}
    recipe = recipe_of(config)
    first = {name: value.numpy() for name, value in model_of(config).state_dict().items()}
    return recipe.strategy(**shell), app, to_record(first), config.num_clients


def _run_config(job: Job) -> dict[str, Any]:
    if "config" in job:
        return engine_work.read(job["config"]).to_flower()
    return {"step": job.get("step", 0.0)}


def _on_cohort(job: Job, app: Any, nodes: int, start: Callable[[Any], None]) -> None:
    with CohortGrid(
        app, num_nodes=nodes, run_config=_run_config(job), workers=job["workers"]
    ) as grid:
        start(grid)


def _on_flower(job: Job, app: Any, nodes: int, start: Callable[[Any], None]) -> None:
    """Run on Flower's own engine as ``flwr run`` does, one processor for each actor."""
    from flwr.simulation.run_simulation import _run_simulation
    from flwr.supercore.constant import NOOP_FEDERATION_ID
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.supercore.telemetry import EventType

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        start(grid)

    run = Run.create_empty(secrets.randbits(63))
    run.primary_task_id, run.federation_id = secrets.randbits(63), NOOP_FEDERATION_ID
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run.run_id, 1
    if "config" in job:  # over the defaults of the app, which pyproject.toml has
        run.override_config = _run_config(job)
    _run_simulation(
        num_supernodes=nodes,
        exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
        client_app=app,
        server_app=server,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": job.get("gpus", 0.0)}},
        app_dir=str(REPOSITORY),
        is_app="config" in job,
        run=run,
    )


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    given, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    (folder / "found.json").write_text(json.dumps(run_job(given, folder)) + "\n")
