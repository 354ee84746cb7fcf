"""Padded batches: what is added has no share, and where padding may have one, there is none."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from metabloom.clients import ClientData, SGDClient, cohort, objective
from metabloom.clients.batches import pad
from metabloom.errors import ModelError
from tests.clients.cohorts import (
    TOLERANCE,
    away,
    by_cohort,
    data_of,
    distance,
    one_by_one,
    ragged,
    trainings,
)
from tests.clients.small_clients import same
from tests.clients.toy_problems import initialised, records, small_net, weights

CROSS_ENTROPY = nn.functional.cross_entropy


@pytest.fixture
def warned(monkeypatch):
    """The warnings of the cohort."""
    said = []
    monkeypatch.setattr(cohort, "log", lambda level, text, *values: said.append(text % values))
    return said


# --- what is padded has no share ---------------------------------------------------------------


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("loss_fn", [CROSS_ENTROPY, lambda o, t: CROSS_ENTROPY(o, t)])
def test_what_masked_records_hold_contributes_exactly_zero(junk, loss_fn):
    model = small_net()
    loss = objective.objective(model, loss_fn)
    inputs, targets, mask = pad(records(5, 0), 9)
    spoilt = torch.where(mask[:, None], inputs, junk), torch.where(mask, targets, 999), mask
    clean = torch.func.grad_and_value(loss)(weights(model), (inputs, targets, mask))
    found = torch.func.grad_and_value(loss)(weights(model), spoilt)
    wanted = torch.func.grad_and_value(loss)(weights(model), records(5, 0))
    assert torch.equal(found[1], clean[1])
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-14, atol=0)
    for name, value in wanted[0].items():
        assert torch.equal(found[0][name], clean[0][name])
        torch.testing.assert_close(found[0][name], value, rtol=1e-13, atol=1e-15)


WRONG = {
    "the mask left out": lambda losses, mask: losses.mean(),
    "divided by the padded count": lambda losses, mask: torch.where(mask, losses, 0).mean(),
    "the sum": lambda losses, mask: torch.where(mask, losses, 0).sum(),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_comparison_sees_a_wrong_mean(wrong, monkeypatch, warned):
    clients = ragged("fedavg")
    monkeypatch.setattr(objective, "_mean_of_real", WRONG[wrong])
    monkeypatch.setattr(cohort, "takes_padding", lambda *some: True)  # which would refuse it
    monkeypatch.setattr(cohort, "_padded", {})
    assert distance(clients) > 1e-3
    assert not warned


@pytest.mark.parametrize("wrong", WRONG)
def test_a_mean_that_padding_changes_is_refused_beforehand(wrong, monkeypatch):
    model = small_net()
    loss = objective.objective(model, CROSS_ENTROPY)
    assert objective.takes_padding(loss, weights(model), records(5, 0))
    monkeypatch.setattr(objective, "_mean_of_real", WRONG[wrong])
    assert not objective.takes_padding(loss, weights(model), records(5, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_padding_is_judged_by_the_precision_at_hand(dtype, monkeypatch):
    model = small_net(dtype=dtype)
    loss = objective.objective(model, CROSS_ENTROPY)
    inputs, targets = records(5, 0)
    batch = inputs.to(dtype), targets
    assert objective.takes_padding(loss, weights(model), batch)
    monkeypatch.setattr(objective, "_mean_of_real", WRONG["the mask left out"])
    assert not objective.takes_padding(loss, weights(model), batch)


# --- which losses are padded ---------------------------------------------------------------------


def balanced(output, targets):
    """The mean over classes of the mean of each: that over records, where all have as many."""
    losses = CROSS_ENTROPY(output, targets, reduction="none")
    counts = nn.functional.one_hot(targets, output.shape[1]).sum(0)
    shares = 1 / counts[targets] / (counts > 0).sum()
    return (losses * shares).sum()


def labelled(output, targets):
    """The mean over the labels that are there; -1.0 says that one is missing."""
    real = (targets != -1.0).to(output)
    return ((output - targets) ** 2 * real).sum() / real.sum().clamp(min=1)


def some_classes(seed, count):
    """Records of class 0 alone, for which many losses are the mean."""
    return records(count, seed)[0], torch.zeros(count, dtype=torch.int64)


def some_labels(seed, count):
    """Records with labels, of which the last one misses one."""
    targets = torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)).double()
    targets[-1, 0] = -1.0
    return records(count, seed)[0], targets


def some_tokens(seed, count):
    """Records of three tokens each, the last one with a padded tail."""
    targets = torch.randint(1, 3, (count, 2), generator=torch.Generator().manual_seed(seed))
    targets[-1, 1] = 0
    return records(count, seed)[0], targets


class Tokens(nn.Module):
    """Scores of three classes for each of two tokens."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 6, dtype=torch.float64)

    def forward(self, x):
        return self.head(x).reshape(-1, 3, 2)


@pytest.mark.parametrize(
    ("model", "loss_fn", "data"),
    [
        (
            small_net,
            partial(CROSS_ENTROPY, weight=torch.tensor([1.0, 2, 3]).double()),
            some_classes,
        ),
        (small_net, partial(CROSS_ENTROPY, ignore_index=2), some_classes),
        (small_net, balanced, some_classes),
        (small_net, labelled, some_labels),
        (Tokens, partial(CROSS_ENTROPY, ignore_index=0), some_tokens),
    ],
    ids=["class-weights", "ignored-class", "balanced", "missing-labels", "padded-tokens"],
)
def test_a_loss_that_is_no_mean_of_records_is_never_padded(model, loss_fn, data, monkeypatch):
    made, model = [], initialised(model())
    collated = cohort._collated
    monkeypatch.setattr(cohort, "_collated", lambda *some: made.append(collated(*some)) or made[-1])
    clients = [
        SGDClient(
            model,
            ClientData(data(seed, count), data(seed + 50, 2)),
            loss_fn=loss_fn,
            batch_size=4,
            local_epochs=2,
            name=str(seed),
        )
        for seed, count in enumerate((4, 5, 7, 5, 7))
    ]
    assert distance(clients) < TOLERANCE[torch.float64]
    assert made  # those with as many records are still computed at once
    assert all(len(batch) == 2 for batch in made)


@pytest.mark.parametrize(
    ("model", "loss_fn", "data"),
    [
        (small_net, nn.functional.mse_loss, some_labels),
        (small_net, nn.MSELoss(), some_labels),
        (Tokens, CROSS_ENTROPY, some_tokens),
    ],
    ids=["mse", "mse-module", "tokens"],
)
def test_a_loss_that_is_known_as_a_mean_is_padded_for_any_targets(model, loss_fn, data, warned):
    model = initialised(model())
    clients = [
        SGDClient(model, ClientData(data(s, n), data(s + 50, 2)), loss_fn=loss_fn, name=str(s))
        for s, n in enumerate((3, 5, 6))
    ]
    assert distance(clients) < TOLERANCE[torch.float64]
    assert not warned


def test_for_very_many_classes_an_unknown_loss_is_not_tried_out(monkeypatch, warned):
    monkeypatch.setattr(cohort, "MOST_CLASSES", 2)
    clients = ragged("fedavg", sizes=(3, 5), loss_fn=lambda o, t: CROSS_ENTROPY(o, t))
    assert distance(clients) < TOLERANCE[torch.float64]
    assert "not known to be a plain mean" in warned[0]


def test_a_client_with_nan_is_alone_with_it_and_does_not_stop_padding(warned):
    clients = ragged("fedavg", sizes=(3, 5, 6, 7))
    inputs, targets = clients[1].data.support
    clients[1]._data = ClientData((inputs * float("nan"), targets), clients[1].data.query)
    found, wanted = by_cohort(clients), one_by_one(clients)
    assert np.isnan(found.pop(1)[0][0]).all()
    assert np.isnan(wanted.pop(1)[0][0]).all()
    assert away(found, wanted, clients[0].get_parameters({})) < TOLERANCE[torch.float64]
    assert not warned


def test_clients_of_one_s_own_making_are_not_padded_either(warned):
    class Own(SGDClient):
        """Takes as many of its records as its name says."""

        def _batches(self, data, purpose, config):
            inputs, targets = data.all
            return iter([(inputs[: int(self.name)], targets[: int(self.name)])] * 2)

    clients = [
        Own(small_net(), data_of(5, 0, torch.float64), loss_fn=balanced, name=name, local_epochs=2)
        for name in ("5", "3", "4")
    ]
    for one in clients:
        one.model = clients[0].model
    rows = [cohort._Row(i, t) for i, t in enumerate(trainings(clients)[0])]
    with pytest.raises(ModelError, match="padding may change the loss"):
        cohort._together(rows)
    for found, wanted in zip(by_cohort(clients), one_by_one(clients), strict=True):
        assert same(found[0], wanted[0])
