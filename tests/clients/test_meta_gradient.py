"""Meta-gradients of small problems with a closed form: the known answers, and their laws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from metabloom.clients import MetaBatch, maml_update, meta_gradient, run_update, sgd_update
from tests.clients.toy_problems import (
    ONE,
    Point,
    Product,
    generator,
    half_square,
    parabola,
    quadratic_loss,
    random_quadratic,
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
