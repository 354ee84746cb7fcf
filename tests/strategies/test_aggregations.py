"""Aggregations that resist bad clients: known answers, wrong variants, laws of each."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metabloom.errors import ConfigError
from metabloom.strategies import (
    Reply,
    aggregation,
    mean,
    median,
    multi_krum,
    trimmed_mean,
)
from metabloom.strategies.aggregation import krum_scores
from tests import mutants

RESISTANT = {"median": median(), "trimmed-mean": trimmed_mean(0.2), "multi-krum": multi_krum(2)}
EVERY = pytest.mark.parametrize("name", RESISTANT)
COUNTED = {"w": np.zeros(1), "batches": np.array(7)}


def one_number(*values, counters=None):
    """Return a reply of one weight, and one counter, for each value."""
    counters = counters or [8] * len(values)
    return [
        Reply({"w": np.array([float(value)]), "batches": np.array(counter)}, num_examples=1)
        for value, counter in zip(values, counters, strict=True)
    ]


def aggregate_of(aggregate, *values, counters=None):
    found = aggregate(COUNTED, one_number(*values, counters=counters), "examples")
    assert found["batches"] == 7  # as it was sent
    assert found["batches"].dtype == COUNTED["batches"].dtype
    return found["w"].item()


def read_only(arrays):
    for value in arrays.values():
        value.flags.writeable = False
    return arrays


def mixed_model(shift=0.0, seed=0, spread=1.0):
    """Return read-only arrays of several shapes and dtypes."""
    rng = np.random.default_rng(seed)
    return read_only(
        {
            "matrix": np.asarray(shift + spread * rng.normal(size=(5, 3)), np.float32),
            "double": shift + spread * rng.normal(size=4),
            "scalar": np.asarray(shift + spread * rng.normal(), np.float32),
            "half": np.asarray(shift + spread * rng.normal(size=2), np.float16),
            "empty": np.zeros((0, 3), np.float32),
            "counter": np.array(5 + seed),
            "flags": np.array([True, bool(seed)]),
        }
    )


def mixed_replies(count, **options):
    return [Reply(mixed_model(seed=i, **options), num_examples=i) for i in range(1, count + 1)]


def stacked(replies, name):
    return np.stack([reply.arrays[name] for reply in replies]).astype(np.float64)  # (n, ...)


def floating(arrays):
    return [name for name, value in arrays.items() if np.issubdtype(value.dtype, np.floating)]


# --- laws, and wrong implementations that break them ----------------------------------------------


def takes_the_middle_or_the_mean_of_the_middle_two(median):
    assert aggregate_of(median(), 9, -1, 5) == 5
    assert aggregate_of(median(), 9, -1, 5, 3) == 4
    sent = {"w": np.zeros(2)}
    replies = [Reply({"w": np.array(v, float)}, 1) for v in ([1, 30], [2, 10], [3, 20])]
    assert median()(sent, replies, "uniform")["w"].tolist() == [2, 20]


def cuts_both_ends(trimmed_mean):
    assert aggregate_of(trimmed_mean(0.2), 1, 2, 6, 1e6, -1e6) == 3  # k = 1
    assert aggregate_of(trimmed_mean(0.2), 1, 2, 3, 10) == 4  # k = 0
    assert aggregate_of(trimmed_mean(0.4), 1, 2, 6, 1e6, -1e6) == 2  # k = 2


def takes_the_model_with_the_nearest_neighbours(multi_krum):
    # n = 5, f = 1: two neighbours. Scores of 0, 3, 6: 9 + 36, 9 + 9, 36 + 9; of 100: 94^2 + .01.
    assert aggregate_of(multi_krum(1, 1), 0, 3, 6, 100, 100.1) == 3
    # 1 and 2 have score 1 + 1, 0 and 3 have 1 + 4: the first of the lowest is 1.
    assert aggregate_of(multi_krum(1, 1), 0, 1, 2, 3, 50) == 1
    assert aggregate_of(multi_krum(1, 1), 50, 3, 2, 1, 0) == 2
    assert aggregate_of(multi_krum(1, 2), 0, 1, 2, 3, 50) == 1.5
    assert aggregate_of(multi_krum(1), 0, 1, 2, 3, 50) == 1.5  # m = n - f = 4


def counts_no_counters(multi_krum):
    counters = [0, 10_000, 0, 0, 0]
    assert aggregate_of(multi_krum(1, 1), 0, 1, 2, 3, 50, counters=counters) == 1


def tells_close_models_apart(multi_krum):
    """Weights near 1000, updates of 0.01: float32 resolves 64 in ||x||^2 = 1e9, distances are 10.

    Every digit of a difference of squared norms is lost; of ten right choices none is luck.
    """
    for seed in range(10):
        rng = np.random.default_rng(seed)
        sent = {"w": np.full(1000, 1000.0, np.float32)}
        updates = rng.normal(0, 0.01, size=(8, 1000))
        updates[3] = 0.1
        replies = [Reply({"w": np.asarray(sent["w"] + u, np.float32)}, 1) for u in updates]
        good = [reply for i, reply in enumerate(replies) if i != 3]
        found = multi_krum(1)(sent, replies, "uniform")["w"]
        assert found.tobytes() == mean(sent, good, "uniform")["w"].tobytes()


LAWS = {
    takes_the_middle_or_the_mean_of_the_middle_two: (
        median,
        mutants.median_that_takes_the_upper_value,
        mutants.median_of_counters_too,
        mutants.median_of_all_coordinates,
    ),
    cuts_both_ends: (
        trimmed_mean,
        mutants.trimmed_mean_of_one_end,
        mutants.trimmed_mean_that_divides_by_all,
    ),
    takes_the_model_with_the_nearest_neighbours: (
        multi_krum,
        mutants.krum_that_neighbours_itself,
        mutants.krum_of_all_neighbours,
        mutants.krum_that_takes_the_highest_scores,
    ),
    counts_no_counters: (multi_krum, mutants.krum_that_measures_counters),
    tells_close_models_apart: (multi_krum, mutants.krum_by_norms),
}
PAIRS = [(law, mutant) for law, (_, *wrong) in LAWS.items() for mutant in wrong]


@pytest.mark.parametrize(
    ("law", "real"), [(law, real) for law, (real, *_) in LAWS.items()], ids=lambda f: f.__name__
)
def test_an_aggregation_obeys_its_law(law, real):
    law(real)


@pytest.mark.parametrize(("law", "mutant"), PAIRS, ids=lambda f: f.__name__)
def test_the_law_refuses_a_wrong_aggregation(law, mutant):
    with pytest.raises(AssertionError):
        law(mutant)


def test_only_multi_krum_heeds_the_weighting():
    replies = [Reply({"w": np.array([v])}, num_examples=n) for v, n in ((1.0, 1), (5.0, 3))]
    sent = {"w": np.zeros(1)}
    for aggregate, by_examples in ((median(), 3), (trimmed_mean(0.2), 3), (multi_krum(0), 4)):
        assert aggregate(sent, replies, "uniform")["w"] == 3
        assert aggregate(sent, replies, "examples")["w"] == by_examples


def test_a_share_that_rounding_puts_below_a_whole_number_cuts_that_number():
    values = [1.0] * 71 + [1e6] * 29
    assert 0.29 * 100 < 29  # the trap is real
    assert aggregate_of(trimmed_mean(0.29), *values) == 1
    nearly_half = np.nextafter(0.5, 0)
    assert aggregate_of(trimmed_mean(nearly_half), 1, 2, 4, 9) == 3  # something is left


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_multi_krum_that_drops_nobody_is_the_mean_to_the_bit(weighting):
    sent, replies = mixed_model(), mixed_replies(6)
    found, wanted = (rule(sent, replies, weighting) for rule in (multi_krum(0), mean))
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in sent)


def test_too_few_replies_for_a_guarantee_still_give_a_model():
    assert aggregate_of(multi_krum(3), 1, 2) in (1, 2)  # one is kept, by its one neighbour
    assert aggregate_of(multi_krum(1), 0, 1, 9) == 0.5
    assert aggregate_of(multi_krum(1, 50), 0, 1, 8) == 3  # all there are
    assert aggregate_of(trimmed_mean(0.4), 1, 4) == 2.5
    assert aggregate_of(median(), 1, 4) == 2.5


def test_scores_equal_sums_in_plain_loops():
    sent, replies = mixed_model(), mixed_replies(7)
    for malicious in range(7):
        wanted = []
        for one in replies:
            distances = sorted(
                math.fsum(
                    math.fsum(np.square(stacked([one], n)[0] - stacked([other], n)[0]).ravel())
                    for n in floating(sent)
                )
                for other in replies
                if other is not one
            )
            wanted.append(math.fsum(distances[: max(1, 7 - malicious - 2)]))
        np.testing.assert_allclose(krum_scores(sent, replies, malicious), wanted, rtol=1e-13)


# --- laws of every aggregation --------------------------------------------------------------------


@EVERY
def test_float64_comes_back_and_arguments_stay(name):
    sent, replies = mixed_model(), mixed_replies(7)  # read-only: writing in place raises
    found = RESISTANT[name](sent, replies, "examples")
    assert list(found) == list(sent)
    for key, value in sent.items():
        assert type(found[key]) is np.ndarray, key  # 0-d arrays too
        assert found[key].shape == value.shape, key
        if key in floating(sent):
            assert found[key].dtype == np.float64, key
            assert not any(np.shares_memory(found[key], r.arrays[key]) for r in replies), key
        else:
            assert found[key] is value, key


@EVERY
def test_one_reply_is_the_result(name):
    sent, (reply,) = mixed_model(), mixed_replies(1)
    found = RESISTANT[name](sent, [reply], "examples")
    for key in floating(sent):
        assert np.array_equal(found[key], reply.arrays[key]), key


@EVERY
def test_half_precision_neither_overflows_nor_rounds_inside(name):
    sent = {"w": np.zeros(3, np.float16)}
    replies = [Reply({"w": np.full(3, 60_000 + 32 * i, np.float16)}, 1) for i in range(7)]
    found = RESISTANT[name](sent, replies, "uniform")["w"]
    # 60000 + 32 i are float16 numbers; their sums and squares are not. Krum drops two at one end.
    wanted = {"multi-krum": 60_000 + 32 * (1 + 2 + 3 + 4 + 5) / 5}.get(name, 60_096)
    assert found.tolist() == pytest.approx([wanted] * 3, abs=1e-9)


values = st.lists(st.integers(-1000, 1000).map(float), min_size=3, max_size=3)
models = st.lists(values, min_size=1, max_size=9)


def replies_of(rows):
    return [Reply({"w": np.array(row)}, num_examples=i + 1) for i, row in enumerate(rows)]


@given(rows=st.lists(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), min_size=1))
@example([[0.0, 0.0, 0.0], [-0.0, 1.0, 1.0], [-0.0, 2.0, 2.0]])
@settings(deadline=None, max_examples=60)
def test_any_order_of_the_replies_gives_the_same_bits_coordinate_by_coordinate(rows):
    sent = {"w": np.zeros(3)}
    replies = replies_of(rows)
    turned = [replies[i] for i in np.random.default_rng(len(rows)).permutation(len(rows))]
    for aggregate in (median(), trimmed_mean(0.2)):
        one, other = (aggregate(sent, some, "uniform")["w"] for some in (replies, turned))
        assert one.tobytes() == other.tobytes()


@given(rows=models, shuffle=st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_scores_move_with_their_replies_to_the_bit(rows, shuffle):
    replies, order = replies_of(rows), list(range(len(rows)))
    shuffle.shuffle(order)
    scores = krum_scores({"w": np.zeros(3)}, replies, 1)
    turned = krum_scores({"w": np.zeros(3)}, [replies[i] for i in order], 1)
    assert turned.tobytes() == scores[order].tobytes()


@EVERY
@given(rows=models, shift=st.integers(-1000, 1000))
@settings(deadline=None, max_examples=60)
def test_the_result_moves_with_the_models(name, rows, shift):
    aggregate = RESISTANT[name]
    here = aggregate({"w": np.zeros(3)}, replies_of(rows), "examples")["w"]
    shifted = replies_of(np.array(rows) + shift)
    there = aggregate({"w": np.full(3, float(shift))}, shifted, "examples")["w"]
    # Whole numbers: distances are exact, only the mean of up to nine of them rounds.
    np.testing.assert_allclose(there, here + shift, rtol=0, atol=1e-11)


anything = st.floats(allow_nan=True, allow_infinity=True)


@pytest.mark.parametrize("name", ["median", "trimmed-mean"])
@given(good=models, bad=st.lists(anything, min_size=4, max_size=4), place=st.integers(0, 9))
@settings(deadline=None, max_examples=200)
def test_bad_replies_within_the_bound_leave_it_among_the_good_ones(name, good, bad, place):
    # Of h good ones and b bad: the median takes b < h, beta = 0.2 takes b <= 0.2 (b + h).
    allowed = len(good) - 1 if name == "median" else len(good) // 4
    evil = [[value] * 3 for value in bad[:allowed]]
    rows = [*good[:place], *evil, *good[place:]]
    found = RESISTANT[name]({"w": np.zeros(3)}, replies_of(rows), "uniform")["w"]
    # A mean of numbers up to 1000 rounds by 1e-13.
    assert (found >= np.min(good, axis=0) - 1e-12).all()
    assert (found <= np.max(good, axis=0) + 1e-12).all()


# --- large arrays ---------------------------------------------------------------------------------


@EVERY
def test_blocks_give_what_whole_arrays_give(name, monkeypatch):
    sent, replies = mixed_model(), mixed_replies(7)
    whole = RESISTANT[name](sent, replies, "uniform")
    for block in (1, 14, 50):  # one column, two, and seven that do not divide 15
        monkeypatch.setattr(aggregation, "BLOCK", block)
        found = RESISTANT[name](sent, replies, "uniform")
        for key in floating(sent):
            assert found[key].tobytes() == whole[key].tobytes(), key


def test_memory_does_not_grow_with_the_number_of_replies():
    sent = {"w": np.zeros(300_000, np.float32)}
    rng = np.random.default_rng(0)
    replies = [Reply({"w": rng.normal(size=300_000).astype(np.float32)}, 1) for _ in range(40)]
    for work in (
        lambda: median()(sent, replies, "uniform"),
        lambda: krum_scores(sent, replies, 2),
    ):
        tracemalloc.start()
        work()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # The result has 2.4 MB, a block 1 MiB; all models in float64 would be 96 MB.
        assert peak < 2.4e6 + 4 * 2**20


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [-0.1, 0.5, float("nan")])
def test_a_share_to_trim_outside_0_to_one_half_is_refused(beta):
    with pytest.raises(ConfigError, match=rf"beta = {beta}: .*at least 0 and below 0\.5"):
        trimmed_mean(beta)


@pytest.mark.parametrize("key", ["num_malicious", "num_selected"])
def test_a_negative_number_of_clients_is_refused(key):
    with pytest.raises(ConfigError, match=f"{key} = -1: must be at least 0"):
        multi_krum(**{key: -1})
