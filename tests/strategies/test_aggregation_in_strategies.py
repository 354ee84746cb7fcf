"""Aggregations beside Flower's strategies, under attack, and inside ours."""

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, MultiKrum

from metabloom.config import RunConfig
from metabloom.sim import CohortGrid
from metabloom.strategies import (
    STRATEGIES,
    FedAvg,
    Reply,
    interpolate,
    mean,
    median,
    multi_krum,
    recipe,
    server_optimizer,
    trimmed_mean,
)
from metabloom.strategies.recipe import Recipe, aggregation_of
from metabloom.task import idle_keys
from metabloom.wire import from_record
from tests.strategies.toy import (
    AVERAGING,
    OF_MODELS,
    PLAIN,
    ShuffledGrid,
    Toy,
    bits,
    model,
    moved,
    start,
    strategy_of,
)

RESISTANT = {"median": median(), "trimmed-mean": trimmed_mean(0.2), "multi-krum": multi_krum(2)}
FLOATING = [name for name, value in model().items() if np.issubdtype(value.dtype, np.floating)]


def stacked(replies, name):
    return np.stack([reply.arrays[name] for reply in replies]).astype(np.float64)  # (n, ...)


# --- Flower's own ---------------------------------------------------------------------------------


ANY_NUMBER = {"min_train_nodes": 1, "min_available_nodes": 1, "fraction_evaluate": 0.0}


def random_replies(count):
    """Return replies near the toy's model, whose counter they turned."""
    rng = np.random.default_rng(count)
    return [
        Reply({n: np.asarray(v + rng.normal(size=v.shape), v.dtype) for n, v in model().items()}, 1)
        for _ in range(count)
    ]


def flowers(strategy, sent, replies):
    """Return what one round of Flower's own strategy makes of the floating arrays.

    FedMedian and FedTrimmedAvg pop each array out of the messages that they get: clients answer
    anew in each run. None of the three writes into an array.
    """
    toy = Toy(learns=lambda arrays, i, _: {name: replies[i].arrays[name] for name in arrays})
    return from_record(start(strategy, toy, nodes=len(replies), rounds=1, arrays=sent).arrays)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_the_median_is_flowers(count):
    sent, replies = model(), random_replies(count)
    found = median()(sent, replies, "uniform")
    theirs = flowers(FedMedian(**ANY_NUMBER), sent, replies)
    for name in FLOATING:  # a mean of two, exact in float64, rounded to the dtype by each
        assert found[name].astype(sent[name].dtype).tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.2, 0.45])
@pytest.mark.parametrize("count", [1, 5, 10])
def test_the_trimmed_mean_is_flowers(count, beta):
    sent, replies = model(), random_replies(count)
    found = trimmed_mean(beta)(sent, replies, "uniform")
    theirs = flowers(FedTrimmedAvg(beta=beta, **ANY_NUMBER), sent, replies)
    for name in FLOATING:  # theirs sums in the dtype: ten additions of values below 4
        tolerance = 40 * np.finfo(sent[name].dtype).eps
        np.testing.assert_allclose(found[name], theirs[name], rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("selected", [1, 4, 8])
@pytest.mark.parametrize("malicious", [0, 1, 3])
def test_multi_krum_is_flowers_where_models_are_far_apart(malicious, selected):
    rng = np.random.default_rng(malicious)
    sent = {"w": np.zeros(10)}
    replies = [Reply({"w": rng.normal(size=10)}, i + 1) for i in range(9)]
    found = multi_krum(malicious, selected)(sent, replies, "examples")
    theirs = MultiKrum(num_malicious_nodes=malicious, num_nodes_to_select=selected, **ANY_NUMBER)
    # another model selected is off by 0.1; nine float64 additions of values below 4
    wanted = flowers(theirs, sent, replies)["w"]
    np.testing.assert_allclose(found["w"], wanted, rtol=0, atol=1e-14)


# --- attacks --------------------------------------------------------------------------------------

ATTACKS = {
    "flipped": lambda update, rng: -update,
    "flipped and scaled by 1e6": lambda update, rng: -1e6 * update,
    "scaled by 1e6": lambda update, rng: 1e6 * update,
    "noise": lambda update, rng: 1e3 * rng.normal(size=update.shape),
    "not a number": lambda update, rng: np.full_like(update, np.nan),
    "infinite": lambda update, rng: np.full_like(update, np.inf),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_two_bad_clients_of_ten_ruin_the_mean_and_nothing_else(attack):
    rng = np.random.default_rng(4)
    sent = {"a": rng.normal(size=(4, 3)), "b": rng.normal(size=20)}
    replies = []
    for client in range(10):
        updates = {name: 1 + 0.1 * rng.normal(size=value.shape) for name, value in sent.items()}
        if client in (0, 6):
            updates = {name: ATTACKS[attack](update, rng) for name, update in updates.items()}
        replies.append(Reply({name: sent[name] + updates[name] for name in sent}, client + 1))
    good = [reply for i, reply in enumerate(replies) if i not in (0, 6)]

    def among_the_good(found):
        return all(
            ((found[n] >= stacked(good, n).min(0)) & (found[n] <= stacked(good, n).max(0))).all()
            for n in sent
        )

    assert not among_the_good(mean(sent, replies, "examples"))
    for name, aggregate in RESISTANT.items():
        _, found = interpolate(aggregate=aggregate).update({}, sent, replies)
        assert among_the_good(found), name


# --- strategies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RESISTANT)
def test_an_attack_through_the_shell_leaves_the_model_among_the_good_ones(name):
    def learns(arrays, partition, number):
        if partition not in (2, 9):
            return moved(arrays, partition, number)
        return {key: np.asarray(value - 100, value.dtype) for key, value in arrays.items()}

    def run(aggregation):
        keys = {"aggregation": aggregation, "num-malicious": 2}
        strategy = strategy_of("fedavg", keys)
        return from_record(start(strategy, Toy(learns=learns), nodes=10, rounds=1).arrays)

    good = [Reply(moved(model(), partition, 1), 1) for partition in (0, 1, *range(3, 9))]
    weight = stacked(good, "weight")
    assert (run("mean")["weight"] < weight.min(axis=0)).all()
    found = run(name)["weight"]
    assert (found >= weight.min(axis=0)).all()
    assert (found <= weight.max(axis=0)).all()


def test_a_server_optimiser_keeps_its_state_over_medians():
    sent = {"w": np.array([1.0, -2.0]), "norm.running_var": np.array([1.0])}
    rule = server_optimizer(lambda params: torch.optim.Adam(params, lr=0.1), aggregate=median())
    by_hand = torch.tensor(sent["w"], requires_grad=True)
    optimizer = torch.optim.Adam([by_hand], lr=0.1)
    rng = np.random.default_rng(0)
    state, arrays = rule.init(sent), sent
    for _ in range(4):
        gradients = [rng.normal(size=2) for _ in range(4)] + [np.array([1e6, -1e6])]
        variances = [1.0, 2.0, 3.0, 4.0, 1e6]
        replies = [
            Reply({"w": arrays["w"] - g, "norm.running_var": np.array([v])}, 1)
            for g, v in zip(gradients, variances, strict=True)
        ]
        by_hand.grad = torch.from_numpy(np.median(gradients, axis=0))
        optimizer.step()
        state, arrays = rule.update(state, arrays, replies)
        # The gradient comes back out of w - (w - g), of numbers below 10.
        np.testing.assert_allclose(arrays["w"], by_hand.detach().numpy(), rtol=0, atol=1e-12)
        assert arrays["norm.running_var"] == 3.0


def wanted_by_hand(name, sent, replies):
    if name == "multi-krum":  # n = 5, f = 1: the mean of the four of lowest score
        rows = np.stack(
            [np.concatenate([r.arrays[n].ravel() for n in FLOATING]) for r in replies]
        ).astype(np.float64)
        squared = [sorted(((rows - row) ** 2).sum(axis=1)) for row in rows]
        worst = int(np.argmax([distances[1] + distances[2] for distances in squared]))
        replies = [reply for i, reply in enumerate(replies) if i != worst]
    cut = {"median": 2, "trimmed-mean": 1}.get(name, 0)
    last = len(replies) - cut
    return {n: np.sort(stacked(replies, n), axis=0)[cut:last].mean(axis=0) for n in FLOATING}


@pytest.mark.parametrize("aggregation", ["mean", *RESISTANT])
@pytest.mark.parametrize("strategy", AVERAGING)
def test_every_strategy_of_the_registry_takes_every_aggregation(strategy, aggregation):
    keys = {**PLAIN, "aggregation": aggregation, "weighting": "uniform"}
    sent = model()
    found = from_record(start(strategy_of(strategy, keys), Toy(), rounds=1).arrays)
    wanted = wanted_by_hand(aggregation, sent, [Reply(moved(sent, i, 1), 1) for i in range(5)])
    for name in FLOATING:  # each rounds once to the dtype, of numbers below 4
        eps = 4 * np.finfo(sent[name].dtype).eps
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=eps, err_msg=name)


@pytest.mark.parametrize("aggregation", RESISTANT)
@pytest.mark.parametrize("strategy", OF_MODELS)
def test_two_rounds_give_the_same_bits_in_whatever_order_replies_come(strategy, aggregation):
    plain, shuffled = (
        start(strategy_of(strategy, {"aggregation": aggregation}), Toy(), rounds=2, grid=grid)
        for grid in (CohortGrid, ShuffledGrid)
    )
    assert bits(plain.arrays) == bits(shuffled.arrays)
    assert [report.failures for report in plain.rounds] == [(), ()]


# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "idle"),
    [
        ({"trim-beta": 0.1, "num-malicious": 2, "num-selected": 3}, "all"),
        ({"aggregation": "trimmed-mean", "trim-beta": 0.1}, ""),
        ({"aggregation": "multi-krum", "num-malicious": 2, "num-selected": 3}, ""),
        ({"aggregation": "multi-krum", "trim-beta": 0.1, "weighting": "uniform"}, "trim-beta"),
        ({"aggregation": "median", "num-selected": 3}, "num-selected"),
        ({"aggregation": "median", "weighting": "uniform"}, "weighting"),
        ({"aggregation": "trimmed-mean", "weighting": "uniform"}, "weighting"),
        ({"weighting": "uniform"}, ""),
    ],
)
@pytest.mark.parametrize("strategy", OF_MODELS)
def test_a_key_that_the_aggregation_does_not_use_is_told(strategy, keys, idle):
    told = idle_keys(RunConfig.read({"strategy": strategy, **keys}))
    assert told == (list(keys) if idle == "all" else idle.split())


def test_a_strategy_that_knows_no_aggregations_has_that_told(monkeypatch):
    monkeypatch.setattr(STRATEGIES, "_entries", {"plain": lambda config: Recipe(FedAvg, "sgd")})
    keys = {"strategy": "plain", "aggregation": "median"}
    assert idle_keys(RunConfig.read(keys)) == ["aggregation"]


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"aggregation": "trimmed-mean", "trim-beta": 0.4}, 3),
        ({"aggregation": "multi-krum", "num-malicious": 2}, 2),
        ({"aggregation": "multi-krum", "num-malicious": 0}, 22.6),
        ({"aggregation": "multi-krum", "num-selected": 1}, 2),
    ],
)
def test_an_aggregation_is_made_of_the_configured_numbers(keys, wanted):
    replies = [Reply({"w": np.array([v])}, 1) for v in (1.0, 2.0, 3.0, 7.0, 100.0)]
    found = aggregation_of(RunConfig.read(keys))({"w": np.zeros(1)}, replies, "uniform")["w"]
    assert found.item() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("keys", "few", "message"),
    [
        ({"aggregation": "median"}, 2, "median: 2 replies, it takes 3"),
        ({"aggregation": "trimmed-mean"}, 4, "trimmed-mean, trim-beta 0.2: 4 replies, it takes 5"),
        (
            {"aggregation": "multi-krum", "num-malicious": 2},
            6,
            "multi-krum, num-malicious 2: 6 replies, it takes 7",
        ),
        ({"aggregation": "multi-krum", "num-malicious": 0}, 0, ""),
        ({"aggregation": "trimmed-mean", "trim-beta": 0.0}, 0, ""),
        ({"aggregation": "mean"}, 0, ""),
    ],
)
def test_too_few_replies_are_told_once_with_the_numbers(keys, few, message, monkeypatch):
    lines = []
    monkeypatch.setattr(recipe, "log", lambda level, text, *values: lines.append(text % values))
    aggregate = aggregation_of(RunConfig.read(keys))
    for count in (few + 1, few, few, 1):
        replies = [Reply({"w": np.array([float(i)])}, 1) for i in range(max(count, 1))]
        aggregate({"w": np.zeros(1)}, replies, "uniform")
        if count > few:
            assert lines == []
    assert lines == ([f"{message} to resist a bad one"] if message else [])
