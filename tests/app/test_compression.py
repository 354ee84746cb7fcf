"""Updates as factors: ranks, exactness, the error's energy, round trips, what a sender may not."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from metabloom import compression
from metabloom.compression import (
    compress,
    compress_update,
    decompress,
    decompress_update,
    energy_threshold,
    num_bytes,
    rank_for,
)
from metabloom.errors import ConfigError, WireError


def low_rank(m, n, sigma, seed=0, dtype=np.float64):
    """Return a matrix (m, n) of the given singular values, and no others."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(size, len(sigma))))[0] for size in (m, n))
    return ((u * np.array(sigma)) @ v.T).astype(dtype)


def there_and_back(array, energy):
    parts = compress(array, energy)
    return decompress(**parts, shape=array.shape, dtype=array.dtype)


# --- ranks ----------------------------------------------------------------------------------------


def keeps_the_known_ranks(rank_for):
    assert rank_for([3, 1], 0.95) == 2
    assert rank_for([3, 1], 0.85) == 1
    assert rank_for([1, 1], 0.95) == 2
    assert rank_for([10, 1, 1], 0.95) == 1
    assert rank_for([3, 1], 0.9) == 1  # 9 / 10 exactly: "at least"
    assert rank_for([4, 3, 2, 1], 0.9) == 3  # 16 + 9 = 25, then 29 of 30


def has_a_rank_at_least_one(rank_for):
    assert rank_for([2, 1, 1], 1) == 3
    assert rank_for([2, 1, 0], 1) == 2
    assert rank_for([0, 0], 0.95) == 1
    assert rank_for([0.0], 1) == 1


def counts_whole_numbers_of_energy(rank_for):
    """The definition in exact fractions, also where squares leave the range of float64."""
    rng = np.random.default_rng(0)
    for scale in (1, 1e-200, 1e200):
        for _ in range(50):
            whole = np.sort(rng.integers(0, 9, size=5))[::-1]
            squares = [Fraction(int(value) ** 2) for value in whole]
            for energy in (0.5, 0.75, 0.875):  # exact in binary
                reached = [
                    sum(squares[: k + 1]) >= Fraction(energy) * sum(squares) for k in range(5)
                ]
                assert rank_for(whole * scale, energy) == reached.index(True) + 1


def of_the_first_that_exceeds(sigma, energy):
    """A public implementation: the last K whose energy is below E, 0 where none is."""
    squares = np.square(np.asarray(sigma, float))
    return int((np.cumsum(squares) < energy * squares.sum()).sum())


def of_sigma_not_squared(sigma, energy):
    reached = np.cumsum(sigma)
    return int(np.searchsorted(reached, energy * reached[-1])) + 1


def of_squares_that_vanish(sigma, energy):
    return rank_for(np.sqrt(np.square(sigma)), energy)


RANK_LAWS = [keeps_the_known_ranks, has_a_rank_at_least_one, counts_whole_numbers_of_energy]


@pytest.mark.parametrize("law", RANK_LAWS, ids=lambda law: law.__name__)
def test_the_rank_keeps_the_law(law):
    law(rank_for)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the mistake itself
@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (of_the_first_that_exceeds, keeps_the_known_ranks),
        (of_the_first_that_exceeds, has_a_rank_at_least_one),
        (of_sigma_not_squared, keeps_the_known_ranks),
        (of_squares_that_vanish, counts_whole_numbers_of_energy),
    ],
)
def test_a_wrong_rank_breaks_its_law(wrong, law):
    with pytest.raises((AssertionError, ConfigError)):
        law(wrong)


def test_the_threshold_goes_from_its_start_to_its_end():
    assert [energy_threshold(p) for p in (0, 1)] == [0.95, 0.98]
    assert energy_threshold(1 / 3) == pytest.approx(0.96, rel=1e-12)
    assert energy_threshold(0.25, start=0.5, end=1.0) == 0.625


# --- one array ------------------------------------------------------------------------------------


def test_the_energy_of_the_error_is_that_of_the_tail():
    matrix = np.random.default_rng(1).normal(size=(40, 30)) * np.geomspace(1, 1e-2, 30)
    energies = np.linalg.eigvalsh(matrix.T @ matrix)[::-1]  # sigma^2 by another way
    for energy in (0.5, 0.8, 0.9):
        parts = compress(matrix, energy)
        rank = len(parts["s"])
        error = np.square(matrix - there_and_back(matrix, energy)).sum()
        assert error == pytest.approx(energies[rank:].sum(), rel=1e-9)
        assert error <= (1 - energy) * energies.sum()
        assert energies[rank - 1 :].sum() > (1 - energy) * energies.sum()  # none fewer would do


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(np.float64, 1e-13), (np.float32, 1e-6), (np.float16, 1e-3)],  # one rounding of each dtype
)
def test_all_the_energy_reconstructs_exactly(dtype, tolerance):
    matrix = low_rank(20, 30, (5, 3, 1), dtype=dtype)
    # In float64 factors of rank 3; in the others rounding has made every singular value count.
    flat = compress_update({"w": matrix}, 1.0)
    assert ("w" in flat) == (dtype is not np.float64)
    found = decompress_update(flat, {"w": matrix})["w"]
    assert np.linalg.norm(found - matrix.astype(float)) <= tolerance * np.linalg.norm(matrix)
    near = compress(matrix, 1 - 1e-6)  # three values hold all but rounding
    assert len(near["s"]) == 3
    error = there_and_back(matrix, 1 - 1e-6) - matrix.astype(float)
    assert np.linalg.norm(error) <= max(tolerance, 1e-3 * (dtype is np.float16)) * 6


def test_the_largest_values_are_kept():
    matrix = low_rank(12, 9, (10, 1, 1))
    parts = compress(matrix, 0.95)
    assert parts["s"] == pytest.approx([10])
    assert {name: part.shape for name, part in parts.items()} == {
        "u": (12, 1),
        "s": (1,),
        "v": (1, 9),
    }


def test_factors_are_sent_only_where_they_are_smaller():
    for m, n, rank in (
        (10, 10, 4),
        (10, 10, 5),
        (4, 5, 2),
        (3, 3, 1),
        (2, 50, 1),
        (1, 50, 1),
        (2, 2, 1),
    ):
        matrix = low_rank(m, n, [1.0] * rank)
        is_factored = isinstance(compress(matrix, 0.9999), dict)
        assert is_factored == (rank * (m + n + 1) < m * n), (m, n, rank)


def test_half_precision_sends_factors_in_float32_and_counts_their_bytes():
    parts = compress(low_rank(10, 10, (1,), dtype=np.float16), 0.9)  # 84 bytes of 200
    assert {part.dtype for part in parts.values()} == {np.dtype(np.float32)}
    assert isinstance(compress(low_rank(10, 10, (1, 1, 1), dtype=np.float16), 0.99), np.ndarray)


def test_a_convolution_is_a_matrix_of_its_outputs():
    kernel = low_rank(16, 8 * 9, (4, 2)).reshape(16, 8, 3, 3)
    parts = compress(kernel, 0.999)
    assert (parts["u"].shape, parts["v"].shape) == ((16, 2), (2, 72))
    assert there_and_back(kernel, 0.999) == pytest.approx(kernel, abs=1e-12)


@pytest.mark.parametrize(
    "array",
    [
        np.float32(3.0).reshape(()),
        np.ones(50, np.float32),
        np.ones((0, 40), np.float32),
        np.ones((40, 40), np.int64),
        np.ones((40, 40), bool),
        np.full((40, 40), np.nan, np.float32),
        np.full((40, 40), 3e38, np.float32),  # its singular value is beyond float32
    ],
    ids=["scalar", "vector", "empty", "counters", "flags", "nan", "huge"],
)
def test_what_cannot_be_factored_goes_as_it_is(array):
    flat = compress_update({"w": array}, 0.9)
    assert list(flat) == ["w"]
    assert flat["w"] is array
    assert decompress_update(flat, {"w": array})["w"] is array


def test_the_number_of_threads_changes_no_bit_and_stays():
    """Clients in one process each have one thread, the server's own process may have more."""
    matrix = np.random.default_rng(2).normal(size=(400, 300))
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        parts = compress(matrix, 0.7)
        assert isinstance(parts, dict)
        whole = decompress(**parts, shape=matrix.shape, dtype=matrix.dtype)
        found.append([part.tobytes() for part in (*parts.values(), whole)])
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


# --- updates --------------------------------------------------------------------------------------

UPDATE = {
    "conv.weight": low_rank(16, 72, (3, 0.1), dtype=np.float32).reshape(16, 8, 3, 3),
    "conv.bias": np.arange(16, dtype=np.float32),
    "batches": np.array(7),
    "dense.weight": low_rank(10, 64, (2, 0.1), seed=1, dtype=np.float32),
}
FLAT = compress_update(UPDATE, 0.95)


def test_an_update_travels_under_flat_names_and_comes_back_in_order():
    assert list(FLAT) == [
        *(f"conv.weight/{suffix}" for suffix in "usv"),
        *("conv.bias", "batches"),
        *(f"dense.weight/{suffix}" for suffix in "usv"),
    ]
    assert num_bytes(FLAT) == 4 * (16 + 1 + 72 + 16 + 10 + 1 + 64) + 8
    found = decompress_update(dict(reversed(FLAT.items())), UPDATE)
    assert list(found) == list(UPDATE)
    for name, value in UPDATE.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype)
        error = np.linalg.norm(found[name] - value) / np.linalg.norm(value)
        assert error <= math.sqrt(1 - 0.95)


shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)
arrays = st.sampled_from([np.float16, np.float32, np.float64]).flatmap(
    lambda dtype: hnp.arrays(dtype, shapes, elements={"min_value": -100, "max_value": 100})
)


@given(arrays, st.floats(0.01, 1))
@settings(deadline=None, max_examples=150)
def test_every_update_comes_back_within_the_energy_and_never_larger(array, energy):
    flat = compress_update({"w": array}, energy)
    found = decompress_update(flat, {"w": array})["w"]
    assert (found.shape, found.dtype) == (array.shape, array.dtype)
    assert num_bytes(flat) <= array.nbytes
    wide = array.astype(float)
    lost = np.linalg.norm((found - wide).ravel())
    # Beyond the tail, factors and result are rounded to their dtypes.
    rounding = 4 * np.finfo(array.dtype).eps * np.linalg.norm(wide.ravel()) + 1e-6
    assert lost <= math.sqrt(1 - energy) * np.linalg.norm(wide.ravel()) + rounding


# --- hostile --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conv.bias": None}, "'conv.bias' did not come, nor its factor 'conv.bias/u'"),
        ({"conv.weight/s": None}, "'conv.weight' did not come, nor its factor 'conv.weight/s'"),
        ({"conv.weight/w": np.ones(1)}, "not expected, 'conv.weight/w' first: .* u, s, v"),
        ({"other": np.ones(1)}, "1 arrays are not expected, 'other' first"),
        ({"conv.weight": UPDATE["conv.weight"]}, "dense and as 'conv.weight/u'"),
        ({"conv.weight/u": np.ones((16, 2), "f4")}, r"'conv.weight/u' has .*wanted \(16, 1\)"),
        ({"conv.weight/v": np.ones((1, 71), "f4")}, r"'conv.weight/v' has .*wanted \(1, 72\)"),
        ({"conv.weight/s": np.ones((1, 1), "f4")}, r"'conv.weight/s' has .*wanted \(1,\)"),
        ({"conv.weight/s": np.ones(0, "f4")}, r"'conv.weight/s' holds 0 .*from 1 to 16"),
        ({"conv.weight/s": np.ones(10**6, "f4")}, "'conv.weight/s' holds 1000000 singular"),
        ({"conv.weight/u": np.ones((16, 1))}, "'conv.weight/u' has .*float64, wanted .*float32"),
        ({"conv.weight/u": np.full((16, 1), "x")}, "'conv.weight/u' has .*<U1"),
        ({"conv.bias": np.ones(15, "f4")}, r"'conv.bias' has shape \(15,\)"),
        ({"batches": np.array(7.0)}, "'batches' has .*float64"),
        (
            {"conv.bias": None} | {f"conv.bias/{s}": np.ones((1, 1), "f4") for s in "usv"},
            "'conv.bias' came as factors",
        ),
    ],
)
def test_what_a_sender_may_not_do_is_refused_by_the_array_s_name(change, words):
    bad = {name: value for name, value in {**FLAT, **change}.items() if value is not None}
    with pytest.raises(WireError, match=words):
        decompress_update(bad, UPDATE)


def test_factors_that_are_not_finite_never_make_a_finite_array():
    """The firewall refuses the result; a NaN that vanished in the product would pass it."""
    for key in ("conv.weight/u", "conv.weight/s", "conv.weight/v"):
        for value in (np.nan, np.inf):
            part = np.zeros_like(FLAT[key])
            part.flat[0] = value
            found = decompress_update({**FLAT, key: part}, UPDATE)
            assert not np.isfinite(found["conv.weight"]).all()


NAMES = [*FLAT, "conv.weight", "dense.weight", "conv.bias/u", "conv.weight/w", "", "/u"]


@given(st.dictionaries(st.sampled_from(NAMES), arrays | st.sampled_from([*FLAT.values()])))
@settings(deadline=None, max_examples=150)
def test_anything_is_refused_or_has_the_expected_layout(flat):
    try:
        found = decompress_update({**FLAT, **flat}, UPDATE)
    except WireError:
        return
    assert {n: (v.shape, v.dtype) for n, v in found.items()} == {
        n: (v.shape, v.dtype) for n, v in UPDATE.items()
    }


def test_a_name_that_ends_like_a_factor_is_refused_at_both_ends():
    for function in (lambda n: compress_update(n, 0.9), lambda n: decompress_update({}, n)):
        with pytest.raises(ConfigError, match="'a/u' ends like a factor"):
            function({"a/u": np.ones(2)})


@pytest.mark.parametrize("energy", [0, -0.1, 1.001, math.nan])
def test_a_share_of_the_energy_that_is_none_is_refused(energy):
    for function in (
        lambda: rank_for([1.0], energy),
        lambda: compress(np.ones(3), energy),
        lambda: energy_threshold(0, start=energy),
        lambda: energy_threshold(0, end=energy),
    ):
        with pytest.raises(ConfigError, match=f"= {energy}: must be above 0 and at most 1"):
            function()


def test_progress_outside_0_to_1_is_refused():
    with pytest.raises(ConfigError, match=r"progress = 2: must be in \[0, 1\]"):
        energy_threshold(2)


@pytest.mark.parametrize("sigma", [[], [[1.0]], [math.nan], [1.0, 2.0], [1.0, -1.0]])
def test_values_that_are_no_singular_values_are_refused(sigma):
    with pytest.raises(ConfigError, match="sigma"):
        rank_for(sigma, 0.9)


def test_a_decomposition_that_fails_sends_the_array(monkeypatch):
    def fails(*arguments, **more):
        raise torch.linalg.LinAlgError

    monkeypatch.setattr(compression.torch.linalg, "svd", fails)
    array = low_rank(10, 10, (1,))
    assert compress(array, 0.9) is array
