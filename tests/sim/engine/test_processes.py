"""What is left of a simulation when it ends, however it ends: nothing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.sim.engine.clients import ask, content

SCRIPT = Path(__file__).with_name("interrupted.py")
ROOT = Path(__file__).parents[3]


def until(happened: Callable[[], object], seconds: float = 90.0) -> bool:
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def alive_of(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid)]


def alive(processes: list[psutil.Process]) -> list[str]:
    return [
        f"{one.pid} {one.name()}"
        for one in processes
        if one.is_running() and one.status() != psutil.STATUS_ZOMBIE
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_simulation_that_is_interrupted_leaves_no_process(tmp_path: Path, number: int):
    flag = tmp_path / "flag"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    with (tmp_path / "stderr").open("wb") as errors:
        run = subprocess.Popen(
            [sys.executable, SCRIPT, flag],
            env=environment,
            start_new_session=True,  # as in a terminal: Ctrl-C goes to the whole group
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    try:
        assert until(flag.exists), (tmp_path / "stderr").read_text()
        processes = psutil.Process(run.pid).children(recursive=True)
        workers = [int(pid) for pid in flag.read_text().split()]
        assert set(workers) <= {one.pid for one in processes}
        if number == signal.SIGINT:
            os.killpg(run.pid, number)
        else:
            run.kill()
        if not until(lambda: run.poll() is not None, 60):
            run.send_signal(signal.SIGABRT)  # tells where it hangs
            run.wait(10)
            raise AssertionError((tmp_path / "stderr").read_text()[-6000:])
        # Ray's own agents see only after a while that a driver was killed; its workers at once.
        mine = (
            processes if number == signal.SIGINT else [psutil.Process(i) for i in alive_of(workers)]
        )
        assert until(lambda: not alive(mine), 60), alive(mine)
    finally:
        run.kill()
        run.wait()


def test_closing_a_grid_stops_its_actors_and_leaves_a_ray_of_others_alone(grid_of):
    import ray

    grid = grid_of(num_nodes=8, workers=2)
    actors = [
        psutil.Process(int(one.content["metrics"]["pid"]))
        for one in ask(grid, content(seconds=0.05))
    ]
    assert alive(actors)
    grid.close()
    grid.close()
    assert until(lambda: not alive(actors)), alive(actors)
    assert ray.is_initialized()


def test_nothing_grows_from_round_to_round(grid_of):
    grid = grid_of(num_nodes=60, workers=2)
    pid_sets = [ask(grid, content(size=50_000)) for _ in range(15)]
    pids = {int(one.content["metrics"]["pid"]) for one in pid_sets[-1]}
    del pid_sets
    processes = [psutil.Process(), *(psutil.Process(pid) for pid in pids)]

    def resident() -> int:
        return sum(one.memory_full_info().uss for one in processes)

    before = resident()
    for _ in range(40):
        ask(grid, content(size=50_000))
    assert resident() < 1.1 * before  # 40 rounds of 24 MB of replies would be a gigabyte
