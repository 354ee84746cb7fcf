"""client_app: one client serves Message-API servers and the roll call."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common import (
    FitIns,
    ndarrays_to_parameters,
)
from flwr.compat.common import recorddict_compat as compat
from flwr.supercore.task_identity import TaskIdentity

from metabloom.clients import MAMLClient, SGDClient, client_app
from metabloom.errors import WireError
from metabloom.sim import CohortGrid
from tests.clients.messages import (
    NAMED,
    Echo,
    arrays_of,
    as_numpy,
    ask,
    learner,
    message_of,
    place,
    record_of,
)


@pytest.fixture(autouse=True)
def _running_task(monkeypatch):
    # Flower keeps the identity of the running task in the process; messages are born with it.
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


# --- Message API -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SGDClient, MAMLClient])
@pytest.mark.parametrize("reverse", [False, True], ids=["same-order", "other-order"])
def test_training_gives_back_each_array_under_its_name(kind, reverse):
    own = learner(kind)
    sent = arrays_of(own)
    wanted, num_examples, metrics = learner(kind).fit(list(sent.values()), {"server-round": 2})
    order = list(reversed(sent)) if reverse else list(sent)
    content = ask(
        client_app(lambda context: learner(kind)),
        "train",
        {"arrays": record_of(sent, order), "config": ConfigRecord({"server-round": 2})},
    )
    assert set(content) == {"arrays", "metrics"}
    found = as_numpy(content["arrays"])
    assert tuple(found) == own.array_names
    for name, array in zip(own.array_names, wanted, strict=True):
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == sent[name].dtype
        assert found[name].shape == sent[name].shape
    assert dict(content["metrics"]) == {**metrics, "num-examples": num_examples}


@pytest.mark.parametrize("reverse", [False, True], ids=["same-order", "other-order"])
def test_an_evaluation_gives_loss_metrics_and_number_of_records(reverse):
    own = learner()
    sent = arrays_of(own)
    loss, num_query, metrics = own.evaluate(list(sent.values()), {})
    order = list(reversed(sent)) if reverse else list(sent)
    content = ask(
        client_app(lambda context: learner()), "evaluate", {"arrays": record_of(sent, order)}
    )
    assert set(content) == {"metrics"}
    wanted = {"loss": loss, **metrics, "num-examples": num_query}
    assert dict(content["metrics"]) == wanted


def test_the_config_reaches_the_client_with_its_types_and_lists():
    echo = Echo()
    config = {"server-round": 3, "lr": 0.5, "on": True, "text": "x", "raw": b"y", "many": [1, 2]}
    ask(client_app(lambda context: echo), "train", message_of(config=config))
    ((_, got),) = echo.seen
    assert got == config
    assert {key: type(value) for key, value in got.items()} == {
        key: type(value) for key, value in config.items()
    }


def test_a_message_without_a_config_gives_the_client_an_empty_one():
    echo = Echo()
    ask(client_app(lambda context: echo), "evaluate", {"arrays": record_of(NAMED)})
    assert echo.seen[0][1] == {}


def test_a_client_that_knows_no_names_serves_in_the_server_s_order():
    echo = Echo()
    content = ask(client_app(lambda context: echo), "train", message_of())
    ((given, _),) = echo.seen
    assert [a.tolist() for a in given] == [a.tolist() for a in NAMED.values()]
    found = as_numpy(content["arrays"])
    assert list(found) == list(NAMED)
    for name, array in NAMED.items():
        np.testing.assert_array_equal(found[name], 2 * array)
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
    assert dict(content["metrics"]) == {"num-examples": 17}


@pytest.mark.parametrize("reverse", [False, True], ids=["same-order", "other-order"])
def test_arrays_that_are_only_numbered_go_by_their_number(reverse):
    own = learner()
    arrays = list(arrays_of(own).values())
    wanted, _, _ = learner().fit(arrays, {})
    record = ArrayRecord(arrays)
    if reverse:
        record = ArrayRecord(dict(reversed(record.items())))
    content = ask(client_app(lambda context: own), "train", {"arrays": record})
    found = as_numpy(content["arrays"])
    assert list(found) == [str(position) for position in range(len(arrays))]
    for got, right in zip(found.values(), wanted, strict=True):
        np.testing.assert_array_equal(got, right)


def test_the_client_cannot_write_into_the_message():
    class Writer(Echo):
        def fit(self, parameters, config):
            parameters[0][:] = 7
            return parameters, 1, {}

    with pytest.raises(ValueError, match="read-only"):
        ask(client_app(lambda context: Writer()), "train", message_of())


def test_a_client_is_made_for_each_message_from_its_context():
    contexts = []

    def make(context):
        contexts.append(context)
        return Echo()

    app, here = client_app(make), place()
    ask(app, "train", message_of(), context=here)
    ask(app, "evaluate", message_of(), context=here)
    assert [each is here for each in contexts] == [True, True]


# --- metrics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_numbers_go_to_the_metric_record_and_text_to_a_config_record(kind):
    metrics = {
        "loss-x": np.float32(0.5),
        "count": np.int64(3),
        "good": True,
        "f": 1.5,
        "i": 2,
        "who": "anna",
        "raw": b"\x01",
    }
    content = ask(client_app(lambda context: Echo(metrics=metrics)), kind, message_of())
    numbers = {"loss-x": 0.5, "count": 3, "good": 1, "f": 1.5, "i": 2}
    own = {"num-examples": 17} if kind == "train" else {"loss": 0.5, "num-examples": 4}
    assert isinstance(content["metrics"], MetricRecord)
    assert dict(content["metrics"]) == numbers | own
    assert type(content["metrics"]["count"]) is int
    assert type(content["metrics"]["loss-x"]) is float
    assert isinstance(content["properties"], ConfigRecord)
    assert dict(content["properties"]) == {"who": "anna", "raw": b"\x01"}


def test_without_text_there_is_one_record_of_metrics():
    content = ask(client_app(lambda context: Echo(metrics={"f": 1.5})), "train", message_of())
    assert set(content) == {"arrays", "metrics"}


# --- roll call ---------------------------------------------------------------------------------


def called(app, context):
    content = ask(app, "query.roll_call", {"config": ConfigRecord()}, context=context)
    assert set(content) == {"properties"}
    return dict(content["properties"])


def test_the_roll_call_answers_the_node_s_place_and_the_client_s_properties():
    assert called(client_app(lambda context: learner()), place(3, 7)) == {
        "partition-id": 3,
        "num-partitions": 7,
        "client": "SGDClient",
        "architecture": "Shifted",
    }


def test_properties_are_asked_without_making_a_client():
    def never(context):
        raise AssertionError("no client is needed")

    app = client_app(never, properties=lambda context: {"role": "train", "node": context.node_id})
    assert called(app, place(0, 2)) == {
        "partition-id": 0,
        "num-partitions": 2,
        "role": "train",
        "node": 1,
    }


def test_a_node_that_has_no_partition_says_none():
    nowhere = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    assert called(client_app(lambda context: Echo()), nowhere) == {}


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize("count", [0, 2])
def test_a_message_with_no_or_two_array_records_is_refused_with_their_number(kind, count):
    content = {f"arrays-{number}": record_of(NAMED) for number in range(count)}
    with pytest.raises(WireError, match=f"the message holds {count} ArrayRecords, exactly one"):
        ask(client_app(lambda context: Echo()), kind, content)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_arrays_of_other_names_are_refused_by_name(kind):
    sent = arrays_of(learner())
    sent["tail.bias"] = sent.pop("head.bias")
    with pytest.raises(WireError, match=r"differ in head\.bias, tail\.bias"):
        ask(client_app(lambda context: learner()), kind, message_of(sent))


def test_a_missing_array_is_refused_by_name():
    sent = arrays_of(learner())
    del sent["body.bias"]
    with pytest.raises(WireError, match=r"differ in body\.bias"):
        ask(client_app(lambda context: learner()), "train", message_of(sent))


def test_an_array_too_many_is_refused_by_name():
    sent = arrays_of(learner()) | {"tail": np.zeros(2, np.float32)}
    with pytest.raises(WireError, match=r"differ in tail:"):
        ask(client_app(lambda context: learner()), "train", message_of(sent))


def test_too_few_numbered_arrays_are_refused_by_the_client():
    arrays = ArrayRecord([np.zeros(3, np.float32)] * 2)
    with pytest.raises(WireError, match=r"client 'anna' received 2 arrays"):
        ask(client_app(lambda context: learner()), "train", {"arrays": arrays})


@pytest.mark.parametrize("drop", [1, 3])
def test_a_fit_that_returns_too_few_arrays_is_refused_with_both_numbers(drop):
    said = rf"Echo\.fit returned {3 - drop} arrays for 3 received"
    with pytest.raises(WireError, match=said):
        ask(client_app(lambda context: Echo(drop=drop)), "train", message_of())


# --- mods, and a grid --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["train", "evaluate", "query.roll_call", "legacy"])
def test_mods_wrap_every_message_the_first_one_outermost(kind):
    diary = []

    def mod(name):
        def wrapped(message, context, call_next):
            diary.append(f"{name} in")
            reply = call_next(message, context)
            diary.append(f"{name} out")
            return reply

        return wrapped

    def make(context):
        diary.append("client")
        return learner()

    app = client_app(make, mods=[mod("outer"), mod("inner")])
    content = message_of(arrays_of(learner()))
    if kind == "legacy":
        ins = FitIns(ndarrays_to_parameters(list(arrays_of(learner()).values())), {})
        kind, content = "train", compat.fitins_to_recorddict(ins, keep_input=True)
    ask(app, kind, content)
    assert diary == ["outer in", "inner in", "client", "inner out", "outer out"]


def test_a_mod_sees_the_arrays_on_their_way_in_and_out():
    def halve(message, context, call_next):
        (record,) = message.content.array_records.values()
        halved = {name: Array(value / 2) for name, value in as_numpy(record).items()}
        message.content["arrays"] = ArrayRecord(halved)
        reply = call_next(message, context)
        (record,) = reply.content.array_records.values()
        raised = {name: Array(value + 1) for name, value in as_numpy(record).items()}
        reply.content["arrays"] = ArrayRecord(raised)
        return reply

    app = client_app(lambda context: Echo(), mods=[halve])
    found = as_numpy(ask(app, "train", message_of({"w": np.array([2.0, 4.0])}))["arrays"])
    assert found["w"].tolist() == [3.0, 5.0]  # 2 * (w / 2) + 1


def test_every_node_of_a_grid_answers_for_itself_and_a_failure_stays_its_own():
    def make(context):
        partition = context.node_config["partition-id"]
        return Echo(drop=int(partition == 1), metrics={"partition": partition})

    grid = CohortGrid(client_app(make), num_nodes=3)
    messages = [
        Message(RecordDict(message_of()), dst_node_id=node, message_type="train")
        for node in grid.get_node_ids()
    ]
    replies = list(grid.send_and_receive(messages))
    failed = [reply for reply in replies if reply.has_error()]
    answered = {reply.content["metrics"]["partition"] for reply in replies if not reply.has_error()}
    assert answered == {0, 2}
    assert len(failed) == 1
    assert "WireError: Echo.fit returned 2 arrays for 3 received" in failed[0].error.reason
