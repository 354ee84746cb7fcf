"""FedOpt against its algorithm in plain numbers, Flower's own strategies, and wrong variants."""

from pathlib import Path

import numpy as np
import pytest
from flwr.serverapp import strategy as flowers

from metabloom.errors import ConfigError
from metabloom.strategies import Checkpoints, FedOpt
from metabloom.strategies.shell import roll_call
from metabloom.wire import from_record
from tests.strategies.toy import Arrays, Toy, bits, moved, start, strategy_of

KINDS = ("adam", "yogi", "adagrad")
EACH = pytest.mark.parametrize("kind", KINDS)
ANY = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1, "eval_every": 0}
FLOWERS = {"min_train_nodes": 1, "min_available_nodes": 1, "fraction_evaluate": 0.0}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "POLL_S", 0.01)
    monkeypatch.setattr(roll_call, "GATHER_S", 0.05)


def doubles() -> Arrays:
    """Return a model in float64, which Flower's strategies keep."""
    return {"w": np.linspace(-1, 1, 6).reshape(2, 3), "b": np.array(0.25)}


def updates(rounds: int, nodes: int = 3) -> list[Arrays]:
    """Return Delta of each round, of Toy's clients: their moves do not depend on the model."""
    n = np.arange(1, nodes + 1)
    found = []
    for number in range(1, rounds + 1):
        each = [moved({k: 0 * v for k, v in doubles().items()}, i, number) for i in range(nodes)]
        found.append(
            {
                k: sum(c * one[k] for c, one in zip(n, each, strict=True)) / n.sum()
                for k in doubles()
            }
        )
    return found


def by_hand(
    kind: str,
    rounds: int,
    *,
    lr: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.99),
    tau: float = 1e-3,
    first: float | None = None,
    corrects_bias: bool = False,
    turn: float = 1.0,
) -> Arrays:
    """Algorithm 2 of 2003.00295, an array at a time; the last two make it wrong."""
    w, (b1, b2) = doubles(), betas
    m = {name: np.zeros_like(value) for name, value in w.items()}
    v = {n: np.full_like(value, tau**2 if first is None else first) for n, value in w.items()}
    for number, delta in enumerate(updates(rounds), 1):
        for name, d in delta.items():
            m[name] = b1 * m[name] + (1 - b1) * d
            if kind == "adagrad":
                v[name] = v[name] + d**2
            elif kind == "yogi":
                v[name] = v[name] - turn * (1 - b2) * d**2 * np.sign(v[name] - d**2)
            else:
                v[name] = b2 * v[name] + (1 - b2) * d**2
            rate = lr * (np.sqrt(1 - b2**number) / (1 - b1**number) if corrects_bias else 1.0)
            w[name] = w[name] + rate * m[name] / (np.sqrt(v[name]) + tau)
    return w


def ours(kind: str, rounds: int = 4, **options) -> Arrays:
    usual = {"optimizer": kind, "lr": 0.05, "betas": (0.9, 0.99), **ANY}
    strategy = FedOpt(**{**usual, **options})
    return from_record(start(strategy, Toy(), nodes=3, rounds=rounds, arrays=doubles()).arrays)


def assert_close(found: Arrays, wanted: Arrays, tolerance: float = 1e-12) -> None:
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance, err_msg=name)


def differ(found: Arrays, wanted: Arrays) -> bool:
    return any(np.abs(found[name] - wanted[name]).max() > 1e-3 for name in wanted)


# --- the algorithm --------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1e-3, 0.1])
@pytest.mark.parametrize("rounds", [1, 2, 5])
@EACH
def test_rounds_are_those_of_algorithm_2(kind: str, rounds: int, tau: float):
    assert_close(ours(kind, rounds, tau=tau), by_hand(kind, rounds, tau=tau))


@EACH
def test_other_betas_and_another_first_v_are_heeded(kind: str):
    own = {"betas": (0.5, 0.8), "first": 0.04}
    assert_close(ours(kind, 3, **own), by_hand(kind, 3, **own))
    assert differ(ours(kind, 3, **own), ours(kind, 3))


def test_adagrad_has_no_momentum_unless_it_is_given():
    usual = ours("adagrad", 3, betas=None)
    assert_close(usual, by_hand("adagrad", 3, betas=(0.0, 0.0)))
    assert differ(usual, ours("adagrad", 3))


def test_wrong_variants_are_refused():
    assert differ(ours("adam", 3), by_hand("adam", 3, corrects_bias=True))  # torch's, and Flower's
    own = {"betas": (0.9, 0.5), "tau": 0.1}
    assert differ(ours("yogi", 3, **own), by_hand("yogi", 3, turn=-1.0, **own))
    assert differ(ours("yogi", 3, **own), by_hand("adam", 3, **own))
    rebuilt = doubles()  # an optimiser that is made anew each round
    for number in range(1, 4):
        alone = Toy(learns=lambda arrays, p, n, number=number: moved(arrays, p, number))
        strategy = FedOpt(optimizer="adam", lr=0.05, **ANY)
        rebuilt = from_record(start(strategy, alone, nodes=3, rounds=1, arrays=rebuilt).arrays)
    assert differ(rebuilt, ours("adam", 3))


# --- Flower's own ---------------------------------------------------------------------------------


def flower(strategy, rounds: int = 4) -> Arrays:
    return from_record(start(strategy, Toy(), nodes=3, rounds=rounds, arrays=doubles()).arrays)


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_yogi_and_adagrad_are_flower_s_where_v_starts_at_0(rounds: int):
    yogi = flowers.FedYogi(eta=0.05, beta_1=0.9, beta_2=0.99, tau=1e-3, **FLOWERS)
    assert_close(ours("yogi", rounds, first=0.0), flower(yogi, rounds))
    adagrad = flowers.FedAdagrad(eta=0.05, tau=1e-3, **FLOWERS)
    assert_close(ours("adagrad", rounds, first=0.0, betas=(0.0, 0.0)), flower(adagrad, rounds))


def test_adam_is_flower_s_but_for_the_factor_on_eta():
    """With betas of 0 that factor is 1; else the first step tells it."""
    plain = flowers.FedAdam(eta=0.05, beta_1=0.0, beta_2=0.0, tau=1e-3, **FLOWERS)
    assert_close(ours("adam", 4, first=0.0, betas=(0.0, 0.0)), flower(plain))
    theirs = flower(flowers.FedAdam(eta=0.05, beta_1=0.9, beta_2=0.99, tau=1e-3, **FLOWERS), 1)
    factor = np.sqrt(1 - 0.99**2) / (1 - 0.9**2)
    found = ours("adam", 1, first=0.0)
    for name, start_value in doubles().items():
        step = factor * (found[name] - start_value)
        np.testing.assert_allclose(theirs[name] - start_value, step, rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_flower_s_fedavgm(momentum: float):
    theirs = flowers.FedAvgM(server_learning_rate=0.5, server_momentum=momentum, **FLOWERS)
    found = ours("sgd", 4, lr=0.5, betas=(momentum, 0.0))
    assert_close(found, flower(theirs))


# --- in runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "sgd"])
def test_two_halves_are_the_whole(kind: str, tmp_path: Path):
    whole = start(FedOpt(optimizer=kind, **ANY), Toy(), rounds=4)
    start(FedOpt(optimizer=kind, checkpoints=Checkpoints(tmp_path), **ANY), Toy(), rounds=2)
    again = FedOpt(optimizer=kind, checkpoints=Checkpoints(tmp_path, resume=True), **ANY)
    assert bits(start(again, Toy(), rounds=4).arrays) == bits(whole.arrays)
    half = from_record(start(FedOpt(optimizer=kind, **ANY), Toy(), rounds=2).arrays)
    later = Toy(learns=lambda arrays, p, n: moved(arrays, p, n + 2))
    forgetful = start(FedOpt(optimizer=kind, **ANY), later, rounds=2, arrays=half)
    assert bits(forgetful.arrays) != bits(whole.arrays)


def test_the_configuration_decides_the_optimiser():
    keys = {"server-optimizer": "yogi", "outer-lr": 0.3, "fedopt-tau": 0.01}
    chosen = strategy_of("fedopt", keys)
    assert (chosen.optimizer, chosen.lr, chosen.tau, chosen.first) == ("yogi", 0.3, 0.01, 1e-4)
    assert (strategy_of("fedopt").optimizer, strategy_of("fedopt").lr) == ("adam", 0.01)
    assert strategy_of("fedopt", {"server-optimizer": "sgd"}).lr == 1.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"optimizer": "adamw"}, "unknown optimiser of fedopt 'adamw': did you mean 'adam'"),
        ({"lr": 0.0}, r"lr = 0\.0"),
        ({"tau": 0.0}, r"tau = 0\.0"),
        ({"tau": float("nan")}, "tau = nan"),
        ({"betas": (0.9, 1.0)}, r"betas = \(0\.9, 1\.0\)"),
        ({"first": -1.0}, r"first = -1\.0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(wrong: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        FedOpt(**wrong)


def test_yogi_is_refused_where_torch_s_optimisers_are_meant():
    with pytest.raises(ConfigError, match="unknown server optimiser 'yogi'"):
        strategy_of("fedmeta", {"server-optimizer": "yogi"})
