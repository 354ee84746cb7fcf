"""Whole cohorts at once: each client's result is what the eager loop gives it alone."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from metabloom.clients import ClientData, SGDClient, cohort, room, training
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
    distance,
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
        (Centred, CROSS_ENTROPY, "padding may change the loss (the model mixes records"),
        (small_net, partial(CROSS_ENTROPY, weight=torch.tensor([1.0, 2, 3]).double()), "padding"),
        (Hidden, CROSS_ENTROPY, "padding may change the loss"),
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


class Table(nn.Module):
    """Has a row of numbers for each of five tokens."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.rows(x.long()).mean(1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("token", [-1, 5, 7])
@pytest.mark.parametrize("part", [0, 1], ids=["support", "query"])
def test_an_input_out_of_range_reads_no_other_client_s_parameters(token, part, dtype):
    model = initialised(Table())

    def client(seed, spoilt):
        draw = torch.Generator().manual_seed(seed)
        split = [torch.randint(5, (3, 3), generator=draw).to(dtype) for _ in range(2)]
        if spoilt:
            split[part][2, 1] = token
        data = ClientData(*((inputs, torch.arange(3)) for inputs in split))
        return SGDClient(model, data, name=str(seed), local_epochs=3)

    clients = [client(seed, spoilt=seed == 1) for seed in range(3)]
    asked, sent = trainings(clients)
    outcomes = run_cohort(asked)
    assert isinstance(outcomes.pop(1), IndexError)
    del clients[1]
    found = [one.answered(out, sent, CONFIG) for one, out in zip(clients, outcomes, strict=True)]
    assert away(found, one_by_one(clients), sent) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("batch_size", [0, 4])
@pytest.mark.parametrize("kernel", ["eager", "compiled"])
def test_a_client_without_records_answers_what_it_received(batch_size, kernel):
    nothing = (torch.zeros(0, 3).double(), torch.zeros(0, dtype=torch.int64))
    clients = ragged("fedavg", sizes=(3, 3, 5), batch_size=batch_size, kernel=kernel)
    clients[1]._data = ClientData(nothing, nothing)
    for replies in (by_cohort(clients), one_by_one(clients)):
        assert same(replies[1][0], clients[1].get_parameters({}))
        assert replies[1][1] == 0
        assert not same(replies[0][0], clients[0].get_parameters({}))


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


def test_what_was_too_much_for_the_memory_is_remembered(monkeypatch):
    monkeypatch.setattr(room, "_bytes_of", {"group": 8.0, "other": 8.0})
    Room("group", torch.device("cpu")).halve(6)
    assert room._bytes_of == {"group": 16.0, "other": 8.0}


def test_room_on_a_cpu_is_a_constant():
    assert Room("any", torch.device("cpu")).clients() == 8
    assert Room("any", torch.device("cpu"), most=3).clients() == 3


def test_data_of_is_ragged():
    assert [data_of(size, 0, torch.float64).num_examples for size in (1, 2, 3)] == [3, 5, 4]
