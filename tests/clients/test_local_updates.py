"""Local updates against torch.optim and closed forms; batches against what they promise."""

import copy
from collections import Counter
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from metabloom.clients import ClientData, MetaBatch, maml_update, run_update, sgd_update
from metabloom.clients.batches import draw, minibatches, resplit
from tests.clients.toy_problems import (
    Point,
    flat,
    generator,
    parabola,
    quadratic_loss,
    records,
    small_net,
    weights,
)

CROSS_ENTROPY = nn.functional.cross_entropy

reproducible = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def head(name: str) -> bool:
    return name.startswith("head")


def three_batches():
    return [records(size, seed) for seed, size in enumerate((5, 4, 6))]


def by_torch(params, batches, *, lr, mu=0.0, anchor=None, train=None):
    """The oracle: an ordinary training loop, the penalty written into the loss."""
    model = small_net()
    model.load_state_dict(params)
    anchor = params if anchor is None else anchor
    for name, value in model.named_parameters():
        value.requires_grad_(train is None or train(name))
    moving = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(moving, lr=lr)
    for inputs, targets in batches:
        optimizer.zero_grad()
        away = sum(((v - anchor[n]) ** 2).sum() for n, v in model.named_parameters())
        (CROSS_ENTROPY(model(inputs), targets) + mu / 2 * away).backward()
        optimizer.step()
    return weights(model)


def assert_same_way(start, found, wanted):
    # Deltas, so that weights that stay put hide nothing. float64: the same sums, some in another
    # order, so a few roundings of numbers of size 1.
    torch.testing.assert_close(
        flat(found) - flat(start), flat(wanted) - flat(start), rtol=1e-11, atol=1e-14
    )


# --- SGD ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [None, head], ids=["all", "head"])
@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_sgd_and_fedprox_equal_torch_sgd_on_the_same_batches(mu, train):
    model = small_net()
    start = weights(model)
    update = sgd_update(model, CROSS_ENTROPY, lr=0.3, proximal_mu=mu, train=train)
    found = run_update(update, start, three_batches()).params
    wanted = by_torch(start, three_batches(), lr=0.3, mu=mu, train=train)
    assert_same_way(start, found, wanted)
    assert list(found) == list(start)
    if train is not None:
        assert all(torch.equal(found[n], start[n]) for n in start if not train(n))


def test_the_penalty_counts_on_every_batch():
    # An anchor that is a generator is exhausted after one batch: then only step 2 is pulled.
    model = small_net()
    start = weights(model)
    update = sgd_update(model, CROSS_ENTROPY, lr=0.3, proximal_mu=0.7)
    state = update.begin(start)
    for batch in three_batches():
        before = state.params
        state = update.step(state, batch)
        plain = by_torch(before, [batch], lr=0.3)
        pull = 0.3 * 0.7 * (flat(before) - flat(start))
        got = flat(plain) - flat(state.params)
        torch.testing.assert_close(got, pull, rtol=1e-10, atol=1e-14)  # float64, as above
    assert pull.norm() > 1e-2


def test_fedprox_on_a_parabola_comes_to_rest_half_way():
    # grad = a (w - c) + mu (w - w_t) = (w - 1) + w = 0 at 1/2; each step of .5 * (1 + 1) goes there
    # at once from anywhere, steps of .1 shrink the distance by .8: .8^200 = 4e-20.
    model = Point(theta=[0.0])
    for lr, steps in ((0.5, 1), (0.1, 200)):
        update = sgd_update(model, quadratic_loss, lr=lr, proximal_mu=1.0)
        found = run_update(update, weights(model), [parabola(1, 1)] * steps).params["theta"]
        assert found.item() == pytest.approx(0.5, abs=1e-14)  # roundings of 1e-16, damped


@reproducible
@given(
    a=st.floats(0.1, 3),
    c=st.floats(-3, 3),
    start=st.floats(-3, 3),
    anchor=st.floats(-3, 3),
    mu=st.floats(0, 3),
    steps=st.integers(1, 8),
)
def test_a_pulled_parabola_has_its_closed_form(a, c, start, anchor, mu, steps):
    # w - r shrinks by 1 - lr (a + mu) a step, around r = (a c + mu anchor) / (a + mu).
    update = sgd_update(
        Point(theta=[0.0]),
        quadratic_loss,
        lr=0.2,
        proximal_mu=mu,
        anchor={"theta": torch.tensor([anchor], dtype=torch.float64)},
    )
    params = {"theta": torch.tensor([start], dtype=torch.float64)}
    found = run_update(update, params, [parabola(a, c)] * steps).params["theta"].item()
    rest = (a * c + mu * anchor) / (a + mu)
    wanted = rest + (start - rest) * (1 - 0.2 * (a + mu)) ** steps
    assert found == pytest.approx(wanted, rel=1e-12, abs=1e-13)  # tens of roundings, sizes below 6


def test_ditto_s_personal_steps_are_those_of_its_formula():
    # v <- v - lr (grad F(v) + lambda (v - w)), from a v that is not w
    model = small_net()
    received, personal = weights(model), weights(small_net(seed=5))
    update = sgd_update(model, CROSS_ENTROPY, lr=0.3, proximal_mu=0.7, anchor=received)
    found = run_update(update, personal, three_batches()).params
    wanted = by_torch(personal, three_batches(), lr=0.3, mu=0.7, anchor=received)
    assert_same_way(personal, found, wanted)


def test_at_zero_strength_the_anchor_does_not_matter():
    model = small_net()
    start = weights(model)
    far = {name: value + 9 for name, value in start.items()}
    plain, pulled = (
        run_update(sgd_update(model, CROSS_ENTROPY, lr=0.3, **more), start, three_batches())
        for more in ({}, {"proximal_mu": 0.0, "anchor": far})
    )
    assert torch.equal(flat(plain.params), flat(pulled.params))


def test_the_loss_reported_is_the_mean_before_each_step():
    model = small_net()
    start = weights(model)
    result = run_update(sgd_update(model, CROSS_ENTROPY, lr=0.3), start, three_batches())
    wanted, at = [], start
    for batch in three_batches():
        own = copy.deepcopy(model)
        own.load_state_dict(at)
        wanted.append(CROSS_ENTROPY(own(batch[0]), batch[1]).item())
        at = by_torch(at, [batch], lr=0.3)
    assert result.metrics == {"train-loss": pytest.approx(sum(wanted) / 3, rel=1e-12)}


def meta_batches():
    return [MetaBatch(records(5, seed), records(4, seed + 10)) for seed in range(3)]


def test_maml_reports_the_mean_query_loss_after_adaptation():
    model = small_net()
    at, losses = weights(model), []
    update = maml_update(model, CROSS_ENTROPY, inner_lr=0.3, outer_lr=0.5)
    for batch in meta_batches():
        own = copy.deepcopy(model)
        own.load_state_dict(by_torch(at, [batch.support], lr=0.3))
        losses.append(CROSS_ENTROPY(own(batch.query[0]), batch.query[1]).item())
        at = run_update(update, at, [batch]).params
    result = run_update(update, weights(model), meta_batches())
    assert result.metrics == {"query-loss": pytest.approx(sum(losses) / 3, rel=1e-12)}
    assert torch.equal(flat(result.params), flat(at))


@pytest.mark.parametrize("kind", ["sgd", "maml"])
def test_an_update_changes_neither_model_nor_parameters_nor_batches(kind):
    model = small_net()
    if kind == "sgd":
        update = sgd_update(model, CROSS_ENTROPY, lr=0.3, proximal_mu=0.5)
        batches = three_batches()
    else:
        update = maml_update(model, CROSS_ENTROPY, inner_lr=0.3, outer_lr=0.5)
        batches = meta_batches()
    things = (weights(small_net(seed=1)), batches, model.state_dict())
    before = copy.deepcopy(things)
    dice = torch.random.get_rng_state()
    state = update.begin(things[0])
    states = [state]
    for batch in batches:
        state = update.step(state, batch)
        states.append(state)
    kept = [copy.deepcopy(each.params) for each in states]
    again = update.step(states[0], batches[0])  # an old state still works: nothing was overwritten
    assert torch.equal(flat(again.params), flat(states[1].params))
    torch.testing.assert_close([each.params for each in states], kept, rtol=0, atol=0)
    for now, then in zip(things[0].values(), before[0].values(), strict=True):
        assert torch.equal(now, then)
    for now, then in zip(things[2].values(), before[2].values(), strict=True):
        assert torch.equal(now, then)
    assert repr(things[1]) == repr(before[1])
    assert torch.equal(torch.random.get_rng_state(), dice)


# --- batches -----------------------------------------------------------------------------------


def numbered(size: int):
    """Records that can be told apart: the input is the number, the target its remainder by 3."""
    return torch.arange(float(size))[:, None], torch.arange(size) % 3


def numbers(batch):
    inputs, targets = batch
    assert torch.equal(inputs[:, 0].long() % 3, targets)  # inputs and targets stay together
    return inputs[:, 0].long().tolist()


@reproducible
@given(size=st.integers(1, 30), batch_size=st.integers(0, 35), epochs=st.integers(1, 3))
def test_minibatches_hold_each_record_once_an_epoch(size, batch_size, epochs):
    found = [
        numbers(batch)
        for batch in minibatches(
            numbered(size), batch_size=batch_size, epochs=epochs, generator=generator()
        )
    ]
    full = min(batch_size or size, size)
    lengths = [full] * (size // full) + ([size % full] if size % full else [])
    assert [len(batch) for batch in found] == lengths * epochs  # the last one may be short
    per_epoch = len(lengths)
    for epoch in range(epochs):
        part = found[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(chain.from_iterable(part)) == list(range(size))


def test_every_epoch_has_an_order_of_its_own_that_its_generator_decides():
    first, second = (
        numbers(b) for b in minibatches(numbered(20), batch_size=0, epochs=2, generator=generator())
    )
    assert first != second
    assert first != list(range(20))
    again, _ = minibatches(numbered(20), batch_size=0, epochs=2, generator=generator())
    assert numbers(again) == first
    other, _ = minibatches(numbered(20), batch_size=0, epochs=2, generator=generator(1))
    assert numbers(other) != first


@pytest.mark.parametrize("size", [0, 7, 8])
def test_a_draw_of_all_records_is_the_records_as_they_stand(size):
    inputs, targets = draw(numbered(7), size=size, generator=generator())
    assert torch.equal(inputs, numbered(7)[0])
    assert torch.equal(targets, numbered(7)[1])


def test_a_draw_has_different_records_each_equally_often():
    dice, counts = generator(), Counter()
    for _ in range(700):
        found = numbers(draw(numbered(7), size=3, generator=dice))
        assert len(set(found)) == 3
        counts.update(found)
    # Each is drawn with probability 3/7: 300 times in 700, deviation 13; five of them either way.
    assert all(abs(counts[number] - 300) < 65 for number in range(7))


@st.composite
def clients(draw_value):
    """A client of numbered records: a class for each, every one in support or query."""
    classes = draw_value(st.lists(st.integers(0, 4), min_size=1, max_size=25))
    in_support = draw_value(
        st.lists(st.booleans(), min_size=len(classes), max_size=len(classes)).map(torch.tensor)
    )
    inputs, targets = torch.arange(float(len(classes)))[:, None], torch.tensor(classes)
    return ClientData(
        (inputs[in_support], targets[in_support]), (inputs[~in_support], targets[~in_support])
    )


@reproducible
@given(data=clients(), seed=st.integers(0, 10**6))
def test_a_fresh_split_holds_every_record_once_with_the_support_s_class_counts(data, seed):
    fresh = resplit(data, generator=generator(seed))
    old, new = (
        dict(zip(pair[0][:, 0].tolist(), pair[1].tolist(), strict=True))
        for pair in (data.all, fresh.all)
    )
    assert new == old  # complete, and every input keeps its target
    assert len(new) == fresh.num_examples == data.num_examples  # no record is in both
    assert Counter(fresh.support[1].tolist()) == Counter(data.support[1].tolist())
    again = resplit(data, generator=generator(seed))
    assert torch.equal(again.support[0], fresh.support[0])
    assert torch.equal(again.query[0], fresh.query[0])


def test_fresh_splits_differ_and_every_record_comes_to_support_in_its_turn():
    data = ClientData(numbered(6), numbered(9))
    data = ClientData(data.support, (data.query[0] + 6, (data.query[1] + 6) % 3))
    dice, counts = generator(), Counter()
    for _ in range(300):
        counts.update(resplit(data, generator=dice).support[0][:, 0].long().tolist())
    # Each class has 2 of its 5 records in support: 120 times in 300, deviation 8.5; five of them.
    assert all(abs(counts[number] - 120) < 43 for number in range(15))


def test_a_split_leaves_the_client_s_own_records_and_the_global_generator():
    data = ClientData(numbered(6), numbered(9))
    before = copy.deepcopy(data)
    dice = torch.random.get_rng_state()
    resplit(data, generator=generator())
    for now, then in zip(data.support + data.query, before.support + before.query, strict=True):
        assert torch.equal(now, then)
    assert torch.equal(torch.random.get_rng_state(), dice)
