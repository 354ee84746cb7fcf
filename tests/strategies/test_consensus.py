"""One opinion out of several models' outputs: known answers, robustness, order, refusals."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metabloom.errors import ConfigError, WireError
from metabloom.strategies import consensus as module
from metabloom.strategies.consensus import (
    average_logits,
    average_probabilities,
    consensus_of,
    drop_worst,
    ensemble_targets,
    era,
    median,
    sound,
    trimmed_mean,
)

NAMES = ("mean", "median", "trimmed-mean")
EVERY = pytest.mark.parametrize("name", NAMES)


def drawn(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(0, 3, size=shape).astype(dtype)


def softmax(row):
    powers = [math.exp(v) for v in row]
    return [v / math.fsum(powers) for v in powers]


# --- laws, and wrong implementations that break them ----------------------------------------------


def averages_logits_and_not_probabilities(targets):
    found = targets(np.array([[[4.0, 0.0]], [[0.0, 2.0]]]))
    assert found.tolist() == [pytest.approx([0.7311, 0.2689], abs=5e-5)]  # softmax(2, 1)
    found = targets(np.array([[[6.0, 0, 0]], [[0, 3.0, 0]], [[0, 0, 0.0]]]))
    assert found.tolist() == [pytest.approx(softmax([2, 1, 0]), rel=1e-12)]


def sharpens_the_mean(era):
    found = era(np.array([[[0.5, 0.3, 0.2]]]), 0.1)
    assert found.tolist() == [pytest.approx([0.843795, 0.114195, 0.042010], abs=5e-7)]
    found = era(np.array([[[0.9, 0.1]], [[0.3, 0.7]]]), 0.2)  # mean (.6, .4), a = e ** (.2 / .2)
    assert found.tolist() == [pytest.approx([math.e / (1 + math.e), 1 / (1 + math.e)], rel=1e-12)]


def average_of_probabilities(logits):
    return np.mean([[softmax(row) for row in client] for client in logits], axis=0)


LAWS = {averages_logits_and_not_probabilities: ensemble_targets, sharpens_the_mean: era}
WRONG = {
    "averages probabilities": (average_of_probabilities, averages_logits_and_not_probabilities),
    "sums logits": (lambda z: ensemble_targets(len(z) * z), averages_logits_and_not_probabilities),
    "sharpens each client": (
        lambda p, t: average_of_probabilities(p / t),
        sharpens_the_mean,
    ),
    "sharpens by a power": (  # softmax(log p / T): another known way to sharpen
        lambda p, t: ensemble_targets(np.log(average_probabilities(p))[None] / t),
        sharpens_the_mean,
    ),
    "multiplies by T": (lambda p, t: era(p, 1 / t), sharpens_the_mean),
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_consensus_keeps_the_law(law):
    law(LAWS[law])


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_consensus_breaks_its_law(name):
    wrong, law = WRONG[name]
    with pytest.raises(AssertionError):
        law(wrong)


def test_averaging_probabilities_gives_the_other_known_answer():
    p = np.array([[softmax([4, 0])], [softmax([0, 2])]])
    assert average_probabilities(p)[0, 0] == pytest.approx(0.5506, abs=5e-5)


# --- means, medians, trimmed means ----------------------------------------------------------------


def test_the_mean_of_logits_has_no_weights():
    two = np.array([[[1.0, 5.0]], [[3.0, 1.0]]])
    assert average_logits(two).tolist() == [[2, 3]]
    # A client twice, as if its records counted: the consensus would be another one.
    assert average_logits(two[[0, 0, 1]]).tolist() != [[2, 3]]


def test_a_mean_of_probabilities_may_be_weighted():
    p = np.array([[[1.0, 0.0]], [[0.0, 1.0]], [[0.5, 0.5]]])
    assert average_probabilities(p).tolist() == [[0.5, 0.5]]
    assert average_probabilities(p, [3, 1, 0]).tolist() == [[0.75, 0.25]]
    assert average_probabilities(p, [0, 0, 7]).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_each_value_is_that_of_the_standard_library(count):
    z = drawn(count, 4, 3, seed=count)
    k = math.floor(0.3 * count)
    for n, c in itertools.product(range(4), range(3)):
        column = sorted(map(float, z[:, n, c]))
        kept = column[k : count - k] if count > 2 * k else [statistics.median(column)]
        # Float32 rounds by 6e-8; cancellation stays in float64.
        assert average_logits(z)[n, c] == pytest.approx(statistics.fmean(column), rel=1e-6)
        assert median(z)[n, c] == np.float32(statistics.median(column))
        assert trimmed_mean(z, 0.3)[n, c] == pytest.approx(statistics.fmean(kept), rel=1e-6)


def test_names_choose_the_function():
    z = drawn(7, 3, 2)
    assert np.array_equal(consensus_of("mean", z), average_logits(z))
    assert np.array_equal(consensus_of("median", z), median(z))
    assert np.array_equal(consensus_of("trimmed-mean", z, trim=0.4), trimmed_mean(z, 0.4))
    assert not np.array_equal(trimmed_mean(z, 0.4), trimmed_mean(z, 0.2))


@pytest.mark.parametrize("factor", [-1000, 1e30])
def test_one_client_of_ten_with_wild_logits_moves_no_robust_consensus(factor):
    z = drawn(10, 50, 10, dtype=np.float64)
    others = np.delete(z, 4, axis=0)
    wild = z.copy()
    wild[4] *= factor
    for name in ("median", "trimmed-mean"):
        found = consensus_of(name, wild)
        assert (found >= others.min(axis=0)).all()
        assert (found <= others.max(axis=0)).all()
    moved = consensus_of("mean", wild)  # the law is not idle: the mean does not keep it
    assert ((moved < others.min(axis=0)) | (moved > others.max(axis=0))).mean() > 0.9


numbers = st.floats(-1e3, 1e3, width=32)


@given(rows=st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=8))
@example([[0.0, 0.0, 0.0], [-0.0, 1.0, 1.0], [-0.0, 2.0, 2.0]])
@settings(deadline=None, max_examples=50)
def test_the_order_of_the_clients_does_not_change_one_bit_of_a_robust_consensus(rows):
    z = np.array(rows, np.float32)[:, None]  # (K, 1, 3)
    turned = z[np.random.default_rng(len(rows)).permutation(len(rows))]
    for name in ("median", "trimmed-mean"):
        assert consensus_of(name, z).tobytes() == consensus_of(name, turned).tobytes()


@EVERY
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_dtype_comes_back_and_arguments_stay(name, dtype):
    z = np.full((5, 2, 3), 60_000, dtype)  # the sum of two is beyond float16
    z.flags.writeable = False
    found = consensus_of(name, z)
    assert (found.dtype, found.shape) == (dtype, (2, 3))
    assert (found == 60_000).all()
    assert not np.shares_memory(found, z)


@EVERY
def test_one_client_is_its_own_consensus(name):
    z = drawn(1, 4, 3)
    assert np.array_equal(consensus_of(name, z), z[0])


def test_blocks_give_what_whole_arrays_give(monkeypatch):
    z = drawn(5, 7, 3)
    whole = median(z)
    for block in (1, 15, 31):  # one row, one row, two rows that do not divide 7
        monkeypatch.setattr(module, "BLOCK", block)
        assert median(z).tobytes() == whole.tobytes()


def test_logits_of_ten_thousand_give_targets_without_overflow():
    found = ensemble_targets(np.array([[[1e4, -1e4]], [[1e4, 0]]], np.float32))
    assert found.tolist() == [[1, 0]]


# --- who takes part -------------------------------------------------------------------------------


def test_teachers_below_chance_are_dropped_and_those_at_chance_are_not():
    labels = np.array([0, 1, 2, 0, 1, 2])
    right = np.eye(3)[labels]
    chance = np.eye(3)[np.zeros(6, int)]  # always class 0: 2 of 6, exactly 1 / 3
    below = np.eye(3)[(labels + 1) % 3]
    below[0] = [1, 0, 0]  # 1 of 6
    assert drop_worst(np.stack([right, chance, below]), labels).tolist() == [True, True, False]


def test_a_row_that_is_not_finite_counts_as_wrong():
    z = np.array([[[9.0, 0.0], [0.0, 9.0]]])
    assert drop_worst(z, np.array([0, 1])).tolist() == [True]
    z[0, :, 0] = [np.nan, np.inf]  # argmax of NaN is its place: it would be class 0
    assert drop_worst(z, np.array([0, 0])).tolist() == [False]


def test_only_teachers_that_are_kept_are_heard():
    z = drawn(4, 5, 3)
    z[2] = np.nan
    kept = np.array([True, False, False, True])
    assert np.array_equal(ensemble_targets(z, kept), ensemble_targets(z[[0, 3]]))
    with pytest.raises(WireError, match="none of the 4 clients is kept"):
        ensemble_targets(z, np.zeros(4, bool))
    with pytest.raises(ConfigError, match=r"shape \(3,\).*each of the 4 clients"):
        ensemble_targets(z, np.ones(3, bool))
    with pytest.raises(ConfigError, match="dtype int64"):
        ensemble_targets(z, np.array([0, 3, 0, 0]))  # as places it would be another choice


def test_reasons_name_rows_and_are_empty_for_the_sound():
    z = drawn(3, 5, 2)
    z[1, 3, 0], z[1, 4, 1] = np.nan, -np.inf
    assert sound(z) == ["", "2 of 5 rows hold NaN or infinity, row 3 first", ""]


def test_rows_that_are_no_distributions_have_a_reason():
    p = np.tile(np.array([0.25, 0.75], np.float16), (4, 3, 1))
    p[1] *= 1000
    p[2, 1] = [-0.5, 1.5]
    p[3, 2] = [0.2, 0.7]
    assert sound(p, probabilities=True) == [
        "",
        "3 of 3 rows do not sum to 1, row 0 first",
        "1 of 3 rows hold negative probabilities, row 1 first",
        "1 of 3 rows do not sum to 1, row 2 first",
    ]
    assert sound(p) == [""] * 4


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [average_logits, average_probabilities, era, median,
                                      trimmed_mean, ensemble_targets])  # fmt: skip
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_clients_that_are_not_finite_are_refused_by_their_index(function, bad):
    z = np.ones((4, 3, 2))
    z[1, 2, 0] = z[3, 0, 1] = bad
    with pytest.raises(WireError, match=r"2 of 4 clients.*client 1: 1 of 3 rows.*client 3: 1 of 3"):
        function(z)


@pytest.mark.parametrize(
    "values", [np.ones((2, 3)), np.ones((0, 3, 2)), np.ones((2, 0, 3)), np.ones((2, 3, 2), int)]
)
def test_arrays_that_are_no_clients_records_and_classes_are_refused(values):
    for function in (average_logits, era, median, ensemble_targets, sound):
        with pytest.raises(WireError, match=r"\(clients, records, classes\) are needed"):
            function(values)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown consensus 'medain': did you mean 'median'"):
        consensus_of("medain", np.ones((1, 1, 1)))


@pytest.mark.parametrize("fraction", [-0.1, 0.5, math.nan])
def test_a_share_to_cut_outside_0_to_one_half_is_refused(fraction):
    with pytest.raises(ConfigError, match=rf"fraction = {fraction}: .*below 0\.5"):
        consensus_of("trimmed-mean", np.ones((2, 1, 1)), trim=fraction)


@pytest.mark.parametrize("temperature", [0, -1, math.nan, math.inf])
def test_a_temperature_that_is_not_finite_and_above_0_is_refused(temperature):
    with pytest.raises(ConfigError, match=f"temperature = {temperature}: must be a finite"):
        era(np.ones((1, 1, 1)), temperature)


@pytest.mark.parametrize("weights", [[1, 2, 3], [0, 0], [-1, 2], [math.nan, 1], [math.inf, 1]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ConfigError, match="2 finite numbers >= 0, not all 0"):
        average_probabilities(np.ones((2, 1, 1)), weights)


@pytest.mark.parametrize(
    "labels", [np.array([0]), np.array([0, 2]), np.array([-1, 0]), np.array([0.0, 1.0])]
)
def test_labels_that_do_not_fit_are_refused(labels):
    with pytest.raises(ConfigError, match=r"one integer class in \[0, 2\) for each of the 2"):
        drop_worst(np.ones((1, 2, 2)), labels)
