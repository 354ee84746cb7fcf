"""``metabloom simulate`` with runs that end early: what is written, said and refused."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from metabloom.cli import app
from metabloom.config import RunConfig
from metabloom.errors import ConfigError

SMALL = ("num-clients=10", "clients-per-round=3", "device=cpu", "strategy=fedavg", "eval-steps=1")


def simulate(out: Path, *settings: str) -> Result:
    words = [word for setting in (*SMALL, *settings) for word in ("--set", setting)]
    return CliRunner().invoke(
        app, ["simulate", *words, "--out", str(out)], env={"COLUMNS": "200"}, catch_exceptions=False
    )


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_patience_ends_a_run_that_leaves_its_best_model(tmp_path: Path):
    settings = ("local-lr=1", "inner-lr=0.001")  # the labels are permuted: nobody gets far
    early = (*settings, "patience=2", "eval-every=1", "rounds=40")
    said = simulate(tmp_path / "early", *early).output
    told = results(tmp_path / "early")
    scores = [
        (entry["validation"]["accuracy_after"]["1"], -entry["validation"]["loss_after"]["1"])
        for entry in told["history"]
    ]
    best = scores.index(max(scores)) + 1
    assert told["ending"] == {
        "rounds": best + 2,
        "model_round": best,
        "reason": f"patience = 2: no better validation since that of round {best}",
    }
    assert len(scores) == best + 2 < 40
    line = f"after round {best + 2}, {told['ending']['reason']}; the model is that of round {best}"
    assert f"ended {line}" in said
    assert line in (tmp_path / "early" / "report.html").read_text(encoding="utf-8")
    simulate(tmp_path / "best", *settings, f"rounds={best}")
    models = [tmp_path / name / "model.safetensors" for name in ("early", "best")]
    assert models[0].read_bytes() == models[1].read_bytes()
    assert told["unseen"] == results(tmp_path / "best")["unseen"]
    assert "ending" not in results(tmp_path / "best")


def test_bytes_of_training_are_counted_and_end_a_run(tmp_path: Path):
    simulate(tmp_path / "one", "rounds=1", "eval-every=1")
    one = results(tmp_path / "one")
    assert one["bytes_training"] == one["history"][0]["bytes_training"]
    assert one["bytes_up"] * 2 == one["bytes_training"]
    assert one["bytes_training"] < one["bytes_up"] + one["bytes_down"]
    bound = 2 * one["bytes_training"] + 1
    said = simulate(tmp_path / "out", f"max-bytes={bound}", "rounds=50").output
    told = results(tmp_path / "out")
    assert told["ending"]["rounds"] == 3
    assert told["ending"]["model_round"] is None
    assert f"ended after round 3, max-bytes = {bound}" in said
    # Resumed with more of it, the run goes on.
    simulate(tmp_path / "out", f"max-bytes={bound + one['bytes_training']}", "resume=true")
    assert results(tmp_path / "out")["ending"]["rounds"] == 4


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"patience": 2, "eval-every": 0}, "no round is validated with eval-every = 0"),
        ({"patience": 2, "rounds": 5}, "eval-every = 10 and rounds = 5"),
        (
            {"patience": 2, "privacy.noise-multiplier": 1.0},
            "private clients keep their metrics to themselves",
        ),
        ({"patience": -1}, "patience = -1"),
        ({"max-bytes": -1}, "max-bytes = -1"),
        ({"max-seconds": -1.0}, "max-seconds = -1.0"),
        ({"max-seconds": float("inf")}, "max-seconds = inf"),
    ],
)
def test_an_ending_that_cannot_work_is_refused(keys: dict, message: str):
    with pytest.raises(ConfigError) as refused:
        RunConfig.read(keys)
    assert message in str(refused.value)


def test_private_clients_that_tell_metrics_may_be_waited_for():
    told = {"privacy.noise-multiplier": 1.0, "privacy.unprotected-metrics": "all"}
    assert RunConfig.read({"patience": 2, **told}).patience == 2
