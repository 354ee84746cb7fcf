"""Meta-gradients and adaptation against closed forms, finite differences and plain autograd."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from metabloom.clients import MetaBatch, adapt, maml_update, meta_gradient, run_update, sgd_update
from tests.clients.toy_problems import (
    ONE,
    Point,
    Product,
    body,
    direction,
    dot,
    flat,
    generator,
    half_square,
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
ORDERS = ("exact", "first", "hf")
# float64 on numbers of size 1: some tens of roundings of 1e-16. "hf" divides a difference of two
# gradients by a step of about 1e-5 and so loses five digits.
CLOSE = {"exact": 1e-14, "first": 1e-14, "hf": 1e-9}

reproducible = settings(max_examples=40, deadline=None, derandomize=True, database=None)


# --- the known answers of algorithms.md, section 7 ---------------------------------------------


def of_parabola(order, steps, *, a=2.0, c=1.0, theta=0.0, alpha=0.1, delta=None):
    found = meta_gradient(
        Point(theta=[theta]),
        quadratic_loss,
        {"theta": torch.tensor([theta], dtype=torch.float64)},
        parabola(a, c),
        parabola(a, c),
        inner_lr=alpha,
        steps=steps,
        order=order,
        delta=delta,
    )
    return found.grads["theta"].item()


@pytest.mark.parametrize(
    ("order", "steps", "wanted"),
    [
        # L = (theta - 1)^2, L' = 2 (theta - 1), alpha = .1: one step multiplies theta - 1 by
        # 1 - .1 * 2 = .8, so after K steps theta_K - 1 = -.8^K and L'(theta_K) = -2 * .8^K.
        # The chain rule gives .8 again for each step: exact -2 * .8^2K, first order -2 * .8^K.
        ("exact", 1, -1.28),
        ("first", 1, -1.6),
        ("hf", 1, -1.28),
        ("exact", 5, -0.2147483648),
        ("first", 5, -0.65536),
        ("hf", 5, -0.2147483648),
    ],
)
def test_maml_on_a_parabola_gives_the_known_meta_gradient(order, steps, wanted):
    assert of_parabola(order, steps) == pytest.approx(wanted, abs=CLOSE[order])


@pytest.mark.parametrize("delta", [1e-3, 0.1, 1.0, 50.0])
def test_hessian_free_is_exact_on_a_parabola_for_any_delta(delta):
    # A gradient that is linear has no truncation error; rounding is 1e-16 times 1 / delta.
    assert of_parabola("hf", 1, delta=delta) == pytest.approx(-1.28, abs=1e-12)


@pytest.mark.parametrize(
    ("order", "wanted"),
    [
        # The meta-gradient is m (w - 1) with m = 1.28 exact, 1.6 first order: each step of
        # beta = .1 multiplies w - 1 by 1 - .1 m, and w - 1 = -1 at first.
        ("exact", 1 - 0.872**3),  # .336945
        ("hf", 1 - 0.872**3),
        ("first", 1 - 0.84**3),  # .407296
    ],
)
def test_three_local_meta_steps_of_per_fedavg_give_the_known_model(order, wanted):
    model, batch = Point(theta=[0.0]), parabola(2, 1)
    update = maml_update(model, quadratic_loss, inner_lr=0.1, outer_lr=0.1, order=order)
    batches = [MetaBatch(support=batch, query=batch, curvature=batch)] * 3
    found = run_update(update, weights(model), batches).params["theta"].item()
    assert found == pytest.approx(wanted, abs=CLOSE[order])


def test_three_local_steps_of_fedavg_give_the_known_model():
    model = Point(theta=[0.0])
    update = sgd_update(model, quadratic_loss, lr=0.1)
    found = run_update(update, weights(model), [parabola(2, 1)] * 3).params["theta"].item()
    assert found == pytest.approx(1 - 0.8**3, abs=1e-15)  # .488; three roundings


def test_meta_sgd_on_a_parabola_gives_the_known_gradient_of_alpha():
    # d L(theta - alpha L'(theta)) / d alpha = -L'(theta) * L'(theta_1) = -(-2)(-1.6) = -3.2
    model = Point(theta=[0.0])
    alpha = {"theta": torch.tensor([0.1], dtype=torch.float64)}
    batch = parabola(2, 1)
    found = meta_gradient(model, quadratic_loss, weights(model), batch, batch, inner_lr=alpha)
    assert found.inner_lr_grads["theta"].item() == pytest.approx(-3.2, abs=1e-14)
    assert found.grads["theta"].item() == pytest.approx(-1.28, abs=1e-14)


@pytest.mark.parametrize("order", ["exact", "hf"])
@pytest.mark.parametrize(
    ("adapted", "wanted"),
    [
        # f = (h b - 1)^2 / 2 at h = 0, b = 1, alpha = .5: grad = ((hb-1) b, (hb-1) h) = (-1, 0),
        # Hessian = [[b^2, 2hb - 1], [2hb - 1, h^2]] = [[1, -1], [-1, 0]].
        # h adapted: h' = .5, v = (-.5, -.25); v - H[:, h] * .5 * v_h = v + .25 * (1, -1).
        (("h",), (-0.25, -0.5)),
        # b adapted: b' = 1 since its gradient is 0, v = (-1, 0), and v_b = 0 moves nothing.
        (("b",), (-1.0, 0.0)),
        # both: (h', b') = (.5, 1), v = (-.5, -.25), v - .5 H v = v - .5 * (-.25, .5).
        (("h", "b"), (-0.375, -0.5)),
    ],
    ids=["ANIL", "BOIL", "MAML"],
)
def test_partial_adaptation_gives_the_known_meta_gradients(adapted, wanted, order):
    model = Product(h=0.0, b=1.0)
    grads = meta_gradient(
        model,
        half_square,
        weights(model),
        ONE,
        ONE,
        inner_lr=0.5,
        adapt=lambda name: name in adapted,
        order=order,
    ).grads
    # The product is not quadratic, but the third derivative along each direction here is at most 6
    # |u|^3: a central difference with step 1e-5 is off by 1e-10.
    assert (grads["h"].item(), grads["b"].item()) == pytest.approx(wanted, abs=CLOSE[order])


def product_after(phases, *, h=0.0, b=1.0, lr=0.5):
    model = Product(h=h, b=b)
    params = weights(model)
    for phase in phases:
        update = sgd_update(model, half_square, lr=lr, train=lambda name, p=phase: name in p)
        params = run_update(update, params, [ONE]).params
    return params["h"].item(), params["b"].item()


def test_fedrep_trains_the_head_first_and_the_body_on_the_new_head():
    # h <- 0 + .5 * 1 = .5; then d/db = (hb - 1) h = -.25 and b <- 1 + .5 * .25.
    assert product_after([("h",), ("b",)]) == (0.5, 1.125)


def test_fedper_trains_head_and_body_at_once():
    # Both gradients at h = 0: (-1, 0).
    assert product_after([("h", "b")]) == (0.5, 1.0)


def test_fedbabu_leaves_the_head_as_it_was_to_the_bit():
    h, b = product_after([("b",)] * 3, h=0.3)
    assert h == torch.tensor(0.3, dtype=torch.float64).item()
    # b - 1/h shrinks by 1 - .5 * h^2 = .955 a step.
    assert b == pytest.approx(1 / 0.3 + (1 - 1 / 0.3) * 0.955**3, rel=1e-14)


# --- the same laws elsewhere -------------------------------------------------------------------

numbers = st.floats(-5, 5)


@reproducible
@given(
    a=st.floats(0.1, 4),
    c=numbers,
    theta=numbers,
    contraction=st.floats(0.05, 1.5),
    steps=st.integers(1, 6),
)
def test_a_parabola_s_meta_gradient_has_its_closed_form(a, c, theta, contraction, steps):
    alpha = contraction / a
    factor, slope_at_start = 1 - alpha * a, a * (theta - c)
    # Each of the 2K + 1 factors rounds numbers of at most the size of a (|theta| + |c|).
    size = 1e-13 * a * (1 + abs(theta) + abs(c))
    at = {"a": a, "c": c, "theta": theta, "alpha": alpha}
    exact = of_parabola("exact", steps, **at)
    assert exact == pytest.approx(factor ** (2 * steps) * slope_at_start, rel=1e-12, abs=size)
    first = of_parabola("first", steps, **at)
    assert first == pytest.approx(factor**steps * slope_at_start, rel=1e-12, abs=size)
    hessian_free = of_parabola("hf", steps, **at, delta=1.0)
    assert hessian_free == pytest.approx(exact, rel=1e-9, abs=100 * size)


def random_quadratic(size, draw):
    """(A, c) with the eigenvalues of A in [.2, 2] and a random basis."""
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))
    eigenvalues = 0.2 + 1.8 * torch.rand(size, generator=draw, dtype=torch.float64)
    matrix = basis * eigenvalues @ basis.T
    return (matrix + matrix.T) / 2, torch.randn(size, generator=draw, dtype=torch.float64)


@reproducible
@given(
    seed=st.integers(0, 10**6),
    head_size=st.integers(1, 4),
    body_size=st.integers(1, 4),
    adapted=st.sampled_from([("head", "body"), ("head",), ("body",)]),
    alpha=st.floats(0.01, 0.45),
    steps=st.integers(1, 5),
    order=st.sampled_from(ORDERS),
)
def test_a_quadratic_in_several_dimensions_has_its_closed_form(
    seed, head_size, body_size, adapted, alpha, steps, order
):
    # theta_{k+1} = theta_k - alpha P A (theta_k - c): with M = I - alpha P A the meta-gradient is
    # (M^T)^K A_q (theta_K - c_q), and without M^T at first order. P projects on the adapted half.
    draw = generator(seed)
    size = head_size + body_size
    support, query = random_quadratic(size, draw), random_quadratic(size, draw)
    start = torch.randn(size, generator=draw, dtype=torch.float64)
    params = {"head": start[:head_size], "body": start[head_size:]}
    onto = torch.zeros(size, dtype=torch.float64)
    onto[:head_size] = float("head" in adapted)
    onto[head_size:] = float("body" in adapted)

    step = torch.eye(size, dtype=torch.float64) - alpha * onto[:, None] * support[0]
    end = start
    for _ in range(steps):
        end = end - alpha * onto * (support[0] @ (end - support[1]))
    wanted = query[0] @ (end - query[1])
    if order != "first":
        wanted = torch.linalg.matrix_power(step.T, steps) @ wanted

    found = meta_gradient(
        Point(**params),
        quadratic_loss,
        params,
        support,
        query,
        inner_lr=alpha,
        steps=steps,
        adapt=lambda name: name in adapted,
        order=order,
    ).grads
    got = torch.cat((found["head"], found["body"]))
    # eigenvalues at most 2, |theta| about 3: hundreds of roundings; "hf" loses five digits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-8 if order == "hf" else 1e-12)


def test_the_hessian_of_a_quadratic_is_taken_on_the_curvature_batch():
    # g = (I - alpha A_c) A_q (theta_1 - c_q), theta_1 by the support batch: three matrices
    draw = generator(4)
    support, query, curved = (random_quadratic(3, draw) for _ in range(3))
    start = torch.randn(3, generator=draw, dtype=torch.float64)
    end = start - 0.3 * support[0] @ (start - support[1])
    outer = query[0] @ (end - query[1])
    wanted = outer - 0.3 * curved[0] @ outer
    for order, tolerance in (("exact", 1e-14), ("hf", 1e-9)):  # as CLOSE
        found = meta_gradient(
            Point(theta=start),
            quadratic_loss,
            {"theta": start},
            support,
            query,
            inner_lr=0.3,
            order=order,
            curvature=curved,
        ).grads["theta"]
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


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
