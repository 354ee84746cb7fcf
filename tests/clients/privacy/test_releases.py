"""What one record can do to a release, and how batches are drawn."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from metabloom.clients.privacy import releases as module
from metabloom.clients.privacy.noise import seeded_sources
from metabloom.clients.privacy.releases import Draw, Releases
from metabloom.errors import PrivacyError
from metabloom.ledger import Charge
from tests.clients.privacy import engine_mutants as mutants
from tests.clients.privacy.engine_problems import (
    CROSS_ENTROPY,
    SmoothNet,
    charge_of,
    clipped,
    clipped_sum,
    flat,
    linear,
    miss,
    nothing,
    ones_of,
    output_itself,
    record_gradients,
    releases_of,
    smooth_records,
    weights,
)

LOW, HIGH = 5e-7, 1 - 5e-7  # of two-sided bounds with 1e-6 outside them


# --- laws: each takes an engine and raises AssertionError where it is wrong --------------------


def one_record_moves_the_sum_by_no_more_than_the_bound(kind, strange=(), dtype=torch.float64):
    """Adding record 0 moves the sum by at most C, whatever is in it."""
    model = SmoothNet().to(dtype)
    inputs, targets = smooth_records(6)
    inputs = 5 * inputs.to(dtype)
    inputs[0, : len(strange)] = torch.tensor(strange, dtype=dtype)
    for bound in (1e-3, 0.5, 20.0):
        whole, rest = (
            clipped_sum(model, (inputs[start:], targets[start:]), bound, kind=kind)
            for start in (0, 1)
        )
        assert whole.isfinite().all()
        rounding = 6 * bound * torch.finfo(dtype).eps  # of the sum of the six, each at most C
        assert (whole - rest).norm() <= bound * (1 + 1e-6) + rounding


def records_that_are_not_finite_count_for_nothing(kind):
    for strange in (math.nan, math.inf, -math.inf):
        one_record_moves_the_sum_by_no_more_than_the_bound(kind, (strange,))


def shares_in(kind, *, total=40, rate=0.2, count=600, seed=11):
    """Which of the records are in each release, (count, total): read from the releases."""
    charge = charge_of(count, rate=rate)
    releases = releases_of(
        linear(total),
        ones_of(total),
        kind=kind,
        loss_fn=output_itself,
        rate=rate,
        charge=charge,
        sources=seeded_sources(seed),
    )
    at = {"weight": torch.zeros(1, total)}
    rows = [
        releases.gradient(at, noise_multiplier=0.0, max_grad_norm=2.0)["weight"][0]
        for _ in range(count)
    ]
    return torch.stack(rows).round().double()


def batches_are_poisson_and_independent(kind):
    """Chi-square at 1e-6 on: inclusion, sizes, pairs of records, pairs of draws."""
    rate = 0.2
    inside = shares_in(kind, rate=rate)
    count, total = inside.shape
    # Each record: binomial(count, q), a two-sided bound of 1e-6 for all records together.
    low, high = stats.binom.ppf([LOW / total, 1 - LOW / total], count, rate)
    assert ((inside.sum(0) >= low) & (inside.sum(0) <= high)).all()
    # Sizes of batches vary as binomial(total, q) does.
    sizes = inside.sum(1)
    scaled = ((sizes - total * rate) ** 2).sum() / (total * rate * (1 - rate))
    assert stats.chi2.ppf(LOW, count) * 0.9 < scaled < stats.chi2.ppf(HIGH, count) * 1.1
    # z = (I - q) / sqrt(q (1 - q)): sums of products of two are normal with unit variance each.
    z = (inside - rate) / math.sqrt(rate * (1 - rate))
    records = (z.T @ z / math.sqrt(count))[torch.triu_indices(total, total, 1).unbind()]
    draws = (z @ z.T / math.sqrt(total))[torch.triu_indices(count, count, 1).unbind()]
    for products in (records, draws):
        size = len(products)
        # The products are uncorrelated; 10 % are for their fourth moments, which are no normal's.
        assert (
            stats.chi2.ppf(LOW, size) * 0.9 < (products**2).sum() < stats.chi2.ppf(HIGH, size) * 1.1
        )
        assert products.abs().max() < 8  # two records always together, a draw that comes again


def every_release_is_paid_for(kind):
    for records in (smooth_records(5), (torch.empty(0, 3).double(), torch.empty(0).long())):
        charge = charge_of(2, sigma=1.0, rate=0.5)
        releases = releases_of(SmoothNet(), records, kind=kind, rate=0.5, charge=charge)
        arguments = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}
        for left in (1, 0):
            releases.gradient(weights(SmoothNet()), **arguments)
            assert charge.left == {(1.0, 0.5): left}
        assert charge.is_used_up
        with pytest.raises(PrivacyError, match="not reserved"):
            releases.gradient(weights(SmoothNet()), **arguments)


LAWS = [
    one_record_moves_the_sum_by_no_more_than_the_bound,
    records_that_are_not_finite_count_for_nothing,
    batches_are_poisson_and_independent,
    every_release_is_paid_for,
]


@pytest.mark.parametrize("law", LAWS)
def test_the_engine_keeps_the_law(law):
    law(Releases)


@pytest.mark.parametrize(
    ("law", "wrong"),
    [
        (one_record_moves_the_sum_by_no_more_than_the_bound, mutants.NoClip),
        (one_record_moves_the_sum_by_no_more_than_the_bound, mutants.ClipOfTheMean),
        (one_record_moves_the_sum_by_no_more_than_the_bound, mutants.ClipByLayer),
        (records_that_are_not_finite_count_for_nothing, mutants.NotFiniteTimesZero),
        (batches_are_poisson_and_independent, mutants.OneDrawForAll),
        (batches_are_poisson_and_independent, mutants.BatchesOfOneSize),
        (every_release_is_paid_for, mutants.NothingBooked),
        (every_release_is_paid_for, mutants.EmptyIsFree),
    ],
)
def test_the_law_refuses_the_planted_bug(law, wrong):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        law(wrong)


# --- clipping ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [1e-3, 0.5, 1e12])
def test_a_release_without_noise_equals_opacus_driven_by_hand(bound):
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model, (inputs, targets) = SmoothNet(), smooth_records(7)
    releases = releases_of(model, (inputs, targets), size=5.0)
    found = releases.gradient(weights(model), noise_multiplier=0.0, max_grad_norm=bound)
    hooked = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(hooked.parameters(), lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=bound,
        expected_batch_size=5.0,
    )
    inputs.requires_grad_()  # Opacus' hook on the first layer else warns
    CROSS_ENTROPY(hooked(inputs), targets, reduction="sum").backward()
    optimizer.step()
    wanted = {n.removeprefix("_module."): p.grad for n, p in hooked.named_parameters()}
    assert miss(flat(found), flat(wanted)) < 1e-12


VALUES = {
    torch.float64: [0.0, 1e-300, 1.0, -3.0, 1e5, 1e200, -1e300, math.inf, -math.inf, math.nan],
    torch.float32: [0.0, 1e-40, 1.0, -3.0, 1e5, 1e30, -3e38, math.inf, -math.inf, math.nan],
}


@pytest.mark.parametrize("dtype", VALUES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_record_whatever_is_in_it_moves_the_sum_by_more_than_the_bound(dtype, data):
    values = st.one_of(
        st.sampled_from(VALUES[dtype]), st.floats(width=64 if dtype is torch.float64 else 32)
    )
    strange = tuple(data.draw(st.lists(values, min_size=1, max_size=3)))
    one_record_moves_the_sum_by_no_more_than_the_bound(Releases, strange, dtype)


def test_a_record_whose_gradient_overflows_leaves_a_finite_release_of_the_others():
    inputs, targets = smooth_records(5)
    wanted = clipped_sum(SmoothNet(), (inputs[1:], targets[1:]), 0.5)
    inputs[0] = torch.tensor([1e200, 1e308, -1e308])
    moved = clipped_sum(SmoothNet(), (inputs, targets), 0.5) - wanted
    assert moved.norm() <= 0.5 * (1 + 1e-6)


def shifted_by_the_batch(outputs, targets):
    """A loss with a mean over the batch in it: a record's value depends on the others."""
    return CROSS_ENTROPY(outputs - 3 * outputs.mean(0), targets) * len(targets)


def test_a_loss_that_mixes_records_is_called_for_each_alone():
    model, (inputs, targets) = SmoothNet(), smooth_records(6)
    found = clipped_sum(model, (inputs, targets), 0.5, loss_fn=shifted_by_the_batch)
    rows = record_gradients(model, (inputs, targets), shifted_by_the_batch)
    assert miss(found, clipped(rows, 0.5)) < 1e-12
    rest = clipped_sum(model, (inputs[1:], targets[1:]), 0.5, loss_fn=shifted_by_the_batch)
    assert (found - rest).norm() <= 0.5 * (1 + 1e-6)
    # It does mix them where it is called on a batch, so the test could have seen it.
    apart = torch.stack(
        [
            shifted_by_the_batch(model(x[None]), y[None])
            for x, y in zip(inputs, targets, strict=True)
        ]
    )
    assert abs(shifted_by_the_batch(model(inputs), targets) - apart.sum()) > 0.1


@pytest.mark.parametrize("total", [module.CHUNK, module.CHUNK + 1, 2 * module.CHUNK + 3])
def test_more_records_than_a_chunk_are_one_release(total, monkeypatch):
    model, records = SmoothNet(), smooth_records(total)
    assert (
        miss(clipped_sum(model, records, 0.7), clipped(record_gradients(model, records), 0.7))
        < 1e-12
    )

    def noisy(size):
        monkeypatch.setattr(module, "CHUNK", size)
        releases = releases_of(model, records, size=9.0, charge=charge_of(2, 1.5))
        arguments = {"noise_multiplier": 1.5, "max_norm": 0.7}
        gradient = releases.gradient(weights(model), noise_multiplier=1.5, max_grad_norm=0.7)
        product = releases.hessian_product(weights(model), weights(model), **arguments)
        assert releases._charge.is_used_up  # once a release, however many chunks
        return torch.cat([flat(gradient), flat(product)])

    whole = noisy(10**6)
    for size in (1, 7, 256):  # the same noise, once; the sum in another order
        assert miss(noisy(size), whole) < 1e-12


def test_a_release_leaves_no_trace_in_the_next_one():
    model, records = SmoothNet(), smooth_records(5)
    releases = releases_of(model, records)
    arguments = {"noise_multiplier": 0.0, "max_grad_norm": 0.4}
    first = flat(releases.gradient(weights(model), **arguments))
    releases.gradient(weights(model), **arguments, names=["head.bias"])
    releases.hessian_product(weights(model), weights(model), noise_multiplier=0.0, max_norm=0.1)
    releases.gradient(weights(SmoothNet(1)), **arguments)
    assert torch.equal(flat(releases.gradient(weights(model), **arguments)), first)


# --- batches ----------------------------------------------------------------------------------


def sizes_of(total, rate, count):
    releases = releases_of(linear(2), (torch.zeros(total, 2), torch.zeros(total).long()), rate=rate)
    return [len(releases.draw().rows) for _ in range(count)]


def test_a_rate_of_one_draws_all_and_no_records_draw_none():
    assert sizes_of(9, 1.0, 20) == [9] * 20
    assert sizes_of(0, 0.5, 5) == [0] * 5
    assert sizes_of(0, 1.0, 5) == [0] * 5


def test_a_small_rate_draws_mostly_nobody():
    sizes = sizes_of(10, 1e-3, 2000)
    # Of 20000 coins: binomial, at most 48 with chance 1 - 1e-7; some, with chance 1 - 2e-9.
    assert 0 < sum(sizes) < 49


def test_the_frequency_of_a_record_in_many_draws_is_the_rate():
    rate, total, count = 0.07, 20, 20000
    releases = releases_of(linear(2), (torch.zeros(total, 2), torch.zeros(total).long()), rate=rate)
    seen = torch.zeros(total)
    for _ in range(count):
        seen[releases.draw().rows] += 1
    low, high = stats.binom.ppf([LOW / total, 1 - LOW / total], count, rate)
    assert ((seen >= low) & (seen <= high)).all()


def test_rows_are_ascending_and_each_at_most_once():
    releases = releases_of(linear(2), (torch.zeros(50, 2), torch.zeros(50).long()), rate=0.5)
    for _ in range(20):
        rows = releases.draw().rows
        assert torch.equal(rows, rows.unique())


def test_a_draw_is_good_for_one_release_of_any_kind():
    model, records = SmoothNet(), smooth_records(5)
    charge = charge_of(3)
    releases = releases_of(model, records, charge=charge)
    draw = releases.draw()
    releases.gradient(weights(model), noise_multiplier=0.0, max_grad_norm=1.0, draw=draw)
    for again in (
        lambda: releases.gradient(
            weights(model), noise_multiplier=0.0, max_grad_norm=1.0, draw=draw
        ),
        lambda: releases.hessian_product(
            weights(model), weights(model), noise_multiplier=0.0, max_norm=1.0, draw=draw
        ),
    ):
        with pytest.raises(PrivacyError, match=r"released twice.*not booked; draw another"):
            again()
    assert charge.is_used_up  # what failed is not given back
    single = Draw(torch.tensor([], dtype=torch.long))
    assert single.take().numel() == 0
    with pytest.raises(PrivacyError):
        single.take()


def test_the_model_and_the_records_are_left_as_they_were():
    model, (inputs, targets) = SmoothNet(), smooth_records(5)
    before = copy.deepcopy(model.state_dict()), inputs.clone(), model.training
    releases = releases_of(model.eval(), (inputs, targets))
    elsewhere = {n: v + 1 for n, v in weights(model).items()}
    releases.gradient(elsewhere, noise_multiplier=0.0, max_grad_norm=1.0)
    releases.hessian_product(elsewhere, elsewhere, noise_multiplier=0.0, max_norm=1.0)
    assert all(
        torch.equal(a, b)
        for a, b in zip(before[0].values(), model.state_dict().values(), strict=True)
    )
    assert torch.equal(before[1], inputs)
    assert not model.training
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in model.parameters())


def test_no_records_at_all_give_a_release():
    releases = releases_of(nn.Linear(3, 2), nothing(3))
    found = releases.gradient(weights(nn.Linear(3, 2)), noise_multiplier=0.0, max_grad_norm=1.0)
    assert not flat(found).any()


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_record_that_raises_has_no_share_and_the_others_have_theirs(monkeypatch, chunks):
    """A label beyond the output, among others and alone in its chunk."""
    monkeypatch.setattr(module, "CHUNK", 8 if chunks == 1 else 3)
    inputs, targets = (
        torch.randn(7, 4, generator=torch.Generator().manual_seed(5)),
        torch.arange(7) % 3,
    )
    wrong = targets.clone()
    wrong[6] = 77
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def released(records):
        releases = Releases(
            model,
            nn.functional.cross_entropy,
            records,
            sample_rate=1.0,
            expected_batch_size=1.0,
            charge=Charge({(0.0, 1.0): 2}),
            sources=seeded_sources(0),
        )
        params = {name: value.detach() for name, value in model.named_parameters()}
        found = releases.gradient(params, noise_multiplier=0.0, max_grad_norm=0.3)
        products = releases.hessian_product(params, found, noise_multiplier=0.0, max_norm=0.3)
        return torch.cat([value.flatten() for value in (*found.values(), *products.values())])

    wanted = released((inputs[:6], targets[:6]))
    assert torch.allclose(released((inputs, wrong)), wanted, atol=1e-6)
    assert not torch.allclose(released((inputs, targets)), wanted, atol=1e-3)
