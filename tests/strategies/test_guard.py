"""``guard(strategy)``: what it adds to other people's strategies, and what it leaves alone."""

import time

import numpy as np
import pytest
from flwr.app import MetricRecord
from flwr.serverapp import strategy as flowers
from flwr.serverapp.exception import AggregationError

from metabloom.errors import ConfigError, MetabloomError
from metabloom.sim import CohortGrid
from metabloom.strategies import FedMeta, Firewall, RunResult, guard
from metabloom.wire import from_record, to_record
from tests.strategies.bad_replies import (
    BAD_REPLIES,
    GridWithout,
    arrays_of,
    grid_with,
    metrics_of,
    with_value,
)
from tests.strategies.toy import Arrays, Toy, bits, model, moved

FEW = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 4}

InOrder = grid_with(lambda message: message)  # Flower samples, and so sums, in a random order


def run(
    strategy: flowers.Strategy,
    grid: type[CohortGrid] = InOrder,
    *,
    toy: Toy | None = None,
    rounds: int = 2,
    arrays: Arrays | None = None,
    timeout: float = 5,
) -> RunResult:
    nodes = grid((toy or Toy()).app(), num_nodes=5)
    record = to_record(arrays or {"bias": np.array([0.1, -0.2]), "w": np.ones(3, np.float32)})
    return strategy.start(nodes, record, num_rounds=rounds, timeout=timeout)


# --- what it leaves alone -------------------------------------------------------------------------


def test_the_replies_are_not_written_into():
    """FedMedian empties the records that it gets."""
    kept = []

    def keep(message):
        kept.append((message, bits(message.content["arrays"])))
        return message

    run(guard(flowers.FedMedian(**FEW)), grid_with(keep, bad=range(5)))
    assert len(kept) == 10
    assert all(bits(message.content["arrays"]) == before for message, before in kept)


def test_its_name_says_whom_it_guards():
    assert repr(guard(flowers.FedAdam())) == "guard(FedAdam)"


# --- dtypes ---------------------------------------------------------------------------------------


def test_counters_stay_whole_numbers_where_flower_alone_makes_floats_of_them():
    bare = from_record(run(flowers.FedAvg(**FEW), arrays=model()).arrays)
    assert bare["batches"].dtype == np.float64
    guarded = from_record(run(guard(flowers.FedAvg(**FEW)), arrays=model()).arrays)
    assert guarded["batches"].dtype == np.int64
    assert int(guarded["batches"]) == 9  # each client counts one more in each of two rounds
    for name in ("weight", "bias", "temperature", "half"):
        assert bits(to_record({name: bare[name]})) == bits(to_record({name: guarded[name]}))


def test_clients_that_compute_in_float32_stay_good_where_fedadam_sends_float64():
    sent = []

    def in_float32(arrays: Arrays, partition: int, number: int) -> Arrays:
        sent.append(arrays["w"].dtype)
        new = moved(arrays, partition, number)
        return {name: value.astype(np.float32) for name, value in new.items()}

    start = {"w": np.ones(3, np.float32)}
    result = run(guard(flowers.FedAdam(**FEW)), toy=Toy(learns=in_float32), arrays=start, rounds=3)
    assert np.dtype(np.float64) in sent
    assert not any(report.quarantined for report in result.rounds)
    bare = run(flowers.FedAdam(**FEW), toy=Toy(learns=in_float32), arrays=start, rounds=3)
    assert bits(result.arrays) == bits(bare.arrays)


# --- rounds that are skipped ----------------------------------------------------------------------


def test_below_the_quorum_the_model_stays():
    grid = grid_with(BAD_REPLIES["NaN"].tamper)
    result = run(guard(flowers.FedAvg(**FEW), min_fit_replies=5), grid)
    assert [report.skipped for report in result.rounds] == [True, True]
    assert from_record(result.arrays)["bias"].tolist() == [0.1, -0.2]


def test_a_model_that_is_not_finite_is_not_taken_and_leaves_no_trace_in_the_strategy():
    """A momentum that became infinite would stay so for ever."""
    calls = []

    def huge_in_round_1(message):
        calls.append(0)
        return with_value(1e308)(message) if len(calls) <= 5 else message

    firewall = Firewall(max_value=1.7e308)
    strategy = flowers.FedAvgM(server_momentum=0.9, server_learning_rate=10.0, **FEW)
    result = run(guard(strategy, firewall=firewall), grid_with(huge_in_round_1, bad=range(5)))
    assert [report.skipped for report in result.rounds] == [True, False]
    assert all(np.isfinite(value).all() for value in from_record(result.arrays).values())
    assert all(np.isfinite(value).all() for value in strategy.momentum_vector)


class WantsAll(flowers.FedAvg):
    """A strategy that cannot do with fewer than five replies."""

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        if len(replies) < 5:
            raise AggregationError("five are needed")
        return super().aggregate_train(server_round, replies)


class AlwaysFails(flowers.FedAvg):
    def aggregate_train(self, server_round, replies):
        raise AggregationError("a mistake in the strategy")


def test_a_strategy_that_cannot_do_with_fewer_replies_skips_the_round(caplog):
    result = run(guard(WantsAll(**FEW)), grid_with(BAD_REPLIES["NaN"].tamper))
    assert [report.skipped for report in result.rounds] == [True, True]
    assert "WantsAll: AggregationError" in caplog.text
    assert "five are needed" in caplog.text


def test_a_mistake_in_the_strategy_itself_is_logged_with_its_traceback(caplog):
    result = run(guard(AlwaysFails(**FEW)))
    assert [report.skipped for report in result.rounds] == [True, True]
    assert "guard(AlwaysFails) fails in round 1" in caplog.text
    assert "Traceback" in caplog.text
    assert "a mistake in the strategy" in caplog.text


def test_bulyan_with_too_few_replies_skips_the_round():
    result = run(guard(flowers.Bulyan(num_malicious_nodes=1, **FEW)))
    assert [report.skipped for report in result.rounds] == [True, True]


# --- metrics that a strategy needs ----------------------------------------------------------------


def test_a_reply_without_the_loss_that_qfedavg_needs_is_refused():
    strategy = flowers.QFedAvg(client_learning_rate=0.1, train_loss_key="loss", **FEW)
    result = run(guard(strategy), grid_with(metrics_of(loss=None)))
    reference = run(
        flowers.QFedAvg(client_learning_rate=0.1, train_loss_key="loss", **FEW), GridWithout
    )
    assert bits(result.arrays) == bits(reference.arrays)
    assert [report.quarantined[0][1] for report in result.rounds] == [
        "metric 'loss' is missing, or not one number from 0 to the largest weight"
    ] * 2


def test_metrics_that_only_some_send_are_averaged_over_those():
    result = run(guard(flowers.FedAvg(**FEW)), grid_with(metrics_of(extra=4.0)), rounds=1)
    metrics = result.train_metrics_clientapp[1]
    assert metrics["extra"] == 4.0
    bare = run(flowers.FedAvg(**FEW), grid_with(lambda message: message), rounds=1)
    assert metrics["loss"] == bare.train_metrics_clientapp[1]["loss"]


def test_a_metric_that_diverged_in_an_evaluation_is_left_out_by_name():
    class Diverges(Toy):
        def _evaluate(self, message, context):
            answer = super()._evaluate(message, context)
            if context.node_config["partition-id"] == 1:
                answer.content["metrics"] = MetricRecord({"loss": np.nan, "num-examples": 2})
            return answer

    result = run(guard(flowers.FedAvg(**FEW)), toy=Diverges(), rounds=1)
    ((_, reason),) = result.rounds[0].quarantined
    assert reason == "metric 'loss' holds NaN or infinity: left out"
    weights, losses = [1, 3, 4, 5], [0.0, 0.2, 0.3, 0.4]
    assert result.evaluate_metrics_clientapp[1]["loss"] == pytest.approx(
        np.average(losses, weights=weights)
    )


def test_the_report_of_each_round_tells_bytes_metrics_and_its_own_seconds():
    began = time.perf_counter()
    result = run(guard(flowers.FedAvg(**FEW)), rounds=3)
    took = time.perf_counter() - began
    size = len(to_record({"b": np.zeros(2)})["b"].data) + len(
        to_record({"w": np.ones(3, np.float32)})["w"].data
    )
    for report in result.rounds:
        assert report.bytes_down == report.bytes_up == 5 * size
        assert report.train_metrics == dict(result.train_metrics_clientapp[report.round])
        assert len(report.clients) == 5
    assert 0 < sum(report.seconds for report in result.rounds) < took  # one after the other


# --- wrappers, bounds, waits ----------------------------------------------------------------------


def test_a_strategy_inside_another_one_is_guarded_by_its_own_weights():
    inner = flowers.FedAvg(weighted_by_key="loss", fraction_evaluate=0.0, **FEW)
    wrapped = flowers.DifferentialPrivacyServerSideFixedClipping(inner, 0.0, 1.0, 5)
    result = run(guard(wrapped), grid_with(metrics_of(num_examples=0)))
    assert not any(report.skipped or report.quarantined for report in result.rounds)
    assert guard(wrapped).weighted_by_key == "loss"


def test_updates_can_be_clipped():
    firewall = Firewall(max_update_norm=0.5, norm_action="clip", max_value=1e31)
    start = {"bias": np.array([0.0, 0.0])}
    far = arrays_of(lambda arrays: {"bias": np.array([3e9, 4e9])})
    result = run(
        guard(flowers.FedAvg(**FEW), firewall=firewall),
        grid_with(far, bad=range(5)),
        arrays=start,
        rounds=1,
    )
    assert from_record(result.arrays)["bias"].tolist() == pytest.approx([0.3, 0.4])


def test_the_wait_for_nodes_ends_with_a_clear_error():
    strategy = flowers.FedAvg(min_available_nodes=9)
    with pytest.raises(MetabloomError, match=r"5 nodes are connected, .* start more SuperNodes"):
        run(guard(strategy), timeout=0.05)


def test_nodes_that_come_at_the_last_moment_are_not_refused():
    class ComeLate(InOrder):
        asked = 0

        def get_node_ids(self):
            self.asked += 1
            return list(super().get_node_ids())[: 4 if self.asked <= 2 else 5]

    strategy = flowers.FedAvg(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=5)
    result = run(guard(strategy), ComeLate, timeout=0.5, rounds=1)  # Flower asks again after 1 s
    assert len(result.rounds[0].clients) == 4  # of those that were there at first


def test_what_cannot_be_guarded_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"guard\(FedXgbBagging\): its clients answer with trees"):
        guard(flowers.FedXgbBagging())
    with pytest.raises(ConfigError, match=r"guard\(str\): a strategy of flwr\.serverapp"):
        guard("fedavg")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"guard\(FedMeta\): it has this firewall already"):
        guard(FedMeta())
    with pytest.raises(ConfigError, match="min_fit_replies = 0"):
        guard(flowers.FedAvg(), min_fit_replies=0)
