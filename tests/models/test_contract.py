"""Laws that hold for every registered model: shapes, seeds, derivatives against an oracle."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap

from metabloom.models import MODELS, build_model, check_model, head_names


@dataclass(frozen=True)
class Case:
    """A model at its smallest, so that the laws take seconds; small sizes run the same code."""

    input_shape: tuple[int, ...] = (1, 16, 16)
    num_classes: int = 3
    options: dict[str, Any] = field(default_factory=dict)
    characters: bool = False

    def build(self, name: str, seed: int = 0) -> nn.Module:
        return build_model(
            name,
            input_shape=self.input_shape,
            num_classes=self.num_classes,
            seed=seed,
            **self.options,
        )

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(7)
        targets = torch.randint(self.num_classes, (size,), generator=generator)
        if self.characters:
            shape = (size, *self.input_shape)
            return torch.randint(self.num_classes, shape, generator=generator), targets
        return (
            torch.randn(size, *self.input_shape, generator=generator, dtype=torch.float64),
            targets,
        )

    @property
    def dtype(self) -> torch.dtype:
        return torch.int64 if self.characters else torch.float32


SMALL = {
    "char-lstm": Case((5,), 7, {"embedding": 3, "hidden": 4, "layers": 2}, characters=True),
    "cnn": Case(input_shape=(1, 8, 8), options={"dense": 6}),
    "conv4": Case(options={"width": 16}),  # two groups
    "mlp": Case(input_shape=(1, 3, 4), options={"hidden": "6,5"}),
}
CASES = {name: SMALL.get(name, Case()) for name in MODELS}  # a new model is tested unasked

every_model = pytest.mark.parametrize(("name", "case"), CASES.items(), ids=list(CASES))

# Opacus hooks every layer, also the first, whose input is data and needs no gradient; torch remarks
# on that, and it is what we want.
first_layer_has_no_input_gradient = pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing when gradients are computed:UserWarning"
)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: a second thread only waits
    yield
    torch.set_num_threads(before)


def record_loss(logits: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, target, reduction="sum")


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def record_gradients(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The oracle: ordinary autograd on one record at a time."""
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for k in range(len(inputs)):
        loss = record_loss(model(inputs[k : k + 1]), targets[k : k + 1])
        found = torch.autograd.grad(loss, list(model.parameters()))
        for name, value in zip(rows, found, strict=True):
            rows[name].append(value)
    return {name: torch.stack(values) for name, values in rows.items()}


def assert_same_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    # float64: the two differ by the order of sums alone, some 1e3 roundings of 1e-16. A gradient
    # that is zero by symmetry (a bias before a GroupNorm of one group) is rounding noise, of the
    # size of the model's largest gradient times that.
    largest = max(value.abs().max().item() for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-9, atol=1e-12 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


@every_model
def test_the_output_has_one_row_of_logits_for_each_record(name, case):
    model = case.build(name).double()
    inputs, _ = case.batch(3)
    assert model(inputs).shape == (3, case.num_classes)


@every_model
def test_the_safety_check_accepts_it(name, case):
    check_model(
        case.build(name),
        input_shape=case.input_shape,
        num_classes=case.num_classes,
        input_dtype=case.dtype,
    )


@every_model
def test_initial_weights_depend_on_the_seed_alone_and_leave_the_global_state(name, case):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = case.build(name, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)  # another global state
    again, other = case.build(name, seed=3), case.build(name, seed=4)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    assert any(
        not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)
    )


@every_model
def test_training_and_evaluation_mode_compute_the_same(name, case):
    model = case.build(name).double()
    assert model.training
    inputs, _ = case.batch(2)
    assert torch.equal(model(inputs), model.eval()(inputs))


@every_model
def test_a_record_does_not_see_its_neighbours(name, case):
    model = case.build(name).double()
    inputs, _ = case.batch(3)
    alone = torch.cat([model(inputs[k : k + 1]) for k in range(3)])
    # float64, another order of sums
    torch.testing.assert_close(model(inputs), alone, rtol=1e-10, atol=1e-12)


@every_model
def test_the_head_is_the_layer_that_knows_the_classes(name, case):
    wider = Case(case.input_shape, case.num_classes + 2, case.options, case.characters)
    small, large = weights(case.build(name)), weights(wider.build(name))
    head = head_names(case.build(name))
    changed = {key for key, value in small.items() if value.shape != large[key].shape}
    assert changed - {"embedding.weight"} == head  # characters: the vocabulary is the input's too


@every_model
def test_vmap_of_grad_equals_one_record_at_a_time(name, case):
    model = case.build(name).double()
    inputs, targets = case.batch(3)

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return record_loss(functional_call(model, params, (x[None],)), y[None])

    got = vmap(grad(loss), in_dims=(None, 0, 0))(weights(model), inputs, targets)
    assert_same_gradients(got, record_gradients(model, inputs, targets))


@first_layer_has_no_input_gradient
@every_model
def test_opacus_hooks_equal_one_record_at_a_time(name, case):
    from opacus import GradSampleModule

    model = case.build(name).double()
    inputs, targets = case.batch(3)
    hooked = GradSampleModule(copy.deepcopy(model), loss_reduction="sum", strict=True)
    record_loss(hooked(inputs), targets).backward()
    got = {
        key.removeprefix("_module."): value.grad_sample for key, value in hooked.named_parameters()
    }
    assert_same_gradients(got, record_gradients(model, inputs, targets))


@every_model
def test_a_hessian_vector_product_equals_finite_differences_of_the_gradient(name, case):
    model = case.build(name).double()
    inputs, targets = case.batch(2)
    at = weights(model)
    generator = torch.Generator().manual_seed(5)
    towards = {
        key: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for key, value in at.items()
    }
    length = flat(towards).norm()
    towards = {key: value / length for key, value in towards.items()}

    def gradient(params: dict[str, Tensor]) -> dict[str, Tensor]:
        return grad(lambda p: record_loss(functional_call(model, p, (inputs,)), targets))(params)

    (product,) = vjp(gradient, at)[1](towards)  # the Hessian is symmetric: vjp = H v
    step = 1e-5  # of a unit direction: too small to cross a kink of ReLU or a tie of max-pooling
    there, back = (
        gradient({key: value + sign * step * towards[key] for key, value in at.items()})
        for sign in (1, -1)
    )
    wanted = (flat(there) - flat(back)) / (2 * step)
    assert wanted.norm() > 1e-3  # there is curvature to compare
    # Truncation is of order step^2 = 1e-10 times third derivatives, rounding 1e-16 / step = 1e-11.
    assert (flat(product) - wanted).norm() < 1e-6 * wanted.norm()


def flat(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([named[key].reshape(-1) for key in sorted(named)])
