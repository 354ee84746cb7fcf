"""Reptile: any server optimiser, and rounds of FedAvg before its own."""

from pathlib import Path

import numpy as np
import pytest
import torch

from metabloom.config import RunConfig
from metabloom.errors import ConfigError
from metabloom.strategies import (
    STRATEGIES,
    Checkpoints,
    FedAvg,
    Reply,
    Reptile,
    interpolate,
    server_optimizer,
)
from metabloom.strategies.fedmeta import OPTIMIZERS
from metabloom.strategies.reptile import first_then
from metabloom.wire import from_record
from tests.strategies.toy import Toy, bits, model, moved, start, strategy_of

FEW = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
FLOATING = [name for name, value in model().items() if np.issubdtype(value.dtype, np.floating)]


def arrays_after(strategy, rounds: int) -> dict[str, np.ndarray]:
    return from_record(start(strategy, Toy(), rounds=rounds).arrays)


# --- known answer 5 ------------------------------------------------------------------------------


def test_epsilon_1_with_weights_by_examples_is_fedavg_to_the_bit():
    reptile = start(Reptile(weighting="examples", **FEW), Toy(), rounds=3)
    assert bits(reptile.arrays) == bits(start(FedAvg(**FEW), Toy(), rounds=3).arrays)


def test_epsilon_one_half_halves_the_step():
    half, whole = (arrays_after(Reptile(epsilon=e, **FEW), 1) for e in (0.5, 1.0))
    for name in FLOATING:
        begin = model()[name].astype(np.float64)
        eps = 4 * np.finfo(model()[name].dtype).eps  # two results, rounded once each
        np.testing.assert_allclose(half[name] - begin, (whole[name] - begin) / 2, atol=eps, rtol=0)


# --- server optimisers ---------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_the_mean_difference_is_the_optimiser_s_gradient_and_epsilon_its_rate(optimizer: str):
    by_hand = torch.tensor(model()["bias"], requires_grad=True)  # float64
    stepper = OPTIMIZERS[optimizer]([by_hand], lr=0.05)
    arrays = model()
    for number in (1, 2, 3):
        arrays["bias"] = by_hand.detach().numpy().copy()
        answers = [moved(arrays, partition, number)["bias"] for partition in range(5)]
        by_hand.grad = torch.from_numpy(arrays["bias"] - np.mean(answers, axis=0))
        stepper.step()
    found = arrays_after(Reptile(epsilon=0.05, optimizer=optimizer, **FEW), 3)
    # float64: a few roundings, which Adam divides by moments of size .1
    np.testing.assert_allclose(found["bias"], by_hand.detach().numpy(), rtol=0, atol=1e-9)


def test_a_factory_serves_too_and_an_unknown_name_is_refused_with_the_nearest():
    made = Reptile(optimizer=lambda params: torch.optim.SGD(params, lr=0.5), **FEW)
    named = Reptile(epsilon=0.5, **FEW)
    found, wanted = arrays_after(made, 2), arrays_after(named, 2)
    for name in FLOATING:
        eps = 8 * np.finfo(model()[name].dtype).eps
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=eps)
    with pytest.raises(ConfigError, match="did you mean 'adam'"):
        Reptile(optimizer="adma")


# --- FedAvg first --------------------------------------------------------------------------------


def scheduled(after: int = 2, **more) -> Reptile:
    return Reptile(epsilon=0.5, fedavg_rounds=after, **FEW, **more)


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_first_rounds_are_fedavg_s_to_the_bit(rounds: int):
    found = start(scheduled(), Toy(), rounds=rounds)
    assert bits(found.arrays) == bits(start(FedAvg(**FEW), Toy(), rounds=rounds).arrays)


def test_the_rounds_after_them_are_reptile_s_to_the_bit():
    middle = arrays_after(FedAvg(**FEW), 2)
    later = Toy(learns=lambda arrays, partition, number: moved(arrays, partition, number + 2))
    wanted = start(Reptile(epsilon=0.5, **FEW), later, rounds=2, arrays=dict(middle))
    assert bits(start(scheduled(), Toy(), rounds=4).arrays) == bits(wanted.arrays)
    never = start(FedAvg(**FEW), Toy(), rounds=4)
    at_once = start(Reptile(epsilon=0.5, **FEW), Toy(), rounds=4)
    for other in (never, at_once, start(scheduled(3), Toy(), rounds=4)):
        assert bits(other.arrays) != bits(wanted.arrays)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_that_stops_before_at_or_after_the_change_goes_on_in_its_place(
    stop: int, tmp_path: Path
):
    whole = start(scheduled(optimizer="adam"), Toy(), rounds=5)
    start(scheduled(optimizer="adam", checkpoints=Checkpoints(tmp_path)), Toy(), rounds=stop)
    kept = Checkpoints(tmp_path, resume=True)
    resumed = start(scheduled(optimizer="adam", checkpoints=kept), Toy(), rounds=5)
    assert bits(resumed.arrays) == bits(whole.arrays)


def test_a_run_with_another_schedule_is_not_resumed(tmp_path: Path):
    start(scheduled(checkpoints=Checkpoints(tmp_path)), Toy(), rounds=1)
    with pytest.raises(ConfigError, match=r"checkpoint has fedavg_rounds = 2, this run 3"):
        start(scheduled(3, checkpoints=Checkpoints(tmp_path, resume=True)), Toy(), rounds=2)


def test_a_round_that_is_skipped_is_none_of_fedavg_s():
    def fails(partition: int, number: int) -> str:
        return "power cut" if number == 2 else ""

    toy = Toy(fails=fails)
    found = start(scheduled(), toy, rounds=4)  # FedAvg in 1 and 3, Reptile in 4
    first = arrays_after(FedAvg(**FEW), 1)
    third = Toy(learns=lambda arrays, partition, number: moved(arrays, partition, 3))
    second = start(FedAvg(**FEW), third, rounds=1, arrays=dict(first))
    fourth = Toy(learns=lambda arrays, partition, number: moved(arrays, partition, 4))
    wanted = start(
        Reptile(epsilon=0.5, **FEW), fourth, rounds=1, arrays=dict(from_record(second.arrays))
    )
    assert bits(found.arrays) == bits(wanted.arrays)


def test_the_rule_keeps_the_state_of_each_part_and_writes_into_none():
    adam = server_optimizer(lambda params: torch.optim.Adam(params, lr=0.1), weighting="examples")
    rule = first_then(1, interpolate(), adam)
    sent = {"w": np.array([1.0])}
    state = rule.init(sent)
    states = [state]
    for value in (3.0, 2.0, 1.0):
        state, sent = rule.update(state, sent, [Reply({"w": np.array([value])}, 1)])
        states.append(state)
    assert [one["round"] for one in states] == [0, 1, 2, 3]
    assert states[1]["then"] == {}
    assert float(states[2]["then"]["optimizer"]["state"][0]["step"]) == 1
    assert float(states[3]["then"]["optimizer"]["state"][0]["step"]) == 2
    assert rule.mean_by == "examples"
    assert first_then(1, interpolate(), interpolate(weighting="uniform")).mean_by is None


def test_the_configuration_says_it_in_three_keys():
    keys = {"reptile-after": 7, "reptile-epsilon": 0.01, "reptile-optimizer": "adam"}
    strategy = strategy_of("reptile", keys)
    assert (strategy.fedavg_rounds, strategy.epsilon, strategy.optimizer) == (7, 0.01, "adam")
    assert (strategy.fedavg_weighting, strategy.weighting) == ("examples", "uniform")
    for weighting in ("examples", "uniform"):
        chosen = strategy_of("reptile", {**keys, "weighting": weighting})
        assert chosen.weighting == chosen.fedavg_weighting == weighting
    usual = STRATEGIES["reptile"](RunConfig.read({})).strategy()
    assert (usual.fedavg_rounds, usual.epsilon, usual.optimizer) == (0, 1.0, "sgd")


def test_a_negative_number_of_rounds_is_refused():
    with pytest.raises(ConfigError, match="fedavg_rounds = -1"):
        Reptile(fedavg_rounds=-1)
