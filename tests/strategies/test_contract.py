"""What every strategy of the registry keeps, whatever its rule."""

import inspect
import random

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg

from metabloom.client_app import app as our_clients
from metabloom.client_app import client_fn
from metabloom.config import RunConfig
from metabloom.errors import ConfigError, MetabloomError
from metabloom.sim import CohortGrid
from metabloom.strategies import STRATEGIES
from metabloom.strategies.shell import roll_call
from metabloom.task import initial_arrays, server_parts
from metabloom.wire import from_record, to_record
from tests.strategies.toy import (
    AVERAGING,
    OF_MODELS,
    PERSONAL,
    PLAIN,
    GrowingGrid,
    ShuffledGrid,
    Toy,
    bits,
    exchanged,
    model,
    moved,
    start,
    strategy_of,
)

EVERY = pytest.mark.parametrize("name", list(STRATEGIES))
# The others' clients need more than a configuration: see their tests.
ALONE = [*AVERAGING, "feddf", "fedper", "fedrep", "lg-fedavg", "fedbabu"]
FIVE_ROLES = ("train", "unseen", "train", "validation", "train")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for missing nodes a moment, not half a minute."""
    monkeypatch.setattr(roll_call, "POLL_S", 0.01)
    monkeypatch.setattr(roll_call, "GATHER_S", 0.05)


# --- arrays ---------------------------------------------------------------------------------------


@EVERY
def test_names_order_shapes_and_dtypes_stay(name: str):
    result = start(strategy_of(name), Toy())
    new = from_record(result.arrays)
    assert list(new) == list(model())
    for key, value in model().items():
        assert new[key].shape == value.shape, key
        assert new[key].dtype == value.dtype, key


@pytest.mark.parametrize("name", OF_MODELS)
def test_every_floating_array_of_the_training_moves_and_all_others_keep_their_value(name: str):
    new = from_record(start(strategy_of(name, PLAIN), Toy(), rounds=1).arrays)
    for key, value in model().items():
        stays = np.issubdtype(value.dtype, np.integer) or key not in exchanged(name)
        assert np.array_equal(new[key], value) == stays, key


@EVERY
def test_what_the_caller_gives_is_not_written_into(name: str):
    initial = to_record(model())
    before = bits(initial)
    train_config, evaluate_config = ConfigRecord({"lr": 0.5}), ConfigRecord({"deep": True})
    strategy_of(name).start(
        CohortGrid(Toy().app(), num_nodes=3),
        initial,
        num_rounds=2,
        timeout=5,
        train_config=train_config,
        evaluate_config=evaluate_config,
    )
    assert bits(initial) == before
    assert dict(train_config) == {"lr": 0.5}
    assert dict(evaluate_config) == {"deep": True}


@EVERY
def test_the_callers_config_reaches_the_clients_with_the_round(name: str):
    toy = Toy()
    start(strategy_of(name), toy, nodes=1, rounds=2, train_config=ConfigRecord({"lr": 0.5}))
    sent = [
        config for (kind, _), config in zip(toy.asked, toy.configs, strict=True) if kind == "train"
    ]
    assert [config["server-round"] for config in sent] == [1, 2]
    assert all(config["lr"] == 0.5 for config in sent)


@EVERY
def test_the_order_of_replies_does_not_matter_to_the_bit(name: str):
    plain, shuffled = (
        start(strategy_of(name), Toy(roles=FIVE_ROLES), rounds=3, grid=grid)
        for grid in (CohortGrid, ShuffledGrid)
    )
    assert bits(plain.arrays) == bits(shuffled.arrays)
    assert plain.train_metrics_clientapp == shuffled.train_metrics_clientapp
    assert plain.unseen == shuffled.unseen
    assert [r.validation for r in plain.rounds] == [r.validation for r in shuffled.rounds]


@EVERY
def test_the_ids_of_nodes_do_not_matter_to_the_bit(name: str):
    one, other = (
        start(strategy_of(name, clients_per_round=2), Toy(), rounds=3, grid_seed=seed)
        for seed in (0, 1)
    )
    assert bits(one.arrays) == bits(other.arrays)
    assert [r.clients for r in one.rounds] == [r.clients for r in other.rounds]


@pytest.mark.parametrize("name", OF_MODELS)
def test_clients_that_learn_nothing_leave_the_model(name: str):
    echo = Toy(learns=lambda arrays, partition, number: arrays)
    new = from_record(start(strategy_of(name), echo, nodes=3, rounds=3).arrays)
    for key, value in model().items():
        # The float64 mean of equal values may err by 1e-16; Adam divides that by its eps of 1e-8.
        np.testing.assert_allclose(new[key], value, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", [name for name in OF_MODELS if name not in PERSONAL])
def test_with_one_client_the_model_is_that_clients(name: str):
    new = from_record(start(strategy_of(name, PLAIN), Toy(), nodes=1, rounds=1).arrays)
    sent = {key: value for key, value in model().items() if key in exchanged(name)}
    for key, value in moved(sent, partition=0, server_round=1).items():
        if np.issubdtype(value.dtype, np.floating):
            # fedmeta steps by w - w_i in the dtype of w: one rounding of each.
            np.testing.assert_allclose(new[key], value, rtol=2 * np.finfo(value.dtype).eps)


@pytest.mark.parametrize("name", ALONE)
def test_with_one_client_of_ours_the_model_is_its_local_run(name: str):
    values = {"strategy": name, "num-clients": 3, "eval-steps": "1", "device": "cpu", **PLAIN}
    config = RunConfig.read(values)
    initial = initial_arrays(config)
    grid = CohortGrid(our_clients, num_nodes=3, run_config=config.to_flower())
    strategy = strategy_of(name, values, **server_parts(config))
    result = strategy.start(grid, to_record(initial), num_rounds=1, timeout=60)
    ((trained,),) = [report.clients for report in result.rounds]
    partition = int(trained.removeprefix("client-"))
    place = {"partition-id": partition, "num-partitions": 3}
    context = Context(1, 1, place, RecordDict(), run_config=config.to_flower())
    alone, _, _ = client_fn(context).fit(list(initial.values()), {"server-round": 1})
    for new, value in zip(from_record(result.arrays).values(), alone, strict=True):
        np.testing.assert_allclose(new, value, rtol=0, atol=1e-7)  # fedmeta: w - (w - w_i), float32
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(alone, initial.values(), strict=True))


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AVERAGING)
def test_a_client_that_fails_is_left_out_and_the_weights_are_those_of_the_others(name: str):
    def fails(partition: int, number: int) -> str:
        return "out of memory" if partition == 2 else ""

    strategy = strategy_of(name, {**PLAIN, "weighting": "examples"})
    result = start(strategy, Toy(fails=fails), nodes=3, rounds=1)
    new = from_record(result.arrays)
    one, two = (moved(model(), partition, 1) for partition in (0, 1))  # of 1 and of 2 examples
    for key in ("weight", "bias", "temperature"):
        expected = one[key] / 3 + 2 * two[key] / 3
        np.testing.assert_allclose(new[key], expected, rtol=1e-6)  # float32 arithmetic
    (report,) = result.rounds
    assert report.clients == ("partition-0", "partition-1", "partition-2")
    (failure,) = report.failures[:1]
    assert failure[0] == "partition-2"
    assert "out of memory" in failure[1]


@EVERY
def test_a_round_without_an_answer_leaves_the_model_and_the_run_goes_on(name: str):
    def fails(partition: int, number: int) -> str:
        return "power cut" if number == 2 else ""

    grown = start(strategy_of(name, eval_every=0), Toy(fails=fails), nodes=2, rounds=2)
    once = start(strategy_of(name, eval_every=0), Toy(), nodes=2, rounds=1)
    assert bits(grown.arrays) == bits(once.arrays)
    assert [len(report.failures) for report in grown.rounds] == [0, 2]
    assert list(grown.train_metrics_clientapp) == [1]


@EVERY
def test_a_run_without_any_answer_ends_with_the_initial_model_and_every_reason(name: str):
    toy = Toy(fails=lambda partition, number: f"disk {partition} is full")
    result = start(strategy_of(name, eval_every=0), toy, nodes=2, rounds=2)
    assert bits(result.arrays) == bits(to_record(model()))
    assert [report.skipped for report in result.rounds] == [True, True]
    for report in result.rounds:
        assert [client for client, _ in report.failures] == ["partition-0", "partition-1"]
        assert all(f"disk {i} is full" in report.failures[i][1] for i in range(2))


# --- sampling -------------------------------------------------------------------------------------


def sample(name: str, seed: int) -> list[tuple[str, ...]]:
    strategy = strategy_of(name, seed=seed, clients_per_round=3)
    return [report.clients for report in start(strategy, Toy(), nodes=9, rounds=4).rounds]


@EVERY
def test_the_seed_decides_the_sample(name: str):
    assert sample(name, seed=1) == sample(name, seed=1)
    assert sample(name, seed=1) != sample(name, seed=2)
    assert len(set(sample(name, seed=1))) > 1  # another one each round
    assert all(len(set(clients)) == 3 for clients in sample(name, seed=1))


def seed_global_state(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the legacy global state is what must stay untouched
    torch.manual_seed(seed)


def global_state() -> list[str]:
    return [
        str(random.getstate()),
        str(np.random.get_state()),  # noqa: NPY002
        str(torch.get_rng_state().tolist()),
    ]


@EVERY
def test_global_random_state_is_neither_read_nor_changed(name: str):
    seed_global_state(1)
    before = global_state()
    first = sample(name, seed=0)
    assert global_state() == before
    seed_global_state(2)
    assert global_state() != before
    assert sample(name, seed=0) == first


@EVERY
def test_fewer_nodes_than_wanted_all_take_part(name: str):
    result = start(strategy_of(name, clients_per_round=8), Toy(), nodes=3, rounds=1)
    assert result.rounds[0].clients == ("partition-0", "partition-1", "partition-2")


# --- the shell's arguments ------------------------------------------------------------------------


def mean_of_metrics(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    return MetricRecord({"seen": float(len(contents)), "weighted-by": len(weighted_by_key)})


@EVERY
def test_every_keyword_argument_of_flowers_fedavg_is_accepted_and_kept(name: str):
    values = {
        "fraction_train": 0.5,
        "fraction_evaluate": 0.25,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
        "min_available_nodes": 3,
        "weighted_by_key": "num-examples",
        "arrayrecord_key": "arrays",
        "configrecord_key": "config",
        "train_metrics_aggr_fn": mean_of_metrics,
        "evaluate_metrics_aggr_fn": mean_of_metrics,
    }
    assert set(values) == set(inspect.signature(FlowersFedAvg).parameters)
    strategy = strategy_of(name, **values)
    assert {key: getattr(strategy, key) for key in values} == values
    result = start(strategy, Toy(), nodes=8, rounds=1)
    assert len(result.rounds[0].clients) == 4  # fraction_train
    assert len(result.rounds[0].validation) == 2  # fraction_evaluate
    assert result.train_metrics_clientapp[1]["seen"] == 4
    assert result.evaluate_metrics_clientapp[1]["seen"] == 2


@EVERY
def test_an_unknown_keyword_is_refused_by_name(name: str):
    with pytest.raises(TypeError, match="fraction_fit"):
        strategy_of(name, fraction_fit=0.5)


@EVERY
@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"clients_per_round": 0}, "clients_per_round = 0"), ({"eval_every": -1}, "eval_every = -1")],
)
def test_a_shell_argument_out_of_range_is_refused_by_name(name: str, wrong: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        strategy_of(name, **wrong)


@EVERY
def test_a_strategy_that_runs_twice_starts_anew(name: str):
    strategy = strategy_of(name, clients_per_round=2)
    first = start(strategy, Toy(roles=FIVE_ROLES), rounds=2)
    again = start(strategy, Toy(roles=FIVE_ROLES), rounds=2)
    assert bits(first.arrays) == bits(again.arrays)
    assert [r.clients for r in first.rounds] == [r.clients for r in again.rounds]
    assert len(again.rounds) == 2
    # ... also where the nodes of the second grid are others, with other roles.
    other = start(strategy, Toy(roles=("train",) * 3), nodes=3, rounds=1)
    assert other.clients == {"train": 3, "validation": 0, "unseen": 0}


# --- roles and nodes ------------------------------------------------------------------------------


@EVERY
def test_only_training_clients_train_and_only_unseen_ones_judge_the_final_model(name: str):
    toy = Toy(roles=FIVE_ROLES)
    strategy = strategy_of(name)
    result = start(strategy, toy, rounds=2)
    assert set(toy.partitions("train")) == {0, 2, 4}
    # Training clients that keep something of their own score too.
    at_the_end = [1, 0, 2, 4] if strategy.scores_training_clients else [1]
    assert toy.partitions("evaluate") == [3, 3, *at_the_end]  # validation in each round
    assert [score.client for score in result.unseen] == ["c1"]
    assert result.unseen[0].metrics == {"loss": pytest.approx(0.1)}
    assert result.unseen[0].num_examples == 2
    assert [score.client for r in result.rounds for score in r.validation] == ["c3", "c3"]
    assert result.clients == {"train": 3, "validation": 1, "unseen": 1}


@EVERY
def test_validation_comes_every_so_many_rounds(name: str):
    toy = Toy(roles=FIVE_ROLES)
    result = start(strategy_of(name, eval_every=2), toy, rounds=5)
    assert [bool(report.validation) for report in result.rounds] == [False, True] * 2 + [False]
    toy = Toy(roles=FIVE_ROLES)
    start(strategy_of(name, eval_every=0), toy, rounds=2)
    assert 3 not in toy.partitions("evaluate")


@EVERY
def test_nodes_that_cannot_answer_the_roll_call_train(name: str):
    toy = Toy(answers_roll_call=False)
    result = start(strategy_of(name), toy, nodes=3, rounds=1)
    assert sorted(toy.partitions("train")) == [0, 1, 2]
    assert result.clients == {"train": 3, "validation": 0, "unseen": 0}
    assert all(client.startswith("node-") for client in result.rounds[0].clients)
    assert not result.rounds[0].failures  # not knowing the query is no failure


@EVERY
def test_a_node_that_joins_late_is_asked_once_and_takes_part(name: str):
    toy = Toy(roles=("train", "train", "unseen"))
    result = start(strategy_of(name), toy, nodes=3, rounds=3, grid=GrowingGrid)
    assert toy.roll_calls == [0, 1, 2]
    assert toy.partitions("evaluate")[0] == 2
    assert result.clients["unseen"] == 1
    toy = Toy(roles=("train",) * 3)
    start(strategy_of(name), toy, nodes=3, rounds=3, grid=GrowingGrid)
    assert toy.partitions("train") == [0, 1, 0, 1, 2, 0, 1, 2]


@EVERY
def test_too_few_nodes_end_the_run_with_both_numbers(name: str):
    strategy = strategy_of(name, min_available_nodes=4)
    grid = CohortGrid(Toy().app(), num_nodes=2)
    with pytest.raises(MetabloomError, match=r"2 nodes are connected, .* 4 are needed"):
        strategy.start(grid, to_record(model()), num_rounds=1, timeout=0.05)


@EVERY
def test_bytes_are_counted_in_both_directions(name: str):
    toy = Toy()
    (report,) = start(strategy_of(name, eval_every=0), toy, nodes=3, rounds=1).rounds
    sent = {key: value for key, value in model().items() if key in exchanged(name)}
    size = sum(len(array.data) for array in to_record(sent).values())
    if name not in OF_MODELS:  # 32 records of two classes, their round, and which they are
        size = 32 * 2 * 4 + 8 + 16 + 3 * 128
    if name not in ("fednova", "scaffold"):  # there more than the model travels
        assert toy.sizes == [size] * 3
    teacher = size if name == "teacher-student" else 0  # in the first message that a client gets
    assert report.bytes_up == sum(toy.sizes)
    assert report.bytes_down == sum(toy.sizes) + 3 * teacher
