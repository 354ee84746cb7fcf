"""Private clients that learn from a teacher: DP-SGD on its outputs too, and which they refuse."""

import numpy as np
import pytest
import torch

from metabloom.clients import ClientData, SGDClient, TaughtClient
from metabloom.errors import RefusedError, WireError
from metabloom.models import distillation_loss
from metabloom.wire import TEACHER_PRIVATE
from tests.clients.privacy.private_clients import Loader, booked, private
from tests.clients.small_clients import context, net, same
from tests.clients.teachers import all_logits, arrays_of, large, start_of, told
from tests.clients.toy_problems import client_data

CONFIG = told(arrays_of(large()))
A, T = 0.3, 2.5
SEEDED = {"seed": 3, "sample_rate": 1.0, "max_grad_norm": 50.0}  # every record, none clipped


def private_reply(file, *, kind=TaughtClient, data=None, pins=SEEDED, config=CONFIG, **options):
    if kind is TaughtClient:
        options = {"teacher": large(), "context": context(), **options}
    own = private(file, kind, data=data, pins=pins, **options)
    if kind is TaughtClient:
        own.take_teacher(arrays_of(large()))
    return own.fit(start_of(own), config)


def test_a_private_student_takes_dp_sgd_steps_on_labels_and_teacher(tmp_path):
    """The noise of two seeded replies is the same: what is left is the difference of gradients."""
    options = {"local_lr": 0.4, "local_steps": 1}
    one, other = (
        private_reply(tmp_path / f"{alpha}.jsonl", alpha=alpha, temperature=T, **options)[0]
        for alpha in (A, 0.0)
    )
    model, (inputs, classes) = net(), client_data().all
    logits = all_logits()

    def sum_of_gradients(alpha):
        outputs = model(inputs)
        loss = distillation_loss(outputs, logits, classes, alpha=alpha, temperature=T)
        found = torch.autograd.grad(len(classes) * loss, list(model.parameters()))
        return [value.numpy() for value in found]

    for found, plain, g, g_plain in zip(
        one, other, sum_of_gradients(A), sum_of_gradients(0.0), strict=True
    ):
        # Noise of size 50 / 4 is added to and taken from float32 numbers: 1e-6 each.
        np.testing.assert_allclose(found - plain, -0.4 / 4 * (g - g_plain), atol=2e-5)
        assert np.abs(g - g_plain).max() > 0.1


def test_a_private_student_without_a_share_of_the_teacher_is_private_local_sgd(tmp_path):
    options = {"local_lr": 0.4, "local_steps": 2}
    found, count, metrics = private_reply(tmp_path / "a.jsonl", alpha=0.0, **options)
    wanted, other, others = private_reply(tmp_path / "b.jsonl", kind=SGDClient, **options)
    for one, two in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
    assert (count, metrics) == (other, others) == (1, metrics)
    assert set(metrics) == {"privacy-epsilon", "privacy-delta"}


@pytest.mark.parametrize("kernel", ["eager", "vmap"])
def test_a_record_that_the_teacher_cannot_teach_has_no_share_in_a_release(tmp_path, kernel):
    data = client_data()
    (xs, ys), query = data.support, data.query
    odd = ClientData((torch.cat([xs, xs[:1]]), torch.cat([ys, torch.tensor([7])])), query)
    found, wanted = (
        private_reply(tmp_path / f"{i}.jsonl", data=Loader(one), kernel=kernel)[0]
        for i, one in enumerate((odd, data))
    )
    for one, two in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("word", [False, None, "yes", 1])
def test_a_private_client_refuses_a_teacher_that_may_tell_what_nobody_counted(file, word):
    config = {key: value for key, value in CONFIG.items() if key != TEACHER_PRIVATE}
    if word is not None:
        config[TEACHER_PRIVATE] = word
    loader = Loader()
    with pytest.raises(RefusedError, match="private client 'anna' refuses the teacher"):
        private_reply(file, data=loader, config=config)
    assert loader.calls == 0
    assert booked(file) == 0


def test_a_private_client_without_its_teacher_says_so_before_it_pays(file):
    loader = Loader()
    own = private(file, TaughtClient, data=loader, teacher=large(), context=context())
    with pytest.raises(WireError, match="'anna' has no outputs of teacher"):
        own.fit(start_of(own), CONFIG)
    assert loader.calls == 0
    assert booked(file) == 0


def test_a_private_client_s_outputs_last_too(file):
    place = context()
    own = private(file, TaughtClient, teacher=large(), context=place)
    own.take_teacher(arrays_of(large()))
    own.fit(start_of(own), CONFIG)
    later = private(file, TaughtClient, teacher=large(), context=place)
    arrays, _, _ = later.fit(start_of(later), CONFIG | {"server-round": 2})
    assert booked(file) == 2
    assert not same(arrays, start_of(later))
