"""User-level privacy in the app: its keys, its ledger in the results folder, and results.json."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from metabloom.accounting import Event, epsilon_of
from metabloom.cli import app
from metabloom.config import RunConfig
from metabloom.errors import ConfigError, MetabloomError
from metabloom.ledger import PrivacyLedger
from metabloom.server_app import user_privacy_of
from metabloom.strategies import UserLevelPrivacy
from metabloom.task import idle_keys

SMALL = ("num-clients=8", "clients-per-round=3", "rounds=2", "eval-every=0", "device=cpu")


def simulate(out: Path, *more: str) -> dict:
    words = [word for setting in (*SMALL, *more) for word in ("--set", setting)]
    ended = CliRunner().invoke(app, ["simulate", *words, "--out", str(out)], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_both_levels_run_together_and_are_told_apart(tmp_path: Path):
    results = simulate(
        tmp_path / "out",
        "privacy.noise-multiplier=2.0",
        "privacy.public-counts=true",
        "user-privacy.noise-multiplier=1.5",
        "user-privacy.sample-rate=0.9",
    )
    assert set(results["privacy"]) == {"record_level", "user_level"}
    user, record = results["privacy"]["user_level"], results["privacy"]["record_level"]
    assert user["unit"] == "one client, added or removed"
    assert record["unit"] == "one record, added or removed"
    assert user["epsilon"] == pytest.approx(epsilon_of([Event(1.5, 0.9, 2)], 1e-5))
    assert user["rounds"] == 2
    assert (user["noise_multiplier"], user["sample_rate"], user["delta"]) == (1.5, 0.9, 1e-5)
    assert user["max_update_norm"] == 1.0
    assert "not the server" in user["protects_against"]
    booked = PrivacyLedger(tmp_path / "out" / "user-level.jsonl")
    assert booked.events == [(1.5, 0.9, 2)]
    # One of six clients at least was sampled in two rounds; else with chance 1e-12.
    assert record["epsilon_max"] > 0


def test_only_what_is_on_is_told(tmp_path: Path):
    assert "privacy" not in simulate(tmp_path / "off")
    results = simulate(tmp_path / "user", "user-privacy.noise-multiplier=2")
    assert list(results["privacy"]) == ["user_level"]
    assert results["privacy"]["user_level"]["sample_rate"] is None
    assert results["privacy"]["user_level"]["adjacency"] == "leave out"


def test_a_second_run_into_the_folder_of_a_spent_one_says_so(tmp_path: Path):
    settings = ("user-privacy.noise-multiplier=2", "user-privacy.target-epsilon=4")
    first = simulate(tmp_path, "rounds=4", *settings)
    assert [entry["skipped"] for entry in first["history"]][-1]
    with pytest.raises(MetabloomError, match="user-level budget was spent before the first round"):
        simulate(tmp_path, *settings)


def test_the_keys_become_the_parameters():
    assert user_privacy_of(RunConfig.read({})) is None
    keys = {
        "clients-per-round": 40,
        "user-privacy.noise-multiplier": 0.9,
        "user-privacy.max-update-norm": 0.3,
        "user-privacy.sample-rate": 0.2,
        "user-privacy.target-epsilon": 6.0,
        "user-privacy.target-delta": 1e-6,
        "user-privacy.adaptive-quantile": 0.5,
        "out": "there",
    }
    assert user_privacy_of(RunConfig.read(keys)) == UserLevelPrivacy(
        noise_multiplier=0.9,
        max_update_norm=0.3,
        expected_clients=40,
        sample_rate=0.2,
        target_epsilon=6.0,
        target_delta=1e-6,
        adaptive_quantile=0.5,
        ledger=Path("there") / "user-level.jsonl",
    )


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        (
            {"user-privacy.max-update-norm": 2.0},
            "user-privacy.max-update-norm is set, but user privacy is off: set "
            "user-privacy.noise-multiplier above 0",
        ),
        ({"privacy.sample-rate": 0.2}, "privacy.sample-rate is set, but privacy is off"),
        (
            {"user-privacy.noise-multiplier": 1.0, "privacy.sample-rate": 0.2},
            "privacy.sample-rate is set, but privacy is off",
        ),
        (
            {"user-privacy.noise-multiplier": 1.0, "aggregation": "median"},
            "aggregation = 'median' with user-privacy",
        ),
    ],
)
def test_keys_that_cannot_go_together_are_refused(keys, complaint):
    with pytest.raises(ConfigError, match=complaint):
        RunConfig.read(keys)


def test_weights_are_told_to_be_idle():
    keys = {"weighting": "examples"}
    assert idle_keys(RunConfig.read(keys)) == []
    private = RunConfig.read({**keys, "user-privacy.noise-multiplier": 1.0})
    assert idle_keys(private) == ["weighting"]
