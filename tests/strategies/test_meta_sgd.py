"""Meta-SGD as a whole: rates are averaged, stepped, saved, resumed, and adapt unseen clients."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner

from metabloom.architectures import names_of
from metabloom.cli import app
from metabloom.clients import MetaSGDClient, SGDClient, adapt
from metabloom.config import RunConfig
from metabloom.inner_rates import INNER_LR, split_rates
from metabloom.strategies import Checkpoints, MetaSGD
from metabloom.task import federation_of, initial_arrays, model_of
from metabloom.wire import from_record
from tests.strategies.points import USUAL, numbers, of_parabola, run
from tests.strategies.toy import bits

SMALL = {"strategy": "meta-sgd", "num-clients": 10, "clients-per-round": 3, "device": "cpu"}


def clients(*centres: float, **options):
    """Return clients of the loss (theta - c)^2 that know of no rate but the one they begin with."""
    options = {"inner_lr": 0.1, **options}
    return [
        lambda context, c=c: of_parabola(MetaSGDClient, 2.0, c, context=context, **options)
        for c in centres
    ]


def sgd(**more) -> MetaSGD:
    return MetaSGD(optimizer="sgd", lr=1.0, **USUAL, **more)


def simulate(out: Path, *settings: str, **keys: object) -> dict:
    chosen = [f"{key}={value}" for key, value in {**SMALL, **keys}.items()]
    words = [word for one in (*chosen, *settings) for word in ("--set", one)]
    arguments = ["simulate", *words, "--out", str(out)]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("steps", [1, 3])
def test_a_round_of_one_client_is_known_answer_3(steps: int):
    found = numbers(run(sgd(), clients(1.0, inner_steps=steps)))
    # -4K .8^(2K - 1) is dL/dalpha, -2 * .8^2K dL/dtheta: -3.2 and -1.28 at K = 1.
    assert found["inner_lr/theta"] == pytest.approx(0.1 + 4 * steps * 0.8 ** (2 * steps - 1))
    assert found["theta"] == pytest.approx(2 * 0.8 ** (2 * steps))


def test_rounds_of_several_clients_follow_the_mean_of_both_gradients():
    """(theta - c)^2 (1 - 2 alpha)^2 has dL/dtheta = 2 m^2 d, dL/dalpha = -4 m d^2 of d, m."""
    centres, lr = (1.0, -2.0, 0.5), 0.05
    theta, alpha = 0.0, 0.1
    for _ in range(3):
        m = 1 - 2 * alpha
        away = [theta - c for c in centres]
        theta, alpha = (
            theta - lr * np.mean([2 * m**2 * d for d in away]),
            alpha - lr * np.mean([-4 * m * d**2 for d in away]),
        )
    strategy = MetaSGD(optimizer="sgd", lr=lr, **USUAL)
    found = numbers(run(strategy, clients(*centres), rounds=3))
    assert found["theta"] == pytest.approx(theta, abs=1e-12)
    assert found["inner_lr/theta"] == pytest.approx(alpha, abs=1e-12)


def test_the_server_optimiser_has_moments_of_the_rates_too():
    values = {"theta": [0.0], "inner_lr/theta": [0.1]}
    by_hand = {
        n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in values.items()
    }
    adam = torch.optim.Adam(by_hand.values(), lr=0.1)
    for _ in range(4):
        theta, alpha = (value.item() for value in by_hand.values())
        m, d = 1 - 2 * alpha, theta - 1.0
        for name, gradient in (("theta", 2 * m**2 * d), ("inner_lr/theta", -4 * m * d**2)):
            by_hand[name].grad = torch.tensor([gradient], dtype=torch.float64)
        adam.step()
    found = numbers(run(MetaSGD(optimizer="adam", lr=0.1, **USUAL), clients(1.0), rounds=4))
    for name, value in by_hand.items():
        assert found[name] == pytest.approx(value.item(), abs=1e-9), name  # Adam's eps


def test_a_client_that_knows_no_rates_is_left_out_by_name():
    def plain(context):
        return of_parabola(SGDClient, 2.0, 9.0, context=context)

    strange = [*clients(1.0), plain]
    result = run(sgd(), strange)
    ((who, why),) = result.rounds[0].failures
    assert who == "partition-1"
    assert "inner_lr/theta" in why
    assert numbers(result) == numbers(run(sgd(), clients(1.0)))


def test_a_run_begins_with_the_configured_rate_of_every_trainable_parameter():
    config = RunConfig.read({**SMALL, "inner-lr": 0.3})
    model, arrays = model_of(config), initial_arrays(config)
    own, rates = split_rates(arrays)
    assert list(own) == list(model.state_dict())
    assert list(rates) == [name for name, _ in model.named_parameters()]
    for name, rate in rates.items():
        assert (rate.shape, rate.dtype) == (own[name].shape, own[name].dtype)
        assert (rate == np.float32(0.3)).all()
    plain = RunConfig.read({**SMALL, "strategy": "fedmeta"})
    assert list(initial_arrays(plain)) == list(own)


def test_with_architectures_each_has_rates_of_its_own(tmp_path: Path):
    keys = {"architectures": "small: mlp hidden=4; large: mlp hidden=8", "rounds": 2}
    simulate(tmp_path, **keys)
    arrays = initial_arrays(RunConfig.read({**SMALL, **keys}))
    for name in ("small", "large"):
        own = {short: arrays[full] for full, short in names_of(arrays, name).items()}
        saved = load_file(tmp_path / f"model-{name}.safetensors")
        assert {n: v.shape for n, v in saved.items()} == {n: v.shape for n, v in own.items()}
        assert any(not np.array_equal(saved[n], own[n]) for n in names_of(own, INNER_LR))


def test_the_results_hold_the_learned_rates_and_unseen_clients_adapt_by_them(tmp_path: Path):
    results = simulate(tmp_path, rounds=3)
    config = RunConfig.read(results["config"])
    saved = {n: torch.from_numpy(v) for n, v in load_file(tmp_path / "model.safetensors").items()}
    own, rates = split_rates(saved)
    assert rates
    assert all((rate != 0.5).any() for rate in rates.values())  # they have moved
    federation, model = federation_of(config), model_of(config)
    (score,) = results["unseen"]["per_client"]
    data = federation.client(federation.client_ids.index(score["client"]))
    loss_fn = torch.nn.functional.cross_entropy
    losses = {}
    for how, alpha in (("learned", rates), ("first", 0.5)):
        there = adapt(model, loss_fn, own, data.support, inner_lr=alpha, steps=5)
        output = torch.func.functional_call(model, there, (data.query[0],))
        losses[how] = loss_fn(output, data.query[1]).item()
    assert score["loss-after-5"] == pytest.approx(losses["learned"], rel=1e-4)  # float32
    assert abs(losses["first"] - losses["learned"]) > 1e-2  # which rates it was is seen


def test_two_halves_are_the_whole_rates_and_moments_included(tmp_path: Path):
    make = partial(MetaSGD, optimizer="adam", lr=0.1, **USUAL)
    whole = run(make(), clients(1.0, -2.0), rounds=4)
    run(make(checkpoints=Checkpoints(tmp_path)), clients(1.0, -2.0), rounds=2)
    resumed = make(checkpoints=Checkpoints(tmp_path, resume=True))
    found = run(resumed, clients(1.0, -2.0), rounds=4)
    assert bits(found.arrays) == bits(whole.arrays)
    assert "inner_lr/theta" in from_record(found.arrays)


def test_private_clients_learn_rates_from_releases(tmp_path: Path):
    keys = {"privacy.noise-multiplier": 1.0, "privacy.unprotected-metrics": "all", "rounds": 1}
    results = simulate(tmp_path, **keys)
    told = results["privacy"]["record_level"]
    plain = simulate(tmp_path / "maml", **{**keys, "strategy": "fedmeta"})
    assert told["epsilon_max"] == plain["privacy"]["record_level"]["epsilon_max"] > 0
