"""SGDClient with an anchor: FedProx and Ditto."""

import numpy as np
import pytest
import torch
from torch import nn

from metabloom.clients import SGDClient
from metabloom.errors import ConfigError
from tests.clients.small_clients import arrays_of, client, context, fit, net, same
from tests.clients.toy_problems import (
    client_data,
    loss_at,
)

CROSS_ENTROPY = nn.functional.cross_entropy
# float32 on numbers of size 1: the same steps by another path differ by some roundings of 6e-8.
F32 = {"rtol": 1e-5, "atol": 1e-6}


# --- FedProx -----------------------------------------------------------------------------------


def test_the_server_s_proximal_mu_takes_the_place_of_the_client_s():
    options = {"batch_size": 4, "local_lr": 0.3}
    plain, _, _ = fit(SGDClient, **options)
    own, _, _ = fit(SGDClient, proximal_mu=2.0, **options)
    assert not same(own, plain)
    sent = {"proximal-mu": 2.0}
    assert same(fit(SGDClient, config=sent, **options)[0], own)
    assert same(fit(SGDClient, config=sent, proximal_mu=0.5, **options)[0], own)
    legacy = {"proximal_mu": 2.0}  # the key of Flower's legacy FedProx
    assert same(fit(SGDClient, config=legacy, proximal_mu=0.5, **options)[0], own)
    off = {"proximal-mu": 0.0}
    assert same(fit(SGDClient, config=off, proximal_mu=2.0, **options)[0], plain)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_proximal_mu_that_cannot_be_is_refused_by_its_key(value):
    with pytest.raises(ConfigError, match=f"proximal-mu = {value!r} in the train config"):
        fit(SGDClient, config={"proximal-mu": value})


# --- Ditto -------------------------------------------------------------------------------------


def personal_steps(start, anchor, data, *, lr, strength, steps=1):
    """The oracle: v <- v - lr (grad F(v) + strength (v - w)), all records, plain autograd."""
    v = [torch.from_numpy(array.copy()) for array in start]
    names = list(net().state_dict())
    for _ in range(steps):
        v = [value.detach().requires_grad_() for value in v]
        loss = loss_at(net(), CROSS_ENTROPY, dict(zip(names, v, strict=True)), data)
        found = torch.autograd.grad(loss, v)
        v = [
            value - lr * (g + strength * (value - torch.from_numpy(w)))
            for value, g, w in zip(v, found, anchor, strict=True)
        ]
    return [value.detach().numpy() for value in v]


def kept(own):
    return [value.numpy() for value in own.personal.after({}, "cpu").values()]


def assert_close(found, wanted):
    for got, right in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, right, **F32)


def test_ditto_s_personal_model_lasts_over_rounds_and_never_leaves():
    place, data = context(), client_data()
    first, second = arrays_of(net(1)), arrays_of(net(2))
    replies, personal = [], []
    for sent in (first, second):  # a new object for each message, as under Flower
        own = client(SGDClient, ditto_lambda=0.7, local_lr=0.3, context=place)
        replies.append(own.fit(sent, {})[0])
        personal.append(kept(own))
    step = {"lr": 0.3, "strength": 0.7}
    wanted = personal_steps(first, first, data.all, **step)  # it begins at the received model
    assert_close(personal[0], wanted)
    assert_close(personal[1], personal_steps(wanted, second, data.all, **step))
    for reply, sent in zip(replies, (first, second), strict=True):
        plain = client(SGDClient, local_lr=0.3).fit(sent, {})[0]
        assert same(reply, plain)  # the server learns what FedAvg's does
    assert not any(np.array_equal(a, b) for a, b in zip(replies[1], personal[1], strict=True))
    assert len(place.state) == 2  # one model and its version, however many rounds


def test_ditto_is_judged_by_its_personal_model_pulled_to_the_received_one():
    place, data = context(), client_data()
    own = client(SGDClient, ditto_lambda=0.7, local_lr=0.3, context=place, eval_steps=(2,))
    own.fit(arrays_of(net(1)), {})
    before, received = kept(own), arrays_of(net(2))
    _, _, metrics = own.evaluate(received, {})
    names = list(net().state_dict())

    def query_loss(arrays):
        at = {n: torch.from_numpy(a) for n, a in zip(names, arrays, strict=True)}
        return pytest.approx(loss_at(net(), CROSS_ENTROPY, at, data.query).item(), rel=1e-5)

    assert metrics["loss-before"] == query_loss(before)
    after = personal_steps(before, received, data.support, lr=0.4, strength=0.7, steps=2)
    assert metrics["loss-after-2"] == query_loss(after)
    assert same(kept(own), before)  # an evaluation does not train


def test_an_unseen_client_of_ditto_begins_at_the_received_model():
    own = client(SGDClient, ditto_lambda=0.7, context=context())
    plain = client(SGDClient)
    received = arrays_of(net(3))
    found = own.evaluate(received, {})[2]
    assert found["loss-before"] == plain.evaluate(received, {})[2]["loss-before"]


def test_at_lambda_0_ditto_trains_a_local_model():
    place, data = context(), client_data()
    for seed in (1, 2):
        own = client(SGDClient, ditto_lambda=0.0, local_lr=0.3, context=place)
        own.fit(arrays_of(net(seed)), {})
    wanted = personal_steps(
        arrays_of(net(1)), arrays_of(net(1)), data.all, lr=0.3, strength=0, steps=2
    )
    assert_close(kept(own), wanted)


def test_a_personal_model_without_a_context_is_refused():
    with pytest.raises(ConfigError, match="needs context="):
        client(SGDClient, ditto_lambda=0.5)
