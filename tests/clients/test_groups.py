"""Members of groups: their reply to each exchange, and which records take part in which."""

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from torch import nn

from metabloom.clients import (
    CLIENTS,
    ClientData,
    GroupMAMLClient,
    GroupSGDClient,
    MAMLClient,
    SGDClient,
    client_app,
    run_update,
    sgd_update,
)
from metabloom.errors import RefusedError, WireError
from metabloom.sim import CohortGrid
from metabloom.wire import DIRECTION, from_record, to_record
from tests.clients.privacy.private_clients import booked, private
from tests.clients.small_clients import arrays_of, client, context, fit, net, same
from tests.clients.toy_problems import (
    Shifted,
    client_data,
    initialised,
    loss_at,
    weights,
)

CROSS_ENTROPY = nn.functional.cross_entropy
F32 = {"rtol": 1e-5, "atol": 1e-6}


def gradient(params, batch, model=None):
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    loss = loss_at(model or net(), CROSS_ENTROPY, leaves, batch)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def hessian_times(params, batch, v):
    """Plain autograd, reverse over reverse."""
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    loss = loss_at(net(), CROSS_ENTROPY, leaves, batch)
    slopes = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    along = sum((g * v[n]).sum() for n, g in zip(leaves, slopes, strict=True))
    return dict(zip(leaves, torch.autograd.grad(along, list(leaves.values())), strict=True))


def drawn(like, seed=3):
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.randn(v.shape, generator=draw, dtype=v.dtype) for n, v in like.items()}


# --- replies ------------------------------------------------------------------------------------


def test_the_clients_are_found_by_name_and_train_as_their_base_without_an_exchange():
    for name, kind, base in (
        ("group-maml", GroupMAMLClient, MAMLClient),
        ("group-sgd", GroupSGDClient, SGDClient),
    ):
        assert CLIENTS[name] is kind
        config = {"server-round": 3}
        options = {"batch_size": 3}
        assert same(fit(kind, config=config, **options)[0], fit(base, config=config, **options)[0])


def test_to_adapt_is_one_step_on_the_support_batch():
    found, count, metrics = fit(GroupMAMLClient, config={"exchange": "adapt"})
    slope = gradient(weights(net()), client_data().support)
    for got, start, g in zip(found, arrays_of(net()), slope.values(), strict=True):
        np.testing.assert_allclose(got, start - 0.4 * g.numpy(), **F32)
    assert count == 11
    assert set(metrics) == {"train-loss"}


def test_a_query_is_answered_by_the_point_less_the_gradient_there():
    found, _, metrics = fit(GroupMAMLClient, config={"exchange": "query"})
    slope = gradient(weights(net()), client_data().query)
    for got, start, g in zip(found, arrays_of(net()), slope.values(), strict=True):
        np.testing.assert_allclose(got, start - g.numpy(), **F32)
    wanted = loss_at(net(), CROSS_ENTROPY, weights(net()), client_data().query).item()
    assert metrics == {"query-loss": pytest.approx(wanted, rel=1e-6)}


def asked_for_curvature(v, model=None, **options):
    own = client(GroupMAMLClient, model=model or net(), **options)
    point = dict(zip(own.array_names, own.get_parameters({}), strict=True))
    beside = {f"{DIRECTION}/{name}": value.numpy() for name, value in v.items()}
    return own, {**point, **beside}


def test_curvature_pulls_a_direction_back_through_the_step():
    v = drawn(weights(net()))
    own, arrays = asked_for_curvature(v)
    found, count, metrics = own.fit_named(arrays, {"exchange": "curvature"})
    wanted = hessian_times(weights(net()), client_data().support, v)
    assert list(found) == list(own.array_names)
    for name, value in found.items():
        np.testing.assert_allclose(value, (v[name] - 0.4 * wanted[name]).numpy(), **F32)
        assert value.dtype == np.float32
    assert (count, metrics) == (11, {})
    assert own.fit_named(arrays, {"exchange": "adapt"}) is None
    assert own.fit_named(arrays, {}) is None


def test_with_a_partial_adaptation_the_hessian_acts_on_that_part_alone():
    v = drawn(weights(net()))
    own, arrays = asked_for_curvature(v, part="head")
    found, _, _ = own.fit_named(arrays, {"exchange": "curvature"})
    only = {n: value if n.startswith("head") else 0 * value for n, value in v.items()}
    wanted = hessian_times(weights(net()), client_data().support, only)
    for name, value in found.items():
        np.testing.assert_allclose(value, (v[name] - 0.4 * wanted[name]).numpy(), **F32)
    whole, _, _ = asked_for_curvature(v)[0].fit_named(arrays, {"exchange": "curvature"})
    assert not np.allclose(whole["head.bias"], found["head.bias"], atol=1e-4)


def test_buffers_take_part_and_come_back_as_they_were_sent():
    v = {**drawn(weights(net())), "shift": torch.zeros(3), "seen": torch.tensor(2)}
    own, arrays = asked_for_curvature(v, model=initialised(Shifted()))
    found, _, _ = own.fit_named(arrays, {"exchange": "curvature"})
    assert found["seen"] == 2
    assert np.array_equal(found["shift"], np.zeros(3, np.float32))
    assert not np.allclose(found["head.bias"], v["head.bias"].numpy(), atol=1e-5)


def test_a_direction_that_is_not_whole_is_refused_by_name():
    own, arrays = asked_for_curvature(drawn(weights(net())))
    del arrays[f"{DIRECTION}/head.bias"]
    with pytest.raises(WireError, match=r"without 'head\.bias'"):
        own.fit_named(arrays, {"exchange": "curvature"})


@pytest.mark.parametrize("kernel", ["eager", "vmap"])
def test_curvature_comes_through_messages_as_a_model_s_worth_of_arrays(kernel: str):
    v = drawn(weights(net()))
    own, arrays = asked_for_curvature(v)
    model = net()

    def client_fn(place):
        return client(GroupMAMLClient, model=model, context=place, kernel=kernel)

    grid = CohortGrid(client_app(client_fn), num_nodes=2)
    config = ConfigRecord({"server-round": 1, "exchange": "curvature"})
    content = RecordDict({"arrays": to_record(arrays), "config": config})
    messages = [grid.create_message(content, "train", node, "0") for node in grid.get_node_ids()]
    wanted, _, _ = own.fit_named(arrays, {"exchange": "curvature"})
    for reply in grid.send_and_receive(messages):
        found = from_record(reply.content["arrays"])
        assert list(found) == list(wanted)
        assert all(np.array_equal(found[name], value) for name, value in wanted.items())


def test_an_exchange_that_nobody_knows_is_refused():
    with pytest.raises(WireError, match="exchange 'dance': it knows adapt, query"):
        fit(GroupMAMLClient, config={"exchange": "dance"})


# --- which records ------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["fixed", "fresh"])
def test_the_batches_of_a_round_are_the_same_in_all_its_exchanges(split: str):
    data = client_data(support=9, query=9)

    def batch(exchange, number):
        own = client(GroupMAMLClient, data=data, split=split, batch_size=4)
        return own._batch_of(exchange, own.data, {"server-round": number})

    adapt, query = batch("adapt", 5), batch("query", 5)
    again = client(GroupMAMLClient, data=data, split=split, batch_size=4)
    whole = next(again._batches(data, again.stream("maml", {"server-round": 5})))
    assert torch.equal(adapt[0], whole.support[0])
    assert torch.equal(query[0], whole.query[0])
    rows = [{tuple(row) for row in one[0].tolist()} for one in (adapt, query)]
    assert not rows[0] & rows[1]
    assert not torch.equal(batch("adapt", 6)[0], adapt[0])


@pytest.mark.parametrize("kind", [GroupMAMLClient, GroupSGDClient])
@pytest.mark.parametrize("kernel", ["eager", "vmap"])
def test_no_query_record_takes_part_when_a_client_joins_its_group(kind, kernel: str):
    data = client_data()
    spoiled = ClientData(data.support, (data.query[0] + 9, (data.query[1] + 1) % 3))
    replies = []
    for each in (data, spoiled):
        extra = {"split": "fresh"} if kind is GroupMAMLClient else {"batch_size": 2}
        one = client(kind, data=each, kernel=kernel, **extra)
        replies.append(one.fit(arrays_of(net()), {"server-round": 2, "exchange": "join"})[0])
    assert same(*replies)
    assert not same(replies[0], arrays_of(net()))


def test_to_join_is_a_step_on_the_whole_support_set_or_epochs_of_sgd_on_it():
    data = client_data(support=9)
    found, _, _ = fit(
        GroupMAMLClient, data=data, batch_size=2, split="fresh", config={"exchange": "join"}
    )
    slope = gradient(weights(net()), data.support)
    for got, start, g in zip(found, arrays_of(net()), slope.values(), strict=True):
        np.testing.assert_allclose(got, start - 0.4 * g.numpy(), **F32)
    found, _, _ = fit(
        GroupSGDClient, data=data, local_lr=0.2, local_epochs=3, config={"exchange": "join"}
    )
    update = sgd_update(net(), CROSS_ENTROPY, lr=0.2)
    wanted = run_update(update, weights(net()), [data.support] * 3).params
    for got, value in zip(found, wanted.values(), strict=True):
        np.testing.assert_allclose(got, value.numpy(), **F32)
    own = client(GroupSGDClient, data=data, batch_size=4, local_epochs=2)
    joining = own.training(weights(net()), {"exchange": "join"})
    assert joining.steps(data) == 2 * 3 == len(list(joining.batches(data)))


def test_several_exchanges_of_sgd_in_one_round_see_the_records_in_orders_of_their_own():
    def order(**config):
        own = client(GroupSGDClient, batch_size=4)
        training = own.training(weights(net()), {"server-round": 1, **config})
        return torch.cat([inputs for inputs, _ in training.batches(own.data)])

    first, second, third = (order(**{"exchange-number": n}) for n in range(3))
    assert torch.equal(first, order())
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert torch.equal(second, order(**{"exchange-number": 1}))


def test_to_score_is_to_score_what_is_received_and_no_more():
    own = client(GroupMAMLClient)
    loss, count, metrics = own.evaluate(arrays_of(net()), {"exchange": "score"})
    assert list(metrics) == ["loss-before", "accuracy-before"]
    assert loss == metrics["loss-before"]
    assert count == 5
    whole = own.evaluate(arrays_of(net()), {})[2]
    assert "loss-after-5" in whole  # the client is as it was
    assert whole["loss-before"] == metrics["loss-before"]


# --- private clients ----------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", ["adapt", "query", "join", "curvature"])
@pytest.mark.parametrize("kind", [GroupMAMLClient, GroupSGDClient])
def test_private_clients_refuse_exchanges_and_book_nothing(kind, exchange: str, tmp_path):
    own = private(tmp_path / "anna.jsonl", kind)
    config = {"server-round": 1, "exchange": exchange}
    by_names = exchange == "curvature" and kind is GroupMAMLClient
    asked, arrays = (own.fit_named, {}) if by_names else (own.fit, arrays_of(net()))
    with pytest.raises(RefusedError, match=f"exchange '{exchange}' with privacy"):
        asked(arrays, config)
    assert booked(tmp_path / "anna.jsonl") == 0
    assert own._data.calls == 0


@pytest.mark.parametrize(("kind", "releases"), [(GroupMAMLClient, 2), (GroupSGDClient, 1)])
def test_private_clients_train_by_themselves_and_each_round_of_a_group_is_paid(
    kind, releases: int, tmp_path
):
    file = tmp_path / "anna.jsonl"
    private(file, kind, context=context()).fit(arrays_of(net()), {"server-round": 1})
    assert booked(file) == releases
    config = {"server-round": 1, "exchange-number": 1}
    private(file, kind, context=context()).fit(arrays_of(net(1)), config)
    assert booked(file) == 2 * releases
