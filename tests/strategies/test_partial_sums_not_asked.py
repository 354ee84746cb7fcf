"""No sums are asked for where anything reads single replies, and of no grid that knows none."""

from pathlib import Path

import numpy as np
import pytest
from flwr.app import MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg

from metabloom.strategies import (
    FedAvg,
    RuleStrategy,
    UserLevelPrivacy,
    guard,
    interpolate,
    median,
)
from metabloom.strategies.shell import roll_call
from metabloom.wire import from_record, to_record
from tests.strategies.summing_grid import BlockGrid, blocks_of
from tests.strategies.toy import Toy, start

ANY = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "POLL_S", 0.01)
    monkeypatch.setattr(roll_call, "GATHER_S", 0.05)


class ReadsReplies(FedAvg):
    """A strategy of a user's that looks at the clients' arrays."""

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        self.seen = [len(reply.content["arrays"]) for reply in replies]
        return super().aggregate_train(server_round, replies)


def of_arrays(contents: list[RecordDict], weight_key: str) -> MetricRecord:
    return MetricRecord({"arrays": float(sum(len(one["arrays"]) for one in contents))})


def private(tmp_path: Path) -> FedAvg:
    return FedAvg(
        user_privacy=UserLevelPrivacy(
            noise_multiplier=1.0,
            max_update_norm=1.0,
            expected_clients=8,
            target_delta=1e-3,
            ledger=tmp_path / "ledger.jsonl",
        ),
        **ANY,
    )


def with_its_own_function(_: Path) -> FedAvg:
    strategy = FedAvg(**ANY)
    ours = strategy.aggregate_train
    strategy.aggregate_train = lambda number, replies: ours(number, replies)
    return strategy


@pytest.mark.parametrize(
    "strategy",
    [
        lambda _: ReadsReplies(**ANY),
        lambda _: FedAvg(train_metrics_aggr_fn=of_arrays, **ANY),
        lambda _: FedAvg(aggregate=median(), **ANY),
        lambda _: FedAvg(partial_sums=False, **ANY),
        lambda _: RuleStrategy(interpolate(aggregate=lambda *args: median()(*args)), **ANY),
        lambda _: guard(FlowersFedAvg(**ANY)),
        lambda _: DifferentialPrivacyServerSideFixedClipping(FedAvg(**ANY), 0.1, 1.0, 8),
        private,
        with_its_own_function,
    ],
    ids=[
        *("a subclass", "metrics of arrays", "median", "off", "a user's rule", "guard"),
        *("a wrapper", "user-level privacy", "its own function"),
    ],
)
def test_no_sums_are_asked_for_where_single_replies_are_read(strategy, tmp_path: Path):
    grid = blocks_of()
    result = start(strategy(tmp_path), Toy(), nodes=8, rounds=1, grid=grid)
    assert not grid.last.handles
    assert result.arrays


def test_a_strategy_that_ran_by_itself_can_be_wrapped_after_that():
    strategy, grid = FedAvg(**ANY), blocks_of()
    start(strategy, Toy(), nodes=8, rounds=1, grid=grid)
    assert grid.last.summed == 8
    wrapped = DifferentialPrivacyServerSideFixedClipping(strategy, 0.1, 1.0, 8)
    start(wrapped, Toy(), nodes=8, rounds=1, grid=grid)
    assert not grid.last.handles


class Passing(Grid):
    """A grid around another one, that hands on whatever it does not know."""

    def __init__(self, app, **more) -> None:
        self.inner = BlockGrid(app, **more)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def send_and_receive(self, messages, *, timeout=None):
        return self.inner.send_and_receive(messages, timeout=timeout)

    def get_node_ids(self):
        return self.inner.get_node_ids()

    create_message = push_messages = pull_messages = set_run = run = None


class Changing(BlockGrid):
    """A grid that does something to replies, of which the sums know nothing."""

    def send_and_receive(self, messages, *, timeout=None):
        replies = list(super().send_and_receive(messages, timeout=timeout))
        assert all(
            reply.content.array_records
            for reply in replies
            if reply.metadata.message_type == "train"
        )
        return replies


@pytest.mark.parametrize("kind", [Passing, Changing])
def test_a_grid_that_was_not_written_for_sums_is_not_asked_for_them(kind: type):
    grid = kind(Toy().app(), num_nodes=8)
    model = to_record({"w": np.zeros(2, np.float32)})
    FedAvg(**ANY).start(grid, model, num_rounds=1, timeout=5)
    assert not grid.handles


def test_a_grid_that_sums_in_a_base_class_of_its_own_is_asked():
    class Named(BlockGrid):
        """Adds nothing."""

    grid = Named(Toy().app(), num_nodes=8)
    FedAvg(**ANY).start(grid, to_record({"w": np.zeros(2, np.float32)}), num_rounds=1, timeout=5)
    assert grid.summed == 8


class SendsAnother(FedAvg):
    """A strategy of a user's that sends other arrays than those of the round."""

    def configure_train(self, server_round, arrays, config, grid):
        messages = list(super().configure_train(server_round, arrays, config, grid))
        other = {name: value + np.float32(1) for name, value in from_record(arrays).items()}
        for message in messages:
            message.content = RecordDict({**message.content, "arrays": to_record(other)})
        return messages


def test_a_strategy_that_sends_other_arrays_gets_single_replies():
    grid = blocks_of()
    model = {"w": np.zeros(2, np.float32), "frozen": np.zeros(1, np.float32)}
    toy = Toy(learns=lambda arrays, i, _: {**arrays, "w": arrays["w"] + np.float32(i)})
    result = start(SendsAnother(**ANY), toy, nodes=8, rounds=1, grid=grid, arrays=model)
    assert grid.last.handles
    assert grid.last.summed == 0
    assert from_record(result.arrays)["frozen"] == 1
