"""Private updates without noise are the plain ones, and take the releases of the table."""

import pytest
import torch

from metabloom.accounting import Event, epsilon_of
from metabloom.clients import PrivacyConfig, meta_gradient, run_update, sgd_update
from metabloom.clients.maml import MetaBatch, maml_update
from metabloom.clients.privacy.noise import seeded_sources
from metabloom.clients.privacy.updates import (
    meta_events,
    private_maml_update,
    private_meta_gradient,
    private_sgd_update,
)
from metabloom.errors import ConfigError, PrivacyError
from metabloom.ledger import Charge
from tests.clients.privacy import engine_mutants as mutants
from tests.clients.privacy.engine_problems import (
    CROSS_ENTROPY,
    SmoothNet,
    charge_of,
    flat,
    generator,
    miss,
    releases_of,
    smooth_records,
    weights,
    without_noise,
)

RECORDS = smooth_records(9)
SIZE = float(len(RECORDS[1]))
STEPS = pytest.mark.parametrize("steps", [1, 2, 3])
ORDERS = pytest.mark.parametrize("order", ["first", "exact"])
# sigma = 0, nothing clipped, all records in each batch, b = n: float64, sums in another order
NEAR = 1e-12


def head(name):
    return name.startswith("head")


def rates_of(params, adapt=None):
    draw = generator(6)
    return {
        name: 0.3 * torch.randn(value.shape, generator=draw, dtype=value.dtype)
        for name, value in params.items()
        if adapt is None or adapt(name)
    }


def privacy(**more):
    return PrivacyConfig(
        **{
            "noise_multiplier": 1.3,
            "hvp_noise_multiplier": 2.6,
            "max_grad_norm": 1.0,
            "sample_rate": 0.3,
            "target_epsilon": 100.0,
            "target_delta": 1e-5,
        }
        | more
    )


# --- group 4: equal to what is not private ----------------------------------------------------


@ORDERS
@STEPS
@pytest.mark.parametrize("adapt", [None, head], ids=["all", "head"])
@pytest.mark.parametrize("rates", ["number", "tensors"])
def test_the_meta_gradient_without_noise_is_the_exact_one(order, steps, adapt, rates):
    model = SmoothNet()
    params = weights(model)
    inner_lr = 0.4 if rates == "number" else rates_of(params, adapt)
    options = {"inner_lr": inner_lr, "steps": steps, "order": order, "adapt": adapt}
    charge = charge_of(2 * steps + 1 if order == "exact" else steps + 1)
    found = private_meta_gradient(
        releases_of(model, RECORDS, size=SIZE, charge=charge), params, without_noise(), **options
    )
    wanted = meta_gradient(model, CROSS_ENTROPY, params, RECORDS, RECORDS, **options)
    assert charge.is_used_up
    assert list(found.grads) == list(wanted.grads)
    assert miss(flat(found.grads), flat(wanted.grads)) < NEAR
    if rates == "number":
        assert found.inner_lr_grads is None
    else:
        assert set(found.inner_lr_grads) == set(wanted.inner_lr_grads)
        assert miss(flat(found.inner_lr_grads), flat(wanted.inner_lr_grads)) < NEAR
    # The test has power: the two orders are far apart.
    other = meta_gradient(
        model,
        CROSS_ENTROPY,
        params,
        RECORDS,
        RECORDS,
        **options | {"order": "first" if order == "exact" else "exact"},
    )
    assert miss(flat(found.grads), flat(other.grads)) > 1e-3


@ORDERS
def test_the_local_update_without_noise_is_the_plain_one(order):
    model = SmoothNet()
    params = weights(model)
    options = {"inner_lr": 0.4, "outer_lr": 0.7, "inner_steps": 2, "order": order}
    charge = charge_of(3 * (5 if order == "exact" else 3))
    releases = releases_of(model, RECORDS, size=SIZE, charge=charge)
    found = run_update(private_maml_update(releases, without_noise(), **options), params, range(3))
    wanted = run_update(
        maml_update(model, CROSS_ENTROPY, **options), params, [MetaBatch(RECORDS, RECORDS)] * 3
    )
    assert found.metrics == {}  # a loss of private records would not be private
    assert charge.is_used_up
    assert miss(flat(found.params) - flat(params), flat(wanted.params) - flat(params)) < NEAR


@pytest.mark.parametrize("mu", [0.0, 0.8])
def test_private_sgd_without_noise_is_sgd(mu):
    model = SmoothNet()
    params = weights(model)
    charge = charge_of(4)
    releases = releases_of(model, RECORDS, size=SIZE, charge=charge)
    update = private_sgd_update(releases, without_noise(), lr=0.3, proximal_mu=mu)
    found = run_update(update, params, range(4))
    plain = sgd_update(model, CROSS_ENTROPY, lr=0.3, proximal_mu=mu)
    wanted = run_update(plain, params, [RECORDS] * 4)
    assert found.metrics == {}
    assert charge.is_used_up
    assert miss(flat(found.params) - flat(params), flat(wanted.params) - flat(params)) < NEAR


def test_the_size_that_sums_are_divided_by_is_the_expected_one():
    model = SmoothNet()
    found = [
        flat(
            releases_of(model, RECORDS, size=size).gradient(
                weights(model), noise_multiplier=0.0, max_grad_norm=1.0
            )
        )
        for size in (1.0, 4.0)
    ]
    assert miss(found[1] * 4, found[0]) < NEAR


# --- group 5: the releases of the table ----------------------------------------------------------


@STEPS
def test_the_events_are_those_of_the_table(steps):
    told = privacy()
    assert meta_events(told, steps=steps, order="first") == [Event(1.3, 0.3, steps + 1)]
    assert meta_events(told, steps=steps, order="exact") == [
        Event(1.3, 0.3, steps + 1),
        Event(2.6, 0.3, steps),
    ]


def meta_step(order, steps, charge, *, kind=None, records=RECORDS, inner_lr=0.4):
    model = SmoothNet()
    more = {} if kind is None else {"kind": kind}
    releases = releases_of(
        model, records, rate=0.3, size=3.0, charge=charge, sources=seeded_sources(2), **more
    )
    return private_meta_gradient(
        releases, weights(model), privacy(), inner_lr=inner_lr, steps=steps, order=order
    )


def one_less_of_each(events):
    for number, event in enumerate(events):
        fewer = [*events]
        fewer[number] = event._replace(count=event.count - 1)
        yield [one for one in fewer if one.count]


def takes_what_is_booked(kind, order="exact", steps=2):
    events = meta_events(privacy(), steps=steps, order=order)
    charge = Charge.of(events)
    meta_step(order, steps, charge, kind=kind)
    assert charge.is_used_up


@ORDERS
@STEPS
@pytest.mark.parametrize("records", [RECORDS, smooth_records(0)], ids=["some", "none"])
@pytest.mark.parametrize("rates", ["number", "tensors"])
def test_a_meta_step_takes_exactly_the_releases_of_the_table(order, steps, records, rates):
    inner_lr = 0.4 if rates == "number" else rates_of(weights(SmoothNet()))
    events = meta_events(privacy(), steps=steps, order=order)
    charge = Charge.of(events)
    found = meta_step(order, steps, charge, records=records, inner_lr=inner_lr)
    assert charge.is_used_up
    assert all(value.isfinite().all() and value.any() for value in found.grads.values())
    for fewer in one_less_of_each(events):
        with pytest.raises(PrivacyError, match="not reserved in the ledger"):
            meta_step(order, steps, Charge.of(fewer), records=records, inner_lr=inner_lr)


def test_booking_that_is_skipped_is_refused():
    takes_what_is_booked(None)
    with pytest.raises(AssertionError):
        takes_what_is_booked(mutants.NothingBooked)


def test_one_step_more_than_was_reserved_is_refused():
    model, told = SmoothNet(), privacy()
    for steps, allowed in ((3, True), (4, False)):
        charge = charge_of(3, 1.3, 0.3)
        releases = releases_of(model, RECORDS, rate=0.3, charge=charge)
        update = private_sgd_update(releases, told, lr=0.1)
        if allowed:
            run_update(update, weights(model), range(steps))
        else:
            with pytest.raises(PrivacyError, match="not reserved"):
                run_update(update, weights(model), range(steps))
        assert charge.is_used_up


def test_a_direction_of_zeros_is_booked_like_any_other():
    model = SmoothNet()
    charge = charge_of(1, 2.6, 0.3)
    releases = releases_of(model, RECORDS, rate=0.3, charge=charge)
    zero = {name: torch.zeros_like(value) for name, value in weights(model).items()}
    found = releases.hessian_product(weights(model), zero, noise_multiplier=2.6, max_norm=0.1)
    assert charge.is_used_up
    assert all(not value.any() for value in found.values())  # H 0 = 0 for any data
    with pytest.raises(PrivacyError, match="not reserved"):
        releases.hessian_product(weights(model), zero, noise_multiplier=2.6, max_norm=0.1)


def test_a_direction_too_short_for_noise_of_its_size_counts_as_zeros():
    model = SmoothNet()
    releases = releases_of(model, RECORDS, rate=0.3, charge=charge_of(1, 2.6, 0.3))
    short = {name: torch.full_like(value, 1e-33) for name, value in weights(model).items()}
    found = releases.hessian_product(weights(model), short, noise_multiplier=2.6, max_norm=0.1)
    assert all(not value.any() for value in found.values())


@pytest.mark.parametrize("wrong", [{"inner_lr": 0.0}, {"steps": 0}, {"adapt": lambda name: False}])
def test_an_inner_loop_that_cannot_work_is_refused_before_anything_is_released(wrong):
    model, charge = SmoothNet(), charge_of(2)
    releases = releases_of(model, RECORDS, size=SIZE, charge=charge)
    with pytest.raises(ConfigError):
        private_meta_gradient(
            releases, weights(model), without_noise(), **{"inner_lr": 0.4, **wrong}
        )
    assert charge == charge_of(2)


def test_a_release_of_another_noise_or_rate_is_not_what_was_reserved():
    model = SmoothNet()
    for sigma, rate in ((1.2, 0.3), (1.3, 0.31)):
        charge = charge_of(5, 1.3, 0.3)
        releases = releases_of(model, RECORDS, rate=rate, charge=charge)
        with pytest.raises(PrivacyError, match="not reserved"):
            releases.gradient(weights(model), noise_multiplier=sigma, max_grad_norm=1.0)
        assert charge == charge_of(5, 1.3, 0.3)


def test_an_order_that_takes_differences_of_gradients_is_refused():
    charge = charge_of(9, 1.3, 0.3)
    with pytest.raises(ConfigError, match=r"order = 'hf' with privacy.*order = 'first'"):
        meta_step("hf", 1, charge)
    assert charge == charge_of(9, 1.3, 0.3)


def test_every_release_of_a_meta_step_draws_a_batch_of_its_own(monkeypatch):
    from metabloom.clients.privacy.releases import Releases

    drawn = []
    honest = Releases.draw
    monkeypatch.setattr(Releases, "draw", lambda own: drawn.append(honest(own)) or drawn[-1])
    records = smooth_records(60)
    meta_step(
        "exact", 3, Charge.of(meta_events(privacy(), steps=3, order="exact")), records=records
    )
    assert len(drawn) == 7
    # Two draws of 60 coins of 0.3 agree with chance (.3^2 + .7^2)^60 = 1e-14.
    assert len({tuple(draw.rows.tolist()) for draw in drawn}) == 7


# --- group 7: one batch for two releases ----------------------------------------------------------


def test_a_batch_used_twice_costs_more_than_two_batches():
    sigma, rate, steps, delta = 1.0, 0.05, 100, 1e-5
    joint = (sigma**-2 + sigma**-2) ** -0.5
    # By PRV, and by RDP, which is an upper bound of some percent more.
    for accountant, apart, together in (("prv", 4.77, 7.69), ("rdp", 5.37, 8.91)):
        found = [
            epsilon_of(events, delta, accountant)
            for events in ([Event(sigma, rate, 2 * steps)], [Event(joint, rate, steps)])
        ]
        assert found == [pytest.approx(apart, abs=0.02), pytest.approx(together, abs=0.02)]


def test_the_joint_mechanism_on_one_batch_is_one_of_the_smaller_sigma():
    # (phi, phi) / (sigma_s, sigma_h) moves by sqrt(sigma_s^-2 + sigma_h^-2) where one record is
    # added: the same as one Gaussian of sigma_eff; against dp_accounting's own joint divergence.
    import dp_accounting

    sigma_s, sigma_h, order = 1.3, 2.6, 4
    effective = (sigma_s**-2 + sigma_h**-2) ** -0.5
    both = dp_accounting.rdp.RdpAccountant([order])
    both.compose(dp_accounting.GaussianDpEvent(sigma_s)).compose(
        dp_accounting.GaussianDpEvent(sigma_h)
    )
    one = dp_accounting.rdp.RdpAccountant([order])
    one.compose(dp_accounting.GaussianDpEvent(effective))
    assert both.get_epsilon(1e-5) == pytest.approx(one.get_epsilon(1e-5), rel=1e-12)
