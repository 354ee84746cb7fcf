"""SuperNodes with different hardware: each trains the architecture that its own config names."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from metabloom.config import RunConfig
from metabloom.sim import load_federation
from metabloom.task import models_of
from tests.app.flower_runs import results_in
from tests.deploy.loopback import loopback, needs_tools

NODES = 5
KINDS = "small: mlp hidden=16; cnn dense=16; resnet18"
RUN_S = 400.0


@needs_tools
@pytest.mark.e2e
@pytest.mark.parametrize("strategy", ["fedavg", "ds-fl"])
def test_an_mlp_a_cnn_and_a_resnet_train_on_supernodes_of_their_own(tmp_path: Path, strategy: str):
    roles = load_federation("digits", seed=0, num_clients=NODES).roles
    assert roles.count("train") == 3
    kinds = iter(("small", "cnn", "resnet18"))
    own = [next(kinds) if role == "train" else "resnet18" for role in roles]
    with loopback(tmp_path) as deployment:
        deployment.environment["METABLOOM_ARCHITECTURES"] = " ".join(own)
        deployment.script("up", str(NODES))
        keys = [
            f"strategy='{strategy}'",
            "rounds=2",
            "distill-steps=50",
            "eval-every=0",
            "eval-steps=1",
        ]
        keys += ["clients-per-round=3", f"architectures='{KINDS}'"]
        run, log = deployment.start_run(*keys)
        deployment.until("the run ends", lambda: run.poll() is not None, RUN_S)
        said = log.read_text(errors="replace")
        assert run.returncode == 0, f"{said}\n{deployment.logs()}"
        results = deployment.folder / "results"
        told = results_in(results)
        for entry in told["history"]:
            assert len(entry["clients"]) == 3
            assert entry["failures"] == entry["quarantined"] == []
        assert list(told["unseen"]["by_architecture"]) == ["resnet18"]
        config = RunConfig.read({"dataset": "digits", "architectures": KINDS})
        for name, model in models_of(config).items():
            trained = load_file(results / f"model-{name}.safetensors")
            initial = {key: value.numpy() for key, value in model.state_dict().items()}
            assert any(not np.array_equal(trained[key], initial[key]) for key in initial), name
