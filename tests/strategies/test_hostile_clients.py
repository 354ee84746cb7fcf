"""What clients can do besides bad arrays: claim roles and names, answer twice, omit metrics."""

from collections.abc import Iterable

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flowers

from metabloom.errors import MetabloomError
from metabloom.sim import CohortGrid
from metabloom.strategies import RunResult, guard
from metabloom.strategies.shell import roll_call
from metabloom.wire import from_record, to_record
from tests.strategies.bad_replies import BAD, grid_with, metrics_of, with_value
from tests.strategies.toy import Arrays, Toy, bits, model, moved, start, strategy_of

FEW = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 5}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "POLL_S", 0.01)
    monkeypatch.setattr(roll_call, "GATHER_S", 0.05)


def says(partition: int, **properties: object) -> type[Toy]:
    """Return clients of which one answers the roll call with other words."""

    class Says(Toy):
        def _answer_roll_call(self, message, context):
            answer = super()._answer_roll_call(message, context)
            if context.node_config["partition-id"] == partition:
                for name, value in properties.items():
                    answer.content["properties"][name.replace("_", "-")] = value
            return answer

    return Says


# --- the roll call --------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["train", "validation", "unseen", "surplus", "emperor", [1.5]])
def test_one_node_that_claims_a_role_sends_nobody_home(role: object):
    toy = says(2, role=role)()
    result = start(strategy_of("fedavg"), toy, rounds=1)
    trained = {0, 1, 3, 4} | ({2} if role in ("train", "emperor", [1.5]) else set())
    assert set(toy.partitions("train")) == trained
    assert not result.rounds[0].skipped


def test_a_node_that_cannot_take_part_and_comes_first_does_not_end_the_run():
    class ComesFirst(CohortGrid):
        calls = 0

        def get_node_ids(self) -> Iterable[int]:
            self.calls += 1
            ids = list(self.partitions)
            return ids[:1] if self.calls == 1 else ids

    toy = says(0, error="no disk")()
    result = start(strategy_of("fedavg", min_available_nodes=3), toy, rounds=1, grid=ComesFirst)
    assert set(toy.partitions("train")) == {1, 2, 3, 4}
    assert result.rounds[0].failures == (("partition-0", "no disk"),)


def test_where_no_node_can_take_part_the_run_ends_at_once_with_the_reason():
    class Broken(Toy):
        def _answer_roll_call(self, message, context):
            answer = super()._answer_roll_call(message, context)
            answer.content["properties"]["error"] = "no data"
            return answer

    with pytest.raises(MetabloomError, match="no node can take part; partition-0 says: no data"):
        start(strategy_of("fedavg"), Broken())


def test_a_node_under_anothers_name_is_told_apart_and_the_other_is_not_blamed():
    roles = ("train",) * 5
    grid = grid_with(with_value(np.nan), bad=[0])
    toy = says(0, client_name="c4")(roles=roles)
    result = start(strategy_of("fedavg", max_offences=1), toy, rounds=3, grid=grid)
    ids = list(grid(Toy().app(), num_nodes=5).partitions)
    ((named, _),) = result.rounds[0].quarantined
    assert named == f"c4 (node-{ids[0]})"
    assert toy.partitions("train") == [*range(5), 1, 2, 3, 4, 1, 2, 3, 4]
    assert result.rounds[1].clients == ("c1", "c2", "c3", f"c4 (node-{ids[4]})")


def test_what_nodes_say_of_themselves_is_cut_short():
    toy = says(1, client_name="x" * 10**6, error="y" * 10**6)(roles=("train",) * 5)
    result = start(strategy_of("fedavg"), toy, rounds=1)
    ((name, reason),) = result.rounds[0].failures
    assert len(name) <= 103
    assert len(reason) <= 503


# --- answers that nobody asked for ----------------------------------------------------------------


class Repeats(CohortGrid):
    """A grid on which the reply of one client comes twenty times, among things that are none."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None):
        replies = list(super().send_and_receive(messages, timeout=timeout))
        is_train = replies and replies[0].metadata.message_type == "train"
        return [*replies, *[replies[-1]] * 19, "no message", None] if is_train else replies


class Volunteers(CohortGrid):
    """A grid on which a client answers a message that it made up."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None):
        replies = list(super().send_and_receive(messages, timeout=timeout))
        if replies and replies[0].metadata.message_type == "train":
            question = Message(RecordDict(), 99, "train")
            question.metadata.__dict__["_message_id"] = "made-up"
            arrays = to_record({name: np.full_like(value, 9) for name, value in model().items()})
            metrics = MetricRecord({"num-examples": 5, "loss": 0.1})
            content = RecordDict({"arrays": arrays, "metrics": metrics})
            replies.append(Message(content, reply_to=question))
        return replies


@pytest.mark.parametrize("grid", [Repeats, Volunteers])
def test_of_several_replies_one_counts_and_of_unasked_ones_none(grid: type[CohortGrid]):
    plain = start(strategy_of("fedavg"), Toy())
    result = start(strategy_of("fedavg"), Toy(), grid=grid)
    assert bits(result.arrays) == bits(plain.arrays)
    assert not any(report.failures for report in result.rounds)


# --- functions and strategies that count on something ---------------------------------------------


def worst(contents: list[RecordDict], weight_key: str) -> MetricRecord:
    """Return the largest loss: a user's function, which counts on there being one."""
    return MetricRecord({"worst": max(content["metrics"]["loss"] for content in contents)})


@pytest.mark.parametrize("loss", [None, [1.0, 2.0]])
def test_a_reply_without_the_usual_metrics_does_not_reach_a_users_function(loss: object):
    grid = grid_with(metrics_of(loss=loss))
    shell = {"train_metrics_aggr_fn": worst, "evaluate_metrics_aggr_fn": worst}
    result = start(strategy_of("fedavg", **shell), Toy(), grid=grid)
    assert result.train_metrics_clientapp[1]["worst"] == 1.0
    assert result.evaluate_metrics_clientapp[1]["worst"] == pytest.approx(0.4)
    plain = start(strategy_of("fedavg"), Toy())
    assert bits(result.arrays) == bits(plain.arrays)  # its model counts


def test_a_users_function_that_raises_is_logged_and_the_usual_mean_takes_its_place(caplog):
    def broken(contents: list[RecordDict], weight_key: str) -> MetricRecord:
        raise ZeroDivisionError("a loss of 0")

    result = start(strategy_of("fedavg", train_metrics_aggr_fn=broken), Toy(), rounds=1)
    usual = start(strategy_of("fedavg"), Toy(), rounds=1)
    assert result.train_metrics_clientapp == usual.train_metrics_clientapp
    assert "the usual mean takes its place" in caplog.text
    assert "a loss of 0" in caplog.text


def guarded(strategy: flowers.Strategy, grid: type[CohortGrid], **more) -> RunResult:
    arrays = {"bias": np.array([0.1, -0.2]), "w": np.ones(3, np.float32)}
    nodes = grid(Toy(**more).app(), num_nodes=5)
    return guard(strategy).start(nodes, to_record(arrays), num_rounds=2, timeout=5)


def test_a_guard_keeps_a_users_function_from_replies_without_the_usual_metrics():
    shell = {"train_metrics_aggr_fn": worst, "evaluate_metrics_aggr_fn": worst}
    result = guarded(flowers.FedAvg(**shell, **FEW), grid_with(metrics_of(loss=None)))
    assert result.train_metrics_clientapp[1]["worst"] == 1.0
    ((_, reason),) = result.rounds[0].quarantined
    assert reason.startswith("its metrics are not those of most replies")


def test_a_client_that_echoes_the_model_skips_a_round_of_a_wrapper_that_divides_by_its_norm():
    def echo(arrays: Arrays, partition: int, number: int) -> Arrays:
        return arrays if partition == BAD and number == 1 else moved(arrays, partition, number)

    inner = flowers.FedAvg(**FEW)
    wrapped = flowers.DifferentialPrivacyServerSideFixedClipping(inner, 0.0, 1.0, 5)
    result = guarded(wrapped, CohortGrid, learns=echo)
    assert [report.skipped for report in result.rounds] == [True, False]


@pytest.mark.parametrize("loss", [-5.0, 1e300])
def test_a_loss_that_qfedavg_cannot_do_with_is_refused_by_name(loss: float):
    strategy = flowers.QFedAvg(client_learning_rate=0.1, train_loss_key="loss", **FEW)
    result = guarded(strategy, grid_with(metrics_of(loss=loss)))
    assert [len(report.quarantined) for report in result.rounds] == [1, 1]
    assert not any(report.skipped for report in result.rounds)


def test_a_counter_that_counts_nothing_does_not_become_the_models():
    counts = {"n": np.array(3), "w": np.ones(2)}

    def absurd(arrays: Arrays, partition: int, number: int) -> Arrays:
        return {**arrays, "n": np.array(2**63 - 1) if partition == BAD else np.array(4)}

    nodes = CohortGrid(Toy(learns=absurd).app(), num_nodes=5)
    result = guard(flowers.FedAvg(**FEW)).start(nodes, to_record(counts), num_rounds=1, timeout=5)
    assert int(from_record(result.arrays)["n"]) == 3


# --- metrics without end, and honest giants -------------------------------------------------------


def test_metrics_without_end_are_refused():
    many = {f"m{i}": 1.0 for i in range(1001)}
    result = start(strategy_of("fedavg"), Toy(), rounds=1, grid=grid_with(metrics_of(**many)))
    assert "1003 metrics: at most 1000" in result.rounds[0].quarantined[0][1]
    long = grid_with(metrics_of(**{"x" * 300: 1.0}))
    result = start(strategy_of("fedavg"), Toy(), rounds=1, grid=long)
    assert "a metric has a name of more than 200" in result.rounds[0].quarantined[0][1]


def test_many_metrics_that_diverged_make_one_note():
    class Diverges(Toy):
        def _evaluate(self, message, context):
            answer = super()._evaluate(message, context)
            wild = {f"m{i}": float("nan") for i in range(900)}
            answer.content["metrics"] = MetricRecord({**answer.content["metrics"], **wild})
            return answer

    result = start(strategy_of("fedavg"), Diverges(), nodes=1, rounds=1)
    assert result.rounds[0].quarantined == (
        ("partition-0", "900 metrics, 'm0' the first, hold NaN or infinity: left out"),
    )


def test_a_client_with_most_of_the_records_is_no_offender_and_is_heard_in_evaluations():
    class Giant(Toy):
        def _train(self, message, context):
            return self._with_weight(super()._train(message, context), context)

        def _evaluate(self, message, context):
            return self._with_weight(super()._evaluate(message, context), context)

        def _with_weight(self, answer, context):
            if context.node_config["partition-id"] == 1:
                answer.content["metrics"]["num-examples"] = 10_000
            return answer

    result = start(strategy_of("fedavg", max_offences=1), Giant(), rounds=3)
    assert [len(report.quarantined) for report in result.rounds] == [1, 1, 1]  # still sampled
    assert all(len(report.validation) == 5 for report in result.rounds)
