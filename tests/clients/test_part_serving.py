"""PartClient: whom it serves, how it is judged, what else its layers hold, and its privacy."""

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg
from torch import nn

from metabloom.clients import ClientStore, client_app
from metabloom.clients.data import ClientData
from metabloom.errors import PrivacyError, WireError
from metabloom.sim import CohortGrid
from metabloom.wire import from_record, to_record
from tests.clients.parts import (
    CROSS_ENTROPY,
    FEDBABU,
    FEDPER,
    FEDREP,
    LG,
    METHODS,
    NAMES,
    after_round,
    assert_close,
    is_head,
    kept,
    kept_of,
    named,
    of,
    shared,
    steps,
)
from tests.clients.privacy.private_clients import pinned
from tests.clients.small_clients import arrays_of, context, net, same
from tests.clients.toy_problems import client_data, loss_at

ALL = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
# --- whom it serves -------------------------------------------------------------------------------


@ALL
def test_a_server_of_whole_models_gets_whole_models_with_the_kept_part_that_it_sent(method):
    place = context()
    for number in (1, 2):
        own = of(method, place)
        sent = arrays_of(net(number + 4))
        assert own.fit_named(dict(zip(NAMES, sent, strict=True)), {}) is None
        said, _, _ = own.fit(sent, {"server-round": number})
        for name, got, there in zip(NAMES, said, sent, strict=True):
            assert np.array_equal(got, there) == own.kept(name), name


def test_at_first_the_kept_part_is_what_was_received_where_it_was_and_else_the_module_s():
    part, whole = of(FEDPER), of(FEDPER)
    received = arrays_of(net(4))
    part.fit_named(shared(part, received), {})
    whole.fit(received, {})
    mine = {**named(received), **{n: named(arrays_of(net()))[n] for n in NAMES[2:]}}
    assert_close(kept(part), kept_of(part, after_round(FEDPER, mine)))
    assert_close(kept(whole), kept_of(whole, after_round(FEDPER, named(received))))


def test_flower_s_own_fedavg_trains_the_body_and_leaves_the_head():
    app = client_app(lambda held: of(FEDPER, held))
    grid = CohortGrid(app, num_nodes=3)
    own = of(FEDPER)
    initial = dict(zip(NAMES, arrays_of(net(1)), strict=True))
    strategy = FlowersFedAvg(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    result = strategy.start(grid, to_record(initial), num_rounds=2, timeout=30)
    for name, value in from_record(result.arrays).items():
        moved = np.abs(value - initial[name]).max()
        assert moved < 1e-6 if own.kept(name) else moved > 1e-4, name  # Flower's mean is in float32


def test_other_arrays_than_the_part_or_the_model_are_refused_by_name():
    grid = CohortGrid(client_app(lambda held: of(FEDPER, held)), num_nodes=1)
    (node,) = grid.get_node_ids()
    arrays = to_record({"body.weight": arrays_of(net())[0]})
    message = grid.create_message(RecordDict({"arrays": arrays}), "train", node, "0")
    (reply,) = grid.send_and_receive([message])
    assert "body.bias" in reply.error.reason
    with pytest.raises(WireError, match="received 3 arrays"):
        of(FEDPER).fit(arrays_of(net())[:3], {})


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_the_shared_part_comes_back_in_the_dtype_that_it_had(dtype):
    own = of(FEDPER)
    sent = {name: value.astype(dtype) for name, value in shared(own, arrays_of(net())).items()}
    said, _, _ = own.fit_named(sent, {})
    assert {value.dtype for value in said.values()} == {np.dtype(dtype)}


# --- evaluation -----------------------------------------------------------------------------------


def curve(params, moves, count):
    data = client_data()
    for _ in range(count):
        params = steps(params, moves, lr=0.4, data=ClientData(data.support, empty()))
    return loss_at(net(), CROSS_ENTROPY, params, data.query).item()


def empty():
    inputs, targets = client_data().query
    return inputs[:0], targets[:0]


@ALL
def test_a_client_that_trained_is_judged_with_its_own_part(method):
    place = context()
    own = of(method, place, eval_steps=(1, 3))
    own.fit_named(shared(own, arrays_of(net(1))), {"server-round": 1})
    received = arrays_of(net(2))
    _, _, metrics = own.evaluate(received, {"server-round": 1})
    start = named(received)
    if own.own is not None:
        start |= {name: torch.from_numpy(value) for name, value in kept(own).items()}
    moves = is_head if method is FEDREP else (lambda name: True)
    for count, key in ((0, "loss-before"), (1, "loss-after-1"), (3, "loss-after-3")):
        assert metrics[key] == pytest.approx(curve(start, moves, count), rel=1e-4), key


@ALL
def test_a_client_that_never_trained_begins_at_the_received_model(method):
    own = of(method, eval_steps=(2,))
    received = arrays_of(net(2))
    _, _, metrics = own.evaluate(received, {"server-round": 5})
    moves = is_head if method is FEDREP else (lambda name: True)
    assert metrics["loss-before"] == pytest.approx(curve(named(received), moves, 0), rel=1e-5)
    assert metrics["loss-after-2"] == pytest.approx(curve(named(received), moves, 2), rel=1e-4)


def test_an_evaluation_leaves_the_kept_part_as_it_is():
    place = context()
    own = of(FEDPER, place)
    own.fit_named(shared(own, arrays_of(net(1))), {"server-round": 1})
    before = kept(own)
    own.evaluate(arrays_of(net(2)), {"server-round": 1})
    assert same(kept(own).values(), before.values())


# --- layers that hold more, other kernels --------------------------------------------------


class Frozen(nn.Module):
    """A frozen layer and a buffer in the head, a frozen one in the body."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
        self.body[2].requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
        self.head[0].requires_grad_(False)
        self.register_buffer("shift", torch.full((3,), 0.5))

    def forward(self, x):
        return self.head(self.body(x + self.shift))


def test_frozen_layers_and_buffers_of_the_shared_part_are_the_server_s_and_others_the_module_s():
    model = Frozen()
    own = of(FEDPER, model=model)
    arrays = {n: v.numpy().copy() for n, v in model.state_dict().items() if own.shared(n)}
    arrays["shift"] += 1
    arrays["body.2.weight"] += 1
    said, _, _ = own.fit_named(arrays, {})
    for name, value in said.items():
        assert np.array_equal(value, arrays[name]) == (name == "shift" or name[5] == "2"), name
    now = own.model.state_dict()
    assert torch.equal(now["shift"], model.shift + 1)
    assert torch.equal(now["body.2.weight"], model.body[2].weight + 1)
    assert torch.equal(now["head.0.weight"], model.head[0].weight)
    assert set(kept(own)) == {"head.1.weight", "head.1.bias"}  # what is trained of it


# --- privacy --------------------------------------------------------------------------------------


def private(tmp_path, method, place, **options):
    return of(method, place, privacy=pinned(tmp_path / "ledger.jsonl"), local_steps=3, **options)


@pytest.mark.parametrize(
    ("method", "releases"),
    [(FEDPER, 3), (FEDREP, 6), (LG, 3), (FEDBABU, 3)],
    ids=["fedper", "fedrep", "lg-fedavg", "fedbabu"],
)
def test_a_private_client_books_a_release_for_each_step_and_tells_nothing_else(
    tmp_path, method, releases
):
    place = context()
    for number in (1, 2):
        own = private(tmp_path, method, place)
        sent = shared(own, arrays_of(net(number)))
        said, count, metrics = own.fit_named(sent, {"server-round": number})
        assert own.private.ledger.events == [(1.0, 0.5, number * releases)]
        assert set(metrics) == {"privacy-epsilon", "privacy-delta"}
        assert count == 1
        assert set(said) == set(sent)
        assert all(not np.array_equal(said[name], sent[name]) for name in sent)


def test_what_a_private_step_does_not_move_stays_to_the_bit(tmp_path):
    own = private(tmp_path, FEDBABU, context())
    own.fit_named(shared(own, arrays_of(net(1))), {"server-round": 1})
    held = own.load(list(shared(own, arrays_of(net(1))).values()))
    for name in NAMES[2:]:
        assert torch.equal(held[name], net().state_dict()[name])


def test_a_private_message_that_comes_again_gets_the_same_bytes_and_is_not_charged(tmp_path):
    options = {"place": context(), "store": ClientStore(tmp_path)}
    sent = shared(of(FEDREP), arrays_of(net(1)))
    first, again = (
        private(tmp_path, FEDREP, **options).fit_named(sent, {"server-round": 1}) for _ in range(2)
    )
    assert all(first[0][name].tobytes() == again[0][name].tobytes() for name in sent)
    assert first[2] == again[2]
    assert private(tmp_path, FEDREP, **options).private.ledger.events == [(1.0, 0.5, 6)]


def test_a_part_that_was_trained_without_privacy_may_not_serve_a_private_client(tmp_path):
    place = context()
    sent = shared(of(FEDPER), arrays_of(net(1)))
    of(FEDPER, place).fit_named(sent, {"server-round": 1})
    with pytest.raises(PrivacyError, match="'anna' was trained without privacy in this run"):
        private(tmp_path, FEDPER, place).fit_named(sent, {"server-round": 2})


def test_a_private_part_is_no_start_for_a_client_without_privacy(tmp_path):
    """The other way round it costs nothing, but it would be another algorithm's head."""
    place = context()
    sent = shared(of(FEDPER), arrays_of(net(1)))
    private(tmp_path, FEDPER, place).fit_named(sent, {"server-round": 1})
    assert of(FEDPER, place).own.after({}, "cpu") is None
