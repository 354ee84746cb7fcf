"""What a client keeps of a teacher, for how long, and which teachers it refuses."""

import numpy as np
import pytest
import torch
from torch import nn

from metabloom.clients import ClientData, ClientStore, SGDClient
from metabloom.clients.soft_targets import pack
from metabloom.errors import ConfigError, DataError, WireError
from metabloom.wire import TEACHER_DIGEST
from tests.clients.small_clients import client, context, same
from tests.clients.teachers import (
    all_logits,
    arrays_of,
    kept_logits,
    large,
    start_of,
    taught,
    told,
)
from tests.clients.toy_problems import client_data

CONFIG, LATER = (told(arrays_of(large()), number) for number in (1, 2))


def test_the_teacher_is_asked_once_without_dropout_and_its_outputs_last():
    place, module = context(), large()
    own = taught(teacher=module, context=place)
    module.calls.clear()
    own.fit(start_of(own), CONFIG)
    assert module.calls == [11]
    np.testing.assert_allclose(kept_logits(place), all_logits(module=module), rtol=1e-6)
    later = taught(teacher=module, context=place, sent=False)  # of another message
    found, _, _ = later.fit(start_of(later), LATER)
    assert module.calls == [11]
    anew = taught()
    assert same(found, anew.fit(start_of(anew), LATER)[0])
    assert module.training


def test_outputs_outlive_the_context_in_a_store(tmp_path):
    store = ClientStore(tmp_path)
    own = taught(store=store)
    own.fit(start_of(own), CONFIG)
    later, anew = taught(store=store, sent=False), taught()  # contexts of their own
    assert same(later.fit(start_of(later), LATER)[0], anew.fit(start_of(anew), LATER)[0])
    other = taught(store=store, sent=False, name="ben")
    with pytest.raises(WireError, match="'ben' has no outputs of teacher"):
        other.fit(start_of(other), CONFIG)


def test_outputs_of_another_teacher_or_of_other_records_do_not_serve():
    place = context()
    own = taught(context=place)
    own.fit(start_of(own), CONFIG)
    other = told(arrays_of(large(8)), 2)
    later = taught(context=place, sent=False)
    with pytest.raises(WireError, match=f"no outputs of teacher {other[TEACHER_DIGEST]}"):
        later.fit(start_of(later), other)
    grown = taught(context=place, sent=False, data=client_data(9))
    with pytest.raises(WireError, match="on other records than it has now"):
        grown.fit(start_of(grown), CONFIG)
    turned = client_data()
    turned = ClientData((turned.support[0].flip(0), turned.support[1]), turned.query)
    own = taught(context=place, sent=False, data=turned)
    with pytest.raises(WireError, match="on other records than it has now"):
        own.fit(start_of(own), CONFIG)
    again = taught(context=place, data=turned)  # sent it again
    again.fit(start_of(again), CONFIG)
    np.testing.assert_allclose(kept_logits(place), all_logits(turned), rtol=1e-6)


def test_a_server_that_names_no_teacher_is_told_so():
    own = taught()
    with pytest.raises(WireError, match="names no teacher to client 'anna'"):
        own.fit(start_of(own), {"server-round": 1})


def without_head():
    arrays = arrays_of(large())
    del arrays["head.bias"]
    return arrays


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        (without_head(), "head.bias"),
        ({**arrays_of(large()), "tail": np.zeros(2)}, "tail"),
        ({**arrays_of(large()), "head.weight": np.zeros((8, 3), np.float32)}, "head.weight"),
    ],
)
def test_arrays_of_another_model_are_refused_by_name(arrays, said):
    with pytest.raises(WireError, match=rf"differs from its own Large in {said}: both ends"):
        taught(sent=False).take_teacher(arrays)


def test_a_teacher_that_is_not_the_one_that_is_named_is_refused():
    own = taught()
    with pytest.raises(WireError, match="the server means"):
        own.fit(start_of(own), told(arrays_of(large(8))))


def test_a_teacher_of_other_classes_is_refused():
    module = nn.Linear(3, 4)
    own = taught(teacher=module)
    with pytest.raises(ValueError, match=r"teacher_logits has shape \(11, 4\)"):
        own.fit(start_of(own), told(arrays_of(module)))


def with_class(value):
    data = client_data()
    classes = data.support[1].index_fill(0, torch.tensor([2]), value)
    return ClientData((data.support[0], classes), data.query)


@pytest.mark.parametrize("value", [3, -100])
def test_a_class_that_the_teacher_does_not_know_is_refused_with_its_record(value):
    own = taught(data=with_class(value))
    with pytest.raises(DataError, match=f"'anna': record 2 has class {value}, the teacher's"):
        own.fit(start_of(own), CONFIG)


def test_outputs_that_are_not_finite_and_targets_that_are_no_classes_are_refused():
    wild = large()
    with torch.no_grad():
        wild.head.weight.fill_(3e38)
    own = taught(teacher=wild)
    with pytest.raises(DataError, match="record 0 has logits that are not finite"):
        own.fit(start_of(own), told(arrays_of(wild)))
    with pytest.raises(DataError, match="one integer for each record"):
        pack(torch.zeros(2), torch.zeros(2, 3), name="anna")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"alpha": 1.5}, "alpha = 1.5"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"context": None}, "a client with a teacher needs context="),
        ({"local_lr": 0.0}, "local_lr = 0.0"),
    ],
)
def test_what_cannot_be_is_refused_when_the_client_is_made(wrong, said):
    with pytest.raises(ConfigError, match=said):
        taught(sent=False, **wrong)


def test_evaluation_is_that_of_local_sgd_and_needs_no_teacher():
    own = taught(sent=False)
    assert own.evaluate(start_of(own), {}) == client(SGDClient).evaluate(start_of(own), {})
