"""PartClient: what it trains in which order, what it keeps, and that the kept part never leaves."""

from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from flwr.common.serde import message_to_proto
from torch import nn

from metabloom.clients import ClientStore, PartClient, SGDClient, client_app
from metabloom.clients.data import ClientData
from metabloom.errors import ConfigError, ModelError
from metabloom.sim import CohortGrid
from metabloom.wire import from_record, to_record
from tests.clients.parts import (
    F32,
    FEDBABU,
    FEDPER,
    FEDREP,
    LG,
    METHODS,
    NAMES,
    after_round,
    assert_close,
    is_body,
    is_head,
    kept,
    kept_of,
    named,
    of,
    shared,
    steps,
)
from tests.clients.small_clients import arrays_of, client, context, net
from tests.clients.toy_problems import Product, client_data

ALL = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
KEEPING = pytest.mark.parametrize("method", [FEDPER, FEDREP, LG], ids=["fedper", "fedrep", "lg"])


# --- known answer 9: 1/2 (h b - 1)^2 from h = 0, b = 1, rate 1/2 ----------------------------------


def product_client(method, **options):
    """The loss of every record is that of the known answer; dh = (hb - 1) b, db = (hb - 1) h."""
    batch = (torch.zeros(1, 1), torch.ones(1, dtype=torch.float64))
    return PartClient(
        Product(h=0.0, b=1.0),
        ClientData(batch, batch),
        loss_fn=lambda output, target: ((output - target) ** 2 / 2).mean(),
        head="h",
        local_lr=0.5,
        context=context(),
        **method,
        **options,
    )


def h_and_b(method, *, rounds=1) -> tuple[float, float]:
    own = product_client(method)
    start = own.get_parameters({})
    arrays = start
    for number in range(1, rounds + 1):
        said, _, _ = own.fit_named(shared(own, arrays), {"server-round": number})
        arrays = [said.get(name, a) for name, a in zip(own.array_names, arrays, strict=True)]
    whole = dict(zip(own.array_names, arrays, strict=True))
    if own.own is not None:
        whole |= kept(own, {"server-round": rounds})
    return float(whole["h"]), float(whole["b"])


def test_known_answer_9():
    # FedRep: h = 0 + 1/2, then b = 1 - 1/2 (1/2 - 1) 1/2. FedPer: db = 0 where h = 0.
    assert h_and_b(FEDREP) == pytest.approx((0.5, 1.125), rel=1e-12)
    assert h_and_b(FEDPER) == pytest.approx((0.5, 1.0), rel=1e-12)
    assert h_and_b({"kept": "body", "trained": "all"}) == pytest.approx((0.5, 1.0), rel=1e-12)


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_fedbabu_s_head_is_its_init_to_the_bit_and_its_body_alone_moves(rounds):
    own = product_client(FEDBABU)
    assert h_and_b(FEDBABU, rounds=rounds)[0] == 0.0  # and db = (0 - 1) 0 = 0 under it
    assert own.own is None


def test_a_second_round_goes_on_from_the_kept_head():
    # Round 2 of FedRep from (1/2, 9/8): h -= 1/2 (9/16 - 1) 9/8, then b -= 1/2 (h b - 1) h.
    h = 0.5 - 0.5 * (0.5625 - 1) * 1.125
    b = 1.125 - 0.5 * (h * 1.125 - 1) * h
    assert h_and_b(FEDREP, rounds=2) == pytest.approx((h, b), rel=1e-12)
    forgotten = 0.0 + 0.5 * 1.125  # a head that begins anew in each round
    assert h != pytest.approx(forgotten, abs=1e-2)


def test_the_wrong_orders_are_refused_by_the_known_answer():
    """Body first: db = 0 at h = 0. At once: FedPer. Both differ from FedRep's 1.125."""
    start = {"h": 0.0, "b": 1.0}

    def step(at, name):
        other = at["b"] if name == "h" else at["h"]
        return {**at, name: at[name] - 0.5 * (at["h"] * at["b"] - 1) * other}

    right, wrong = step(step(start, "h"), "b"), step(step(start, "b"), "h")
    assert (right["h"], right["b"]) == pytest.approx(h_and_b(FEDREP))
    assert (wrong["h"], wrong["b"]) != pytest.approx(h_and_b(FEDREP))


# --- a net ----------------------------------------------------------------------------------------


@ALL
def test_a_round_is_that_of_plain_autograd(method):
    own = of(method, local_epochs=2, **({"head_epochs": 3} if method is FEDREP else {}))
    received = arrays_of(net(4))
    said, count, metrics = own.fit_named(shared(own, received), {"server-round": 1})
    start = {**named(arrays_of(net())), **{n: named(received)[n] for n in shared(own, received)}}
    wanted = after_round(method, start, epochs=2, head_epochs=3)
    assert_close(said, shared(own, [wanted[name] for name in own.array_names]))
    if own.own is not None:
        assert_close(kept(own), {n: v for n, v in wanted.items() if own.kept(n)})
    assert count == len(client_data().all[1])
    assert metrics["train-loss"] > 0


def test_the_body_first_is_no_fedrep():
    """The wrong variant: the epochs of the body before those of the head."""
    own = of(FEDREP)
    said, _, _ = own.fit_named(shared(own, arrays_of(net(4))), {})
    start = {**named(arrays_of(net())), **{n: named(arrays_of(net(4)))[n] for n in NAMES[:2]}}
    body_first = steps(steps(start, is_body), is_head)
    assert not np.allclose(said["body.weight"], body_first["body.weight"], atol=1e-4)


@KEEPING
def test_the_kept_part_lasts_over_rounds_and_a_message_that_comes_twice_has_one_effect(
    method, tmp_path
):
    place, store = context(), ClientStore(tmp_path)
    replies = []
    params = named(arrays_of(net()))
    for number in (1, 2, 2, 3):
        own = of(method, place, store=store)  # a new object for each message, as under Flower
        received = shared(own, arrays_of(net(number)))
        replies.append(own.fit_named(received, {"server-round": number})[0])
        if len(replies) != 3:
            params |= {name: torch.from_numpy(value) for name, value in received.items()}
            params = after_round(method, params)
            assert_close(replies[-1], shared(own, [params[name] for name in NAMES]))
            assert_close(kept(own, {"server-round": number}), kept_of(own, params))
    for name, value in replies[1].items():
        assert value.tobytes() == replies[2][name].tobytes()


def bytes_of(message) -> bytes:
    return message_to_proto(message).SerializeToString()


@ALL
def test_no_byte_of_the_kept_part_is_in_any_reply(method):
    """Training and evaluation over three rounds: every byte that leaves is read."""
    place = context()
    grid = CohortGrid(client_app(lambda held: of(method, place, eval_steps=(1,))), num_nodes=1)
    (node,) = grid.get_node_ids()
    secrets = []
    for number in (1, 2, 3):
        own = of(method, place)
        whole = dict(zip(NAMES, arrays_of(net(number)), strict=True))
        for kind, arrays in (("train", shared(own, whole.values())), ("evaluate", whole)):
            config = ConfigRecord({"server-round": number})
            content = RecordDict({"arrays": to_record(arrays), "config": config})
            message = grid.create_message(content, kind, node, "0")
            (reply,) = grid.send_and_receive([message])
            assert reply.has_content(), reply.error
            left = bytes_of(reply)
            if own.own is not None:
                now = kept(own, {"server-round": number})
                secrets += [
                    value
                    for value in now.values()
                    if value.tobytes() not in b"".join(array.tobytes() for array in whole.values())
                ]
            for secret in secrets:
                assert secret.tobytes() not in left
                assert all(one.tobytes() not in left for one in secret.reshape(-1))
            if kind == "train":
                assert set(from_record(reply.content["arrays"])) == set(own.shared_names)
    assert bool(secrets) == (method is not FEDBABU)


def test_a_reply_that_holds_the_head_would_be_noticed():
    """The check above, on the client of FedAvg, finds the trained head."""
    own = client(SGDClient, local_lr=0.3)
    said, _, _ = own.fit(arrays_of(net(1)), {})
    trained = steps(named(arrays_of(net(1))), lambda name: True)
    np.testing.assert_allclose(said[2], trained["head.weight"], **F32)


# --- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [("kept", "neck"), ("trained", "both"), ("head_epochs", 0), ("head_epochs", 1.5)],
)
def test_an_option_out_of_range_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key):
        of({**FEDREP, key: value})


def test_a_client_that_keeps_a_part_needs_a_context_and_one_of_fedbabu_does_not():
    make = partial(client, PartClient)
    with pytest.raises(ConfigError, match="context="):
        make(**FEDPER)
    make(**FEDBABU)


def test_a_model_without_a_body_is_refused():
    with pytest.raises(ModelError, match="no body beside its head"):
        of(FEDPER, model=nn.Linear(3, 3))
