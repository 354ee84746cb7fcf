"""What is said of public records: packed and unpacked, and whose records they must be."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from metabloom.errors import DataError, MetabloomError, WireError
from metabloom.public import PublicData
from metabloom.public_logits import Subsets, round_of

INPUTS = torch.arange(20.0)[:, None]
PUBLIC = PublicData.of("numbered", INPUTS)
ENCODINGS = pytest.mark.parametrize(
    ("encoding", "error"), [("float32", 0), ("float16", 5e-3), ("int8", 1 / 254 + 1e-6)]
)
FLOATS = st.floats(-8, 8, width=32)


@ENCODINGS
@given(values=arrays(np.float32, (6, 3), elements=FLOATS), number=st.integers(0, 50))
def test_what_is_packed_is_unpacked(encoding, error, values, number):
    subsets = Subsets(PUBLIC, 6, 0, encoding)
    packed = subsets.packed(values, number)
    assert round_of(packed) == number
    found = subsets.unpacked(packed, 3)
    bound = error * np.abs(values).max(axis=1, keepdims=True)
    assert (np.abs(found - values) <= bound + 1e-7).all()


def test_both_ends_make_the_same_subsets_and_others_each_round():
    ours, theirs = Subsets(PUBLIC, 6, 4), Subsets(PublicData.of("here", INPUTS.clone()), 6, 4)
    for number in range(4):
        assert np.array_equal(ours.rows(number), theirs.rows(number))
    assert not np.array_equal(ours.rows(1), ours.rows(2))
    assert np.array_equal(Subsets(PUBLIC, 0, 4).rows(3), np.arange(20))


def test_the_name_of_a_source_does_not_count_but_each_bit_does():
    said = Subsets(PUBLIC, 0, 0).packed(np.zeros((20, 2), np.float32), 1)
    Subsets(PublicData.of("another name", INPUTS), 0, 0).unpacked(said, 2)
    changed = INPUTS.clone()
    changed[7, 0] = torch.nextafter(changed[7, 0], torch.tensor(100.0))
    for others in (changed, INPUTS.flip(0), INPUTS.double()):
        with pytest.raises(WireError, match="the public data differ"):
            Subsets(PublicData.of("numbered", others), 0, 0).unpacked(said, 2)


@pytest.mark.parametrize("theirs", [Subsets(PUBLIC, 6, 1), Subsets(PUBLIC, 7, 0)])
def test_another_seed_or_size_is_found(theirs):
    said = theirs.packed(np.zeros((theirs.size, 2), np.float32), 1)
    with pytest.raises(WireError, match="the public data differ"):
        Subsets(PUBLIC, 6, 0).unpacked(said, 2)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda a: {k: v for k, v in a.items() if k != "round"}, "without 'round'"),
        (lambda a: {k: v for k, v in a.items() if k != "mark"}, "without 'mark'"),
        (lambda a: {k: v for k, v in a.items() if k != "logits"}, "logits are missing"),
        (lambda a: a | {"round": np.array(-1)}, "at least 0"),
        (lambda a: a | {"round": np.array([1, 2])}, "one int64"),
        (lambda a: a | {"round": np.array(1.0)}, "one int64"),
        (lambda a: a | {"mark": a["mark"][:3]}, "the public data differ"),
        (lambda a: a | {"logits": a["logits"].T.copy()}, "have"),
        (lambda a: a | {"scale": np.ones(20, np.float32)}, "came as"),
    ],
)
def test_what_is_malformed_is_named(spoil, reason):
    subsets = Subsets(PUBLIC, 0, 0)
    with pytest.raises(WireError, match=reason):
        subsets.unpacked(spoil(subsets.packed(np.zeros((20, 2), np.float32), 1)), 2)


def test_what_cannot_be_packed_is_named():
    with pytest.raises(DataError, match="size = 21"):
        Subsets(PUBLIC, 21, 0).rows(1)
    with pytest.raises(MetabloomError, match="not finite"):
        Subsets(PUBLIC, 0, 0).packed(np.full((20, 2), np.nan, np.float32), 1)
