"""What a meta-gradient leaves alone, what it gives back, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

from metabloom.clients import adapt, meta_gradient
from metabloom.clients.objective import objective, predict
from metabloom.errors import ConfigError, ModelError
from tests.clients.toy_problems import (
    Shifted,
    flat,
    head,
    initialised,
    random_rates,
    records,
    small_net,
    weights,
)

CROSS_ENTROPY = nn.functional.cross_entropy
ORDERS = ("exact", "first", "hf")


# --- what stays as it was ----------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rates", ["number", "tensors"])
def test_nothing_that_goes_in_is_changed(order, rates):
    model = initialised(Shifted()).double()
    params = weights(model)
    rates = 0.3 if rates == "number" else random_rates(params, 1)
    support, query, curved = records(6, 1), records(5, 2), records(4, 3)
    given_things = (model.state_dict(), params, rates, support, query, curved)
    before = copy.deepcopy(given_things)
    dice = torch.random.get_rng_state()
    meta_gradient(
        model,
        CROSS_ENTROPY,
        params,
        support,
        query,
        inner_lr=rates,
        steps=2,
        order=order,
        curvature=curved,
    )
    torch.testing.assert_close(given_things, before, rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), dice)
    assert model.training
    assert all(value.grad is None for value in model.parameters())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_names_order_shapes_and_dtype_are_those_of_the_parameters(order, dtype):
    model = small_net(dtype=dtype)
    params = dict(reversed(weights(model).items()))  # an order of the caller's own
    found = meta_gradient(
        model,
        CROSS_ENTROPY,
        params,
        records(6, 1, dtype=dtype),
        records(5, 2, dtype=dtype),
        inner_lr={name: torch.full_like(value, 0.1) for name, value in params.items()},
        order=order,
    )
    for named in (found.grads, found.inner_lr_grads):
        assert list(named) == list(params)
        assert all(named[name].dtype == dtype for name in params)
        assert all(named[name].shape == value.shape for name, value in params.items())
    assert found.query_loss.dtype == dtype
    assert found.query_loss.ndim == 0


@pytest.mark.parametrize("order", ORDERS)
def test_parameters_that_require_grad_give_the_same_without_a_graph(order):
    model = small_net()
    plain = weights(model)
    arguments = (records(6, 1), records(5, 2))
    options = {"order": order, "steps": 2}
    wanted = meta_gradient(model, CROSS_ENTROPY, plain, *arguments, inner_lr=0.3, **options)
    live = dict(model.named_parameters())  # requires_grad
    rates = {n: torch.full_like(v, 0.3).requires_grad_() for n, v in plain.items()}
    found = meta_gradient(model, CROSS_ENTROPY, live, *arguments, inner_lr=rates, **options)
    assert torch.equal(flat(found.grads), flat(wanted.grads))
    outputs = (*found.grads.values(), *found.inner_lr_grads.values(), found.query_loss)
    assert not any(value.requires_grad for value in outputs)
    for rate in (0.3, rates):
        adapted = adapt(model, CROSS_ENTROPY, live, arguments[0], inner_lr=rate)
        assert not any(value.requires_grad for value in adapted.values())
    assert all(value.grad is None for value in live.values())


def test_the_buffers_of_a_model_take_part():
    # Its output is that of Net on inputs moved by shift * seen = 0.5 * 2.
    model, plain = initialised(Shifted()).double(), small_net()
    params = weights(model)
    (xs, ys), (xq, yq) = records(6, 1), records(5, 2)
    options = {"inner_lr": 0.3, "steps": 2}
    found = meta_gradient(model, CROSS_ENTROPY, params, (xs, ys), (xq, yq), **options).grads
    wanted = meta_gradient(
        plain, CROSS_ENTROPY, params, (xs + 1, ys), (xq + 1, yq), **options
    ).grads
    assert torch.equal(flat(found), flat(wanted))
    assert torch.equal(predict(model, params, xq), predict(plain, params, xq + 1))


def test_scoring_a_model_that_counts_its_calls_in_a_buffer_does_not_change_it():
    class Counting(Shifted):
        def forward(self, x):
            self.seen += 1
            return super().forward(x)

    model = initialised(Counting()).double()
    first = predict(model, weights(model), records(6, 1)[0])
    assert torch.equal(predict(model, weights(model), records(6, 1)[0]), first)
    assert model.seen == 2


# --- bad input ---------------------------------------------------------------------------------


def attempt(**changed):
    model = small_net()
    options = {"inner_lr": 0.1} | changed
    return meta_gradient(
        model, CROSS_ENTROPY, weights(model), records(6, 1), records(5, 2), **options
    )


def rates_without(name):
    return {n: torch.ones_like(v) for n, v in weights(small_net()).items() if n != name}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"inner_lr": 0.0}, "inner_lr = 0.0"),
        ({"inner_lr": -0.1}, "inner_lr = -0.1"),
        ({"inner_lr": float("nan")}, "inner_lr = nan"),
        ({"inner_lr": float("inf")}, "inner_lr = inf"),
        ({"inner_lr": rates_without("head.bias")}, "adapted parameter 'head.bias'"),
        (
            {"inner_lr": rates_without("head.bias") | {"head.bias": torch.ones(4)}},
            r"inner_lr\['head.bias'\] has shape \(4,\): the parameter's \(3,\)",
        ),
        ({"steps": 0}, "steps = 0"),
        ({"steps": -1}, "steps = -1"),
        ({"steps": 1.5}, "steps = 1.5"),
        ({"order": "second"}, "order = 'second': must be one of exact, first, hf"),
        ({"adapt": lambda name: False}, "adapt selects none of the parameters body.weight, "),
        ({"order": "hf", "delta": 0.0}, "delta = 0.0"),
        ({"order": "hf", "delta": -1.0}, "delta = -1.0"),
        ({"order": "hf", "delta": float("nan")}, "delta = nan"),
        ({"order": "hf", "delta": float("inf")}, "delta = inf"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_that_cannot_work_is_refused_by_name(changed, said):
    with pytest.raises(ConfigError, match=said):
        attempt(**changed)


def test_alpha_is_needed_for_what_is_adapted_only():
    assert set(attempt(inner_lr=rates_without("body.bias"), adapt=head).inner_lr_grads) == {
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"inner_lr": -1.0}, "inner_lr = -1.0"),
        ({"steps": 0}, "steps = 0"),
        ({"adapt": lambda name: False}, "adapt selects none"),
    ],
)
def test_adaptation_refuses_what_the_meta_gradient_refuses(changed, said):
    model = small_net()
    with pytest.raises(ConfigError, match=said):
        adapt(model, CROSS_ENTROPY, weights(model), records(6, 1), **{"inner_lr": 0.1} | changed)


def test_a_loss_that_is_no_scalar_is_refused_with_its_shape():
    model = small_net()

    def each(output, target):
        return nn.functional.cross_entropy(output, target, reduction="none")

    with pytest.raises(ModelError, match=r"the loss has shape \(6,\).*reduction='mean'"):
        adapt(model, each, weights(model), records(6, 1), inner_lr=0.1)
    with pytest.raises(ModelError, match=r"\(5,\)"):
        objective(model, each)(weights(model), records(5, 1))
