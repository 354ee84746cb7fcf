"""The contract for strategies that others write: ours keep it, and broken ones do not."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg

from metabloom.config import RunConfig
from metabloom.strategies import STRATEGIES, Recipe, Reply, Rule, RuleStrategy, interpolate
from metabloom.strategies.fedavg import local_sgd
from metabloom.testing import AVERAGING, CONTRACT, Check

DOCS = Path(__file__).parents[2] / "docs" / "own-strategies.md"
PAGE = DOCS.read_text(encoding="utf-8")
NAMED = {check.__name__: check for check in (*CONTRACT, *AVERAGING)}  # type: ignore[attr-defined]

# The models of these follow from an average of the clients' models.
OF_AVERAGES = ("fedavg", "fedmeta", "fedprox", "meta-sgd", "per-fedavg", "reptile", "scaffold")
PLAIN = {"server_optimizer": "sgd", "outer_lr": 1.0}


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ["ditto", "fedmeta", "fedper", "scaffold"])
def test_ours_keep_the_contract(check: Check, name: str, tmp_path: Path):
    check(name, tmp_path)


@pytest.mark.parametrize("check", AVERAGING, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", OF_AVERAGES)
def test_ours_that_average_keep_more(check: Check, name: str, tmp_path: Path):
    check(name, tmp_path, **PLAIN)


# --- broken ones ----------------------------------------------------------------------------------


def of_rule(update: Any) -> partial[RuleStrategy]:
    return partial(RuleStrategy, Rule(lambda arrays: {}, update))


def last_wins(state: Any, sent: Any, replies: list[Reply]) -> Any:
    return state, dict(replies[-1].arrays)


def drifting() -> partial[RuleStrategy]:
    """Return a strategy that keeps what it learned of past rounds where no checkpoint sees it."""
    rounds = []

    def update(state: Any, sent: Any, replies: list[Reply]) -> Any:
        rounds.append(1)
        scale = np.float32(1 + 0.01 * len(rounds))
        return state, {name: value * scale for name, value in replies[0].arrays.items()}

    return of_rule(update)


def noisy(state: Any, sent: Any, replies: list[Reply]) -> Any:
    noise = np.random.default_rng().normal(scale=1e-3)
    return state, {n: (v + noise).astype(v.dtype) for n, v in replies[0].arrays.items()}


def doubles(state: Any, sent: Any, replies: list[Reply]) -> Any:
    return state, {n: value.astype(np.float64) for n, value in replies[0].arrays.items()}


class Unsorted(RuleStrategy):
    """Takes replies as they come."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        return FlowersFedAvg.aggregate_train(self, server_round, replies)


class Greedy(RuleStrategy):
    """Asks all clients that may train."""

    def _sample(self, candidates: Any, server_round: int) -> Any:
        return candidates


BROKEN = {
    "names_shapes_and_dtypes_stay": of_rule(doubles),
    "the_same_seed_gives_the_same_model": of_rule(noisy),
    "the_order_of_replies_does_not_matter": partial(Unsorted, interpolate()),
    "two_halves_are_the_whole": drifting(),
    "a_bad_reply_is_as_none": partial(Unsorted, interpolate()),
    "only_training_clients_train": partial(Greedy, interpolate()),
    "clients_that_learn_nothing_leave_the_model": of_rule(noisy),
    "one_client_is_its_own_run": partial(RuleStrategy, interpolate(0.5)),
}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch):
    """Return what registers a strategy of FedAvg's clients as "mine" for this test."""
    monkeypatch.setattr(STRATEGIES, "_entries", dict(STRATEGIES._entries))

    def register(strategy: Any) -> None:
        def recipe(config: RunConfig) -> Recipe:
            return Recipe(strategy=strategy, client="sgd", client_options=local_sgd(config))

        STRATEGIES.add("mine", recipe)

    return register


@pytest.mark.parametrize("clause", BROKEN)
def test_a_strategy_that_breaks_a_clause_is_told_so(clause: str, registered, tmp_path: Path):
    registered(BROKEN[clause])
    with pytest.raises(AssertionError, match=r"\w"):
        NAMED[clause]("mine", tmp_path)


# --- a project of somebody else -------------------------------------------------------------------


def block(name: str) -> str:
    (found,) = re.findall(rf"```python\n(# {name}\n.*?)```", PAGE, flags=re.DOTALL)
    return found


def test_one_file_makes_a_strategy_and_its_tests(tmp_path: Path):
    for name in ("equal_steps.py", "test_equal_steps.py"):
        (tmp_path / name).write_text(block(name), encoding="utf-8")
    # Both find modules beside them in this way: installed, "metabloom" is at home elsewhere.
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    call = partial(
        subprocess.run,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    (command,) = re.findall(r"```console\n(.*?)\n```", PAGE)
    words = [
        *command.partition("metabloom ")[2].split(),
        "--set",
        "rounds=2",
        "--set",
        "device=cpu",
        "--out",
        "run",
    ]
    ran = call([Path(sys.executable).with_name("metabloom"), *words])
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "run" / "results.json").exists()
    tested = call([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"])
    assert "9 passed" in tested.stdout, tested.stdout


def test_the_page_names_every_check():
    for name in NAMED:
        assert f"`{name}`" in PAGE
