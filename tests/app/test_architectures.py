"""The key ``architectures``: what it says, who gets which, and a run of three on both engines."""

import json
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from metabloom.architectures import architectures_of, assigned, joined, part_of
from metabloom.client_app import client_fn, properties
from metabloom.config import RunConfig
from metabloom.errors import ConfigError
from metabloom.server_app import run
from metabloom.simulation import as_carried_out, cohort_grid
from metabloom.task import architectures_of_clients, federation_of, models_of

THREE = "small: mlp hidden=16; large: mlp hidden=64; conv4 width=8"
RUN = {
    "strategy": "fedavg",
    "architectures": THREE,
    "num-clients": 12,
    "rounds": 2,
    "clients-per-round": 8,
    "eval-steps": "1",
    "device": "cpu",
}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("mlp; mlp", "'mlp' comes twice"),
        ("a/b: mlp", "'a/b' cannot be a name"),
        (": mlp", "'' cannot be a name"),
        ("small: ", "names no model"),
        ("hidden=3", "names no model"),
        ("mlp hidden", "not of the form name=value"),
    ],
)
def test_what_cannot_be_a_list_of_architectures_is_refused(text: str, part: str):
    with pytest.raises(ConfigError, match=part):
        RunConfig.read({"architectures": text})


def test_a_model_beside_architectures_is_refused():
    with pytest.raises(ConfigError, match="leave one of the two out"):
        RunConfig.read({"architectures": "mlp", "model": "cnn"})


def test_an_empty_text_and_loose_semicolons_are_no_architectures():
    assert architectures_of("") == architectures_of(" ; ") == ()


@given(
    st.sets(st.text("abcdef", min_size=1, max_size=4), min_size=1, max_size=40), st.integers(1, 5)
)
def test_architectures_are_shared_out_evenly_and_not_by_order(clients: set[str], count: int):
    names = [f"k{i}" for i in range(count)]
    found = assigned(names, sorted(clients), seed=3)
    assert found == assigned(names, sorted(clients, reverse=True), seed=3)
    counts = [list(found.values()).count(name) for name in names]
    assert sum(counts) == len(clients)
    assert max(counts) - min(counts) <= 1


def test_another_seed_shares_out_otherwise():
    clients = [f"c{i}" for i in range(20)]
    assert assigned(["a", "b"], clients, seed=0) != assigned(["a", "b"], clients, seed=1)


def test_models_side_by_side_come_apart_again():
    models = {"a": {"x": np.zeros(2), "y": np.ones(1)}, "ab": {"x": np.ones(3)}}
    side_by_side = joined(models)
    assert list(side_by_side) == ["a/x", "a/y", "ab/x"]
    for name, arrays in models.items():
        assert part_of(side_by_side, name).keys() == arrays.keys()
    assert part_of({"x": np.zeros(1)}, "") == {"x": np.zeros(1)}


def context(config: RunConfig, index: int, **own) -> Context:
    nodes = len(federation_of(config))
    place = {"partition-id": index, "num-partitions": nodes, **own}
    return Context(1, index, place, RecordDict(), config.to_flower())


def test_every_role_has_every_architecture_where_it_has_clients_enough():
    config = RunConfig.read({**RUN, "num-clients": 60})
    federation, found = federation_of(config), architectures_of_clients(config)
    for role in ("train", "validation", "unseen"):
        names = [found[federation.client_ids[i]] for i in federation.indices(role)]
        assert set(names) == {"small", "large", "conv4"}


def test_a_node_builds_the_model_of_its_architecture_and_its_own_word_counts():
    config = RunConfig.read(RUN)
    found = architectures_of_clients(config)
    for index, name in enumerate(federation_of(config).client_ids):
        assert properties(context(config, index))["architecture"] == found[name]
        assert client_fn(context(config, index)).model is models_of(config)[found[name]]
    own = context(config, 0, architecture="large")
    assert properties(own)["architecture"] == "large"
    assert client_fn(own).model is models_of(config)["large"]


def test_a_node_with_an_architecture_that_the_run_does_not_have_says_so():
    with pytest.raises(
        ConfigError, match="'huge', the run's architectures are small, large, conv4"
    ):
        properties(context(RunConfig.read(RUN), 0, architecture="huge"))


def test_without_architectures_a_nodes_own_word_changes_nothing():
    config = RunConfig.read({key: value for key, value in RUN.items() if key != "architectures"})
    assert "architecture" not in properties(context(config, 0, architecture="large"))


@pytest.mark.parametrize("strategy", ["fedavg", "fedmeta"])
def test_a_run_of_three_architectures_writes_each_model_and_its_scores(
    strategy: str, tmp_path: Path
):
    config = as_carried_out(RunConfig.read({**RUN, "strategy": strategy, "out": str(tmp_path)}))
    with cohort_grid(config) as grid:
        run(grid, config)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["failures"] == results["quarantined"] == results["skipped"] == 0
    scores = results["unseen"]["by_architecture"]
    assert sum(one["clients"] for one in scores.values()) == results["clients"]["unseen"]
    for name, initial in models_of(config).items():
        trained = load_file(tmp_path / f"model-{name}.safetensors")
        assert {key: value.shape for key, value in trained.items()} == {
            key: tuple(value.shape) for key, value in initial.state_dict().items()
        }
        assert any(
            not np.array_equal(trained[key], value.numpy())
            for key, value in initial.state_dict().items()
        )
    assert not (tmp_path / "model.safetensors").exists()


def test_private_clients_train_the_architecture_that_they_have(tmp_path: Path):
    private = {
        "privacy.noise-multiplier": 1.0,
        "privacy.expected-batch-size": 30.0,
        "privacy.target-epsilon": 1000.0,
        "privacy.unprotected-metrics": "all",
    }
    keys = {**RUN, **private, "rounds": 1, "out": str(tmp_path)}
    config = as_carried_out(RunConfig.read(keys))
    with cohort_grid(config) as grid:
        run(grid, config)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["failures"] == results["quarantined"] == results["skipped"] == 0
    assert results["privacy"]["record_level"]["epsilon_max"] > 0
    for name, initial in models_of(config).items():
        trained = load_file(tmp_path / f"model-{name}.safetensors")
        noised = [not np.array_equal(trained[k], v) for k, v in initial.state_dict().items()]
        assert all(noised), name
