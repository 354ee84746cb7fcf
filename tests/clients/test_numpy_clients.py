"""MAMLClient and SGDClient as a Flower server sees them: arrays, numbers and metrics."""

import numpy as np
import pytest
import torch
from torch import nn

from metabloom.clients import CLIENTS, ClientData, MAMLClient, SGDClient, adapt, meta_gradient
from metabloom.models import build_model
from metabloom.sim import load_federation
from tests.clients.small_clients import arrays_of, client, context, fit, net, same
from tests.clients.toy_problems import (
    Shifted,
    client_data,
    initialised,
    loss_at,
    weights,
)

CROSS_ENTROPY = nn.functional.cross_entropy
# float32 on numbers of size 1: the same steps by another path differ by some roundings of 6e-8.
F32 = {"rtol": 1e-5, "atol": 1e-6}

both = pytest.mark.parametrize("kind", [MAMLClient, SGDClient])


# --- replies -----------------------------------------------------------------------------------


@both
def test_clients_of_a_real_federation_answer_with_arrays_like_those_received(kind):
    federation = load_federation("digits", num_clients=4, ways=3)
    model = build_model("mlp", input_shape=(1, 8, 8), num_classes=3, seed=0, hidden=8)
    for index in range(2):
        data = federation.client(index)
        own = kind(model, data, eval_steps=(1, 2), name=federation.client_ids[index])
        sent = own.get_parameters({})
        found, num_examples, metrics = own.fit(sent, {"server-round": 1})
        assert [a.shape for a in found] == [a.shape for a in sent]
        assert [a.dtype for a in found] == [a.dtype for a in sent] == [np.float32] * 4
        assert all(not np.array_equal(a, b) for a, b in zip(found, sent, strict=True))
        assert num_examples == data.num_examples > 20
        assert all(type(value) is float for value in metrics.values())
        loss, num_query, _ = own.evaluate(found, {})
        assert num_query == len(data.query[1])
        assert np.isfinite(loss)


@pytest.mark.parametrize("kind", ["maml", "sgd"])
def test_clients_are_found_by_name(kind):
    assert fit(CLIENTS[kind])[1] == 11


@both
def test_the_arrays_of_a_client_are_its_model_s_in_its_order(kind):
    own = client(kind, model=initialised(Shifted()))
    buffers, parameters = ("shift", "seen"), tuple(weights(net()))
    assert own.array_names == (*buffers, *parameters)
    assert same(own.get_parameters({}), arrays_of(initialised(Shifted())))
    assert own.get_properties({}) == {"client": kind.__name__, "architecture": "Shifted"}


def test_sgd_trains_on_support_and_query_by_epochs_of_torch_sgd():
    found, num_examples, metrics = fit(SGDClient, local_lr=0.3, local_epochs=3)
    model, (inputs, targets) = net(), client_data().all
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.3), []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(CROSS_ENTROPY(model(inputs), targets))
        losses[-1].backward()
        optimizer.step()
    for name, got, start in zip(model.state_dict(), found, arrays_of(net()), strict=True):
        wanted = model.state_dict()[name].numpy()
        np.testing.assert_allclose(got - start, wanted - start, **F32, err_msg=name)
    assert num_examples == 11
    assert metrics == {"train-loss": pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)}


@pytest.mark.parametrize("order", ["exact", "first", "hf"])
def test_one_maml_step_with_outer_lr_1_replies_with_w_minus_g(order):
    data = client_data()
    found, num_examples, metrics = fit(
        MAMLClient, data=data, outer_lr=1.0, inner_steps=2, order=order
    )
    wanted = meta_gradient(
        net(),
        CROSS_ENTROPY,
        weights(net()),
        data.support,
        data.query,
        inner_lr=0.4,
        steps=2,
        order=order,
    )
    for got, start, g in zip(found, arrays_of(net()), wanted.grads.values(), strict=True):
        np.testing.assert_array_equal(got, start - g.numpy())
    assert num_examples == 11
    assert metrics == {"query-loss": wanted.query_loss.item()}


def test_local_meta_steps_follow_one_another():
    own = client(MAMLClient, outer_lr=0.5)
    once, _, first = own.fit(own.get_parameters({}), {})
    twice, _, second = own.fit(once, {})
    found, _, metrics = fit(MAMLClient, outer_lr=0.5, local_steps=2)
    assert same(found, twice)
    mean = (first["query-loss"] + second["query-loss"]) / 2
    assert metrics["query-loss"] == pytest.approx(mean, rel=1e-6)


def test_a_partial_adaptation_is_trained_and_evaluated_as_such():
    def head(name):
        return name.startswith("head")

    data = client_data()
    found, _, _ = fit(MAMLClient, data=data, adapt=head)
    options = {"inner_lr": 0.4, "adapt": head}
    wanted = meta_gradient(
        net(), CROSS_ENTROPY, weights(net()), data.support, data.query, **options
    ).grads
    for got, start, g in zip(found, arrays_of(net()), wanted.values(), strict=True):
        np.testing.assert_array_equal(got, start - g.numpy())
    _, _, metrics = client(MAMLClient, adapt=head).evaluate(arrays_of(net()), {})
    adapted = adapt(net(), CROSS_ENTROPY, weights(net()), data.support, **options)
    wanted = loss_at(net(), CROSS_ENTROPY, adapted, data.query).item()
    assert metrics["loss-after-1"] == pytest.approx(wanted, rel=1e-6)


# --- streams -----------------------------------------------------------------------------------

RANDOM = [
    (MAMLClient, {"batch_size": 2}),
    (MAMLClient, {"split": "fresh"}),
    (MAMLClient, {"split": "independent", "batch_size": 3, "outer_lr": 0.1}),
    (SGDClient, {"batch_size": 2}),
]
with_streams = pytest.mark.parametrize(
    ("kind", "options"), RANDOM, ids=["maml-batches", "maml-fresh", "maml-independent", "sgd"]
)


@with_streams
def test_seed_round_and_name_alone_decide_the_batches(kind, options):
    config = {"server-round": 3}
    own = client(kind, **options)
    dice = torch.random.get_rng_state()
    first, _, _ = own.fit(own.get_parameters({}), config)
    assert torch.equal(torch.random.get_rng_state(), dice)
    torch.rand(5)  # another global state
    assert same(fit(kind, config=config, **options)[0], first)
    own = client(kind, **options)
    own.fit(own.get_parameters({}), {"server-round": 2})  # what it did before does not matter
    assert same(own.fit(own.get_parameters({}), config)[0], first)
    assert not same(fit(kind, config={"server-round": 4}, **options)[0], first)
    assert not same(fit(kind, config=config, seed=1, **options)[0], first)
    assert not same(fit(kind, config=config, name="bert", **options)[0], first)


def test_maml_on_the_whole_sets_has_nothing_random():
    first, _, _ = fit(MAMLClient, config={"server-round": 1})
    assert same(fit(MAMLClient, config={"server-round": 2}, seed=5)[0], first)


def test_independent_batches_are_three_with_the_hessian_on_the_third():
    # size 11 of 11 records: all three are all records, so the reply has a closed form
    data = client_data()
    found, _, _ = fit(MAMLClient, data=data, split="independent", batch_size=11)
    wanted = meta_gradient(
        net(), CROSS_ENTROPY, weights(net()), data.all, data.all, inner_lr=0.4, curvature=data.all
    ).grads
    for got, start, g in zip(found, arrays_of(net()), wanted.values(), strict=True):
        np.testing.assert_array_equal(got, start - g.numpy())
    own = client(MAMLClient, split="independent", batch_size=4)
    (batch,) = own._batches(own.data, own.stream("maml", {}))
    rows = [tuple(map(tuple, part[0].tolist())) for part in (batch.support, batch.query)]
    rows.append(tuple(map(tuple, batch.curvature[0].tolist())))
    assert len(set(rows)) == 3
    assert all(len(set(part)) == 4 for part in rows)


# --- evaluation --------------------------------------------------------------------------------


@both
def test_an_evaluation_reports_the_query_set_before_and_after_each_number_of_steps(kind):
    data = client_data()
    own = client(kind, eval_steps=(1, 3))
    loss, num_query, metrics = own.evaluate(arrays_of(net()), {})
    wanted = {}
    for steps, suffix in ((0, "before"), (1, "after-1"), (3, "after-3")):
        at = weights(net())
        if steps:
            at = adapt(net(), CROSS_ENTROPY, at, data.support, inner_lr=0.4, steps=steps)
        model = net()
        model.load_state_dict(at)
        output = model(data.query[0])
        wanted[f"loss-{suffix}"] = CROSS_ENTROPY(output, data.query[1]).item()
        hits = output.argmax(1) == data.query[1]
        wanted[f"accuracy-{suffix}"] = hits.float().mean().item()
    assert list(metrics) == list(wanted)
    assert metrics == pytest.approx(wanted, rel=1e-5)  # float32
    assert len({metrics[f"loss-{s}"] for s in ("before", "after-1", "after-3")}) == 3
    assert loss == metrics["loss-after-3"]
    assert num_query == 5


def test_an_evaluation_without_adaptation_reports_the_received_model_alone():
    loss, _, metrics = client(SGDClient, eval_steps=()).evaluate(arrays_of(net()), {})
    assert list(metrics) == ["loss-before", "accuracy-before"]
    assert loss == metrics["loss-before"]


def test_a_query_set_larger_than_one_chunk_is_scored_as_a_whole():
    data = client_data(query=2500)  # two chunks of 1024 and a short one
    _, num_query, metrics = client(SGDClient, data=data).evaluate(arrays_of(net()), {})
    output = net()(data.query[0])
    assert num_query == 2500
    wanted = CROSS_ENTROPY(output, data.query[1]).item()
    assert metrics["loss-before"] == pytest.approx(wanted, rel=1e-5)  # float32, another order
    hits = (output.argmax(1) == data.query[1]).double().mean().item()
    assert metrics["accuracy-before"] == pytest.approx(hits, abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "options"), [(MAMLClient, {}), (SGDClient, {}), (SGDClient, {"ditto_lambda": 0.5})]
)
def test_query_records_never_enter_adaptation(kind, options):
    data = client_data()
    # The same support set; every query record has another label.
    spoiled = ClientData(data.support, (data.query[0], (data.query[1] + 1) % 3))
    adapted, curves = [], []
    for each in (data, spoiled):
        own = client(kind, data=each, context=context(), **options)
        start, advance = own.adaptation(weights(net()))
        adapted.append(advance(start, 2))
        curves.append(own.evaluate(arrays_of(net()), {})[2])
    assert all(torch.equal(adapted[0][name], adapted[1][name]) for name in adapted[0])
    assert any(not torch.equal(adapted[0][name], weights(net())[name]) for name in adapted[0])
    assert curves[0]["accuracy-after-1"] != curves[1]["accuracy-after-1"]
    assert curves[0]["loss-after-1"] != curves[1]["loss-after-1"]


@both
def test_an_evaluation_leaves_the_client_as_it_was(kind):
    own = client(kind)
    first = own.evaluate(arrays_of(net(1)), {})
    own.evaluate(arrays_of(net(2)), {})
    assert own.evaluate(arrays_of(net(1)), {}) == first
    assert same(own.get_parameters({}), arrays_of(net()))


def test_data_are_loaded_when_they_are_first_needed_and_once():
    calls = []

    def load():
        calls.append(1)
        return client_data()

    own = MAMLClient(net(), load, name="anna", inner_lr=0.4)
    own.get_properties({})
    own.get_parameters({})
    assert not calls
    found, _, _ = own.fit(own.get_parameters({}), {})
    own.evaluate(found, {})
    assert len(calls) == 1
    assert same(found, fit(MAMLClient)[0])
