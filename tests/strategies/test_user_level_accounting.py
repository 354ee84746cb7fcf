"""What user-level privacy counts on: Poisson samples, their cost, and parameters in range."""

import math

import dp_accounting
import numpy as np
import pytest

from metabloom.accounting import ORDERS, Event, epsilon_of
from metabloom.errors import ConfigError
from metabloom.strategies import UserLevelPrivacy
from metabloom.strategies.shell.roll_call import Node
from metabloom.strategies.shell.sampling import Sampler, poisson_sample


def privacy(**changed) -> UserLevelPrivacy:
    usual = {
        "noise_multiplier": 1.0,
        "max_update_norm": 1.0,
        "expected_clients": 4.0,
        "target_delta": 1e-5,
    }
    return UserLevelPrivacy(**{**usual, **changed})


# --- Poisson samples ------------------------------------------------------------------------------

NODES = [Node(number) for number in range(10)]
DRAWS = 4000


def check_inclusion(sample) -> None:
    """Each node with chance q, pairs with q^2, sizes as of a binomial: 5 standard deviations."""
    q, coins = 0.3, np.random.default_rng(5)
    samples = [sample(NODES, q, coins) for _ in range(DRAWS)]
    rows = np.array([[node in one for node in NODES] for one in samples])
    both = rows[:, 0] & rows[:, 1]
    for rate, p in ((rows.mean(axis=0), q), (both.mean(), q * q)):
        assert np.all(np.abs(rate - p) < 5 * math.sqrt(p * (1 - p) / DRAWS))
    sizes = rows.sum(axis=1)
    assert sizes.var() == pytest.approx(10 * q * (1 - q), rel=0.15)  # its own error is 2 %
    assert (sizes == 0).any()  # 0.7^10 is 3 %: none of 4000 with chance 1e-50


def test_each_node_is_sampled_by_itself_with_chance_q():
    check_inclusion(poisson_sample)


def test_a_sample_of_fixed_size_is_no_poisson_sample():
    def fixed(nodes, rate, coins):
        return Sampler(int(coins.integers(2**31))).sample(nodes, int(rate * len(nodes)), "s", 1)

    with pytest.raises(AssertionError):
        check_inclusion(fixed)


# --- accounting -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("z", "q", "rounds"), [(1.0, 0.25, 40), (0.8, 0.05, 300), (2.0, 1.0, 25)])
def test_epsilon_is_that_of_flowers_and_googles_accountants(z, q, rounds):
    chosen = privacy(noise_multiplier=z, sample_rate=q)
    own = epsilon_of(rounds * [chosen.event], 1e-5)
    googles = dp_accounting.rdp.RdpAccountant(list(ORDERS))
    gaussian = dp_accounting.GaussianDpEvent(z)
    googles.compose(dp_accounting.PoissonSampledDpEvent(q, gaussian), rounds)
    # At fractional orders the two libraries bound the same series a little differently.
    assert own == pytest.approx(googles.get_epsilon(1e-5), rel=0.01)

    flower = pytest.importorskip("flwr.serverapp")
    told_by_flower = flower.RdpAccountant(
        flower.PrivacyConfig(
            target_delta=1e-5,
            population_size=100,
            neighboring_relation=flower.NeighboringRelation.ADD_OR_REMOVE_ONE,
            sampling_method=flower.SamplingMethod.POISSON,
        ),
        orders=tuple(ORDERS),
    )
    event = flower.GaussianPrivacyEvent(
        noise_multiplier=z, sample_size=round(100 * q), population_size=100
    )
    told_by_flower.compose(event, rounds)
    assert own == pytest.approx(told_by_flower.get_epsilon(1e-5), rel=0.01)


def test_a_sample_of_fixed_size_is_not_amplified():
    assert privacy().event == Event(1.0, 1.0)
    assert "left out" in privacy().unit
    assert privacy(sample_rate=0.1).event == Event(1.0, 0.1)
    assert "added or removed" in privacy(sample_rate=0.1).unit
    assert "left out" in privacy(sample_rate=1.0).unit


# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_multiplier", 0.0),
        ("noise_multiplier", math.nan),
        ("max_update_norm", 0.0),
        ("max_update_norm", math.inf),
        ("expected_clients", 0),
        ("target_delta", 1.0),
        ("sample_rate", 0.0),
        ("sample_rate", 1.5),
        ("target_epsilon", 0.0),
        ("adaptive_quantile", 1.0),
        ("adaptive_quantile", 0.0),
        ("adaptive_lr", 0.0),
        ("count_noise", -1.0),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        privacy(**{name: value})


def test_a_count_that_costs_more_than_z_alone_is_refused():
    with pytest.raises(ConfigError, match=r"count_noise = 0\.5"):
        privacy(adaptive_quantile=0.5, count_noise=0.5)
    assert privacy(adaptive_quantile=0.5, expected_clients=400).sigma_b == 20.0
    assert privacy(adaptive_quantile=0.5, expected_clients=4).sigma_b == 1.0
