"""Which models private clients take: those that mix or track records are refused by name."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metabloom.clients import ClientData, MAMLClient, PrivacyConfig, SGDClient
from metabloom.clients.privacy.noise import fresh_sources
from metabloom.clients.privacy.private_models import check_private_model
from metabloom.errors import ModelError, PrivacyError
from tests.clients.privacy.engine_problems import (
    clipped,
    clipped_sum,
    flat,
    generator,
    record_gradients,
    releases_of,
    weights,
)

CLIENTS = pytest.mark.parametrize("kind", [MAMLClient, SGDClient])


def images(size=6, shape=(2, 4, 4)):
    x = torch.randn(size, *shape, generator=generator(1))
    return x, torch.arange(size) % 3


def vectors(size=6, width=4):
    return images(size, (width,))


def privacy(tmp_path, **more):
    return PrivacyConfig(
        **{
            "noise_multiplier": 1e-3,
            "max_grad_norm": 1e3,
            "sample_rate": 1.0,
            "target_epsilon": 1e12,
            "target_delta": 1e-5,
            "expected_batch_size": 12.0,
            "ledger": tmp_path / "ledger.jsonl",
        }
        | more
    )


def client(kind, model, tmp_path, records=None, **more):
    support = query = records or images()
    return kind(model, ClientData(support, query), name="anna", privacy=privacy(tmp_path, **more))


def head(width):
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 3))


def tied():
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    model[3].weight = model[1].weight
    return model


class Tracking(nn.Module):
    """Statistics of its own making, under the usual names."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        if self.training:
            self.running_mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return self.layer(x - self.running_mean)


class FusedLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


REFUSED = {
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), head(16)),
        r"layer '1' is BatchNorm2d: .*mixes the records.*use GroupNorm",
    ),
    "batch norm without parameters": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False), head(16)),
        r"layer '1' is BatchNorm2d: .*mixes the records.*use GroupNorm",
    ),
    "batch norm without statistics": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), head(16)
        ),
        r"layer '1' is BatchNorm2d: .*mixes the records.*use GroupNorm",
    ),
    "instance norm with statistics": (
        lambda: nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True), head(32)),
        r"layer '0' is InstanceNorm2d with track_running_stats=True.*=False or use GroupNorm",
    ),
    "tied parameters": (tied, r"'1.weight' and '3.weight' share.*give each layer its own"),
    "tracked buffer": (Tracking, r"'running_mean' of Tracking is tracked.*use GroupNorm"),
    "fused lstm": (FusedLSTM, r"layer 'rnn' is LSTM: .*'char-lstm', or opacus.layers.DPLSTM"),
}


@CLIENTS
@pytest.mark.parametrize("name", REFUSED)
def test_a_private_client_refuses_the_model_with_its_reason_and_remedy(kind, name, tmp_path):
    model, reason = REFUSED[name]
    with pytest.raises(ModelError, match=reason):
        client(kind, model(), tmp_path)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_the_engine_itself_refuses_them_too():
    for model, reason in REFUSED.values():
        with pytest.raises(ModelError, match=reason):
            check_private_model(model())
        with pytest.raises(ModelError, match=reason):
            releases_of(model(), images())


# --- what mixes records without saying so --------------------------------------------------------


class MeanOfTheBatch(nn.Module):
    def __init__(self, *, always=True):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.always = always

    def forward(self, x):
        return self.layer(x - x.mean(0) if self.always or self.training else x)


class AttentionOverTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(torch.softmax(x @ x.T, dim=1) @ x)


class DropoutAndMean(nn.Module):
    """Its outputs differ from call to call anyway: that must not hide the mean."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        x = F.dropout(x, 0.5, self.training)
        return self.layer(x - x.mean(0) if self.training else x)


MIXING = {
    "mean": MeanOfTheBatch,
    "mean in training alone": lambda: MeanOfTheBatch(always=False),
    "attention": AttentionOverTheBatch,
    "dropout and mean": DropoutAndMean,
}


@pytest.mark.parametrize("name", MIXING)
def test_a_module_that_mixes_records_is_refused(name):
    with pytest.raises(ModelError, match=r"mixes the records of a batch.*remove what is computed"):
        releases_of(MIXING[name](), vectors())


@pytest.mark.parametrize("name", MIXING)
def test_a_private_client_of_a_module_that_mixes_records_sends_nothing(name, tmp_path):
    own = client(SGDClient, MIXING[name](), tmp_path, vectors())
    with pytest.raises(PrivacyError):
        own.fit(own.get_parameters({}), {})


class Folded(nn.Module):
    """The steps of a sequence as rows of the layer: each would be clipped by itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        rows = self.layer(x.reshape(-1, x.shape[-1]))
        return rows.reshape(*x.shape[:2], -1).sum(1)


class TimeFirst(nn.Module):
    """The rows of the layer are times, not records; with two times as well."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).sum(0)


class WeightsUsedDirectly(nn.Module):
    """The weight's second use is not a call of its layer: hooks do not see it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(self.layer(x).tanh(), self.layer.weight).flatten(1)[:, :3]


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("model", [Folded, TimeFirst, WeightsUsedDirectly])
def test_a_module_whose_hooks_do_not_see_records_is_refused(model, times):
    if model is Folded and times == 1:
        releases_of(Folded(), images(6, (1, 4)))  # a record is one row: nothing is wrong
        return
    with pytest.raises(ModelError, match=r"no gradient of their own for 'layer.weight'.*influence"):
        releases_of(model(), images(6, (times, 4)))


def test_rows_that_are_not_records_are_refused_in_the_release_as_well(monkeypatch):
    from metabloom.clients.privacy import releases as module

    monkeypatch.setattr(module, "check_rows_are_gradients", lambda *_: None)
    releases = releases_of(Folded(), images(6, (5, 4)))
    with pytest.raises(ModelError, match="rows of gradients"):
        releases.gradient(weights(Folded()), noise_multiplier=0.0, max_grad_norm=1.0)


# --- what is taken -------------------------------------------------------------------------------


def test_buffers_that_stay_are_taken():
    model = nn.Sequential(nn.Linear(4, 3))
    model.register_buffer("constant", torch.ones(3))
    records = vectors()
    wanted = clipped(record_gradients(model, records), 0.5)
    assert torch.allclose(clipped_sum(model, records, 0.5), wanted, rtol=1e-4, atol=1e-6)


def frozen_net():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    draw = generator(4)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=draw))
    model[0].requires_grad_(False)
    return model


@CLIENTS
def test_frozen_parameters_come_back_as_they_were_received_and_the_others_move(kind, tmp_path):
    own = client(kind, frozen_net(), tmp_path, vectors())
    sent = [value + 0.25 for value in own.get_parameters({})]
    reply, _, _ = own.fit(sent, {})
    moved = [not np.array_equal(a, b) for a, b in zip(sent, reply, strict=True)]
    assert moved == [False, False, True, True]


def test_frozen_parameters_do_not_count_in_the_norm():
    model, records = frozen_net(), vectors()
    rows = record_gradients(model, records)
    assert rows.shape[1] == 18
    bound = float(rows.norm(dim=1).median())
    found = clipped_sum(model, records, bound)
    assert torch.allclose(found, clipped(rows, bound), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), [(MAMLClient, {"order": "first"}), (SGDClient, {})])
def test_private_training_uses_the_frozen_parameters_that_it_received(kind, options, tmp_path):
    # With hardly any noise and no clipping, a step on all records is the plain client's step.
    data = ClientData(vectors(), vectors())
    pinned = privacy(tmp_path, noise_multiplier=1e-7, target_epsilon=1e100)
    own = kind(frozen_net(), data, name="anna", privacy=pinned, **options)
    plain = kind(frozen_net(), data, name="anna", **options)
    sent = [value + 0.5 for value in own.get_parameters({})]
    (found, *_), (wanted, *_) = own.fit(sent, {}), plain.fit(sent, {})
    for one, other, before in zip(found, wanted, sent, strict=True):
        # noise of 1e-7 * 1e3 / 12 = 1e-5, beside steps of 1e-2 and more
        assert np.allclose(one - before, other - before, rtol=0, atol=1e-4)
    assert np.abs(wanted[2] - sent[2]).max() > 1e-2


def test_a_model_with_dropout_is_taken_and_its_records_stay_bounded():
    model = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Dropout(0.5), nn.Linear(30, 3))
    inputs, targets = vectors(1)
    for number in range(5):
        releases = releases_of(model, (100 * inputs, targets), sources=fresh_sources())
        found = releases.gradient(weights(model), noise_multiplier=0.0, max_grad_norm=0.5)
        assert 0 < flat(found).norm() <= 0.5 * (1 + 1e-5), number
        product = releases.hessian_product(
            weights(model), found, noise_multiplier=0.0, max_norm=0.1
        )
        assert flat(product).norm() <= 0.1 * flat(found).norm() * (1 + 1e-5)


@CLIENTS
def test_a_private_client_trains_a_model_with_dropout(kind, tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    own = client(kind, model, tmp_path, vectors())
    before = torch.get_rng_state()
    reply, count, metrics = own.fit(own.get_parameters({}), {})
    assert all(np.isfinite(array).all() for array in reply)
    assert count == 1  # not told
    assert set(metrics) == {"privacy-epsilon", "privacy-delta"}
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
