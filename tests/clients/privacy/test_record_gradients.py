"""Gradients and Hessian products of single records, as the engine clips them, by torch.func."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from metabloom.clients.privacy.releases import hessian_products
from tests.clients.privacy.engine_problems import (
    CASES,
    CROSS_ENTROPY,
    HUGE,
    SmoothNet,
    clipped,
    clipped_sum,
    direction,
    flat,
    generator,
    miss,
    record_gradients,
    record_products,
    releases_of,
    smooth_records,
    weights,
)

every_model = pytest.mark.parametrize(("name", "case"), CASES.items(), ids=list(CASES))
# Sums of some 1e3 products in another order: roundings of 1e-16 and 1e-7 each. Gradients that are
# zero by symmetry are noise of that size beside the largest one, to which all is compared.
DTYPES = pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])


class Scaled(nn.Module):
    """Parameters of its own, for which Opacus has no rule, around a layer for which it has one."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.5, -1.5, 2.0]))
        self.inner = nn.Linear(3, 3)
        self.shift = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return self.gain * self.inner(x).tanh() + self.shift


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(self.layer(x).tanh()).tanh())


class Sequences(nn.Module):
    """Layers on (B, T, d): a record is a sequence."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(self.embedding(x))).sum(1)


def layers():
    flatten = nn.Flatten()
    return {
        "linear": (nn.Linear(4, 3), (4,)),
        "linear on sequences": (nn.Sequential(nn.Linear(4, 2), flatten, nn.Linear(6, 3)), (3, 4)),
        "conv1d": (nn.Sequential(nn.Conv1d(2, 3, 3, stride=2), flatten, nn.Linear(6, 3)), (2, 6)),
        "conv2d": (
            nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=2), flatten, nn.Linear(64, 3)),
            (2, 4, 4),
        ),
        "group norm": (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), flatten, nn.Linear(16, 3)),
            (1, 4, 4),
        ),
        "instance norm": (
            nn.Sequential(nn.InstanceNorm1d(2, affine=True), flatten, nn.Linear(8, 3)),
            (2, 4),
        ),
        "layer norm": (nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)), (4,)),
        "embedding": (Sequences(), (4,)),
        "own parameters": (nn.Sequential(nn.Linear(4, 3), Scaled()), (4,)),
        "a layer twice": (Twice(), (4,)),
        "weight norm": (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (4,)),
        "one parameter unused": (nn.ModuleDict({"used": nn.Linear(4, 3)}), (4,)),
    }


class FirstOf(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


def layer_problem(name, dtype):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        model, shape = layers()[name]
        model = FirstOf() if name == "one parameter unused" else model
    model = model.to(dtype)
    draw = generator(2)
    if name == "embedding":
        inputs = torch.randint(5, (6, *shape), generator=draw)
    else:
        inputs = torch.randn(6, *shape, generator=draw, dtype=torch.float64).to(dtype)
    return model, (inputs, torch.randint(3, (6,), generator=draw))


def assert_clips_as_the_oracle(model, records, near):
    rows = record_gradients(model, records)
    assert miss(clipped_sum(model, records), rows.sum(0)) < near
    # A bound that some records reach and some do not: a sum that mixed two records would differ.
    bound = float(rows.norm(dim=1).median())
    assert miss(clipped_sum(model, records, bound), clipped(rows, bound)) < near


@DTYPES
@every_model
def test_every_model_s_records_are_clipped_as_torch_func_s_gradients(name, case, dtype, near):
    assert_clips_as_the_oracle(*case.problem(name, 3, dtype), near)


@DTYPES
@pytest.mark.parametrize("name", layers())
def test_every_layer_s_records_are_clipped_as_torch_func_s_gradients(name, dtype, near):
    assert_clips_as_the_oracle(*layer_problem(name, dtype), near)


def test_parameters_that_are_frozen_do_not_count_in_the_norm():
    model, records = layer_problem("layer norm", torch.float64)
    whole = record_gradients(model, records).norm(dim=1)
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    rows = record_gradients(model, records)
    assert (rows.norm(dim=1) < 0.9 * whole).all()  # else this test could not see it
    assert_clips_as_the_oracle(model, records, 1e-11)


def test_names_left_out_of_a_release_do_not_count_in_the_norm():
    model, records = SmoothNet(), smooth_records(5)
    names = ["head.weight", "head.bias"]
    found = releases_of(model, records).gradient(
        weights(model), noise_multiplier=0.0, max_grad_norm=0.3, names=names
    )
    head = record_gradients(model, records)[:, 16:]  # body.bias, body.weight come before
    assert set(found) == set(names)
    assert miss(flat(found), clipped(head, 0.3)) < 1e-12


def products_of(model, records, params, towards):
    found = hessian_products(model, CROSS_ENTROPY, params, towards)(*records)
    return torch.cat([found[name].reshape(len(records[1]), -1) for name in sorted(found)], dim=1)


@every_model
def test_every_model_s_hessian_products_equal_reverse_over_reverse(name, case):
    model, records = case.problem(name, 2)
    params = weights(model)
    towards = direction(params, 4)
    wanted = record_products(model, records, params, towards)
    assert miss(products_of(model, records, params, towards), wanted) < 1e-10
    # And as they are released: the same, each clipped to c_h ||v||.
    bound = float(wanted.norm(dim=1).median())
    released = releases_of(model, records).hessian_product(
        params, {n: 2 * v for n, v in towards.items()}, noise_multiplier=0.0, max_norm=bound
    )
    assert miss(flat(released), clipped(2 * wanted, 2 * bound)) < 1e-10


@pytest.mark.parametrize(
    "name", [name for name in layers() if name not in ("weight norm", "one parameter unused")]
)
def test_every_layer_s_hessian_products_equal_reverse_over_reverse(name):
    model, records = layer_problem(name, torch.float64)
    params = weights(model)
    towards = direction(params, 4)
    wanted = record_products(model, records, params, towards)
    if wanted.abs().max() == 0:
        pytest.fail("there is no curvature to compare")
    assert miss(products_of(model, records, params, towards), wanted) < 1e-10


def test_hessian_products_equal_the_whole_hessian_and_finite_differences():
    model, records = SmoothNet(), smooth_records(4)
    params = weights(model)
    names = sorted(params)
    sizes = [params[name].numel() for name in names]

    def named(vector):
        parts = torch.split(vector, sizes)
        return {n: p.reshape(params[n].shape) for n, p in zip(names, parts, strict=True)}

    towards = direction(params, 9)
    found = products_of(model, records, params, towards)
    for row, x, y in zip(found, *records, strict=True):

        def loss(vector, x=x, y=y):
            return CROSS_ENTROPY(functional_call(model, named(vector), (x[None],)), y[None])

        hessian = torch.autograd.functional.hessian(loss, flat(params))
        assert miss(row, hessian @ flat(towards)) < 1e-10
    step = 1e-5  # truncation 1e-10, rounding 1e-16 / step = 1e-11
    ahead, behind = (
        record_gradients(model, records, at=named(flat(params) + sign * step * flat(towards)))
        for sign in (1, -1)
    )
    assert miss(found, (ahead - behind) / (2 * step)) < 1e-6


def test_a_direction_over_some_names_is_the_columns_of_those():
    model, records = SmoothNet(), smooth_records(4)
    params = weights(model)
    towards = {n: v for n, v in direction(params, 9).items() if n.startswith("head")}
    padded = {n: towards.get(n, torch.zeros_like(v)) for n, v in params.items()}
    assert (
        miss(
            products_of(model, records, params, towards),
            record_products(model, records, params, padded),
        )
        < 1e-10
    )


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if not case.characters])
def test_a_record_that_is_not_finite_leaves_the_others_rows_alone(name):
    case = CASES[name]
    model, (inputs, targets) = case.problem(name, 3, torch.float32)
    bad = inputs.clone()
    bad[0], bad[1, ..., 0] = torch.nan, torch.inf
    good = [2]
    assert (
        miss(clipped_sum(model, (bad, targets)), clipped_sum(model, (inputs[good], targets[good])))
        < 1e-4
    )
    params = weights(model)
    towards = direction(params, 4)
    found, wanted = (
        flat(
            releases_of(model, records).hessian_product(
                params, towards, noise_multiplier=0.0, max_norm=HUGE
            )
        )
        for records in ((bad, targets), (inputs[good], targets[good]))
    )
    assert found.isfinite().all()
    assert miss(found, wanted) < 1e-3  # float32: second derivatives of a net lose some digits
