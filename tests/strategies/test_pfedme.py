"""pFedMe as a whole: the server's step, and personal models that are scored and stay."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from metabloom.cli import app
from metabloom.clients import PFedMeClient
from metabloom.config import RunConfig
from metabloom.errors import ConfigError
from metabloom.strategies import STRATEGIES, PFedMe
from tests.strategies.points import USUAL, numbers, of_parabola, run

OPTIONS = {"pull": 15.0, "inner_lr": 1 / 16, "local_lr": 0.005}
SMALL = {"strategy": "pfedme", "num-clients": 10, "clients-per-round": 8, "device": "cpu"}


def clients(*centres: float, **options):
    """Return clients of the loss 1/2 (theta - c)^2."""
    return [
        lambda place, c=c: of_parabola(PFedMeClient, 1.0, c, context=place, **OPTIONS, **options)
        for c in centres
    ]


@pytest.mark.parametrize("beta", [1.0, 0.5, 1.7])
def test_a_round_goes_beta_of_the_way_to_the_clients_mean(beta: float):
    # Each w_i is .075 c / 16 (known answer 8), their mean that of c = 2.
    found = numbers(run(PFedMe(beta=beta, **USUAL), clients(1.0, 3.0)))
    assert found["theta"] == pytest.approx(beta * 2 * 0.0046875, abs=1e-12)


def test_rounds_of_several_clients_follow_the_recursion():
    centres, w = (1.0, -2.0, 4.0), 0.0
    for _ in range(3):
        answers = []
        for c in centres:
            theta = w + 1 / 16 * (c - w)  # one step of 1 / (a + lambda) from w, where the pull is 0
            answers.append(w - 0.075 * (w - theta))
        w = 0.5 * w + 0.5 * sum(answers) / 3
    found = numbers(run(PFedMe(beta=0.5, **USUAL), clients(*centres), rounds=3))
    assert found["theta"] == pytest.approx(w, abs=1e-12)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_a_beta_that_is_no_step_is_refused(beta: float):
    with pytest.raises(ConfigError, match=f"beta = {beta}"):
        PFedMe(beta=beta)


def test_the_configuration_reaches_both_ends():
    keys = {"pfedme-lambda": 3.0, "pfedme-beta": 0.7, "inner-steps": 4, "local-lr": 0.2}
    recipe = STRATEGIES["pfedme"](RunConfig.read({"strategy": "pfedme", **keys}))
    options = recipe.client_options
    assert (options["pull"], options["inner_steps"], options["local_lr"]) == (3.0, 4, 0.2)
    assert recipe.strategy().beta == 0.7
    assert recipe.strategy().weighting == "uniform"
    assert PFedMe.scores_training_clients


def simulate(out: Path, **keys: object) -> dict:
    chosen = [f"{key}={value}" for key, value in {**SMALL, **keys}.items()]
    words = [word for one in chosen for word in ("--set", one)]
    arguments = ["simulate", *words, "--out", str(out)]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_training_clients_are_scored_by_their_personal_models(tmp_path: Path):
    """Each client's classes are named in its own way: only a personal model can know them."""
    results = simulate(
        tmp_path, rounds=15, **{"inner-steps": 5, "inner-lr": 0.3, "local-epochs": 5}
    )
    assert len(results["trained"]["per_client"]) == 8
    assert results["trained"]["accuracy_before"] > 0.6
    assert results["unseen"]["accuracy_before"] < 0.5  # one that never trained has none
    assert (tmp_path / "clients").is_dir()


def test_private_clients_train_on_releases_and_keep_a_personal_model(tmp_path: Path):
    keys = {"privacy.noise-multiplier": 1.0, "privacy.unprotected-metrics": "all", "rounds": 2}
    results = simulate(tmp_path, **keys, **{"inner-steps": 2})
    assert results["privacy"]["record_level"]["epsilon_max"] > 0
    assert len(results["trained"]["per_client"]) == 8
