"""What the clients do with the arrays they receive, and which settings they refuse."""

import copy

import numpy as np
import pytest
import torch

from metabloom.clients import MAMLClient, SGDClient
from metabloom.errors import ConfigError, WireError
from tests.clients.small_clients import arrays_of, client, context, net, same
from tests.clients.toy_problems import (
    Shifted,
    client_data,
    initialised,
)

both = pytest.mark.parametrize("kind", [MAMLClient, SGDClient])


# --- arrays ------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("method", ["fit", "evaluate"])
def test_a_wrong_number_of_arrays_is_refused_with_the_client_and_both_numbers(kind, method):
    with pytest.raises(WireError, match=r"client 'anna' received 3 arrays, its Net has 4"):
        getattr(client(kind), method)(arrays_of(net())[:3], {})


@both
@pytest.mark.parametrize("method", ["fit", "evaluate"])
def test_a_wrong_shape_is_refused_with_client_array_and_both_shapes(kind, method):
    arrays = arrays_of(net())
    arrays[2] = arrays[2].T
    said = r"client 'anna' received 'head.weight' of shape \(4, 3\), its model's is \(3, 4\)"
    with pytest.raises(WireError, match=said):
        getattr(client(kind), method)(arrays, {})


@both
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_arrays_come_back_in_the_dtype_that_they_had(kind, dtype):
    own = client(kind)
    sent = [array.astype(dtype) for array in own.get_parameters({})]
    found, _, _ = own.fit(sent, {})
    assert [array.dtype for array in found] == [dtype] * 4
    # It computes as its model does, in float32.
    wanted, _, _ = own.fit([array.astype(np.float32) for array in sent], {})
    assert same(found, [array.astype(dtype) for array in wanted])


@both
def test_read_only_arrays_serve_and_stay_as_they_are(kind):
    own = client(kind)
    sent = own.get_parameters({})
    before = copy.deepcopy(sent)
    wanted, _, _ = own.fit(copy.deepcopy(sent), {})
    for array in sent:
        array.flags.writeable = False
    found, _, _ = own.fit(sent, {})
    own.evaluate(sent, {})
    assert same(found, wanted)
    assert same(sent, before)
    assert not any(np.shares_memory(a, b) for a, b in zip(found, sent, strict=True))


@both
def test_neither_the_model_nor_the_data_given_are_changed(kind):
    model, data = initialised(Shifted()), client_data()
    before = copy.deepcopy((model.state_dict(), data.support, data.query))
    own = client(kind, model=model, data=data)
    sent = [array * 0 + 1 for array in own.get_parameters({})]
    own.fit(sent, {})
    own.evaluate(sent, {})
    now = (model.state_dict(), data.support, data.query)
    torch.testing.assert_close(now, before, rtol=0, atol=0)


def with_shift(own, value):
    return [
        np.full_like(array, value) if name == "shift" else array
        for name, array in zip(own.array_names, own.get_parameters({}), strict=True)
    ]


@both
def test_buffers_go_back_as_they_came(kind):
    own = client(kind, model=initialised(Shifted()))
    sent = with_shift(own, 0.25)
    found, _, _ = own.fit(sent, {})
    assert found[1].dtype == np.int64
    for got, there, name in zip(found, sent, own.array_names, strict=True):
        assert np.array_equal(got, there) is (name in ("shift", "seen")), name


@both
def test_received_buffers_take_part_in_training_and_evaluation(kind):
    # A model that was built with the buffer must do the same as one that received it.
    built = initialised(Shifted())
    built.shift.fill_(0.25)
    born, taught = client(kind, model=built), client(kind, model=initialised(Shifted()))
    wanted, _, _ = born.fit(born.get_parameters({}), {})
    sent = with_shift(taught, 0.25)
    assert same(taught.fit(sent, {})[0], wanted)
    assert taught.evaluate(sent, {}) == born.evaluate(born.get_parameters({}), {})
    other = client(kind, model=initialised(Shifted()))
    assert not same(other.fit(other.get_parameters({}), {})[0], wanted)


# --- construction ------------------------------------------------------------------------------

NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("inner_lr", 0.0),
        ("inner_lr", -1.0),
        ("inner_lr", NAN),
        ("inner_lr", INFINITE),
        ("eval_steps", (0, 1)),
        ("eval_steps", (5, 1)),
        ("eval_steps", (1, 1)),
        ("eval_steps", (1, 1.5)),
        ("batch_size", -1),
        ("batch_size", 1.5),
        ("batch_size", NAN),
    ],
)
@both
def test_a_value_that_no_client_can_work_with_is_refused_by_name(kind, key, value):
    with pytest.raises(ConfigError) as caught:
        client(kind, **{key: value})
    assert f"{key} = {value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        *[(MAMLClient, "outer_lr", value) for value in (0.0, -1.0, NAN, INFINITE)],
        *[(MAMLClient, "local_steps", value) for value in (0, 1.5)],
        (MAMLClient, "split", "half"),
        (MAMLClient, "order", "second"),
        *[(SGDClient, "local_lr", value) for value in (0.0, -1.0, NAN, INFINITE)],
        *[(SGDClient, "local_epochs", value) for value in (0, 1.5)],
        *[(SGDClient, "proximal_mu", value) for value in (-1.0, NAN, INFINITE)],
        *[(SGDClient, "ditto_lambda", value) for value in (-1.0, NAN, INFINITE)],
    ],
)
def test_a_value_that_this_client_cannot_work_with_is_refused_by_name(kind, key, value):
    with pytest.raises(ConfigError) as caught:
        client(kind, context=context(), **{key: value})
    assert f"{key} = {value!r}" in str(caught.value)


def test_inner_steps_are_checked_when_the_client_is_made():
    with pytest.raises(ConfigError, match="steps = 0"):
        client(MAMLClient, inner_steps=0)


@both
def test_an_adaptation_of_nothing_is_refused_with_the_names_that_there_are(kind):
    with pytest.raises(ConfigError, match=r"none of the parameters body\.weight, body\.bias"):
        client(kind, adapt=lambda name: False)
