"""Which engine carries a run: the cohort engine in `metabloom simulate`, either in a ServerApp."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from typer.testing import CliRunner, Result

from metabloom import server_app, simulation
from metabloom.cli import app as command_line
from metabloom.client_app import app as client_app
from metabloom.config import RunConfig
from metabloom.errors import ConfigError, MetabloomError
from metabloom.sim import CohortGrid
from tests.app.flower_runs import clients_by_round, results_in

SMALL = {"num-clients": 10, "rounds": 3, "clients-per-round": 4, "eval-every": 2, "device": "cpu"}
IDENTITY = (11, 12, 13)


def simulate(out: Path, **keys: object) -> Result:
    settings = {**SMALL, **{key.replace("_", "-"): value for key, value in keys.items()}}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    arguments = ["simulate", *words, "--out", str(out)]
    return CliRunner().invoke(command_line, arguments, catch_exceptions=False)


def serve(grid: Grid, out: Path, **keys: object) -> None:
    """Call the ServerApp as Flower does."""
    changed = {key.replace("_", "-"): value for key, value in keys.items()}
    config = RunConfig.read({**SMALL, **changed, "out": str(out)})
    server_app.app(
        grid,
        Context(
            run_id=IDENTITY[1],
            node_id=IDENTITY[2],
            node_config={},
            state=RecordDict(),
            run_config=config.to_flower(),
        ),
    )


def model(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def identity() -> tuple[int, int, int]:
    return TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id


class IdleGrid(Grid):
    """A grid of Flower's that nobody may use."""

    def _used(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("Flower's own grid was used")

    set_run = create_message = get_node_ids = push_messages = _used
    pull_messages = send_and_receive = _used
    run = property(_used)


@pytest.fixture
def flowers_identity() -> Iterator[None]:
    """Let the process be a task of Flower's."""
    before = {name: getattr(TaskIdentity, f"_{name}") for name in ("task_id", "run_id", "node_id")}
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = IDENTITY
    yield
    for name, value in before.items():
        setattr(TaskIdentity, name, value)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Return the list to which Flower's log is written."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


# --- the ServerApp --------------------------------------------------------------------------------


@pytest.mark.usefixtures("flowers_identity")
def test_the_server_app_reaches_the_simulators_model_on_a_cohort_grid_of_its_own(
    tmp_path: Path, said: list[str]
) -> None:
    serve(IdleGrid(), tmp_path / "served", engine="cohort")
    assert identity() == IDENTITY  # Flower's last messages of the run are of its own task
    assert "engine: cohort, workers: 0, kernel: eager" in said
    assert simulate(tmp_path / "simulated").exit_code == 0
    assert model(tmp_path / "served") == model(tmp_path / "simulated")
    served, simulated = (results_in(tmp_path / name) for name in ("served", "simulated"))
    assert served["clients"] == simulated["clients"] == {"train": 8, "validation": 1, "unseen": 1}
    assert served["config"]["engine"] == simulated["config"]["engine"] == "cohort"
    assert clients_by_round(tmp_path / "served") == clients_by_round(tmp_path / "simulated")


@pytest.mark.usefixtures("flowers_identity")
def test_flowers_identity_is_back_after_a_run_that_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MetabloomError, match="another folder"):
        serve(IdleGrid(), tmp_path / "file" / "out", engine="cohort")
    assert identity() == IDENTITY


@pytest.mark.parametrize("engine", ["auto", "flower"])
def test_flowers_grid_is_used_unless_the_cohort_engine_is_asked_for(
    tmp_path: Path, said: list[str], engine: str
) -> None:
    config = RunConfig.read({**SMALL, "engine": engine})
    with CohortGrid(client_app, num_nodes=10, run_config=config.to_flower()) as flowers:
        serve(flowers, tmp_path, engine=engine, workers=2)
    assert results_in(tmp_path)["config"]["engine"] == engine
    assert "engine: flower, kernel: eager" in said
    assert sum("workers has no effect" in line for line in said) == 1
    with pytest.raises(AssertionError, match="Flower's own grid was used"):
        serve(IdleGrid(), tmp_path, engine=engine)


def test_a_kernel_that_flowers_engine_cannot_serve_is_refused_before_any_round(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="kernel = 'vmap'"):
        serve(IdleGrid(), tmp_path / "out", kernel="vmap")
    assert not (tmp_path / "out").exists()


# --- the command line -----------------------------------------------------------------------------


def test_what_was_decided_is_told_and_stands_in_the_results(tmp_path: Path) -> None:
    done = simulate(tmp_path)
    assert "workers: 0, kernel: eager" in done.output
    config = results_in(tmp_path)["config"]
    assert (config["engine"], config["workers"], config["kernel"]) == ("cohort", "0", "eager")


def test_flowers_engine_is_refused_by_the_simulator_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine = 'flower'.*flwr run \. --run-config"):
        simulate(tmp_path / "out", engine="flower")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "passed"),
    [
        ({}, {"workers": 0, "ray_address": "", "gpus_per_worker": 0.0, "client_timeout_s": None}),
        ({"workers": 3, "client-timeout-s": 2.5}, {"workers": 3, "client_timeout_s": 2.5}),
        ({"ray-address": "head:6379"}, {"workers": "auto", "ray_address": "head:6379"}),
        ({"gpus-per-worker": 0.5, "workers": 2}, {"gpus_per_worker": 0.5, "workers": 2}),
    ],
)
def test_the_grid_gets_what_the_keys_say(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, object], passed: dict[str, object]
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(simulation, "CohortGrid", lambda app, **options: given.update(options))
    config = simulation.as_carried_out(RunConfig.read({**SMALL, **keys}))
    simulation.cohort_grid(config)
    assert passed.items() <= given.items()
    assert (given["num_nodes"], given["seed"]) == (10, 0)
    assert given["run_config"] == config.to_flower()


@pytest.mark.parametrize("end", [KeyboardInterrupt(), MetabloomError("no round")])
def test_the_grid_is_closed_however_a_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    closed: list[bool] = []

    class Watched(CohortGrid):
        def close(self) -> None:
            super().close()
            closed.append(True)

    def ending(*_: Any, **__: Any) -> Path:
        raise end

    monkeypatch.setattr(simulation, "CohortGrid", Watched)
    monkeypatch.setattr(server_app, "run", ending)
    if isinstance(end, KeyboardInterrupt):
        assert simulate(tmp_path).exit_code == 130
    else:
        with pytest.raises(MetabloomError, match="no round"):
            simulate(tmp_path)
    assert closed == [True]


def test_workers_reach_the_same_model_to_the_bit(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    assert simulate(here, workers=0).exit_code == 0
    done = simulate(there, workers=2, client_timeout_s=60)
    assert done.exit_code == 0
    assert "workers: 2, kernel: eager" in done.output
    assert model(there) == model(here)
    first, second = results_in(here), results_in(there)
    assert second["unseen"] == first["unseen"]
    assert second["failures"] == 0


COMMAND = "from metabloom.cli import main; main()"
MARK = "METABLOOM_TEST_OF_STOPPING"


def processes_of(mark: str) -> list[str]:
    """Return the command of each process that has ``mark`` in its environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it ended, or is somebody else's
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are not told here")
def test_a_run_that_is_terminated_leaves_no_process_and_says_what_is_saved(tmp_path: Path) -> None:
    """Ray puts a handler of its own in the place of ours."""
    settings = {**SMALL, "rounds": 100_000, "workers": 2, "kernel": "eager", "eval-every": 0}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    mark = f"{MARK}={tmp_path}"
    run = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "simulate", *words, "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env={**os.environ, MARK: str(tmp_path)},
    )
    try:
        until = time.monotonic() + 240
        while not list((tmp_path / "out").rglob("round-*.safetensors")):
            assert run.poll() is None, run.communicate()[0]
            assert time.monotonic() < until, "no round was saved"
            time.sleep(0.1)
        assert len(processes_of(mark)) >= 4  # this one, Ray's own, two workers
        run.terminate()
        said, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130, said
    assert "the whole rounds are saved" in said
    assert "Traceback" not in said
    until = time.monotonic() + 30
    while left := processes_of(mark):
        assert time.monotonic() < until, left
        time.sleep(0.1)
