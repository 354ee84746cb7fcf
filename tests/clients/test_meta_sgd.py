"""Meta-SGD on a client: rates that travel with the model, their gradient, and what they are for."""

import numpy as np
import pytest
import torch
from torch import nn

from metabloom.clients import (
    CLIENTS,
    MAMLClient,
    MetaBatch,
    MetaSGDClient,
    adapt,
    meta_sgd_update,
    run_update,
)
from metabloom.clients.maml import MetaState
from metabloom.clients.privacy.updates import meta_events, private_meta_sgd_update
from metabloom.errors import ConfigError, WireError
from metabloom.inner_rates import initial_rates, rate_name, split_rates
from metabloom.ledger import PrivacyLedger
from tests.clients.privacy.engine_problems import (
    SmoothNet,
    charge_of,
    miss,
    releases_of,
    smooth_records,
    without_noise,
)
from tests.clients.privacy.private_clients import PINNED, pinned, private
from tests.clients.small_clients import arrays_of, client, net, same
from tests.clients.toy_problems import (
    Point,
    body,
    client_data,
    flat,
    head,
    meta_gradient_by_graph,
    parabola,
    quadratic_loss,
    random_rates,
    records,
    small_net,
    weights,
)

CROSS_ENTROPY = nn.functional.cross_entropy
ALPHA = rate_name("theta")


def with_rates(params, rates):
    return params | {rate_name(name): value for name, value in rates.items()}


# --- the gradient of the rates -----------------------------------------------------------------


def on_the_parabola(update_of, steps=1, **options):
    """a = 2, c = 1, theta = 0, alpha = .1; beta = 1: the update is the negative gradient."""
    model, batch = Point(theta=[0.0]), parabola(2, 1)
    start = with_rates(weights(model), {"theta": torch.tensor([0.1], dtype=torch.float64)})
    update = update_of(model, quadratic_loss, outer_lr=1.0, inner_steps=steps, **options)
    found = run_update(update, start, [MetaBatch(batch, batch)]).params
    return {name: (start[name] - value).item() for name, value in found.items()}


def gives_known_answer_3(update_of):
    # theta_K - 1 = -(1 - 2 alpha)^K, L = (1 - 2 alpha)^2K, so
    # dL/dalpha = -4K (1 - 2 alpha)^(2K - 1): -3.2 at K = 1, -6.1440 at K = 3.
    for steps in (1, 3, 5):
        found = on_the_parabola(update_of, steps)
        wanted = -4 * steps * 0.8 ** (2 * steps - 1)
        assert found[ALPHA] == pytest.approx(wanted, abs=1e-12)
        assert found["theta"] == pytest.approx(-2 * 0.8 ** (2 * steps), abs=1e-12)


def test_the_rates_get_their_own_gradient_by_the_exact_chain_rule():
    gives_known_answer_3(meta_sgd_update)


def with_the_weight_s_own_gradient(model, loss_fn, **options):
    """alpha gets the gradient of the weight that it belongs to, as in a public baseline: -1.6."""
    right = meta_sgd_update(model, loss_fn, **{**options, "order": "first"})

    def step(state, batch):
        moved = right.step(state, batch).params
        own, rates = split_rates(state.params)
        change = {name: moved[name] - value for name, value in own.items()}
        wrong = {rate_name(name): rate + change[name] for name, rate in rates.items()}
        return MetaState(moved | wrong, state.losses)

    return type(right)(begin=right.begin, step=step, finish=lambda state: right.finish(state))


def of_the_last_step_alone(model, loss_fn, *, inner_steps, **options):
    """alpha gets the gradient of one of the K steps in which it acts."""
    whole = meta_sgd_update(model, loss_fn, inner_steps=inner_steps, **options)
    one = meta_sgd_update(model, loss_fn, inner_steps=1, **options)

    def step(state, batch):
        own, rates = split_rates(state.params)
        if inner_steps > 1:
            own = adapt(model, loss_fn, own, batch.support, inner_lr=rates, steps=inner_steps - 1)
        last = one.step(MetaState(with_rates(own, rates)), batch).params
        of_rates = {rate_name(name): last[rate_name(name)] for name in rates}
        return MetaState(whole.step(state, batch).params | of_rates, state.losses)

    return type(whole)(begin=whole.begin, step=step, finish=whole.finish)


@pytest.mark.parametrize("wrong", [with_the_weight_s_own_gradient, of_the_last_step_alone])
def test_wrong_gradients_of_the_rates_are_refused(wrong):
    with pytest.raises(AssertionError):
        gives_known_answer_3(wrong)


def test_the_public_baseline_s_gradient_is_the_known_wrong_one():
    model, batch = Point(theta=[0.0]), parabola(2, 1)
    start = with_rates(weights(model), {"theta": torch.tensor([0.1], dtype=torch.float64)})
    update = with_the_weight_s_own_gradient(model, quadratic_loss, outer_lr=1.0)
    state = update.step(update.begin(start), MetaBatch(batch, batch))
    assert (start[ALPHA] - state.params[ALPHA]).item() == pytest.approx(-1.6, abs=1e-12)


@pytest.mark.parametrize("adapted", [None, head, body], ids=["all", "head", "body"])
@pytest.mark.parametrize("steps", [1, 3])
def test_two_meta_steps_equal_plain_autograd_through_the_inner_loop(steps, adapted):
    model = small_net()
    own = weights(model)
    rates = random_rates({n: v for n, v in own.items() if adapted is None or adapted(n)}, 3)
    batches = [MetaBatch(records(6, i), records(5, i + 10)) for i in (1, 2)]
    update = meta_sgd_update(model, CROSS_ENTROPY, outer_lr=0.7, inner_steps=steps, adapt=adapted)
    found = run_update(update, with_rates(own, rates), batches).params
    for batch in batches:
        of_own, of_rates = meta_gradient_by_graph(
            model,
            CROSS_ENTROPY,
            own,
            batch.support,
            batch.query,
            inner_lr=rates,
            steps=steps,
            adapt=adapted,
        )
        own = {name: value - 0.7 * of_own[name] for name, value in own.items()}
        rates = {name: value - 0.7 * of_rates[name] for name, value in rates.items()}
    # float64: the same products in another order, a few hundred roundings of 1e-16
    torch.testing.assert_close(flat(found), flat(with_rates(own, rates)), rtol=0, atol=1e-12)
    assert any((value < 0).any() for value in rates.values())  # of any sign


def test_without_the_hessian_the_rates_keep_the_first_order_gradient():
    found = on_the_parabola(meta_sgd_update, 2, order="first")
    # v is L'(theta_2) = -2 * .64 for both steps; gradients -2 and -1.6.
    assert found["theta"] == pytest.approx(-1.28, abs=1e-12)
    assert found[ALPHA] == pytest.approx(-(2 + 1.6) * 1.28, abs=1e-12)


# --- what travels ------------------------------------------------------------------------------


def test_the_client_is_found_by_name_and_exchanges_the_model_s_arrays_then_the_rates():
    own = client(CLIENTS["meta-sgd"])
    names = tuple(net().state_dict())
    assert own.array_names == (*names, *map(rate_name, names))
    first = own.get_parameters({})
    assert same(first[:4], arrays_of(net()))
    assert all((rate == np.float32(0.4)).all() for rate in first[4:])
    assert same(first[4:], list(initial_rates(net(), 0.4).values()))


def test_frozen_parameters_and_those_that_are_not_adapted_have_no_rates():
    model = net()
    model.body.bias.requires_grad_(requires_grad=False)
    own = client(MetaSGDClient, model=model)
    assert rate_name("body.bias") not in own.array_names
    assert len(own.array_names) == 4 + 3
    found, _, _ = own.fit(own.get_parameters({}), {})
    assert np.array_equal(found[1], own.get_parameters({})[1])
    partial = client(MetaSGDClient, adapt=head)
    assert partial.array_names[4:] == (rate_name("head.weight"), rate_name("head.bias"))
    assert len(partial.fit(partial.get_parameters({}), {})[0]) == 6


def test_the_reply_is_the_point_minus_its_gradient_in_the_dtypes_received():
    data, own = client_data(), client(MetaSGDClient, inner_steps=2)
    rates = random_rates(weights(net()), 5)
    sent = [*arrays_of(net()), *(rate.float().numpy() for rate in rates.values())]
    found, num_examples, metrics = own.fit(sent, {})
    params = {name: value.double() for name, value in weights(net()).items()}
    of_own, of_rates = meta_gradient_by_graph(
        small_net(),
        CROSS_ENTROPY,
        params,
        *((inputs.double(), targets) for inputs, targets in (data.support, data.query)),
        inner_lr={name: rate.float().double() for name, rate in rates.items()},
        steps=2,
    )
    for got, start, gradient in zip(
        found, sent, [*of_own.values(), *of_rates.values()], strict=True
    ):
        # float32: the client's arithmetic, and the rounding of w - g
        np.testing.assert_allclose(start - got, gradient.numpy(), rtol=1e-4, atol=1e-6)
    assert num_examples == 11
    assert set(metrics) == {"query-loss"}
    doubled, _, _ = own.fit([array.astype(np.float64) for array in sent], {})
    assert {array.dtype for array in doubled} == {np.dtype(np.float64)}


def test_a_server_without_rates_is_told_what_to_begin_with():
    own = client(MetaSGDClient)
    with pytest.raises(WireError, match=r"0 arrays of inner rates, its Net has 4.*initial_rates"):
        own.fit(arrays_of(net()), {})
    with pytest.raises(WireError, match="received 3 arrays, its Net has 4"):
        own.fit(arrays_of(net())[:3], {})


def test_rates_of_another_shape_are_refused_by_name():
    own = client(MetaSGDClient)
    sent = own.get_parameters({})
    sent[4] = sent[4].T
    with pytest.raises(WireError, match=r"'inner_lr/body.weight' of shape \(3, 4\).*\(4, 3\)"):
        own.evaluate(sent, {})


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_first_rates_that_are_no_rates_are_refused(rate):
    with pytest.raises(ConfigError, match="inner_lr"):
        initial_rates(net(), rate)


# --- adaptation --------------------------------------------------------------------------------


def test_an_evaluation_adapts_by_the_rates_that_were_received_negative_ones_too():
    data = client_data()
    own = client(MetaSGDClient, inner_lr=7.0, eval_steps=(1, 3))  # of its own, which do not count
    rates = {name: rate.float() for name, rate in random_rates(weights(net()), 8).items()}
    assert any((rate < 0).any() for rate in rates.values())
    sent = [*arrays_of(net()), *(rate.numpy() for rate in rates.values())]
    loss, _, metrics = own.evaluate(sent, {})
    for steps in (1, 3):
        there = adapt(
            net(), CROSS_ENTROPY, weights(net()), data.support, inner_lr=rates, steps=steps
        )
        judge = net()
        judge.load_state_dict(there)
        wanted = CROSS_ENTROPY(judge(data.query[0]), data.query[1]).item()
        assert metrics[f"loss-after-{steps}"] == pytest.approx(wanted, rel=1e-5)  # float32
    assert loss == metrics["loss-after-3"]
    other = client(MetaSGDClient, inner_lr=7.0, eval_steps=(1, 3))
    flipped = [*sent[:4], *(-rate for rate in sent[4:])]
    assert other.evaluate(flipped, {})[2]["loss-after-1"] != metrics["loss-after-1"]
    assert other.evaluate(flipped, {})[2]["loss-before"] == metrics["loss-before"]


def test_rates_may_become_negative_in_training():
    own = client(MetaSGDClient, outer_lr=50.0)
    found, _, _ = own.fit(own.get_parameters({}), {})
    assert any((rate < 0).any() for rate in found[4:])
    assert np.isfinite(own.evaluate(found, {})[0])


# --- private training --------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["first", "exact"])
@pytest.mark.parametrize("steps", [1, 2])
def test_private_meta_steps_without_noise_are_the_plain_ones(order, steps):
    model, data = SmoothNet(), smooth_records(9)
    own = weights(model)
    start = with_rates(own, random_rates(own, 4))
    options = {"outer_lr": 0.7, "inner_steps": steps, "order": order}
    charge = charge_of(2 * (2 * steps + 1 if order == "exact" else steps + 1))
    releases = releases_of(model, data, size=9.0, charge=charge)
    found = run_update(
        private_meta_sgd_update(releases, without_noise(), **options), start, range(2)
    )
    plain = meta_sgd_update(model, CROSS_ENTROPY, **options)
    wanted = run_update(plain, start, [MetaBatch(data, data)] * 2)
    assert charge.is_used_up
    assert found.metrics == {}
    away = (flat(one.params) - flat(start) for one in (found, wanted))
    assert miss(*away) < 1e-12  # as the other private updates


def test_a_private_client_pays_for_the_releases_of_maml_and_sends_noisy_rates(tmp_path):
    books = {}
    for kind in (MAMLClient, MetaSGDClient):
        file = tmp_path / f"{kind.__name__}.jsonl"
        own = private(file, kind, inner_steps=2)
        found, count, metrics = own.fit(own.get_parameters({}), {"server-round": 1})
        books[kind] = PrivacyLedger(file).events
        assert set(metrics) == {"privacy-epsilon", "privacy-delta"}
        assert count == 1
    assert books[MetaSGDClient] == books[MAMLClient]
    step = meta_events(pinned(tmp_path / "none"), steps=2, order="first")
    assert [tuple(event) for event in step] == books[MAMLClient]
    sent = own.get_parameters({})
    assert PINNED["noise_multiplier"] > 0
    assert not any(np.array_equal(a, b) for a, b in zip(found, sent, strict=True))
    # The same message again has the same answer, rates included, and costs nothing.
    again, _, _ = private(file, MetaSGDClient, inner_steps=2).fit(sent, {"server-round": 1})
    assert same(again, found)
    assert PrivacyLedger(file).events == books[MetaSGDClient]
