"""Runs on digits in which clients share a part of their models, under heads of several forms."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from metabloom.config import RunConfig
from metabloom.errors import ConfigError, ModelError
from metabloom.models import MODELS, register_model
from metabloom.server_app import run
from metabloom.simulation import as_carried_out, cohort_grid
from metabloom.task import heads_of, idle_keys, models_of

RUN = {
    "num-clients": 12,
    "rounds": 2,
    "clients-per-round": 8,
    "eval-steps": "1",
    "device": "cpu",
}
FORMS = "flat: headed-for-tests layers=1; deep: headed-for-tests layers=2"


@pytest.fixture(autouse=True)
def headed() -> Iterator[None]:
    """Register a model whose head has as many layers as are wanted, on a body that is the same."""

    @register_model("headed-for-tests")
    class Headed(nn.Module):
        def __init__(self, input_shape, num_classes, layers=1):
            super().__init__()
            self.body = nn.Sequential(
                nn.Flatten(), nn.Linear(int(np.prod(input_shape)), 16), nn.Tanh()
            )
            between = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(int(layers) - 1)]
            self.head = nn.Sequential(*between, nn.Linear(16, num_classes))

        def forward(self, x):
            return self.head(self.body(x))

    yield
    del MODELS._entries["headed-for-tests"]


def ran(tmp_path: Path, **keys) -> tuple[dict, RunConfig]:
    settings = {**RUN, "out": str(tmp_path), **{k.replace("_", "-"): v for k, v in keys.items()}}
    config = as_carried_out(RunConfig.read(settings))
    with cohort_grid(config) as grid:
        run(grid, config)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["failures"] == results["quarantined"] == results["skipped"] == 0
    return results, config


@pytest.mark.parametrize("strategy", ["fedper", "fedrep", "fedbabu"])
def test_heads_of_several_forms_share_one_body(strategy: str, tmp_path: Path):
    results, config = ran(tmp_path, strategy=strategy, architectures=FORMS, head_epochs=2)
    trained = {kind: load_file(tmp_path / f"model-{kind}.safetensors") for kind in ("flat", "deep")}
    initial = {kind: model.state_dict() for kind, model in models_of(config).items()}
    for name in ("body.1.weight", "body.1.bias"):
        assert trained["flat"][name].tobytes() == trained["deep"][name].tobytes()
        assert not np.array_equal(trained["flat"][name], initial["flat"][name].numpy())
    for kind, model in initial.items():
        for name in heads_of(config)[kind]:
            assert trained[kind][name].tobytes() == model[name].numpy().tobytes()
    assert len(results["trained"]["per_client"]) == results["clients"]["train"]
    kept = [load_file(file) for file in (tmp_path / "clients").rglob("round-*.safetensors")]
    if strategy == "fedbabu":
        assert not kept
        return
    forms = {tuple(sorted(arrays)) for arrays in kept}
    assert {len(names) for names in forms} == {2, 4}
    assert all(name.startswith("head.") for names in forms for name in names)


def test_low_layers_of_several_forms_share_one_top(tmp_path: Path):
    keys = {"architectures": "small: mlp hidden=8,16; wide: mlp hidden=24,16", "head": "head"}
    _, config = ran(tmp_path, strategy="lg-fedavg", **keys)
    small, wide = (load_file(tmp_path / f"model-{kind}.safetensors") for kind in ("small", "wide"))
    assert small["head.weight"].tobytes() == wide["head.weight"].tobytes()
    for kind, trained in (("small", small), ("wide", wide)):
        initial = models_of(config)[kind].state_dict()
        for name in set(initial) - heads_of(config)[kind]:
            assert np.array_equal(trained[name], initial[name].numpy())


def test_what_travels_is_as_large_as_the_shared_part(tmp_path: Path):
    sizes = {}
    for strategy in ("fedavg", "fedper", "lg-fedavg"):
        results, _ = ran(tmp_path / strategy, strategy=strategy, model="mlp")
        sizes[strategy] = results["bytes_up"]
    # 64 inputs, 64 hidden units, 5 classes; headers of 128 bytes: four arrays and two
    assert sizes["fedper"] == 2 * 8 * (4 * (64 * 64 + 64) + 2 * 128)
    assert sizes["lg-fedavg"] == 2 * 8 * (4 * (64 * 5 + 5) + 2 * 128)
    assert sizes["fedavg"] == sizes["fedper"] + sizes["lg-fedavg"]


@pytest.mark.parametrize("strategy", ["fedper", "fedrep", "lg-fedavg", "fedbabu"])
def test_private_clients_are_charged_for_each_step_of_either_part(strategy: str, tmp_path: Path):
    private = {
        "privacy.noise-multiplier": 1.0,
        "privacy.expected-batch-size": 3.0,
        "privacy.target-epsilon": 1000.0,
        "privacy.unprotected-metrics": "all",
    }
    results, _ = ran(tmp_path, strategy=strategy, local_steps=2, **private)
    told = results["privacy"]["record_level"]
    assert told["epsilon_max"] > 0
    ledgers = [file.read_text() for file in (tmp_path / "ledgers").rglob("*.jsonl")]
    assert len(ledgers) == told["clients"]


def test_a_head_by_name_or_number_decides_what_travels(tmp_path: Path):
    deep = {"strategy": "fedper", "model": "mlp", "model_args": "hidden=32,16"}
    one, _ = ran(tmp_path / "one", **deep)
    two, config = ran(tmp_path / "two", head=2, **deep)
    assert heads_of(config)[""] == {"body.3.weight", "body.3.bias", "head.weight", "head.bias"}
    assert two["bytes_up"] < one["bytes_up"]


@pytest.mark.parametrize(
    ("keys", "error", "part"),
    [
        ({"head": "neck"}, ConfigError, "head = 'neck': MLP has no layer"),
        ({"head": "9"}, ConfigError, "MLP has 2"),
        ({"architectures": "mlp; cnn dense=8", "head": "body.1"}, ConfigError, "FemnistCNN has no"),
    ],
)
def test_a_head_that_cannot_be_told_ends_the_run_before_any_client_is_asked(
    keys: dict, error: type[Exception], part: str, tmp_path: Path
):
    config = RunConfig.read({**RUN, "strategy": "fedper", "out": str(tmp_path / "out"), **keys})
    with cohort_grid(as_carried_out(config)) as grid, pytest.raises(error, match=part):
        run(grid, config)
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_model_of_one_layer_is_refused_with_the_remedy(tmp_path: Path):
    @register_model("one-layer-for-tests")
    def one_layer(input_shape, num_classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(input_shape)), num_classes))

    keys = {**RUN, "strategy": "fedrep", "model": "one-layer-for-tests", "out": str(tmp_path)}
    config = as_carried_out(RunConfig.read(keys))
    try:
        with (
            cohort_grid(config) as grid,
            pytest.raises(ModelError, match="use a model of"),
        ):
            run(grid, config)
    finally:
        del MODELS._entries["one-layer-for-tests"]


def test_keys_of_heads_are_idle_elsewhere():
    keys = {"head": "head", "head-epochs": 3}
    assert idle_keys(RunConfig.read({"strategy": "fedavg", **keys})) == ["head", "head-epochs"]
    assert idle_keys(RunConfig.read({"strategy": "fedper", **keys})) == ["head-epochs"]
    assert idle_keys(RunConfig.read({"strategy": "fedrep", **keys})) == []


def test_personal_heads_know_labels_that_one_head_for_all_cannot(tmp_path: Path):
    """On digits the labels mean another thing to each client: without adaptation FedAvg guesses."""
    scores = {}
    torch.set_num_threads(1)
    for strategy in ("ditto", "fedper"):
        keys = {"rounds": 12, "clients_per_round": 10, "local_lr": 0.5, "ditto_lambda": 1.0}
        results, _ = ran(tmp_path / strategy, strategy=strategy, local_epochs=5, **keys)
        scores[strategy] = results["trained"]["accuracy_before"]
        scores[f"{strategy}, unseen"] = results["unseen"]["accuracy_before"]
    assert scores["fedper"] > 0.6
    assert scores["fedper, unseen"] < 0.5  # the head that nobody trained
