"""Whole cohorts at once: each client's result is what the eager loop gives it alone."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from metabloom.clients import ClientData, SGDClient, cohort, objective, training
from metabloom.clients.batches import pad
from metabloom.clients.cohort import run_cohort
from metabloom.clients.room import Room
from metabloom.errors import ModelError
from metabloom.models import build_model
from tests.clients.cohorts import (
    CONFIG,
    RULES,
    TOLERANCE,
    away,
    by_cohort,
    data_of,
    one_by_one,
    ragged,
    trainings,
)
from tests.clients.small_clients import same
from tests.clients.toy_problems import Shifted, initialised, records, small_net, weights

CROSS_ENTROPY = nn.functional.cross_entropy
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


@pytest.fixture
def warned(monkeypatch):
    """The warnings of the cohort."""
    said = []
    monkeypatch.setattr(cohort, "log", lambda level, text, *values: said.append(text % values))
    return said


def distance(clients, **options):
    found = by_cohort(clients, **options)
    return away(found, one_by_one(clients), clients[0].get_parameters({}))


# --- the same as the eager loop ----------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("rule", RULES)
def test_a_ragged_cohort_equals_its_clients_one_by_one(rule, dtype, warned):
    assert distance(ragged(rule, dtype)) < TOLERANCE[dtype]
    assert not warned


@pytest.mark.parametrize("rule", ["fedavg", "maml-batches"])
def test_neither_the_chunks_nor_the_other_clients_matter(rule):
    clients = ragged(rule)
    whole = by_cohort(clients, most=100)
    for most in (1, 2, 5):
        far = away(by_cohort(clients, most=most), whole, clients[0].get_parameters({}))
        assert far < TOLERANCE[torch.float64]
    some = [clients[i] for i in (9, 4, 7)]
    far = away(by_cohort(some), [whole[i] for i in (9, 4, 7)], clients[0].get_parameters({}))
    assert far < TOLERANCE[torch.float64]


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("mlp", (1, 8, 8), {"hidden": 8}),
        ("cnn", (1, 8, 8), {"dense": 8}),
        ("conv4", (1, 8, 8), {"width": 8}),
        ("char-lstm", (5,), {"hidden": 6}),
    ],
)
@pytest.mark.parametrize("rule", ["fedavg", "maml"])
def test_the_models_of_the_library_can_be_computed_at_once(name, shape, options, rule, warned):
    model = build_model(name, input_shape=shape, num_classes=3, seed=0, **options).double()
    clients = ragged(rule, sizes=(3, 4, 4), model=model, local_lr=0.3) if rule == "fedavg" else []
    clients = clients or ragged(rule, sizes=(3, 4, 4), model=model)
    for seed, one in enumerate(clients):
        draw = torch.Generator().manual_seed(seed)
        split = [
            torch.randint(3, (len(y), *shape), generator=draw)
            if name == "char-lstm"
            else torch.randn(len(y), *shape, generator=draw, dtype=torch.float64)
            for _, y in (one.data.support, one.data.query)
        ]
        one._data = ClientData((split[0], one.data.support[1]), (split[1], one.data.query[1]))
    assert distance(clients) < TOLERANCE[torch.float64]
    assert not warned


def test_clients_that_begin_at_different_models_do_not_mix():
    clients = ragged("fedprox", sizes=(3, 5, 5))
    starts = [weights(small_net(seed)) for seed in range(3)]
    pairs = list(zip(clients, starts, strict=True))
    found = run_cohort([one.training(start, CONFIG) for one, start in pairs])
    for (one, start), result in zip(pairs, found, strict=True):
        wanted = training.run_eagerly(one.training(start, CONFIG), one.data)
        for name, value in wanted.params.items():
            torch.testing.assert_close(result.params[name], value, rtol=1e-12, atol=1e-14)


def test_a_client_that_has_ended_takes_no_more_steps():
    # 1, 2 and 4 steps: were the short ones to go on, they would end at other models.
    clients = ragged("fedavg", sizes=(4, 7, 13), local_epochs=1)
    steps = [
        one.training(one.load(one.get_parameters({})), CONFIG).steps(one.data) for one in clients
    ]
    assert steps == [2, 3, 4]
    assert distance(clients) < TOLERANCE[torch.float64]


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


# --- what goes another way ---------------------------------------------------------------------


class Centred(nn.Module):
    """Mixes the records of a batch."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x):
        return self.head(x - x.mean(0))


class Hidden(nn.Module):
    """Draws random numbers where nobody can see it."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x):
        return self.head(nn.functional.dropout(x, 0.5))


def dropout():
    return nn.Sequential(nn.Dropout(0.5), initialised(nn.Linear(3, 3, dtype=torch.float64)))


def frozen():
    model = small_net()
    model.body.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "loss_fn", "says"),
    [
        (Centred, CROSS_ENTROPY, "padding changes the loss"),
        (small_net, partial(CROSS_ENTROPY, weight=torch.tensor([1.0, 2, 3]).double()), "padding"),
        (Hidden, CROSS_ENTROPY, "run one after another"),
        (dropout, CROSS_ENTROPY, ""),
        (frozen, CROSS_ENTROPY, ""),
        (lambda: initialised(Shifted()).double(), CROSS_ENTROPY, ""),  # has buffers
    ],
    ids=["mixes", "class-weights", "hidden-dropout", "dropout", "frozen", "buffers"],
)
def test_what_cannot_be_computed_at_once_is_computed_eagerly(model, loss_fn, says, warned):
    clients = ragged("fedavg", sizes=(3, 5, 7), model=model(), loss_fn=loss_fn)
    for found, wanted in zip(by_cohort(clients), one_by_one(clients), strict=True):
        assert same(found[0], wanted[0])
    assert len(warned) == bool(says)
    assert says in "".join(warned)


def test_a_loss_with_class_weights_is_known_by_classes_that_no_client_has():
    # Each client has class 0 alone, for which the weighted mean is the mean.
    clients = ragged(
        "fedavg", sizes=(3, 5), loss_fn=partial(CROSS_ENTROPY, weight=torch.arange(3.0).double())
    )
    for seed, one in enumerate(clients):
        (x, y), (xq, yq) = one.data.support, one.data.query
        one._data = ClientData((x, y * 0), (xq, yq * 0))
        assert seed < 2
    with pytest.raises(ModelError, match="padding changes the loss"):
        cohort._check_padding([cohort._Row(i, t) for i, t in enumerate(trainings(clients)[0])])


def test_options_without_a_hash_are_no_obstacle():
    rates = {name: torch.full_like(value, 0.1) for name, value in weights(small_net()).items()}
    clients = ragged("maml", sizes=(3, 5), inner_lr=rates)
    for found, wanted in zip(by_cohort(clients), one_by_one(clients), strict=True):
        assert same(found[0], wanted[0])


# --- one client hurts no other -----------------------------------------------------------------


def fails():
    raise OSError("its disk is gone")


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (fails, OSError),
        (ClientData(records(3, 0), (torch.zeros(2, 3).double(), torch.tensor([0, 7]))), ModelError),
        (
            ClientData(records(3, 0), (torch.zeros(2, 3).double(), torch.tensor([0, -1]))),
            ModelError,
        ),
        (ClientData((torch.zeros(3, 9).double(), torch.arange(3)), records(2, 0)), RuntimeError),
    ],
    ids=["no-data", "class-too-large", "negative-class", "other-shape"],
)
def test_a_client_that_raises_is_alone_with_it(data, error, warned):
    clients = ragged("fedavg", sizes=(3, 5, 5, 3))
    wanted = by_cohort(clients)
    bad = SGDClient(clients[0].model, data, name="bad", batch_size=4, local_epochs=2)
    asked, sent = trainings(clients)
    params = asked[0].params
    asked.insert(1, bad.training(params, CONFIG))
    outcomes = run_cohort(asked)
    assert isinstance(outcomes.pop(1), error)
    found = [one.answered(out, sent, CONFIG) for one, out in zip(clients, outcomes, strict=True)]
    assert away(found, wanted, sent) < TOLERANCE[torch.float64]
    assert not warned


def test_an_empty_part_is_computed_alone():
    clients = ragged("maml", sizes=(3, 5))
    empty = (torch.zeros(0, 3).double(), torch.zeros(0, dtype=torch.int64))
    clients[0]._data = ClientData(clients[0].data.support, empty)
    (found, _), (wanted, _) = by_cohort(clients), one_by_one(clients)
    np.testing.assert_array_equal(found[0][0], wanted[0][0])  # NaN: a mean of nothing


# --- memory ------------------------------------------------------------------------------------


def test_too_many_clients_for_the_memory_are_computed_in_halves(monkeypatch, warned):
    clients, together, sizes = ragged("fedavg", sizes=(5,) * 7), cohort._together, []

    def small(rows):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("too many")
        return together(rows)

    monkeypatch.setattr(cohort, "_together", small)
    assert distance(clients) < TOLERANCE[torch.float64]
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert not warned


def test_where_one_client_is_too_many_each_runs_eagerly(monkeypatch, warned):
    clients = ragged("fedavg", sizes=(5, 5))

    def none(rows):
        raise torch.OutOfMemoryError("too many")

    monkeypatch.setattr(cohort, "_together", none)
    for found, wanted in zip(by_cohort(clients), one_by_one(clients), strict=True):
        assert same(found[0], wanted[0])
    assert "one client needs more memory than there is" in warned[0]


def test_room_on_a_cpu_is_a_constant():
    assert Room("any", torch.device("cpu")).clients() == 8
    assert Room("any", torch.device("cpu"), most=3).clients() == 3


def test_data_of_is_ragged():
    assert [data_of(size, 0, torch.float64).num_examples for size in (1, 2, 3)] == [3, 5, 4]
