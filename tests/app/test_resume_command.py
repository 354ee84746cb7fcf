"""``metabloom simulate --resume``: what a user does after a crash, Ctrl-C, or for more rounds."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from metabloom.cli import app
from metabloom.errors import ConfigError
from metabloom.strategies import STRATEGIES
from tests.app.needed import needed

EVERY = pytest.mark.parametrize("strategy", list(STRATEGIES))
COMMAND = "from metabloom.cli import main; main()"
SMALL = ("num-clients=8", "clients-per-round=3", "eval-every=2", "device=cpu")


def simulate(out: Path, *settings: str, resume: bool = False) -> Result:
    words = [word for setting in (*SMALL, *settings) for word in ("--set", setting)]
    more = ["--resume"] if resume else []
    return CliRunner().invoke(
        app, ["simulate", *words, *more, "--out", str(out)], catch_exceptions=False
    )


def told(out: Path) -> dict:
    """Return all of results.json but how long it took, how far it was to go, and where to."""
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    del results["seconds"], results["config"]
    parts = [results, *results["history"]]
    for entry in results["history"]:
        del entry["seconds"]
    if "teacher" in results["strategy"]:  # it is sent again after a resume
        for part in parts:
            del part["bytes_down"], part["bytes_training"]
    return {**results, "rounds": None}


def model(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@EVERY
def test_two_halves_are_the_whole_with_the_clients_of_the_app(strategy: str, tmp_path: Path):
    """Personal models are scored in the results: they are the same too."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    keys = [f"strategy={strategy}", *needed(strategy, tmp_path)]
    keys += ["energy-start=0.98"] if strategy == "fedkd" else []  # else it grows over the rounds
    assert simulate(whole, *keys, "rounds=6").exit_code == 0
    assert simulate(halves, *keys, "rounds=3").exit_code == 0
    assert simulate(halves, *keys, "rounds=6", resume=True).exit_code == 0
    assert model(halves) == model(whole)
    assert told(halves) == told(whole)


def _has_round(folder: Path, least: int) -> bool:
    """Return whether the state of round ``least`` or a later one is there; old ones are removed."""
    return any(int(file.stem[-8:]) >= least for file in folder.rglob("round-*.safetensors"))


@pytest.mark.parametrize(
    ("strategy", "stop"),
    [("fedmeta", signal.SIGTERM), ("ditto", signal.SIGINT), ("ditto", signal.SIGKILL)],
)
def test_a_run_that_was_stopped_and_resumed_ends_as_if_nothing_had_been(
    strategy: str, stop: signal.Signals, tmp_path: Path
):
    """After kill -9 up to four rounds are played again: clients' own models must go back too."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = [*SMALL, f"strategy={strategy}", "rounds=60", "checkpoint-every=5"]
    words = [word for setting in settings for word in ("--set", setting)]
    run = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "simulate", *words, "--out", str(stopped)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # Jobs in the background of a shell ignore Ctrl-C, and hand that on to what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    folder = stopped / "checkpoints"
    waited_for = (folder, 5)
    if stop is signal.SIGKILL:  # personal models of a round that no checkpoint holds
        waited_for = (stopped / "clients", 7)
    deadline = time.monotonic() + 60
    while not _has_round(*waited_for) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    run.send_signal(stop)
    said, _ = run.communicate(timeout=60)
    if stop is signal.SIGKILL:
        assert run.returncode == -signal.SIGKILL
    else:
        assert run.returncode == 130
        assert "interrupted: the whole rounds are saved, --resume goes on from them" in said
        assert "Traceback" not in said
    newest = max(file.name for file in folder.glob("round-*.json"))
    assert "round-00000005.json" <= newest < "round-00000060.json"
    assert simulate(whole, *settings[4:]).exit_code == 0
    assert simulate(stopped, *settings[4:], resume=True).exit_code == 0
    assert model(stopped) == model(whole)
    assert told(stopped) == told(whole)


def test_a_run_with_other_keys_is_refused_with_each_of_them(tmp_path: Path):
    assert simulate(tmp_path, "strategy=fedavg", "rounds=1").exit_code == 0
    with pytest.raises(ConfigError) as refused:
        simulate(tmp_path, "strategy=fedavg", "rounds=2", "local-lr=0.3", "seed=4", resume=True)
    assert "checkpoint has local-lr = 0.1, this run 0.3" in str(refused.value)
    assert "checkpoint has seed = 0, this run 4" in str(refused.value)
    assert "resume = false" in str(refused.value)


def test_keys_that_do_not_decide_what_is_computed_may_differ(tmp_path: Path):
    assert simulate(tmp_path, "strategy=ditto", "rounds=2", "timeout-s=100").exit_code == 0
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    tmp_path.rename(moved)
    settings = ("rounds=3", "timeout-s=50", "checkpoint-every=2", "checkpoints-kept=1")
    assert simulate(moved, "strategy=ditto", *settings, resume=True).exit_code == 0
    assert simulate(tmp_path, "strategy=ditto", "rounds=3").exit_code == 0
    assert model(moved) == model(tmp_path)
    assert told(moved) == told(tmp_path)


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(tmp_path: Path, caplog):
    assert simulate(tmp_path / "whole", "rounds=4").exit_code == 0
    out = tmp_path / "out"
    assert simulate(out, "rounds=3").exit_code == 0
    newest = out / "checkpoints" / "round-00000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert simulate(out, "rounds=4", resume=True).exit_code == 0
    assert "round-00000003" in caplog.text
    assert model(out) == model(tmp_path / "whole")


def test_without_a_checkpoint_resume_begins_anew(tmp_path: Path, caplog):
    assert simulate(tmp_path / "out", "rounds=1", resume=True).exit_code == 0
    assert "the run begins anew" in caplog.text


def test_an_interrupt_before_the_first_round_promises_nothing(tmp_path: Path, monkeypatch):
    def interrupted(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("metabloom.server_app.run", interrupted)
    result = simulate(tmp_path / "out", "rounds=2")
    assert result.exit_code == 130
    assert "interrupted: no round is saved" in result.output


def test_a_resumed_run_finds_personal_models_though_it_saves_no_more(tmp_path: Path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert simulate(whole, "strategy=ditto", "rounds=4").exit_code == 0
    assert simulate(halves, "strategy=ditto", "rounds=2").exit_code == 0
    last = ("strategy=ditto", "rounds=4", "checkpoint-every=0")
    assert simulate(halves, *last, resume=True).exit_code == 0
    assert told(halves) == told(whole)
