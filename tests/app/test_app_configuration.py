"""What both ends make of a configuration: plugins, keys without effect, too few nodes."""

import logging
from pathlib import Path

import pytest
from typer.testing import CliRunner

from metabloom.cli import app as command_line
from metabloom.client_app import app as client_app
from metabloom.config import RunConfig
from metabloom.errors import ConfigError, MetabloomError
from metabloom.server_app import run
from metabloom.sim import DATASETS, CohortGrid
from metabloom.strategies import STRATEGIES
from metabloom.task import federation_of, idle_keys, recipe_of

PLUGIN = """
import numpy as np
from metabloom.sim import DataSpec, register_dataset

@register_dataset("blobs-of-a-plugin", DataSpec((2,), 2, "mlp"))
def blobs(*, root, seed, num_clients, download):
    rng = np.random.default_rng(seed)
    labels = np.arange(20) % 2
    return {f"c{i}": (rng.normal(size=(20, 2)) + 4 * labels[:, None], labels) for i in range(10)}
"""


def test_a_plugins_data_set_runs_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_blobs.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(DATASETS, "_entries", dict(DATASETS._entries))  # gone after this test
    arguments = ["--dataset", "blobs-of-a-plugin", "--set", "plugins=my_blobs", "--set", "rounds=2"]
    result = CliRunner().invoke(
        command_line, ["simulate", *arguments, "--out", str(tmp_path)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "results.json").exists()


def test_a_plugin_that_cannot_be_imported_is_named_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"module 'not_there' cannot be imported.*PYTHONPATH"):
        recipe_of(RunConfig.read({"plugins": "not_there"}))


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_no_key_is_idle_on_defaults(strategy: str) -> None:
    assert idle_keys(RunConfig.read({"strategy": strategy})) == []


def test_a_key_without_effect_is_told_and_one_with_effect_is_not(tmp_path: Path) -> None:
    keys = {"strategy": "per-fedavg", "server-optimizer": "sgd", "outer-lr": 0.2}
    assert idle_keys(RunConfig.read(keys)) == ["server-optimizer"]
    settings = ["--set", "server-optimizer=sgd", "--set", "rounds=1", "--out", str(tmp_path)]
    result = CliRunner().invoke(
        command_line, ["simulate", "--strategy", "fedavg", *settings], catch_exceptions=False
    )
    assert "server-optimizer has no effect under fedavg" in result.output


def test_two_nodes_are_refused_before_any_round_with_the_remedy(tmp_path: Path) -> None:
    config = RunConfig.read({"out": str(tmp_path / "out")})
    grid = CohortGrid(client_app, num_nodes=2, run_config=config.to_flower())
    with pytest.raises(MetabloomError, match=r"no node can take part.*num-supernodes=60"):
        run(grid, config)
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_missing_data_set_ends_a_flower_run_before_any_round(tmp_path: Path) -> None:
    keys = {"dataset": "mnist", "data-root": str(tmp_path), "out": str(tmp_path / "out")}
    config = RunConfig.read(keys)
    grid = CohortGrid(client_app, num_nodes=4, run_config=config.to_flower())
    with pytest.raises(MetabloomError, match=r"partition-0 says: data set 'mnist' needs"):
        run(grid, config)


def test_configurations_that_differ_in_training_alone_share_one_federation() -> None:
    first, second = (federation_of(RunConfig.read({"inner-lr": rate})) for rate in (0.1, 0.2))
    assert first is second
    assert federation_of(RunConfig.read({"seed": 5})) is not first


def test_a_failed_client_is_told_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metabloom.clients import SGDClient

    def fit(self: SGDClient, parameters: object, config: object) -> None:
        raise RuntimeError("the disk is [full]")

    monkeypatch.setattr(SGDClient, "fit", fit)
    settings = ["--set", "rounds=1", "--out", str(tmp_path)]
    with pytest.raises(MetabloomError, match=r"no round had enough good replies.*\[full\]"):
        CliRunner().invoke(
            command_line, ["simulate", "--strategy", "fedavg", *settings], catch_exceptions=False
        )


def test_only_warnings_of_flowers_log_are_shown_unless_asked_for(tmp_path: Path) -> None:
    settings = ["--set", "rounds=3", "--set", "num-clients=6", "--out", str(tmp_path)]
    quiet = CliRunner().invoke(command_line, ["simulate", *settings], catch_exceptions=False)
    assert logging.getLogger("flwr").level == logging.WARNING
    assert "[ROUND 1/3]" not in quiet.output
    assert quiet.output.count("8 clients wanted, 4 there are") == 1  # not in each round
    loud = CliRunner().invoke(
        command_line, ["simulate", "--verbose", *settings], catch_exceptions=False
    )
    assert logging.getLogger("flwr").level == logging.INFO
    assert "[ROUND 1/3]" in loud.output


STRATEGY_PLUGIN = """
from functools import partial
from metabloom.strategies import STRATEGIES, FedAvg, Recipe

@STRATEGIES.register("mean-of-a-plugin")
def recipe(config):
    return Recipe(strategy=partial(FedAvg, weighting="uniform"), client="sgd",
                  client_options={"local_lr": config.local_lr})
"""


def test_a_plugins_strategy_is_known_to_whichever_end_asks_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_mean.py").write_text(STRATEGY_PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(STRATEGIES, "_entries", dict(STRATEGIES._entries))
    keys = {"strategy": "mean-of-a-plugin", "plugins": "my_mean", "order": "first", "local-lr": 1}
    assert idle_keys(RunConfig.read(keys)) == ["order"]
    assert recipe_of(RunConfig.read(keys)).client_options == {"local_lr": 1.0}


def test_a_plugin_that_is_broken_is_named_with_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_broken.py").write_text("def half(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="'my_broken' fails when it is imported: SyntaxError"):
        recipe_of(RunConfig.read({"plugins": "my_broken"}))
