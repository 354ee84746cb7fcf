"""Meta-SGD, the three orders and adaptation on a small smooth net."""

import copy

import pytest
import torch
from torch import nn

from metabloom.clients import adapt, meta_gradient
from tests.clients.toy_problems import (
    Point,
    body,
    direction,
    dot,
    flat,
    head,
    loss_after_adapting,
    loss_at,
    meta_gradient_by_graph,
    moved,
    parabola,
    quadratic_loss,
    random_rates,
    records,
    slope,
    small_net,
    weights,
)

CROSS_ENTROPY = nn.functional.cross_entropy


# --- Meta-SGD ----------------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [None, head], ids=["all", "head"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_meta_sgd_s_gradient_of_alpha_equals_finite_differences(steps, adapted):
    model, support, query = small_net(), records(6, 1), records(5, 2)
    params = weights(model)
    rates = {n: v for n, v in random_rates(params, 8).items() if adapted is None or adapted(n)}
    found = meta_gradient(
        model, CROSS_ENTROPY, params, support, query, inner_lr=rates, steps=steps, adapt=adapted
    ).inner_lr_grads
    assert list(found) == list(rates)
    for number in range(3):
        towards = direction(rates, number)

        def loss(step, towards=towards):
            return loss_after_adapting(
                model,
                CROSS_ENTROPY,
                params,
                support,
                query,
                inner_lr=moved(rates, towards, step),
                steps=steps,
                adapt=adapted,
            )

        # tanh: no kinks. Truncation 1e-12 times fifth derivatives of size 1, rounding 1e-16 / 1e-3.
        assert dot(found, towards) == pytest.approx(slope(loss, 1e-3), rel=1e-7, abs=1e-10)


@pytest.mark.parametrize("adapted", [None, head, body], ids=["MAML", "ANIL", "BOIL"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_meta_sgd_equals_plain_autograd_through_the_inner_loop(steps, adapted):
    model, support, query = small_net(), records(6, 1), records(5, 2)
    params = weights(model)
    options = {"inner_lr": random_rates(params, 8), "steps": steps, "adapt": adapted}
    found = meta_gradient(model, CROSS_ENTROPY, params, support, query, **options)
    wanted, rates = meta_gradient_by_graph(model, CROSS_ENTROPY, params, support, query, **options)
    # float64, another order of sums
    torch.testing.assert_close(flat(found.grads), flat(wanted), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(flat(found.inner_lr_grads), flat(rates), rtol=1e-11, atol=1e-14)


def test_one_alpha_for_all_equals_the_same_alpha_in_every_entry():
    model, support, query = small_net(), records(6, 1), records(5, 2)
    params = weights(model)
    rates = {name: torch.full_like(value, 0.2) for name, value in params.items()}
    number = meta_gradient(model, CROSS_ENTROPY, params, support, query, inner_lr=0.2, steps=2)
    tensors = meta_gradient(model, CROSS_ENTROPY, params, support, query, inner_lr=rates, steps=2)
    torch.testing.assert_close(number.grads, tensors.grads, rtol=0, atol=0)
    assert number.inner_lr_grads is None
    assert tensors.inner_lr_grads is not None


# --- the three orders --------------------------------------------------------------------------


def written_out(model, params, inner, query, curved, alpha):
    """(I - alpha H(w; D'')) grad f(w - alpha grad f(w; D); D') with the Hessian as a matrix."""
    names = list(params)

    def at(vector, batch):
        pieces = vector.split([params[name].numel() for name in names])
        point = {n: p.view(params[n].shape) for n, p in zip(names, pieces, strict=True)}
        return loss_at(model, CROSS_ENTROPY, point, batch)

    def gradient(vector, batch):
        return torch.autograd.functional.jacobian(lambda w: at(w, batch), vector)

    w = torch.cat([params[name].reshape(-1) for name in names])
    hessian = torch.autograd.functional.hessian(lambda w: at(w, curved), w)
    outer = gradient(w - alpha * gradient(w, inner), query)
    result = (outer - alpha * hessian @ outer).split([params[n].numel() for n in names])
    return {n: v.view(params[n].shape) for n, v in zip(names, result, strict=True)}


# "hf": truncation is step^2 times third derivatives, with step about 1e-5 of the weights
@pytest.mark.parametrize(("order", "tolerance"), [("exact", 1e-14), ("hf", 1e-9)])
def test_per_fedavg_takes_its_hessian_on_a_third_batch(order, tolerance):
    model = small_net()
    params = weights(model)
    inner, query, curved = records(6, 1), records(5, 2), records(4, 3)
    options = {"inner_lr": 0.5, "order": order}
    found = meta_gradient(
        model, CROSS_ENTROPY, params, inner, query, **options, curvature=curved
    ).grads
    wanted = written_out(model, params, inner, query, curved, 0.5)
    torch.testing.assert_close(flat(found), flat(wanted), rtol=0, atol=tolerance)
    same = meta_gradient(model, CROSS_ENTROPY, params, inner, query, **options).grads
    assert (flat(same) - flat(found)).norm() > 1e-3  # the batch matters


def test_the_curvature_batch_changes_nothing_at_first_order():
    model = small_net()
    arguments = (model, CROSS_ENTROPY, weights(model), records(6, 1), records(5, 2))
    options = {"inner_lr": 0.5, "order": "first"}
    with_it = meta_gradient(*arguments, **options, curvature=records(4, 3))
    assert torch.equal(flat(with_it.grads), flat(meta_gradient(*arguments, **options).grads))


@pytest.mark.parametrize("adapted", [None, head], ids=["MAML", "ANIL"])
@pytest.mark.parametrize("steps", [1, 3])
def test_hessian_free_comes_close_to_exact(steps, adapted):
    model = small_net()
    arguments = (model, CROSS_ENTROPY, weights(model), records(6, 1), records(5, 2))
    options = {"inner_lr": 0.5, "steps": steps, "adapt": adapted}
    exact, free, first = (
        flat(meta_gradient(*arguments, **options, order=order).grads)
        for order in ("exact", "hf", "first")
    )
    # The step is cbrt(1e-16) of the weights: an error of 1e-10 times third derivatives.
    assert (free - exact).norm() < 1e-8 * exact.norm()
    assert (first - exact).norm() > 0.05 * exact.norm()


def test_a_longer_step_of_the_central_difference_is_a_worse_one():
    model = small_net()
    arguments = (model, CROSS_ENTROPY, weights(model), records(6, 1), records(5, 2))
    exact = flat(meta_gradient(*arguments, inner_lr=0.5).grads)
    errors = [
        (flat(meta_gradient(*arguments, inner_lr=0.5, order="hf", delta=d).grads) - exact).norm()
        for d in (0.1, 0.2)
    ]
    # second order: a doubled step has four times the error, up to terms of fourth order
    assert errors[1] / errors[0] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("steps", [1, 4])
def test_first_order_is_the_gradient_at_the_adapted_point(steps):
    model = small_net()
    params, support, query = weights(model), records(6, 1), records(5, 2)
    options = {"inner_lr": 0.3, "steps": steps}
    found = meta_gradient(model, CROSS_ENTROPY, params, support, query, **options, order="first")
    there = {name: value.clone() for name, value in params.items()}
    for _ in range(steps):  # by torch's own optimiser
        there = by_torch_sgd(model, there, support, 0.3)
    there = {name: value.requires_grad_() for name, value in there.items()}
    loss = loss_at(model, CROSS_ENTROPY, there, query)
    wanted = dict(zip(there, torch.autograd.grad(loss, list(there.values())), strict=True))
    torch.testing.assert_close(flat(found.grads), flat(wanted), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.query_loss, loss.detach(), rtol=1e-13, atol=0)


def by_torch_sgd(model, params, batch, lr):
    own = copy.deepcopy(model)
    own.load_state_dict(params)
    optimizer = torch.optim.SGD(own.parameters(), lr=lr)
    CROSS_ENTROPY(own(batch[0]), batch[1]).backward()
    optimizer.step()
    return weights(own)


def test_where_the_query_gradient_is_zero_hessian_free_is_zero_and_not_nan():
    # The direction of the central difference has no length at the query's minimum.
    start = torch.tensor([1.0], dtype=torch.float64)
    arguments = (Point(theta=start), quadratic_loss, {"theta": start}, parabola(2, 1))
    found = meta_gradient(*arguments, parabola(2, 1), inner_lr=0.1, order="hf")
    assert found.grads["theta"].item() == 0.0


# --- adaptation --------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5])
def test_adaptation_equals_torch_sgd(steps):
    model, support = small_net(), records(6, 1)
    wanted = weights(model)
    for _ in range(steps):
        wanted = by_torch_sgd(model, wanted, support, 0.3)
    found = adapt(model, CROSS_ENTROPY, weights(model), support, inner_lr=0.3, steps=steps)
    start = flat(weights(model))
    # compare the way gone; float64, the same sums
    torch.testing.assert_close(flat(found) - start, flat(wanted) - start, rtol=1e-12, atol=1e-15)


def test_what_is_not_adapted_comes_back_to_the_bit():
    model = small_net()
    params = weights(model)
    found = adapt(model, CROSS_ENTROPY, params, records(6, 1), inner_lr=0.3, steps=3, adapt=head)
    for name in params:
        assert torch.equal(found[name], params[name]) is body(name)


def test_the_outer_gradient_covers_what_is_not_adapted():
    model = small_net()
    grads = meta_gradient(
        model,
        CROSS_ENTROPY,
        weights(model),
        records(6, 1),
        records(5, 2),
        inner_lr=0.3,
        adapt=head,
    ).grads
    assert all(value.norm() > 1e-3 for value in grads.values())
