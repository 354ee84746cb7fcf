"""The mechanism of user-level privacy, against closed forms, other accountants and planted bugs."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metabloom.strategies import Reply, UserLevelPrivacy, interpolate, with_user_privacy
from metabloom.strategies.rules import is_floating
from metabloom.strategies.user_level import (
    FARTHEST,
    clipped_sum,
    clipped_update,
    fresh_generator,
    next_norm,
    released,
)
from tests.strategies import user_level_mutants as mutants

SENT = {
    "weight": np.linspace(-1, 1, 6).reshape(2, 3),
    "half": np.array([1.5], dtype=np.float16),
    "temperature": np.array(0.5, dtype=np.float32),
    "batches": np.array(7, dtype=np.int64),
}
TOLERANCE = 1e-9  # of a norm: sums of at most ten float64 numbers err by some 1e-15


def privacy(**changed) -> UserLevelPrivacy:
    usual = {
        "noise_multiplier": 1.0,
        "max_update_norm": 1.0,
        "expected_clients": 4.0,
        "target_delta": 1e-5,
    }
    return UserLevelPrivacy(**{**usual, **changed})


def seeded(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def reply_of(*values: float, num_examples: float = 1.0) -> Reply:
    """Return a reply whose update fills each floating array with a value of its own."""
    arrays = dict(SENT)
    for name, value in zip(("weight", "half", "temperature"), values, strict=True):
        arrays[name] = np.asarray(SENT[name].astype(np.float64) + value)
    return Reply(arrays, num_examples)


def flat(arrays: dict) -> np.ndarray:
    return np.concatenate(
        [np.ravel(arrays[name]).astype(np.float64) for name in SENT if is_floating(SENT[name])]
    )


def told(mechanism, replies: list[Reply], chosen: UserLevelPrivacy) -> np.ndarray:
    """Return m times what the replies add to a release: with the same seed, the noise goes."""
    norm = chosen.max_update_norm
    loud = mechanism(SENT, replies, chosen, norm, seeded())[0]
    still = mechanism(SENT, [], chosen, norm, seeded())[0]
    return (flat(loud) - flat(still)) * chosen.expected_clients


def oracle(replies: list[Reply], max_norm: float) -> np.ndarray:
    """Return the sum of clipped updates of one long vector each."""
    total = np.zeros(flat(SENT).shape)
    for reply in replies:
        update = flat(reply.arrays) - flat(SENT)
        norm = math.hypot(*update)
        total += update * min(1.0, max_norm / norm if norm else 1.0)
    return total


REPLIES = [
    reply_of(0.01, 0.02, -0.03, num_examples=5),
    reply_of(3.0, -2.0, 1.0, num_examples=1000),
    reply_of(-0.4, 0.0, 0.0),
]


# --- laws -----------------------------------------------------------------------------------------


def check_sum_is_that_of_clipped_updates(mechanism) -> None:
    chosen = privacy(max_update_norm=0.7)
    for count in (1, 2, 3):
        found = told(mechanism, REPLIES[:count], chosen)
        np.testing.assert_allclose(found, oracle(REPLIES[:count], 0.7), atol=TOLERANCE)


def check_one_client_weighs_at_most_c(mechanism, values: tuple[float, ...], c: float) -> None:
    chosen = privacy(max_update_norm=c)
    with np.errstate(all="ignore"):
        with_it = told(mechanism, [*REPLIES, reply_of(*values)], chosen)
        without = told(mechanism, REPLIES, chosen)
        change = math.hypot(*(with_it - without))
    assert change <= c * (1 + TOLERANCE) + TOLERANCE


def check_noise(mechanism, chosen: UserLevelPrivacy) -> None:
    """Chi-square and correlation: a seeded draw, and false alarms below 1e-6 for any other seed."""
    n = 20_000
    sent = {"one": np.zeros(n), "other": np.zeros(n)}
    c, m = chosen.max_update_norm, chosen.expected_clients
    arrays, _ = mechanism(sent, [], chosen, c, seeded(3))
    z = math.sqrt(1 / (chosen.noise_multiplier**-2 - _count_cost(chosen)))
    one, other = (arrays[name] * m / (z * c) for name in sent)
    for noise in (one, other):
        assert abs(noise @ noise - n) < 5 * math.sqrt(2 * n)  # 5 standard deviations: 6e-7
        assert abs(noise.sum()) < 5 * math.sqrt(n)
    assert abs(one @ other) < 5 * math.sqrt(n)


def _count_cost(chosen: UserLevelPrivacy) -> float:
    """Return the inverse square of the noise multiplier of the count, of sensitivity 1/2."""
    if chosen.adaptive_quantile is None:
        return 0.0
    return (chosen.sigma_b / 0.5) ** -2


# --- the mechanism --------------------------------------------------------------------------------


def test_without_its_noise_a_release_is_the_sum_of_clipped_updates_over_m():
    check_sum_is_that_of_clipped_updates(released)


@settings(deadline=None, max_examples=200)
@given(
    values=st.tuples(*3 * [st.floats(width=64)]),
    c=st.floats(1e-6, 1e6),
)
def test_one_client_changes_the_sum_by_at_most_c_whatever_it_sends(values, c):
    check_one_client_weighs_at_most_c(released, values, c)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(width=64), min_size=9, max_size=9), st.floats(1e-150, 1e150))
def test_a_clipped_update_has_norm_c_at_most(values, c):
    sent = {"a": np.zeros(9)}
    found = clipped_update({"a": np.array(values)}, sent, c)
    if found is None:
        assert not np.isfinite(values).all()
        return
    clipped, is_within = found
    norm = math.hypot(*clipped["a"])
    assert norm <= c * (1 + TOLERANCE)
    assert is_within == (math.hypot(*values) <= c) or math.isclose(math.hypot(*values), c)
    if is_within:
        np.testing.assert_array_equal(clipped["a"], values)
    elif math.hypot(*values) < 1e300:
        assert norm == pytest.approx(c)


@pytest.mark.parametrize("chosen", [privacy(), privacy(noise_multiplier=0.3, max_update_norm=7.0)])
def test_the_noise_is_z_c_over_m_in_every_coordinate(chosen):
    check_noise(released, chosen)


def test_with_an_adaptive_norm_updates_and_their_count_together_cost_z():
    chosen = privacy(adaptive_quantile=0.5, count_noise=0.7)
    check_noise(released, chosen)
    costs = chosen.update_noise**-2 + (2 * chosen.sigma_b) ** -2
    assert costs == pytest.approx(chosen.noise_multiplier**-2)


def test_the_denominator_is_m_whatever_the_number_of_replies():
    for m in (0.5, 4.0, 100.0):
        chosen = privacy(expected_clients=m, max_update_norm=100.0)
        for count in (1, 2, 3):
            x = released(SENT, REPLIES[:count], chosen, 100.0, seeded())[0]
            noise = flat(released(SENT, [], chosen, 100.0, seeded())[0]) - flat(SENT)
            moved = sum(flat(reply.arrays) - flat(SENT) for reply in REPLIES[:count]) / m
            np.testing.assert_allclose(flat(x) - noise - flat(SENT), moved, atol=1e-9 / m)


def test_an_update_of_zero_is_no_failure():
    np.testing.assert_array_equal(told(released, [Reply(SENT, 1.0)], privacy()), 0.0)
    update, is_within = clipped_update(SENT, SENT, 1.0)
    assert is_within
    assert all(not value.any() for value in update.values())


def test_integer_arrays_keep_their_value_and_no_argument_is_written_into():
    before = {name: value.copy() for name, value in SENT.items()}
    counted = Reply({**SENT, "batches": np.array(8)}, 1.0)
    arrays, _ = released(SENT, [counted], privacy(), 1.0, seeded())
    assert arrays["batches"] == 7
    assert list(arrays) == list(SENT)
    assert {name: value.shape for name, value in arrays.items()} == {
        name: value.shape for name, value in SENT.items()
    }
    for name, value in before.items():
        np.testing.assert_array_equal(SENT[name], value)


def test_a_variance_never_becomes_negative():
    sent = {"norm.running_var": np.full(1000, 0.01), "norm.running_mean": np.zeros(1000)}
    arrays, _ = released(sent, [], privacy(noise_multiplier=5.0), 1.0, seeded())
    assert arrays["norm.running_var"].min() == 0.0
    assert arrays["norm.running_mean"].min() < 0.0


def test_fresh_noise_is_another_each_time_and_of_a_full_key():
    drawn = {fresh_generator().standard_normal() for _ in range(100)}
    assert len(drawn) == 100
    keys = [fresh_generator().bit_generator.state["state"]["key"] for _ in range(200)]
    # Every bit of a key of 128 is set in some and not in others; else with chance 128 * 2^-199.
    assert [int(np.bitwise_or.reduce([key[i] for key in keys])) for i in (0, 1)] == 2 * [2**64 - 1]
    assert [int(np.bitwise_and.reduce([key[i] for key in keys])) for i in (0, 1)] == [0, 0]


# --- the rule -------------------------------------------------------------------------------------


def test_with_fedavgs_rule_the_model_is_the_release_itself():
    rule = with_user_privacy(interpolate(1.0), privacy(), seeded)
    state = rule.init(SENT)
    state, new = rule.update(state, SENT, REPLIES)
    expected = flat(SENT) + (oracle(REPLIES, 1.0) + _noise_of(SENT)) / 4.0
    for name, value in SENT.items():
        assert new[name].dtype == value.dtype
    # float16 rounds to 1e-3 of a value.
    np.testing.assert_allclose(flat(new), expected, rtol=1e-3)
    np.testing.assert_allclose(flat(new)[:6], expected[:6], rtol=1e-12)
    assert state == {"rule": {}, "max_update_norm": 1.0}


def _noise_of(sent: dict) -> np.ndarray:
    generator = seeded()
    return np.concatenate(
        [np.ravel(generator.standard_normal(v.shape)) for v in sent.values() if is_floating(v)]
    )


def test_what_the_rule_does_with_the_release_is_post_processing():
    """Half a step of the rule is half the release, of replies and of noise alike."""
    full, half = (
        with_user_privacy(interpolate(epsilon), privacy(), seeded).update(
            {"rule": {}, "max_update_norm": 1.0}, {"a": np.zeros(5)}, []
        )[1]["a"]
        for epsilon in (1.0, 0.5)
    )
    np.testing.assert_allclose(half, full / 2)


# --- the adaptive norm ----------------------------------------------------------------------------


def test_the_norm_comes_to_the_quantile_of_the_updates_norms():
    """Andrew et al.: C follows the share within it; here norms are 0.01 to 100, evenly in log."""
    m, gamma = 200, 0.7
    chosen = privacy(
        expected_clients=m, adaptive_quantile=gamma, adaptive_lr=0.5, max_update_norm=0.05
    )
    sent = {"a": np.zeros(1)}
    norms = np.logspace(-2, 2, m)
    replies = [Reply({"a": np.array([norm])}, 1.0) for norm in norms]
    norm, path, generator = chosen.max_update_norm, [], seeded(1)
    for _ in range(80):
        _, norm = released(sent, replies, chosen, norm, generator)
        path.append(norm)
    # The share's noise of 1/20 moves C by 2.5 % a round; 1/20 of the quantiles is a factor 1.6.
    assert np.exp(np.mean(np.log(path[-20:]))) == pytest.approx(np.quantile(norms, gamma), rel=0.3)


def test_the_count_of_updates_within_c_moves_by_one_half_with_a_client():
    for one in REPLIES:
        _, with_it = clipped_sum(SENT, [*REPLIES, one], 0.7)
        _, without = clipped_sum(SENT, REPLIES, 0.7)
        assert abs(with_it - without) == 0.5


def test_an_adaptive_norm_stays_within_public_bounds():
    chosen = privacy(adaptive_quantile=0.5, max_update_norm=3.0)
    assert next_norm(chosen, 3.0, -1e300) == pytest.approx(3.0 * FARTHEST)
    assert next_norm(chosen, 3.0, 1e300) == pytest.approx(3.0 / FARTHEST)
    assert next_norm(privacy(), 3.0, 0.9) == 3.0  # fixed
    assert next_norm(chosen, 3.0, 0.5) == pytest.approx(3.0)
    assert next_norm(chosen, 3.0, 1.0) == pytest.approx(3.0 * math.exp(-0.1))


# --- planted bugs ---------------------------------------------------------------------------------

WRONG_SUMS = [
    mutants.clips_each_array,
    mutants.divides_by_the_number_of_replies,
    mutants.weighs_by_records,
]


@pytest.mark.parametrize("mutant", WRONG_SUMS)
def test_a_wrong_sum_is_refused(mutant):
    with pytest.raises(AssertionError):
        check_sum_is_that_of_clipped_updates(mutant)


@pytest.mark.parametrize(
    ("mutant", "values"),
    [
        (mutants.clips_each_array, (5.0, 5.0, 5.0)),
        (mutants.lets_nan_through, (math.nan, 0.0, 0.0)),
        (mutants.lets_nan_through, (math.inf, 0.0, 0.0)),
    ],
)
def test_a_client_that_weighs_more_than_c_is_found(mutant, values):
    check_one_client_weighs_at_most_c(released, values, 1.0)
    with pytest.raises(AssertionError):
        check_one_client_weighs_at_most_c(mutant, values, 1.0)


@pytest.mark.parametrize(
    "mutant",
    [
        mutants.divides_by_the_number_of_replies,
        mutants.divides_the_noise_twice,
        mutants.is_silent_without_replies,
        mutants.has_too_little_noise,
        mutants.has_the_same_noise_in_each_array,
    ],
)
def test_wrong_noise_is_found(mutant):
    with pytest.raises(AssertionError):
        check_noise(mutant, privacy())


def test_a_norm_that_adapts_for_nothing_is_found():
    with pytest.raises(AssertionError):
        check_noise(
            mutants.ignores_the_cost_of_the_count, privacy(adaptive_quantile=0.5, count_noise=0.7)
        )
