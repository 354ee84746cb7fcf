"""The federation of a generator: the server's step, both ends' model, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from metabloom.client_app import app as our_clients
from metabloom.config import RunConfig
from metabloom.errors import ConfigError
from metabloom.models import GeneratedModel
from metabloom.models.hypernetworks import BASE, GENERATOR
from metabloom.server_app import run
from metabloom.sim import CohortGrid
from metabloom.strategies import STRATEGIES
from metabloom.task import federation_of, idle_keys, model_of
from metabloom.wire import from_record
from tests.strategies.toy import PLAIN, Toy, start, strategy_of

NAME = {"strategy": "autoregressive"}


def test_with_plain_sgd_on_the_server_it_is_fedavg():
    keys = {**PLAIN, "weighting": "examples"}
    found, wanted = (
        from_record(start(strategy_of(name, keys), Toy(), rounds=3).arrays)
        for name in ("autoregressive", "fedavg")
    )
    for key, value in wanted.items():  # a step by w - (w - w_i): a rounding of each dtype
        eps = 8 * np.finfo(value.dtype).eps if np.issubdtype(value.dtype, np.floating) else 0
        np.testing.assert_allclose(found[key], value, rtol=0, atol=eps, err_msg=key)


def test_both_ends_build_the_model_and_its_generator_by_the_seed():
    config = RunConfig.read({**NAME, "hypernetwork-width": 16})
    model = model_of(config)
    assert isinstance(model, GeneratedModel)
    plain = model_of(RunConfig.read({"strategy": "fedavg"})).state_dict()
    base = {n.removeprefix(BASE): v for n, v in model.state_dict().items() if n.startswith(BASE)}
    assert base.keys() == plain.keys()
    assert all(torch.equal(base[name], value) for name, value in plain.items())
    assert model.generator.gru.from_state.in_features == 16
    features = model.generator.encoder.features
    assert type(features) is type(model.base)  # of the same architecture, other weights
    assert not torch.equal(features.body[1].weight, model.base.body[1].weight)
    other = model_of(RunConfig.read({**NAME, "hypernetwork-width": 16, "seed": 1}))
    drawn = [
        name
        for name, value in model.state_dict().items()
        if name.startswith(GENERATOR) and not torch.equal(value, other.state_dict()[name])
    ]
    assert f"{GENERATOR}encoder.classes" in drawn
    assert not any("heads" in name and name.endswith("weight") for name in drawn)  # zero at first


def test_a_run_on_digits_adapts_unseen_clients_by_one_forward_pass(tmp_path: Path):
    """Labels are permuted for each client: the base model can only guess."""
    keys = {**NAME, "rounds": 60, "clients-per-round": 8, "device": "cpu", "eval-every": 0}
    config = RunConfig.read({**keys, "checkpoint-every": 0, "out": str(tmp_path)})
    size = len(federation_of(config))
    grid = CohortGrid(our_clients, num_nodes=size, run_config=config.to_flower())
    run(grid, config)
    unseen = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["unseen"]
    assert unseen["accuracy_after"]["1"] - unseen["accuracy_before"] > 0.2


def test_private_clients_are_refused_before_any_round():
    config = RunConfig.read({**NAME, "privacy.noise-multiplier": 1.0})
    with pytest.raises(ConfigError, match="no record has a gradient of its own"):
        STRATEGIES["autoregressive"](config)


def test_text_is_refused_with_the_reason():
    config = RunConfig.read({**NAME, "dataset": "shakespeare"})
    with pytest.raises(ConfigError, match="images and tables"):
        model_of(config)


def test_keys_of_other_strategies_are_told_to_be_idle():
    keys = {"hypernetwork-width": 64, "local-steps": 2, "split": "fixed", "outer-lr": 0.01}
    assert idle_keys(RunConfig.read({**NAME, **keys})) == []
    assert idle_keys(RunConfig.read({**NAME, "embedding-size": 4, "order": "first"})) == [
        "order",
        "embedding-size",
    ]
    assert "hypernetwork-width" in idle_keys(RunConfig.read({"strategy": "fedavg", **keys}))
