"""Logits in fewer bytes: the error of half a step, ranges, what a sender may not."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from metabloom.errors import ConfigError, MetabloomError, WireError
from metabloom.quantisation import dequantise_logits, quantise_logits

ENCODINGS = ("float32", "float16", "int8")
ROWS = np.array([[12.7, -3.04, 0.0], [-0.02, 0.013, 0.0], [0.0, 0.0, 0.0]], np.float32)

shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=6)
logits = hnp.arrays(np.float32, shapes, elements={"allow_nan": False, "allow_infinity": False})


def there_and_back(values, encoding):
    return dequantise_logits(quantise_logits(values, encoding), values.shape)


def test_eight_bits_have_one_scale_a_record():
    found = quantise_logits(ROWS, "int8")
    assert found["logits"].tolist() == [[127, -30, 0], [-127, 83, 0], [0, 0, 0]]
    assert found["scale"] == pytest.approx([0.1, 0.02 / 127, 0])
    assert (found["logits"].dtype, found["scale"].dtype) == (np.int8, np.float32)
    back = there_and_back(ROWS, "int8")
    assert back[0] == pytest.approx([12.7, -3.0, 0.0], rel=1e-6)
    assert back[2].tolist() == [0, 0, 0]


@given(logits)
@example(np.full((1, 2), np.finfo(np.float32).max))  # the scale rounds up
@settings(deadline=None, max_examples=150)
def test_eight_bits_are_off_by_half_a_step_at_most(values):
    found = quantise_logits(values, "int8")
    error = np.abs(there_and_back(values, "int8").astype(float) - values)
    # Float32 rounds scale and product by 1e-7 of the value, 127 steps; subnormal ones lose more.
    assert (error <= found["scale"][:, None] * (0.5 + 1e-4) + 1e-42).all()


def test_one_scale_for_all_records_would_be_off_by_more():
    scale = np.abs(ROWS).max() / 127
    error = np.abs(np.rint(ROWS / scale) * scale - ROWS)
    assert (error > quantise_logits(ROWS, "int8")["scale"][:, None] * 0.51).any()


@given(logits)
@settings(deadline=None, max_examples=80)
def test_the_sign_and_the_order_of_logits_stay(values):
    for encoding in ENCODINGS:
        back = there_and_back(values, encoding)
        assert (back * np.sign(values) >= 0).all()
        order = np.argsort(values, axis=1)
        assert (np.diff(np.take_along_axis(back, order, axis=1), axis=1) >= 0).all()


def test_float32_is_exact_and_float16_is_the_nearest():
    assert np.array_equal(there_and_back(ROWS, "float32"), ROWS)
    assert np.array_equal(there_and_back(ROWS, "float16"), ROWS.astype(np.float16))


def test_beyond_the_range_of_float16_logits_are_clipped():
    wide = np.array([[1e5, -3e38, 65504.0, 65519.0, 70_000.0]], np.float32)
    assert there_and_back(wide, "float16").tolist() == [[65504, -65504, 65504, 65504, 65504]]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_floating_input_comes_back_in_float32(encoding, dtype):
    back = there_and_back(ROWS.astype(dtype), encoding)
    assert (back.dtype, back.shape) == (np.float32, ROWS.shape)


def test_bytes_are_those_of_the_encoding():
    sizes = {
        encoding: sum(a.nbytes for a in quantise_logits(np.ones((50, 10)), encoding).values())
        for encoding in ENCODINGS
    }
    assert sizes == {"float32": 2000, "float16": 1000, "int8": 500 + 200}


# --- refused --------------------------------------------------------------------------------------


def test_an_unknown_encoding_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="'int9': did you mean 'int8'"):
        quantise_logits(ROWS, "int9")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_logits_that_are_not_finite_in_float32_are_refused_by_their_record(bad):
    values = np.zeros((3, 2))
    values[1, 0] = bad
    with pytest.raises(MetabloomError, match=r"logits of record 1 are .* not finite in float32"):
        quantise_logits(values, "int8")


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros((2, 3), int)])
def test_arrays_that_are_no_logits_are_refused(values):
    with pytest.raises(MetabloomError, match=r"floating \(records, classes\) are needed"):
        quantise_logits(values, "int8")


GOOD = quantise_logits(ROWS, "int8")


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({}, "logits are missing"),
        ({"logits": GOOD["logits"]}, r"int8 came as \['logits'\]: wanted \['logits', 'scale'\]"),
        ({"logits": ROWS, "scale": GOOD["scale"]}, "float32 came as"),
        (GOOD | {"more": ROWS}, "came as"),
        ({"logits": ROWS[:2]}, r"have \(2, 3\)"),
        ({"logits": ROWS.astype(np.float64)}, "float64"),
        ({"logits": ROWS.astype(str)}, "<U"),
        (GOOD | {"scale": GOOD["scale"][:2]}, r"'scale' has shape \(2,\)"),
        (GOOD | {"scale": GOOD["scale"][:, None]}, r"'scale' has shape \(3, 1\)"),
        (GOOD | {"scale": GOOD["scale"].astype(np.float64)}, "'scale' has .*float64"),
    ],
)
def test_what_a_sender_may_not_do_is_refused(named, words):
    with pytest.raises(WireError, match=words):
        dequantise_logits(named, ROWS.shape)


@given(st.dictionaries(st.sampled_from(["logits", "scale", "x"]), logits | st.just(GOOD["scale"])))
@settings(deadline=None, max_examples=80)
def test_anything_is_refused_or_has_the_expected_layout(named):
    try:
        found = dequantise_logits(GOOD | named, ROWS.shape)
    except WireError:
        return
    assert (found.shape, found.dtype) == (ROWS.shape, np.float32)


def test_a_scale_that_is_not_finite_makes_logits_that_are_not():
    found = dequantise_logits(GOOD | {"scale": np.full(3, np.inf, np.float32)}, ROWS.shape)
    assert not np.isfinite(found).all(axis=1).any()
