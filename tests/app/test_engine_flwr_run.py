"""The cohort engine inside Flower's own simulation: one Ray for both, and the same model."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from metabloom.cli import app as command_line
from tests.app.flower_runs import (
    REPOSITORY,
    clients_by_round,
    flower,
    largest_difference,
    results_in,
    toml_of,
)

KEYS = {"num-clients": 12, "rounds": 3, "clients-per-round": 6, "eval-every": 2, "device": "cpu"}


@pytest.mark.e2e
@pytest.mark.parametrize("workers", [0, 2])
def test_a_flwr_run_on_the_cohort_engine_reaches_the_simulators_model(
    tmp_path: Path, workers: int
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    config = tmp_path / "run.toml"
    config.write_text(toml_of({**KEYS, "out": str(here)}), encoding="utf-8")
    done = CliRunner().invoke(command_line, ["simulate", "--config", str(config)])
    assert done.exit_code == 0, done.output

    chosen = {"engine": "cohort", "workers": workers, "out": str(there)}
    config.write_text(toml_of({**KEYS, **chosen}), encoding="utf-8")
    home = tmp_path / "flower"
    home.mkdir()
    with flower(home) as link:  # two nodes, of which nobody is asked
        said = link.run(REPOSITORY, supernodes=2, config=config, timeout_s=240)
    assert f"engine: cohort, workers: {workers}, kernel: eager" in said, said
    assert largest_difference(here, there) == 0
    assert clients_by_round(here) == clients_by_round(there)
    assert results_in(there)["clients"] == {"train": 10, "validation": 1, "unseen": 1}
    assert results_in(there)["failures"] == 0
