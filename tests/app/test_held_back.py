"""Records that training clients hold back: no training sees them, and they judge at the end."""

import json
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict
from typer.testing import CliRunner

from metabloom.cli import app
from metabloom.client_app import client_fn
from metabloom.clients import ClientData
from metabloom.clients.data import with_held_back
from metabloom.config import RunConfig
from metabloom.task import federation_of


def records(count: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.arange(first, first + count)
    return numbers[:, None].float(), numbers


def test_query_and_held_back_share_out_the_query_set():
    data = ClientData(records(4), records(11, 4))
    held = with_held_back(data, 0.3, torch.Generator().manual_seed(1))
    back, left = held.judging, held.query
    assert (len(back[1]), len(left[1]), held.num_examples) == (3, 8, 12)
    assert sorted([*back[1].tolist(), *left[1].tolist()]) == list(range(4, 15))
    for inputs, targets in (back, left):
        assert torch.equal(inputs[:, 0].long(), targets)
    assert torch.equal(held.all[1], torch.cat([data.support[1], left[1]]))
    moved = held.to("cpu").held_back
    assert moved is not None
    assert torch.equal(moved[1], back[1])


@pytest.mark.parametrize("share", [0.0, 0.01])
def test_where_nothing_is_held_back_the_query_set_judges(share: float):
    data = ClientData(records(4), records(11, 4))
    held = with_held_back(data, share, torch.Generator())
    assert held is data
    assert held.judging is data.query
    one = ClientData(records(4), records(1))
    assert with_held_back(one, 0.9, torch.Generator()) is one


def client(index: int, **keys: object):
    config = RunConfig.read({"held-back": 0.5, "num-clients": 12, "device": "cpu", **keys})
    place = {"partition-id": index, "num-partitions": 12}
    return client_fn(Context(0, 0, place, RecordDict(), config.to_flower())), config


def test_training_clients_hold_back_the_same_records_each_time_and_no_others_do():
    for index in range(12):
        own, config = client(index)
        again, _ = client(index)
        federation = federation_of(config)
        query = federation.client(index).query
        if federation.roles[index] != "train":
            assert own.data.held_back is None
            assert torch.equal(own.data.query[0], query[0])
            continue
        assert torch.equal(own.data.judging[0], again.data.judging[0])
        assert len(own.data.judging[1]) == round(len(query[1]) / 2)


def simulate(out: Path, **keys: object) -> dict:
    usual = {"rounds": 2, "num-clients": 12, "clients-per-round": 6, "device": "cpu"}
    words = [w for key, value in {**usual, **keys}.items() for w in ("--set", f"{key}={value}")]
    ran = CliRunner().invoke(app, ["simulate", *words, "--out", str(out)], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("strategy", ["fedavg", "ditto", "fedper"])
def test_training_clients_score_by_them(strategy: str, tmp_path: Path):
    keys = {"strategy": strategy, "held-back": 0.5, "score-training": "true"}
    results = simulate(tmp_path / "run", **keys)
    federation = federation_of(RunConfig.read({"num-clients": 12}))
    queries = {
        federation.client_ids[i]: len(federation.client(i).query[1])
        for i in federation.indices("train")
    }
    counts = {one["client"]: one["num_examples"] for one in results["trained"]["per_client"]}
    assert counts == {name: round(count / 2) for name, count in queries.items()}
    whole = simulate(tmp_path / "whole", **{**keys, "held-back": 0})
    train = [run["history"][0]["train"] for run in (results, whole)]
    assert train[0] != train[1]  # they did not learn from the same records


def test_only_those_that_keep_models_score_unless_all_are_asked_to(tmp_path: Path):
    assert "trained" not in simulate(tmp_path / "run", strategy="fedavg")


def test_records_that_depend_on_each_other_cannot_be_held_back(small_data: Path, tmp_path: Path):
    keys = [f"data-root={small_data}", "dataset-args=sequence_length=20", "held-back=0.5"]
    words = [word for key in keys for word in ("--set", key)]
    ran = CliRunner().invoke(
        app, ["simulate", "--dataset", "shakespeare", *words, "--out", str(tmp_path)]
    )
    assert "held-back = 0.5 on shakespeare" in str(ran.exception)
