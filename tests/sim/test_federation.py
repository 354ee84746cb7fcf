"""Federations made of plain records: choice of clients, roles, splits, errors."""

import numpy as np
import pytest
import torch

from metabloom.errors import ConfigError, DataError
from metabloom.sim import DataSpec, Federation, Records, Split, federate
from metabloom.sim import federation as module

SPEC = DataSpec((1,), 10, "mlp")


def records(count: int, size: int = 10) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return clients whose every record is a number of its own; classes 0 and 1 in turn."""
    return {
        f"c{i:03d}": (
            np.arange(i * size, (i + 1) * size, dtype=np.float32)[:, None],
            np.arange(size) % 2,
        )
        for i in range(count)
    }


def make(count: int = 20, size: int = 10, **options) -> Federation:
    return federate("toy", SPEC, records(count, size), seed=0, **options)


def test_clients_split_80_10_10_into_roles():
    assert make(50).counts() == {"train": 40, "validation": 5, "unseen": 5}
    assert make(3).counts() == {"train": 1, "validation": 1, "unseen": 1}


def test_fewer_than_three_clients_are_refused():
    with pytest.raises(DataError, match="at least 3"):
        make(2)
    with pytest.raises(DataError, match="at least 3"):
        make(20, num_clients=2)


def test_a_client_without_a_role_or_with_an_unknown_one_is_named_with_the_remedy():
    roles = dict.fromkeys(records(20), "train")
    for wrong, words in (
        ({"c007": "test"}, "client 'c007' of 'toy' has role 'test' in roles"),
        ({"c008": "", "c009": "eval"}, "client 'c008' of 'toy' has role ''"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            make(20, roles={**roles, **wrong})
        assert "'train', 'validation', 'unseen', or leave roles out" in str(caught.value)
    del roles["c003"]
    for given in (roles, {}):
        with pytest.raises(DataError, match=r"client 'c00[03]' of 'toy' has no role in roles"):
            make(20, roles=given)


def test_records_with_their_own_support_have_a_fixed_split_and_others_have_not():
    own = Records(np.arange(6) % 2, lambda: np.arange(6.0)[:, None], support_rows=4)
    federation = federate("toy", SPEC, records(3) | {"own": own}, seed=0)
    fixed = [federation.client(i).fixed_split for i in range(4)]
    assert dict(zip(federation.client_ids, fixed, strict=True)) == {
        "c000": False, "c001": False, "c002": False, "own": True,
    }  # fmt: skip
    assert federation.client(3).support[0].flatten().tolist() == [0, 1, 2, 3]


def test_a_shape_written_as_a_list_is_the_same_spec():
    spec = DataSpec([1], 10, "mlp")
    assert spec == SPEC
    assert spec.input_shape == (1,)
    assert len(federate("toy", spec, records(3), seed=0)) == 3


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"input_shape": ()}, r"input_shape = \(\): must be one input's shape"),
        ({"input_shape": (1, 0)}, r"input_shape = \(1, 0\)"),
        ({"input_shape": (2.5,)}, r"input_shape = \(2\.5,\)"),
        ({"input_shape": 28}, "input_shape = 28"),
        ({"num_classes": 1}, "num_classes = 1: must be a whole number of at least 2"),
        ({"num_classes": True}, "num_classes = True"),
        ({"num_classes": 2.0}, r"num_classes = 2\.0"),
        ({"input_dtype": "float64"}, "input_dtype = 'float64'"),
    ],
)
def test_a_spec_that_cannot_be_is_refused_by_value(wrong, words):
    with pytest.raises(ConfigError, match=words):
        DataSpec(**{"input_shape": (1,), "num_classes": 2, "model": "mlp", **wrong})


def test_more_clients_than_there_are_is_refused_with_both_numbers():
    with pytest.raises(DataError, match="needs 21 clients, but 20 are large enough"):
        make(20, num_clients=21)


def test_a_choice_of_clients_is_seeded_and_of_the_size_asked_for():
    chosen = {seed: federate("toy", SPEC, records(50), seed=seed, num_clients=9) for seed in (0, 1)}
    assert len(chosen[0]) == len(chosen[1]) == 9
    assert chosen[0].client_ids != chosen[1].client_ids


def test_a_smaller_choice_is_part_of_a_larger_one():
    small, large = make(50, num_clients=9), make(50, num_clients=30)
    assert set(small.client_ids) < set(large.client_ids)
    for index, key in enumerate(small.client_ids):
        other = large.client(large.client_ids.index(key))
        assert torch.equal(small.client(index).support[0], other.support[0])


def test_the_order_in_which_clients_are_listed_does_not_matter():
    listed = records(20)
    backwards = dict(reversed(listed.items()))
    first, second = (federate("toy", SPEC, r, seed=0) for r in (listed, backwards))
    assert first.client_ids == second.client_ids
    assert first.roles == second.roles
    for i in range(20):
        assert torch.equal(first.client(i).all[0], second.client(i).all[0])


def test_a_client_is_the_same_whatever_other_clients_there_are():
    few, many = make(5), make(20)
    for i in range(5):
        assert torch.equal(few.client(i).support[0], many.client(i).support[0])


def test_support_and_query_hold_each_record_once():
    federation = make()
    for i in range(20):
        data = federation.client(i)
        assert sorted(data.all[0].flatten().tolist()) == list(range(i * 10, (i + 1) * 10))
        assert data.num_examples == 10


def test_clients_split_differently_though_their_sizes_agree():
    federation = make()
    picked = {tuple((federation.client(i).support[0].flatten() % 10).tolist()) for i in range(20)}
    assert len(picked) > 15


@pytest.mark.parametrize(
    ("split", "support", "query"),
    [
        (Split(), 5, 5),
        (Split(support_fraction=0.2), 2, 8),
        (Split(support_fraction=0.01), 1, 9),
        (Split(support_fraction=0.99), 9, 1),
        (Split(support_size=3), 3, 7),
        (Split(support_size=3, query_size=4), 3, 4),
        (Split(support_fraction=0.9, query_size=4), 6, 4),
        (Split(shots=2), 4, 6),
        (Split(shots=1, query_shots=3), 2, 6),
    ],
)
def test_a_split_has_the_sizes_that_it_says(split, support, query):
    data = make(split=split).client(0)
    assert (len(data.support[1]), len(data.query[1])) == (support, query)
    if split.shots:
        assert data.support[1].bincount().tolist() == [split.shots] * 2


def test_small_clients_are_dropped_and_counted_never_padded():
    mixed = records(6) | {
        "tiny-a": (np.zeros((4, 1)), np.arange(4) % 2),
        "tiny-b": (np.zeros((0, 1)), np.zeros(0, int)),
    }
    federation = federate("toy", SPEC, mixed, seed=0, split=Split(support_size=4))
    assert federation.dropped == 2
    assert len(federation) == 6
    assert not {"tiny-a", "tiny-b"} & set(federation.client_ids)


def test_a_client_with_one_rare_class_is_dropped_by_a_split_by_class():
    lopsided = {"lopsided": (np.zeros((10, 1)), np.array([0] * 9 + [1]))}
    federation = federate("toy", SPEC, records(3) | lopsided, seed=0, split=Split(shots=1))
    assert federation.dropped == 1
    assert "lopsided" not in federation.client_ids


def test_a_support_larger_than_every_client_says_what_was_wanted_and_what_there_is():
    with pytest.raises(DataError) as caught:
        make(split=Split(support_size=10))
    message = str(caught.value)
    assert "11 records (support_size = 10" in message
    assert "'c000', has 10 records" in message
    assert "lower support_size" in message
    with pytest.raises(DataError, match="7 records of each of its classes"):
        make(split=Split(shots=5, query_shots=2))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"support_fraction": 0.0}, "between 0 and 1"),
        ({"support_fraction": float("nan")}, "between 0 and 1"),
        ({"shots": -1}, "shots = -1"),
        ({"shots": 1, "support_size": 3}, "not both"),
        ({"query_shots": 2}, "without shots"),
    ],
)
def test_a_split_that_cannot_be_is_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        Split(**wrong)


def test_a_size_that_a_user_gives_replaces_the_kind_of_the_default():
    assert Split(shots=2).with_options({"support_size": 3}) == Split(support_size=3)
    assert Split(support_size=3).with_options({"shots": 2}) == Split(shots=2)
    assert Split(support_size=3).with_options({"support_fraction": 0.1}) == Split(0.1)
    assert Split(shots=2).with_options({"query_shots": 4}) == Split(shots=2, query_shots=4)
    assert Split(shots=2).with_options({}) == Split(shots=2)


@pytest.mark.parametrize(
    ("inputs", "targets", "words"),
    [
        (np.zeros((4, 2)), np.zeros(4, int), r"shape \(2,\), the spec says \(1,\)"),
        (np.zeros((4, 1)), np.zeros(5, int), "4 inputs but 5 targets"),
        (np.zeros((4, 1)), np.zeros(4), "dtype float64"),
        (np.zeros((4, 1)), np.full(4, 10), r"outside \[0, 10\)"),
        (np.zeros((4, 1)), np.full(4, -1), r"outside \[0, 10\)"),
        (np.full((4, 1), np.nan), np.zeros(4, int), "NaN"),
    ],
)
def test_records_that_do_not_fit_the_spec_name_the_client(inputs, targets, words):
    with pytest.raises(DataError, match=words) as caught:
        federate("toy", SPEC, records(3) | {"odd": (inputs, targets)}, seed=0)
    assert "client 'odd' of 'toy'" in str(caught.value)


def test_records_decode_only_when_their_client_is_asked_for_and_then_once():
    decoded = []

    def lazily(key: str) -> Records:
        return Records(np.zeros(4, int), lambda: (decoded.append(key), np.zeros((4, 1)))[1])

    federation = federate("toy", SPEC, {k: lazily(k) for k in "abcd"}, seed=0)
    assert decoded == []
    assert federation.client(2) is federation.client(2)
    assert decoded == ["c"]


def test_the_cache_forgets_the_oldest_client_when_it_is_full(monkeypatch):
    federation = make(20)
    one = module._num_bytes(federation.client(0))
    monkeypatch.setattr(module, "CACHE_BYTES", 3 * one)
    first = federation.client(0)
    for i in (1, 2, 3):
        federation.client(i)
    again = federation.client(0)
    assert again is not first
    assert torch.equal(again.all[0], first.all[0])
    assert federation._cache._bytes <= 3 * one


def test_a_client_that_does_not_exist_is_refused():
    for index in (-1, 20):
        with pytest.raises(DataError, match=f"client {index} of 'toy' does not exist"):
            make(20).client(index)


def test_bytes_become_floats_between_0_and_1_and_other_numbers_stay():
    data = {f"c{i}": (np.array([[0], [51], [255]], np.uint8), np.zeros(3, int)) for i in range(3)}
    values = federate("toy", SPEC, data, seed=0).client(0).all[0]
    assert values.dtype == torch.float32
    assert sorted(values.flatten().tolist()) == pytest.approx([0, 0.2, 1])
    assert make(3).client(2).all[0].max() == 29


def test_given_roles_are_kept_and_a_choice_keeps_their_proportion():
    roles = {
        f"c{i:03d}": ("unseen" if i < 30 else "train" if i < 80 else "validation")
        for i in range(100)
    }
    everyone = make(100, roles=roles)
    assert everyone.counts() == {"train": 50, "validation": 20, "unseen": 30}
    some = make(100, roles=roles, num_clients=40)
    assert some.counts() == {"train": 32, "validation": 4, "unseen": 4}
    assert all(roles[key] == role for key, role in zip(some.client_ids, some.roles, strict=True))
    with pytest.raises(DataError, match="56 train clients, but 50"):
        make(100, roles=roles, num_clients=70)
