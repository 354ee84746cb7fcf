"""Three architectures under `flwr run`: the same models as in the simulator."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from metabloom.config import RunConfig
from metabloom.server_app import run
from metabloom.simulation import as_carried_out, cohort_grid
from tests.app.flower_runs import REPOSITORY, Flower, flower, results_in, toml_of

NODES = 8
KEYS = {
    "dataset": "digits",
    "architectures": "small: mlp hidden=16; cnn dense=16; resnet18",
    "num-clients": NODES,
    "clients-per-round": 6,
    "rounds": 2,
    "eval-every": 0,
    "eval-steps": "1",
    "distill-steps": 50,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def local_flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    with flower(tmp_path_factory.mktemp("flower")) as link:
        yield link


@pytest.mark.e2e
@pytest.mark.parametrize("strategy", ["fedavg", "ds-fl"])
def test_flowers_engine_and_the_simulator_train_the_same_three_models(
    local_flower: Flower, tmp_path: Path, strategy: str
):
    under_flower, simulated = tmp_path / "flower", tmp_path / "simulated"
    file = tmp_path / "run.toml"
    file.write_text(toml_of({**KEYS, "strategy": strategy, "out": str(under_flower)}))
    local_flower.run(REPOSITORY, supernodes=NODES, config=file, timeout_s=300)
    config = as_carried_out(RunConfig.read({**KEYS, "strategy": strategy, "out": str(simulated)}))
    with cohort_grid(config) as grid:
        run(grid, config)
    one, other = results_in(under_flower), results_in(simulated)
    assert one["failures"] == other["failures"] == 0
    assert [entry["clients"] for entry in one["history"]] == [
        entry["clients"] for entry in other["history"]
    ]
    for name in ("small", "cnn", "resnet18"):
        first, second = (
            load_file(folder / f"model-{name}.safetensors") for folder in (under_flower, simulated)
        )
        assert list(first) == list(second)
        assert max(float(np.abs(first[key] - second[key]).max()) for key in first) < 1e-5
