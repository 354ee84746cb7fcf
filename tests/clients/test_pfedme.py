"""pFedMe on a client: the envelope's closed forms, torch.optim's steps, and what never leaves."""

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from flwr.common.serde import message_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from metabloom.accounting import Event, epsilon_of
from metabloom.clients import (
    CLIENTS,
    ClientStore,
    PFedMeClient,
    client_app,
    pfedme_update,
    run_update,
)
from metabloom.clients.cohort import run_cohort
from metabloom.clients.local_update import LocalUpdate, personal_in, with_personal
from metabloom.clients.pfedme import PFedMeState
from metabloom.clients.privacy.updates import private_pfedme_update
from metabloom.errors import BudgetExhaustedError, ConfigError
from metabloom.ledger import PrivacyLedger
from metabloom.sim import CohortGrid
from metabloom.wire import to_record
from tests.clients.privacy.engine_problems import (
    SmoothNet,
    charge_of,
    miss,
    releases_of,
    smooth_records,
    without_noise,
)
from tests.clients.privacy.private_clients import private
from tests.clients.small_clients import arrays_of, client, context, net, same
from tests.clients.toy_problems import (
    Point,
    client_data,
    flat,
    loss_at,
    parabola,
    quadratic_loss,
    records,
    small_net,
    weights,
)

CROSS_ENTROPY = nn.functional.cross_entropy
reproducible = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def on_a_parabola(update_of, *, a=1.0, c=1.0, w=0.0, rounds=1, **options):
    """Return (w_i, theta) after local rounds on a/2 (theta - c)^2 from w."""
    model = Point(theta=[w])
    update = update_of(model, quadratic_loss, **options)
    found = run_update(update, weights(model), [parabola(a, c)] * rounds).params
    return found["theta"].item(), personal_in(found)["theta"].item()


# --- the known answer ---------------------------------------------------------------------------

EIGHT = {"steps": 1, "local_lr": 0.005, "pull": 15.0}


def gives_known_answer_8(update_of):
    # theta^ = (a c + lambda w) / (a + lambda) = 1/16; a step of 1 / (a + lambda) goes there at
    # once. w_1 = w - eta lambda (w - theta^) = .005 * 15 / 16.
    for lr, steps in ((1 / 16, 1), (0.05, 60)):
        w, theta = on_a_parabola(update_of, lr=lr, **{**EIGHT, "steps": steps})
        assert theta == pytest.approx(0.0625, abs=1e-12)
        assert w == pytest.approx(0.0046875, abs=1e-13)
    # A second local round begins at w_1, and pulls theta to it: theta^ = (1 + 15 w_1) / 16.
    w, theta = on_a_parabola(update_of, lr=1 / 16, rounds=2, **EIGHT)
    second = (1 + 15 * 0.0046875) / 16
    assert theta == pytest.approx(second, abs=1e-13)
    assert w == pytest.approx(0.0046875 - 0.075 * (0.0046875 - second), abs=1e-13)


def test_the_envelope_of_a_parabola_is_known_answer_8():
    gives_known_answer_8(pfedme_update)


def replaced(update, step):
    return LocalUpdate(begin=update.begin, step=step, finish=update.finish)


def pulled_to_the_received_model(model, loss_fn, **options):
    """theta is pulled to w as received, not to w_i, which has moved since."""
    right, first = pfedme_update(model, loss_fn, **options), []

    def step(state, batch):
        first.append(state.params)
        there = right.step(PFedMeState(first[0], state.personal, state.losses), batch)
        share = options["local_lr"] * options["pull"]
        moved = {n: v - share * (v - there.personal[n]) for n, v in state.params.items()}
        return there._replace(params=moved)

    return replaced(right, step)


def without_lambda_in_the_outer_step(model, loss_fn, **options):
    """w_i <- w_i - eta (w_i - theta): the envelope's gradient lacks its factor."""
    right = pfedme_update(model, loss_fn, **options)

    def step(state, batch):
        there = right.step(state, batch)
        moved = {
            n: v - options["local_lr"] * (v - there.personal[n]) for n, v in state.params.items()
        }
        return there._replace(params=moved)

    return replaced(right, step)


def replying_with_the_personal_model(model, loss_fn, **options):
    """The server gets theta in the place of w_i."""
    right = pfedme_update(model, loss_fn, **options)

    def finish(state):
        result = right.finish(state)
        return type(result)(with_personal(state.personal, state.personal), result.metrics)

    return LocalUpdate(begin=right.begin, step=right.step, finish=finish)


@pytest.mark.parametrize(
    "wrong",
    [
        pulled_to_the_received_model,
        without_lambda_in_the_outer_step,
        replying_with_the_personal_model,
    ],
)
def test_wrong_updates_are_refused(wrong):
    with pytest.raises(AssertionError):
        gives_known_answer_8(wrong)


@reproducible
@given(
    a=st.floats(0.1, 3),
    c=st.floats(-3, 3),
    w=st.floats(-3, 3),
    pull=st.floats(0.5, 10),
    share=st.floats(0.05, 0.9),
    steps=st.integers(1, 6),
    rounds=st.integers(1, 4),
)
def test_local_rounds_on_a_parabola_have_their_closed_form(a, c, w, pull, share, steps, rounds):
    # theta - r shrinks by 1 - lr (a + lambda) a step, around r = (a c + lambda w_i)/(a + lambda).
    lr, eta = share / (a + pull), 0.5 / pull
    theta, own = w, w
    for _ in range(rounds):
        rest = (a * c + pull * own) / (a + pull)
        theta = rest + (theta - rest) * (1 - share) ** steps
        own -= 0.5 * (own - theta)
    found = on_a_parabola(
        pfedme_update, a=a, c=c, w=w, rounds=rounds, lr=lr, steps=steps, local_lr=eta, pull=pull
    )
    # some hundred roundings of numbers below 4
    assert found == pytest.approx((own, theta), abs=1e-12)


def test_steps_of_a_network_equal_torch_sgd_on_the_loss_with_its_penalty():
    model, start = small_net(), weights(small_net())
    batches = [records(size, seed) for seed, size in enumerate((5, 4, 6))]
    update = pfedme_update(model, CROSS_ENTROPY, lr=0.2, steps=3, local_lr=0.1, pull=2.0)
    found = run_update(update, start, batches)
    theta = small_net()  # one module for all rounds: it goes on from one to the next
    own, losses = dict(start), []
    optimizer = torch.optim.SGD(theta.parameters(), lr=0.2)
    for inputs, targets in batches:
        for _ in range(3):
            optimizer.zero_grad()
            away = sum(((v - own[n]) ** 2).sum() for n, v in theta.named_parameters())
            loss = CROSS_ENTROPY(theta(inputs), targets)
            (loss + 2.0 / 2 * away).backward()
            losses.append(loss.item())
            optimizer.step()
        there = weights(theta)
        own = {n: v - 0.1 * 2.0 * (v - there[n]) for n, v in own.items()}
    # float64: the same sums, some in another order
    torch.testing.assert_close(
        flat(found.params), flat(with_personal(own, weights(theta))), rtol=0, atol=1e-13
    )
    assert found.metrics["train-loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    assert (flat(own) - flat(start)).norm() > 1e-2  # it is steps that are compared


# --- the client ---------------------------------------------------------------------------------

OPTIONS = {"inner_lr": 0.3, "inner_steps": 2, "local_lr": 0.2, "pull": 2.0}


def of(place=None, **options):
    return client(PFedMeClient, context=place or context(), **{**OPTIONS, **options})


def kept(one, config=None):
    found = one.own.after(config or {}, "cpu")
    return {name: value.numpy() for name, value in found.items()}


def test_the_client_is_found_by_name_replies_with_w_i_and_keeps_theta():
    place = context()
    own = CLIENTS["pfedme"](net(), client_data(), name="anna", context=place, **OPTIONS)
    found, num_examples, metrics = own.fit(arrays_of(net()), {"server-round": 1})
    update = pfedme_update(net(), CROSS_ENTROPY, lr=0.3, steps=2, local_lr=0.2, pull=2.0)
    wanted = run_update(update, weights(net()), [client_data().all]).params
    for name, got in zip(own.array_names, found, strict=True):
        np.testing.assert_allclose(got, wanted[name].numpy(), rtol=1e-6, atol=1e-7)  # float32
    for name, value in kept(own).items():
        np.testing.assert_allclose(value, personal_in(wanted)[name], rtol=1e-6, atol=1e-7)
    assert num_examples == 11
    assert set(metrics) == {"train-loss"}
    assert len(found) == 4


def test_local_rounds_are_the_batches_of_the_epochs():
    own = of(batch_size=4, local_epochs=2)
    training = own.training(weights(net()), {"server-round": 1})
    assert training.steps(own.data) == 2 * 3 == len(list(training.batches(own.data)))


def test_a_round_begins_at_the_received_model_whatever_was_personal_before():
    place = context()
    first = of(place).fit(arrays_of(net()), {"server-round": 1})
    again = of(place).fit(arrays_of(net()), {"server-round": 2})
    for one, other in zip(first[0], again[0], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)  # the records in another order


def test_evaluation_begins_at_the_personal_model_and_is_pulled_to_the_received_one():
    place, received, data = context(), arrays_of(net(1)), client_data()
    of(place).fit(arrays_of(net()), {"server-round": 1})
    own = of(place, eval_steps=(2,))
    _, _, metrics = own.evaluate(received, {"server-round": 1})
    theta = {name: torch.from_numpy(value) for name, value in kept(own).items()}
    losses = [loss_at(net(), CROSS_ENTROPY, theta, data.query).item()]
    for _ in range(2):
        leaves = {n: v.detach().requires_grad_() for n, v in theta.items()}
        away = sum(((v - weights(net(1))[n]) ** 2).sum() for n, v in leaves.items())
        loss = loss_at(net(), CROSS_ENTROPY, leaves, data.support) + 2.0 / 2 * away
        found = torch.autograd.grad(loss, list(leaves.values()))
        theta = {n: v.detach() - 0.3 * g for (n, v), g in zip(leaves.items(), found, strict=True)}
    losses.append(loss_at(net(), CROSS_ENTROPY, theta, data.query).item())
    found = [metrics["loss-before"], metrics["loss-after-2"]]
    assert found == pytest.approx(losses, rel=1e-5)  # float32
    new = of(eval_steps=(2,)).evaluate(received, {"server-round": 1})[2]  # it never trained
    at_received = loss_at(net(), CROSS_ENTROPY, weights(net(1)), data.query).item()
    assert new["loss-before"] == pytest.approx(at_received, rel=1e-6)


def test_the_personal_model_outlives_the_context_and_goes_back_with_the_rounds(tmp_path):
    store = ClientStore(tmp_path)
    run = {"run-token": "t", "kept-round": 0}
    models = {}
    for number in (1, 2):
        one = of(store=store)
        one.fit(arrays_of(net(number)), {"server-round": number, **run})
        models[number] = kept(one, {"server-round": number, **run})
    for number in (1, 2):
        there = kept(of(store=store), {"server-round": number, **run})
        assert all(np.array_equal(there[n], v) for n, v in models[number].items())
    assert not all(np.array_equal(models[1][n], v) for n, v in models[2].items())


def test_theta_is_in_no_byte_of_what_leaves_the_client():
    place_of = {}

    def client_fn(place):
        place_of[0] = place
        return of(place)

    grid = CohortGrid(client_app(client_fn), num_nodes=1)
    (node,) = grid.get_node_ids()
    sent = dict(zip(of().array_names, arrays_of(net()), strict=True))
    replies = b""
    for kind in ("train", "evaluate"):
        config = ConfigRecord({"server-round": 1})
        content = RecordDict({"arrays": to_record(sent), "config": config})
        message = grid.create_message(content, kind, node, "0")
        (reply,) = grid.send_and_receive([message])
        assert reply.has_content()
        replies += message_to_proto(reply).SerializeToString()
        if kind == "train":
            answer = reply.content["arrays"]
            assert list(answer) == list(sent)
    theta = kept(of(place_of[0]))
    assert list(theta) == list(sent)
    for name, value in theta.items():
        assert value.tobytes() not in replies, name
        assert answer[name].numpy().tobytes() in replies  # so that the search can find
    assert b"personal" not in replies


def test_a_cohort_at_once_gives_the_replies_and_the_personal_models_of_its_clients():
    places = [context() for _ in range(4)]
    options = {"batch_size": 4, "local_epochs": 2, "model": small_net()}

    def clients(places):
        return [
            of(place, data=client_data(5 + i, seed=i, dtype=torch.float64), **options)
            for i, place in enumerate(places)
        ]

    sent, config = arrays_of(small_net()), {"server-round": 1}
    alone = [context() for _ in range(4)]
    wanted = [one.fit(sent, config)[0] for one in clients(alone)]
    together = clients(places)
    trainings = [one.training(one.load(sent), config) for one in together]
    found = [
        one.answered(outcome, sent, config)[0]
        for one, outcome in zip(together, run_cohort(trainings), strict=True)
    ]
    for ours, theirs in zip(found, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)  # float64, another order of sums
    for mine, other in zip(clients(places), clients(alone), strict=True):
        for name, value in kept(mine).items():
            np.testing.assert_allclose(value, kept(other)[name], rtol=0, atol=1e-12)


# --- private training ---------------------------------------------------------------------------


def test_private_local_rounds_without_noise_are_the_plain_ones():
    model, data = SmoothNet(), smooth_records(9)
    options = {"lr": 0.2, "steps": 3, "local_lr": 0.1, "pull": 2.0}
    charge = charge_of(2 * 3)
    releases = releases_of(model, data, size=9.0, charge=charge)
    start = weights(model)
    found = run_update(private_pfedme_update(releases, without_noise(), **options), start, range(2))
    wanted = run_update(pfedme_update(model, CROSS_ENTROPY, **options), start, [data] * 2)
    assert charge.is_used_up
    assert found.metrics == {}
    for part in (lambda p: {n: p[n] for n in start}, personal_in):
        away = (flat(part(one.params)) - flat(start) for one in (found, wanted))
        assert miss(*away) < 1e-12  # as the other private updates


def test_a_private_client_pays_for_k_releases_of_each_local_round_and_keeps_theta(tmp_path):
    place, file = context(), tmp_path / "anna.jsonl"
    own = private(file, PFedMeClient, context=place, local_steps=3, **OPTIONS)
    found, count, metrics = own.fit(arrays_of(net()), {"server-round": 1})
    assert PrivacyLedger(file).events == [(1.0, 0.5, 3 * 2)]
    assert set(metrics) == {"privacy-epsilon", "privacy-delta"}
    assert count == 1
    theta = kept(own)
    assert not any(np.array_equal(a, b) for a, b in zip(found, theta.values(), strict=True))
    # The same message again: the same bytes, the same personal model, no further cost.
    again = private(file, PFedMeClient, context=place, local_steps=3, **OPTIONS)
    assert same(again.fit(arrays_of(net()), {"server-round": 1})[0], found)
    assert all(np.array_equal(kept(again)[n], v) for n, v in theta.items())
    assert PrivacyLedger(file).events == [(1.0, 0.5, 3 * 2)]


def test_a_private_client_without_budget_sends_nothing_and_keeps_its_last_theta(tmp_path):
    place, file = context(), tmp_path / "anna.jsonl"
    one_round = epsilon_of([Event(1.0, 0.5, 2)], 1e-5)
    options = {"context": place, "pins": {"target_epsilon": 1.01 * one_round}, **OPTIONS}
    private(file, PFedMeClient, **options).fit(arrays_of(net()), {"server-round": 1})
    theta = kept(private(file, PFedMeClient, **options))
    spent = private(file, PFedMeClient, **options)
    with pytest.raises(BudgetExhaustedError):
        spent.fit(arrays_of(net()), {"server-round": 2})
    assert all(np.array_equal(kept(spent)[n], v) for n, v in theta.items())


# --- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"pull": 0.0}, "lambda of pFedMe = 0.0"),
        ({"pull": float("nan")}, "lambda of pFedMe = nan"),
        ({"inner_steps": 0}, "inner_steps = 0"),
        ({"inner_steps": 1.5}, "inner_steps = 1.5"),
        ({"inner_lr": 0.5, "pull": 15.0}, "inner_lr = 0.5 with .* by 1 - 7.5.* below 0.133"),
        ({"inner_lr": 0.01, "local_lr": 0.2, "pull": 15.0}, "local_lr = 0.2 with .* of 15"),
        ({"local_lr": -1.0}, "local_lr = -1.0"),
    ],
)
def test_what_cannot_work_is_refused_by_name(wrong, said):
    with pytest.raises(ConfigError, match=said):
        of(**wrong)


def test_without_a_context_there_is_no_place_for_the_personal_model():
    with pytest.raises(ConfigError, match="a personal model needs context="):
        client(PFedMeClient, **OPTIONS)
