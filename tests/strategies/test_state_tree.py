"""The state of a rule through a checkpoint: to the bit, or refused by its path."""

import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metabloom.errors import CheckpointError
from metabloom.strategies import server_optimizer
from metabloom.strategies.fedmeta import OPTIMIZERS
from metabloom.strategies.rules import Reply
from metabloom.strategies.shell.checkpoint import Checkpoints
from tests.strategies import snapshots
from tests.strategies.snapshots import exactly, snapshot, through_disk


@settings(max_examples=200, deadline=None)
@given(st.none() | st.dictionaries(st.text(), snapshots.TREES, max_size=3))
def test_any_state_of_a_rule_comes_back_to_the_bit(state):
    assert exactly(through_disk(state=state).state) == exactly(state)


def test_tensors_of_every_kind_come_back_to_the_bit():
    whole = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    state = {
        "brain": torch.tensor([1.5, math.nan, -0.0]).bfloat16(),
        "scalar": torch.tensor(2.5).bfloat16(),
        "empty": torch.empty(0, 3).bfloat16(),
        "half": torch.tensor([1e-7, 65504.0]).half(),
        "turned": whole.T,
        "strided": whole[:, ::2],
        "shared": [whole, whole[1]],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "flag": torch.tensor(True),
        "count": torch.tensor(2**62),
    }
    found = through_disk(state=state).state
    assert exactly(found) == exactly(state)
    found["half"].add_(1)  # torch's own memory: an optimiser writes into it


def test_other_kinds_of_mappings_come_back_as_dicts_and_big_endian_arrays_as_native_ones():
    state = {"teacher": OrderedDict(b=1, a=2), "array": np.arange(3, dtype=">f4")}
    found = through_disk(state=state).state
    assert exactly(found["teacher"]) == exactly({"b": 1, "a": 2})
    assert exactly(found["array"]) == exactly(np.arange(3, dtype="f4"))


def test_what_a_rule_keeps_can_be_written_to():
    """A rule written by a user may add to its arrays in place."""
    kept = {"mean": np.zeros(2), "more": [(np.ones(3),)]}
    found = through_disk(state=kept, arrays={"mean": np.zeros(2)})
    found.state["mean"] += 1
    found.state["more"][0][0][:] = 7
    assert found.arrays["mean"].tolist() == [0, 0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_goes_on_from_its_saved_state_to_the_bit(name):
    rule = server_optimizer(lambda params: OPTIMIZERS[name](params, lr=0.1))
    rng = np.random.default_rng(0)
    model = {"weight": rng.normal(size=(3, 2)).astype(np.float32), "bias": rng.normal(size=2)}

    def step(state, model, number):
        shift = np.random.default_rng(number).normal()
        return rule.update(state, model, [Reply({n: a + shift for n, a in model.items()}, 1.0)])

    state = rule.init(model)
    for number in (1, 2):
        state, model = step(state, model, number)
    found = through_disk(state=state, arrays=model)
    assert exactly(found.state) == exactly(state)
    assert exactly(step(found.state, found.arrays, 3)) == exactly(step(state, model, 3))


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ({"optimizer": {"x": snapshots.Foo()}}, r"state\['optimizer'\]\['x'\] is a Foo"),
        ({"all": [1, (2, snapshots.Foo)]}, r"state\['all'\]\[1\]\[1\] is a type"),
        ({"x": {1.5: 2}}, r"state\['x'\] has the key 1.5"),
        ({"x": {True: 2}}, r"state\['x'\] has the key True"),
        ({"x": 1j}, r"state\['x'\] is a complex"),
        ({"x": {1}}, r"state\['x'\] is a set"),
        ({"x": np.array(["a"])}, r"state\['x'\] is a ndarray of <U1"),
        ({"x": np.ma.masked_array([1])}, r"state\['x'\] is a MaskedArray"),
        ({"x": torch.zeros(2, dtype=torch.complex64)}, r"a Tensor of torch.complex64"),
        ({"x": torch.eye(2).to_sparse()}, r"state\['x'\] is a Tensor"),
        ({"x": torch.zeros(2, device="meta")}, r"state\['x'\] is a Tensor"),
        ({"x": 10**5000}, r"round 1 cannot be saved: state"),
        ({"x": snapshots.ENDLESS}, "nested too deeply"),
    ],
)
def test_a_state_that_cannot_be_saved_is_refused_by_its_path(tmp_path, state, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        Checkpoints(tmp_path / "new").save(snapshot(state=state))
    assert not (tmp_path / "new").exists()
