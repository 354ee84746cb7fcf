"""ANIL and BOIL as wholes, and Per-FedAvg's variants: known answers through messages."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from metabloom.cli import app
from metabloom.clients import CLIENTS, MAMLClient, meta_gradient
from metabloom.config import RunConfig
from metabloom.errors import ConfigError, ModelError
from metabloom.models import MODELS, register_model
from metabloom.strategies import ANIL, BOIL, STRATEGIES, FedMeta, PerFedAvg
from metabloom.task import initial_arrays, model_of
from tests.clients.small_clients import arrays_of, client, net
from tests.clients.toy_problems import client_data, weights
from tests.strategies.points import USUAL, numbers, of_parabola, of_product, run

# 1/2 (h b - 1)^2 at h = 0, b = 1, alpha = .5 (known answer 9): the derivation is in
# tests/clients/test_meta_gradient.py.
KNOWN = {"anil": (-0.25, -0.5), "boil": (-1.0, 0.0), "fedmeta": (-0.375, -0.5)}
CLASSES = {"anil": ANIL, "boil": BOIL, "fedmeta": FedMeta}


def client_of(name: str, **options):
    """Return what makes the client that a recipe describes, of the problem of known answer 9."""
    recipe = STRATEGIES[name](RunConfig.read({"strategy": name, "head": "h", "split": "fixed"}))
    chosen = {**recipe.client_options, "inner_lr": 0.5, **options}
    kind = CLIENTS[recipe.client]
    return lambda place: of_product(kind, 0.0, 1.0, context=place, **chosen)


def one_step(name: str, **options) -> tuple[float, float]:
    """Return the (h, b) part of the server's step, of rate 1."""
    strategy = CLASSES[name](optimizer="sgd", lr=1.0, **USUAL)
    found = numbers(run(strategy, [client_of(name, **options)]))
    return found["h"] - 0.0, found["b"] - 1.0


@pytest.mark.parametrize("name", list(KNOWN))
def test_a_round_is_known_answer_9(name: str):
    h, b = one_step(name)
    assert (-h, -b) == pytest.approx(KNOWN[name], abs=1e-12)


@pytest.mark.parametrize("name", ["anil", "boil"])
def test_what_adapts_another_part_or_drops_the_hessian_gives_another_answer(name: str):
    """A gradient of ANIL that stops at the head's inner step gives b the -.25 of FOMAML."""
    other = {"anil": "body", "boil": "head"}[name]
    for wrong in ({"part": other}, {"part": "all"}, {"order": "first"}):
        if name == "boil" and wrong == {"order": "first"}:
            continue  # b's gradient is 0 there, so nothing moves and no Hessian counts
        h, b = one_step(name, **wrong)
        assert (-h, -b) != pytest.approx(KNOWN[name], abs=1e-3), wrong


@pytest.mark.parametrize(("part", "moving"), [("head", "head"), ("body", "body")])
def test_evaluation_adapts_the_same_part_alone(part: str, moving: str):
    own = client(MAMLClient, part=part)
    start, advance = own.adaptation(weights(net()))
    there = advance(start, 3)
    for name, value in start.items():
        assert torch.equal(there[name], value) is not name.startswith(moving), name


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_client_s_reply_is_its_partial_meta_gradient(part: str):
    own, data = client(MAMLClient, part=part, inner_steps=2), client_data()
    found, _, _ = own.fit(arrays_of(net()), {})
    wanted = meta_gradient(
        net(),
        torch.nn.functional.cross_entropy,
        weights(net()),
        data.support,
        data.query,
        inner_lr=0.4,
        steps=2,
        adapt=lambda name: name.startswith("head") is (part == "head"),
    ).grads
    for got, start, gradient in zip(found, arrays_of(net()), wanted.values(), strict=True):
        np.testing.assert_array_equal(got, start - gradient.numpy())


# --- which parameters the head is ---------------------------------------------------------------


def test_clients_of_one_model_have_equal_predicates_so_that_they_share_compiled_steps():
    one, other = (client(MAMLClient, part="head").adapted for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != client(MAMLClient, part="body").adapted


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_head_that_cannot_be_told_is_refused(part: str):
    with pytest.raises(ConfigError, match=r"head = 'hed': Net has no .* did you mean 'head'"):
        client(MAMLClient, part=part, head="hed")
    with pytest.raises(ModelError, match="no body beside its head"):
        MAMLClient(torch.nn.Linear(3, 3), client_data(), part=part)


def test_a_part_that_is_none_and_two_words_on_the_same_thing_are_refused():
    with pytest.raises(ConfigError, match="part = 'neck': must be one of all, head, body"):
        client(MAMLClient, part="neck")
    with pytest.raises(ConfigError, match="part = 'head' beside adapt"):
        client(MAMLClient, part="head", adapt=lambda name: True)


@pytest.fixture
def flat_model() -> Iterator[str]:
    """Register a model of one layer."""

    @register_model("flat-for-tests")
    def flat(input_shape: tuple[int, ...], num_classes: int) -> torch.nn.Module:
        size = int(np.prod(input_shape))
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(size, num_classes))

    yield "flat-for-tests"
    del MODELS._entries["flat-for-tests"]


@pytest.mark.parametrize("strategy", ["anil", "boil"])
def test_a_run_without_a_head_ends_before_any_round_with_one_message(
    strategy: str, flat_model: str, tmp_path: Path
):
    config = RunConfig.read({"strategy": strategy, "model": flat_model})
    with pytest.raises(ModelError, match="no body beside its head"):
        initial_arrays(config)
    with pytest.raises(ConfigError, match="head = 'hed': MLP has no layer or parameter"):
        initial_arrays(RunConfig.read({"strategy": strategy, "head": "hed"}))
    words = ["--set", f"model={flat_model}", "--out", str(tmp_path / "out")]
    with pytest.raises(ModelError, match="no body beside its head"):
        CliRunner().invoke(
            app, ["simulate", "--strategy", strategy, *words], catch_exceptions=False
        )
    assert not (tmp_path / "out").exists()


def test_the_configured_head_reaches_the_clients(tmp_path: Path):
    """On a network of three layers it may be one of them, or the last two."""
    keys = {"model-args": "hidden=8,8", "rounds": 1, "num-clients": 6, "device": "cpu"}
    names = list(model_of(RunConfig.read({"model-args": "hidden=8,8"})).state_dict())
    assert "body.3.weight" in names
    found = {}
    for head in ("head", "body.3", "2"):
        chosen = {**keys, "head": head}
        words = [w for key, value in chosen.items() for w in ("--set", f"{key}={value}")]
        out = tmp_path / head
        arguments = ["simulate", "--strategy", "anil", *words, "--out", str(out)]
        assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        found[head] = results["unseen"]["loss_after"]
    assert len({str(losses) for losses in found.values()}) == 3


# --- Per-FedAvg ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "wanted"),
    [("exact", 1 - 0.872**3), ("hf", 1 - 0.872**3), ("first", 1 - 0.84**3)],  # known answer 2
)
def test_a_round_of_per_fedavg_is_known_answer_2_in_each_variant(order: str, wanted: float):
    keys = {"strategy": "per-fedavg", "order": order, "local-steps": 3, "outer-lr": 0.1}
    recipe = STRATEGIES["per-fedavg"](RunConfig.read(keys))
    options = {**recipe.client_options, "inner_lr": 0.1}

    def of(centre: float):
        kind = CLIENTS[recipe.client]
        return lambda place: of_parabola(kind, 2.0, centre, context=place, **options)

    alone = numbers(run(recipe.strategy(**USUAL), [of(1.0)]))
    # "hf" divides a difference of gradients by a step of 1e-5
    assert alone["theta"] == pytest.approx(wanted, abs=1e-9)
    assert isinstance(recipe.strategy(**USUAL), PerFedAvg)
    # A client at c ends at c times that (theta_0 = 0): the server takes the plain mean.
    three = numbers(run(recipe.strategy(**USUAL), [of(1.0), of(-2.0), of(7.0)]))
    assert three["theta"] == pytest.approx(2.0 * wanted, abs=1e-8)
