"""Bad replies, one by one, under every strategy of ours and under guarded ones of Flower's.

The run ends normally, the bad reply is named, and the result is that of the other clients alone, to
the bit.
"""

import re

import numpy as np
import pytest
from flwr.serverapp import strategy as flowers

from metabloom.sim import CohortGrid
from metabloom.strategies import RunResult, guard
from metabloom.strategies.shell import roll_call
from metabloom.wire import to_record
from tests.strategies.bad_replies import BAD, BAD_REPLIES, GridWithout, grid_with
from tests.strategies.toy import OF_MODELS, Arrays, Toy, bits, model, start, strategy_of

EVERY = pytest.mark.parametrize("name", OF_MODELS)  # of the others: test_public_consensus.py
FLOWERS = {
    "FedAvg": lambda **shared: flowers.FedAvg(**shared),
    "FedAvgM": lambda **shared: flowers.FedAvgM(server_momentum=0.9, **shared),
    "FedAdam": lambda **shared: flowers.FedAdam(**shared),
    "FedYogi": lambda **shared: flowers.FedYogi(**shared),
    "FedMedian": lambda **shared: flowers.FedMedian(**shared),
    "FedTrimmedAvg": lambda **shared: flowers.FedTrimmedAvg(**shared),
    "Krum": lambda **shared: flowers.Krum(num_malicious_nodes=1, **shared),
    "MultiKrum": lambda **shared: flowers.MultiKrum(num_nodes_to_select=3, **shared),
}
EVERY_OF_FLOWERS = pytest.mark.parametrize("flower", list(FLOWERS))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "POLL_S", 0.01)
    monkeypatch.setattr(roll_call, "GATHER_S", 0.05)


def only_floats() -> Arrays:
    """Return a model without counters, whose dtype Flower's own strategies change."""
    return {name: value for name, value in model().items() if value.dtype != np.int64}


def run_of_flowers(flower: str, grid: type[CohortGrid], *, guarded: bool) -> RunResult:
    shared = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 4}
    strategy = FLOWERS[flower](**shared)
    nodes = grid(Toy().app(), num_nodes=5)
    return (guard(strategy) if guarded else strategy).start(
        nodes, to_record(only_floats()), num_rounds=2, timeout=5
    )


def assert_named(result: RunResult, client: str, said: str) -> None:
    for report in result.rounds:
        ((named, reason),) = (*report.failures, *report.quarantined)
        assert named == client
        assert re.search(said, reason), reason


@pytest.mark.parametrize("how", list(BAD_REPLIES))
@EVERY
def test_a_bad_reply_is_named_and_the_others_decide_the_model_to_the_bit(name: str, how: str):
    bad = BAD_REPLIES[how]
    result = start(strategy_of(name), Toy(), grid=grid_with(bad.tamper))
    reference = start(strategy_of(name), Toy(), grid=GridWithout if bad.said else CohortGrid)
    assert bits(result.arrays) == bits(reference.arrays)
    assert not any(report.skipped for report in result.rounds)
    if bad.said:
        assert_named(result, f"partition-{BAD}", bad.said)
        assert result.train_metrics_clientapp == reference.train_metrics_clientapp
    else:
        assert not any(report.quarantined or report.failures for report in result.rounds)


@pytest.mark.parametrize("how", list(BAD_REPLIES))
@EVERY_OF_FLOWERS
def test_a_guarded_strategy_of_flowers_gives_the_model_of_the_good_replies(flower: str, how: str):
    bad = BAD_REPLIES[how]
    grid = grid_with(bad.tamper)
    result = run_of_flowers(flower, grid, guarded=True)
    reference = run_of_flowers(
        flower, GridWithout if bad.said else grid_with(lambda m: m), guarded=False
    )
    assert bits(result.arrays) == bits(reference.arrays)
    assert not any(report.skipped for report in result.rounds)
    if bad.said:
        node = list(grid(Toy().app(), num_nodes=5).partitions)[BAD]
        assert_named(result, f"node-{node}", bad.said)
        assert result.train_metrics_clientapp == reference.train_metrics_clientapp


@EVERY_OF_FLOWERS
def test_with_good_replies_a_guard_changes_nothing(flower: str):
    grid = grid_with(lambda message: message)
    guarded, bare = (run_of_flowers(flower, grid, guarded=one) for one in (True, False))
    assert bits(guarded.arrays) == bits(bare.arrays)
    assert guarded.train_metrics_clientapp == bare.train_metrics_clientapp
    assert guarded.evaluate_metrics_clientapp == bare.evaluate_metrics_clientapp


ALL_BAD = ["raises", "no reply in time", "NaN", "weight 0", "two ArrayRecords", "extra array"]


@pytest.mark.parametrize("how", ALL_BAD)
@EVERY
def test_where_all_replies_are_bad_the_model_stays_and_all_are_named(name: str, how: str):
    grid = grid_with(BAD_REPLIES[how].tamper, bad=range(5))
    result = start(strategy_of(name), Toy(), grid=grid)
    assert bits(result.arrays) == bits(to_record(model()))
    assert [report.skipped for report in result.rounds] == [True, True]
    for report in result.rounds:
        named = [client for client, _ in (*report.failures, *report.quarantined)]
        assert named == [f"partition-{index}" for index in range(5)]


@pytest.mark.parametrize("how", ALL_BAD)
@EVERY_OF_FLOWERS
def test_where_all_replies_are_bad_a_guarded_model_stays(flower: str, how: str):
    grid = grid_with(BAD_REPLIES[how].tamper, bad=range(5))
    result = run_of_flowers(flower, grid, guarded=True)
    assert bits(result.arrays) == bits(to_record(only_floats()))
    assert [report.skipped for report in result.rounds] == [True, True]
    assert all(len((*r.failures, *r.quarantined)) == 5 for r in result.rounds)


@EVERY
def test_a_good_round_after_a_skipped_one_is_the_first_to_move_the_model(name: str):
    """The skipped round leaves no trace in the rule's state."""

    def bad_in_round_1(message):
        rounds.append(0)
        return BAD_REPLIES["NaN"].tamper(message) if len(rounds) <= 5 else message

    rounds: list[int] = []
    result = start(strategy_of(name), Toy(), rounds=2, grid=grid_with(bad_in_round_1, bad=range(5)))
    assert [report.skipped for report in result.rounds] == [True, False]

    def of_round_2(arrays: Arrays, partition: int, number: int) -> Arrays:
        return toy.learns(arrays, partition, number + 1)

    toy = Toy()
    alone = start(strategy_of(name), Toy(learns=of_round_2), rounds=1)
    assert bits(result.arrays) == bits(alone.arrays)
