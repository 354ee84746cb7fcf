"""Exact meta-gradients of every registered model, against finite differences and autograd."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from metabloom.clients import meta_gradient
from metabloom.models import MODELS, build_model
from tests.clients.toy_problems import (
    direction,
    dot,
    flat,
    generator,
    loss_after_adapting,
    meta_gradient_by_graph,
    moved,
    slope,
    weights,
)

CROSS_ENTROPY = nn.functional.cross_entropy


@dataclass(frozen=True)
class Case:
    """A model at its smallest, where its loss is smooth over four steps of the stencil.

    ReLU, max-pooling and hard swishes have kinks, and beyond one the gradient, so the adapted
    model, JUMPS: a stencil that crosses a kink is wrong by the jump over the step, far more than
    the tolerance. A step that is too long can therefore make the test fail, but not pass. The
    step is as long as the kinks allow, since rounding costs 1e-15 / (step * slope): 1e-7 at most.
    """

    input_shape: tuple[int, ...] = (1, 8, 8)
    options: dict[str, Any] = field(default_factory=dict)
    inner_lr: float = 0.02
    step: float = 1e-5
    records: int = 2
    directions: int = 1
    characters: bool = False

    def problem(self, name):
        model = build_model(
            name, input_shape=self.input_shape, num_classes=3, seed=0, **self.options
        ).double()
        return model, self.batch(1), self.batch(2)

    def batch(self, seed):
        draw = generator(seed)
        shape = (self.records, *self.input_shape)
        if self.characters:
            inputs = torch.randint(3, shape, generator=draw)
        else:
            inputs = torch.randn(shape, generator=draw, dtype=torch.float64)
        return inputs, torch.randint(3, (self.records,), generator=draw)


SMALL = {
    "mlp": Case((1, 3, 4), {"hidden": "6,5"}, 0.1, 1e-4, records=4, directions=3),
    "conv4": Case((1, 8, 8), {"width": 8}, 0.1, 1e-4, records=3, directions=2),
    "cnn": Case((1, 6, 6), {"dense": 5}, 0.1, 1e-4, records=3, directions=2),
    "char-lstm": Case(
        (5,),
        {"embedding": 3, "hidden": 4, "layers": 2},
        0.1,
        1e-3,  # smooth everywhere
        records=4,
        directions=3,
        characters=True,
    ),
    # On 8x8 images its squeezed maps make a stiff loss: five steps are chaos.
    "mobilenet-v3-small": Case((1, 32, 32), inner_lr=0.001),
}
CASES = {name: SMALL.get(name, Case()) for name in MODELS}  # a new model is tested unasked

every_model = pytest.mark.parametrize(("name", "case"), CASES.items(), ids=list(CASES))


@every_model
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_meta_gradient_of_every_model_equals_finite_differences(
    name, case, steps, record_property
):
    model, support, query = case.problem(name)
    params = weights(model)
    options = {"inner_lr": case.inner_lr, "steps": steps}
    exact = meta_gradient(model, CROSS_ENTROPY, params, support, query, **options).grads
    first = meta_gradient(
        model, CROSS_ENTROPY, params, support, query, **options, order="first"
    ).grads
    misses = []
    for number in range(case.directions):
        towards = direction(params, 3 + number)

        def loss(step, towards=towards):
            there = moved(params, towards, step)
            return loss_after_adapting(model, CROSS_ENTROPY, there, support, query, **options)

        wanted = slope(loss, case.step)
        error = abs(dot(exact, towards) - wanted) / abs(wanted)
        record_property("relative_error", f"{error:.1e}")
        assert error < 1e-6
        misses.append(abs(dot(first, towards) - wanted) / abs(wanted))
    # The test has power: what drops the Hessian is off by more than a thousand tolerances.
    assert max(misses) > 1e-3


@pytest.mark.parametrize("name", ["mlp", "conv4", "cnn", "char-lstm"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_meta_gradient_equals_plain_autograd_through_the_inner_loop(name, steps):
    model, support, query = CASES[name].problem(name)
    params = weights(model)
    options = {"inner_lr": 0.1, "steps": steps}
    found = meta_gradient(model, CROSS_ENTROPY, params, support, query, **options).grads
    wanted, _ = meta_gradient_by_graph(model, CROSS_ENTROPY, params, support, query, **options)
    # float64: the same derivatives in another order of sums, some 1e3 roundings
    torch.testing.assert_close(flat(found), flat(wanted), rtol=1e-10, atol=1e-12)
