"""Each law accepts the library and refuses the wrong implementations that are kept for it."""

import numpy as np
import pytest
import torch
from torch import nn

from metabloom.clients import meta_gradient, run_update, sgd_update
from metabloom.strategies.rules import Reply, server_optimizer
from tests import mutants
from tests.clients.toy_problems import (
    ONE,
    Point,
    Product,
    flat,
    half_square,
    loss_after_adapting,
    meta_gradient_by_graph,
    moved,
    parabola,
    quadratic_loss,
    records,
    slope,
    small_net,
    weights,
)

CROSS_ENTROPY = nn.functional.cross_entropy


def near(wanted):
    # float64 on numbers of size 1; the mutants are off in the first or second digit
    return pytest.approx(wanted, rel=1e-6, abs=1e-9)


# --- laws: each takes an implementation and raises AssertionError where it is wrong ------------


def on_the_parabola(gradient_of, **options):
    """a = 2, c = 1, theta = 0: answers 1 and 3 of algorithms.md, derived in test_meta_gradient."""
    model, batch = Point(theta=[0.0]), parabola(2, 1)
    return gradient_of(model, quadratic_loss, weights(model), batch, batch, **options)


def gives_the_known_exact_answers(gradient_of):
    for steps, wanted in ((1, -1.28), (5, -0.2147483648)):
        found = on_the_parabola(gradient_of, inner_lr=0.1, steps=steps)
        assert found.grads["theta"].item() == near(wanted)


def gives_the_known_first_order_answers(gradient_of):
    for steps, wanted in ((1, -1.6), (5, -0.65536)):
        found = on_the_parabola(gradient_of, inner_lr=0.1, steps=steps, order="first")
        assert found.grads["theta"].item() == near(wanted)


def gives_the_known_gradient_of_alpha(gradient_of):
    alpha = {"theta": torch.tensor([0.1], dtype=torch.float64)}
    # K steps: d/dalpha [a/2 (1 - alpha a)^2K] = -K a^2 (1 - alpha a)^(2K-1) -> -3.2 at K = 1
    for steps in (1, 3):
        found = on_the_parabola(gradient_of, inner_lr=alpha, steps=steps)
        wanted = -steps * 4 * 0.8 ** (2 * steps - 1)
        assert found.inner_lr_grads["theta"].item() == near(wanted)


def gives_the_known_answer_of_anil(gradient_of):
    model = Product(h=0.0, b=1.0)
    found = gradient_of(
        model, half_square, weights(model), ONE, ONE, inner_lr=0.5, adapt=lambda name: name == "h"
    ).grads
    assert (found["h"].item(), found["b"].item()) == near((-0.25, -0.5))


def equals_plain_autograd(gradient_of):
    model = small_net()
    arguments = (model, CROSS_ENTROPY, weights(model), records(6, 1), records(5, 2))
    for steps in (1, 3):
        found = gradient_of(*arguments, inner_lr=0.4, steps=steps).grads
        wanted, _ = meta_gradient_by_graph(*arguments, inner_lr=0.4, steps=steps)
        assert flat(found).tolist() == near(flat(wanted).tolist())


def equals_finite_differences(gradient_of):
    model = small_net()
    params, support, query = weights(model), records(6, 1), records(5, 2)
    options = {"inner_lr": 0.4, "steps": 2}
    found = gradient_of(model, CROSS_ENTROPY, params, support, query, **options).grads
    along = {name: value / 3 for name, value in weights(small_net(seed=9)).items()}

    def loss(step):
        there = moved(params, along, step)
        return loss_after_adapting(model, CROSS_ENTROPY, there, support, query, **options)

    # tanh: no kinks; truncation 1e-12, rounding 1e-13
    assert sum((found[n] * along[n]).sum().item() for n in found) == near(slope(loss, 1e-3))


def takes_the_hessian_before_the_step(gradient_of):
    """L = w^4 / 4 on the support, w on the query: v = 1, so g = 1 - alpha * 3 w^2, w = 1."""
    model = Point(theta=[1.0])

    def loss_fn(output, power):
        return (output[0] ** power / power).sum()

    support, query = (
        (torch.zeros(1), torch.tensor(power, dtype=torch.float64)) for power in (4.0, 1.0)
    )
    found = gradient_of(
        model, loss_fn, weights(model), support, query, inner_lr=0.1, order="hf", delta=1e-4
    )
    # Truncation of the central difference of w^3: delta^2 = 1e-8 of alpha, so 1e-9.
    assert found.grads["theta"].item() == pytest.approx(0.7, abs=1e-8)


def takes_the_hessian_on_its_own_batch(gradient_of):
    """Support 2 (w - 1), query 1 (w - 1), Hessian 3: w_1 = .2, g = (1 - .1 * 3) * (.2 - 1)."""
    model = Point(theta=[0.0])
    found = gradient_of(
        model,
        quadratic_loss,
        weights(model),
        parabola(2, 1),
        parabola(1, 1),
        inner_lr=0.1,
        curvature=parabola(3, 1),
    )
    assert found.grads["theta"].item() == near(-0.56)


def pulls_on_every_batch(train):
    """a = c = mu = 1, w_t = 0, lr = .1: w - 1/2 shrinks by .8 a step, so 1/2 (1 - .8^3)."""
    model = Point(theta=[0.0])
    found = train(
        model, quadratic_loss, weights(model), [parabola(1, 1)] * 3, lr=0.1, proximal_mu=1.0
    )
    assert found["theta"].item() == near(0.5 * (1 - 0.8**3))


def pulls_the_personal_model_to_the_received_one(train):
    """F' = v - 1, lambda = 1, w = 0, lr = .1 from v = 3: v - 1/2 shrinks by .8 a step."""
    model = Point(theta=[0.0])
    personal, received = (
        {"theta": torch.tensor([value], dtype=torch.float64)} for value in (3.0, 0.0)
    )
    found = train(
        model, quadratic_loss, personal, received, [parabola(1, 1)] * 2, lr=0.1, strength=1.0
    )
    assert found["theta"].item() == near(0.5 + 2.5 * 0.8**2)


def remembers_its_moments(displacement):
    # Adam on 1 then -.1: m = .9 * .1 - .01 = .08 over 1 - .81, v = .999 * .001 + 1e-5 over
    # 1 - .998001: steps -1 and -.421053 / .710513 = -.592604. eps = 1e-8 shifts that by 1e-8.
    found = displacement([1.0, -0.1], lr=0.01)
    second = (0.08 / 0.19) / ((0.000999 + 0.00001) / 0.001999) ** 0.5
    assert found == pytest.approx(-0.01 * (1 + second), rel=1e-6)
    assert found == pytest.approx(-1.592649 * 0.01, abs=1e-6)


# --- the library in the forms that these laws take ---------------------------------------------


def fedprox(model, loss_fn, params, batches, *, lr, proximal_mu):
    update = sgd_update(model, loss_fn, lr=lr, proximal_mu=proximal_mu)
    return run_update(update, params, batches).params


def ditto(model, loss_fn, personal, received, batches, *, lr, strength):
    update = sgd_update(model, loss_fn, lr=lr, proximal_mu=strength, anchor=received)
    return run_update(update, personal, batches).params


def server_adam(gradients, *, lr):
    rule = server_optimizer(lambda params: torch.optim.Adam(params, lr=lr))
    arrays = {"w": np.zeros(())}
    state = rule.init(arrays)
    for gradient in gradients:
        reply = Reply({"w": arrays["w"] - gradient}, num_examples=1)
        state, arrays = rule.update(state, arrays, [reply])
    return arrays["w"].item()


LAWS = {
    gives_the_known_exact_answers: (
        meta_gradient,
        mutants.maml_with_a_detached_inner_step,
        mutants.first_order_sold_as_exact,
        mutants.multi_step_with_one_hessian,
    ),
    gives_the_known_first_order_answers: (meta_gradient, mutants.exact_sold_as_first_order),
    gives_the_known_gradient_of_alpha: (
        meta_gradient,
        mutants.meta_sgd_with_the_weight_s_own_gradient,
        mutants.meta_sgd_of_the_last_step,
    ),
    gives_the_known_answer_of_anil: (
        meta_gradient,
        mutants.anil_that_drops_the_body,
        mutants.first_order_sold_as_exact,
    ),
    equals_plain_autograd: (
        meta_gradient,
        mutants.maml_with_a_detached_inner_step,
        mutants.first_order_sold_as_exact,
        mutants.multi_step_with_one_hessian,
        mutants.meta_gradient_with_the_support_s_loss,
    ),
    equals_finite_differences: (
        meta_gradient,
        mutants.maml_with_a_detached_inner_step,
        mutants.first_order_sold_as_exact,
        mutants.multi_step_with_one_hessian,
        mutants.meta_gradient_with_the_support_s_loss,
    ),
    takes_the_hessian_before_the_step: (
        meta_gradient,
        mutants.hessian_free_at_the_adapted_point,
    ),
    takes_the_hessian_on_its_own_batch: (meta_gradient, mutants.hessian_on_the_support_batch),
    pulls_on_every_batch: (
        fedprox,
        mutants.fedprox_whose_anchor_is_exhausted,
        mutants.fedprox_whose_anchor_follows,
        mutants.fedprox_with_an_unsquared_norm,
    ),
    pulls_the_personal_model_to_the_received_one: (
        ditto,
        mutants.ditto_anchored_to_itself,
        mutants.ditto_that_begins_at_the_received_model,
    ),
    remembers_its_moments: (server_adam, mutants.adam_rebuilt_each_round),
}
PAIRS = [(law, mutant) for law, (_, *wrong) in LAWS.items() for mutant in wrong]


@pytest.mark.parametrize(
    ("law", "real"), [(law, real) for law, (real, *_) in LAWS.items()], ids=lambda f: f.__name__
)
def test_the_library_obeys_the_law(law, real):
    law(real)


@pytest.mark.parametrize(("law", "mutant"), PAIRS, ids=lambda f: f.__name__)
def test_the_law_refuses_the_mutant(law, mutant):
    with pytest.raises(AssertionError):
        law(mutant)


def test_adam_rebuilt_each_round_comes_back_to_where_it_began():
    assert mutants.adam_rebuilt_each_round([1.0, -0.1], lr=0.01) == pytest.approx(0, abs=1e-8)


def test_the_baseline_s_mutants_are_wrong_in_the_way_that_was_published():
    found = on_the_parabola(mutants.maml_with_a_detached_inner_step, inner_lr=0.1)
    assert found.grads["theta"].item() == near(-1.6)
    alpha = {"theta": torch.tensor([0.1], dtype=torch.float64)}
    found = on_the_parabola(mutants.meta_sgd_with_the_weight_s_own_gradient, inner_lr=alpha)
    assert found.inner_lr_grads["theta"].item() == near(-1.6)
