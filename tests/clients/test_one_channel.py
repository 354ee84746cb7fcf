"""Convolutions of one channel as products of matrices: torch's own result and derivatives."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metabloom.clients import SGDClient, one_channel, training
from metabloom.clients.one_channel import OneChannelAsMatrix
from metabloom.models import build_model
from tests.clients.cohorts import TOLERANCE, away
from tests.clients.toy_problems import client_data, generator, initialised

CASES = {
    "same": {"padding": 1},
    "no padding": {},
    "strides": {"stride": (2, 1), "padding": (0, 2)},
    "all at once": {"stride": 3, "padding": 2},
}


def draw(*shape):
    return torch.randn(shape, generator=generator(sum(shape)), dtype=torch.float64)


@pytest.fixture
def products(monkeypatch):
    """Note each convolution that became a product."""
    seen = []
    inner = one_channel._convolved

    def noted(*args, **options):
        product = inner(*args, **options)
        if product is not None:
            seen.append(args[1].shape)
        return product

    monkeypatch.setattr(one_channel, "_convolved", noted)
    return seen


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_result_and_all_first_derivatives_are_torchs(case, has_bias, products):
    given = [draw(3, 1, 7, 6), draw(4, 1, 3, 2), draw(4)]

    def found():
        inputs, weight, bias = (value.clone().requires_grad_() for value in given)
        out = F.conv2d(inputs, weight, bias if has_bias else None, **CASES[case])
        wanted = (inputs, weight, *([bias] if has_bias else []))
        return out, *torch.autograd.grad((out * draw(*out.shape)).sum(), wanted)

    plain = found()
    assert not products
    with OneChannelAsMatrix():
        ours = found()
    assert len(products) == 1
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_second_derivatives_are_torchs(products):
    inputs, direction = draw(2, 1, 5, 5), draw(3, 1, 3, 3)

    def slope_along(weight):
        slope = torch.func.grad(lambda w: (F.conv2d(inputs, w, padding=1) ** 3).sum())(weight)
        return (slope * direction).sum()

    weight = draw(3, 1, 3, 3) + 1
    plain = torch.func.grad(slope_along)(weight)
    with OneChannelAsMatrix():
        ours = torch.func.grad(slope_along)(weight)
    assert products
    torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("inputs", "weight", "options"),
    [
        ((2, 3, 6, 6), (4, 3, 3, 3), {}),
        ((2, 2, 6, 6), (4, 1, 3, 3), {"groups": 2}),
        ((2, 1, 6, 6), (4, 1, 3, 3), {"dilation": 2}),
        ((2, 1, 6, 6), (4, 1, 3, 3), {"padding": "same"}),
        ((1, 6, 6), (4, 1, 3, 3), {}),
    ],
    ids=["three channels", "groups", "dilation", "padding in words", "one image"],
)
def test_other_convolutions_stay_as_they_are(inputs, weight, options, products):
    x, w = draw(*inputs), draw(*weight)
    plain = F.conv2d(x, w, **options)
    with OneChannelAsMatrix():
        assert torch.equal(F.conv2d(x, w, **options), plain)
    assert not products


def images_of(net):
    return nn.Sequential(nn.Unflatten(1, (1, 4, 4)), net)


def normed_cnn():
    net = build_model("conv4", input_shape=(1, 4, 4), num_classes=3, seed=0, width=4)
    return images_of(net)


def small_cnn():
    net = nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Flatten(),
        nn.Linear(32, 3),
    )
    return initialised(net).float()


@pytest.mark.parametrize("make", ["small_cnn", "normed_cnn"])
def test_every_step_of_a_compiled_convolution_is_the_compiled_one(make, monkeypatch):
    """The compiler lays out weights in its own way: the next step must not be eager for that."""
    torch.compiler.reset()
    monkeypatch.setattr(training, "_compilers", training._Compilers())
    inner = training.Step.__call__
    was_eager = []

    def noted(step, *args, **options):
        after = inner(step, *args, **options)
        was_eager.append(step.ran_eagerly)
        return after

    monkeypatch.setattr(training.Step, "__call__", noted)
    model = globals()[make]()
    clients = {
        kernel: [
            SGDClient(
                model,
                wide(seed),
                local_lr=0.1,
                batch_size=4,
                local_epochs=3,
                name=str(seed),
                kernel=kernel,
            )
            for seed in (0, 1)
        ]
        for kernel in ("eager", "compiled")
    }
    received = clients["eager"][0].get_parameters({})
    eager = [one.fit(received, {}) for one in clients["eager"]]
    fast = [one.fit(received, {}) for one in clients["compiled"]]
    assert was_eager == [False] * 18  # two clients, three epochs of three batches
    assert away(fast, eager, received) < TOLERANCE[torch.float32]


def test_a_model_that_was_changed_between_clients_trains_as_it_is_now(monkeypatch):
    """Within one client the compiler does not look again; between two it must."""
    torch.compiler.reset()
    monkeypatch.setattr(training, "_compilers", training._Compilers())
    model = nn.Sequential(nn.Linear(3, 4), nn.Hardtanh(), nn.Linear(4, 3))
    initialised(model).float()

    def reply(kernel):
        data = client_data(6, 6)
        options = {"local_lr": 0.1, "batch_size": 4, "local_epochs": 2, "name": "a"}
        client = SGDClient(model, data, kernel=kernel, **options)
        return client.fit(client.get_parameters({}), {}), client.get_parameters({})

    (before, sent), (eager, _) = reply("compiled"), reply("eager")
    assert away([before], [eager], sent) < TOLERANCE[torch.float32]
    model[1].max_val = 0.01
    (after, sent), (wanted, _) = reply("compiled"), reply("eager")
    assert away([wanted], [eager], sent) > 0.1
    assert away([after], [wanted], sent) < TOLERANCE[torch.float32]


def test_a_step_gets_parameters_with_the_strides_that_it_was_compiled_for():
    before = {"w": torch.zeros(4, 1, 3, 3), "c": torch.zeros(2, 3, 2, 2)}
    last = torch.arange(24.0).reshape(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    after = {"w": torch.ones(9, 4).T.reshape(4, 3, 3)[:, None], "c": last}
    laid_out = training._laid_out_like(before, after)
    for name, value in laid_out.items():
        assert value.stride() == before[name].stride() != after[name].stride()
        assert torch.equal(value, after[name])


def wide(seed):
    data = client_data(6, 6, seed=seed)

    def images(batch):
        inputs, targets = batch
        return inputs.repeat(1, 6)[:, :16], targets

    return type(data)(images(data.support), images(data.query))
