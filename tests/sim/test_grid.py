"""The in-process Grid keeps what Flower's own grids promise."""

import copy

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode

from metabloom.client_app import app as our_clients
from metabloom.config import RunConfig
from metabloom.errors import ConfigError
from metabloom.server_app import run
from metabloom.sim import CohortGrid
from metabloom.strategies import FedAvg


def app_of(train) -> ClientApp:
    app = ClientApp()
    app.train()(train)
    return app


def echo(message: Message, context: Context) -> Message:
    place = {key: int(value) for key, value in context.node_config.items()}
    content = RecordDict({"place": ConfigRecord({**place, "node": context.node_id})})
    return Message(content, reply_to=message)


def ask(grid: CohortGrid, nodes: list[int], content: RecordDict | None = None) -> list[Message]:
    content = content or RecordDict()
    return list(grid.send_and_receive([Message(content, node, "train") for node in nodes]))


def test_every_node_answers_once_with_its_own_id_and_partition():
    grid = CohortGrid(app_of(echo), num_nodes=4)
    nodes = list(grid.get_node_ids())
    replies = ask(grid, nodes)
    assert [reply.metadata.src_node_id for reply in replies] == nodes
    assert [reply.content["place"]["node"] for reply in replies] == nodes
    assert sorted(reply.content["place"]["partition-id"] for reply in replies) == [0, 1, 2, 3]
    assert {reply.content["place"]["num-partitions"] for reply in replies} == {4}


def test_node_ids_are_not_partition_ids_nor_in_their_order():
    grid = CohortGrid(app_of(echo), num_nodes=20)
    nodes = list(grid.get_node_ids())
    assert len(set(nodes)) == 20
    assert min(nodes) > 20
    partitions = [reply.content["place"]["partition-id"] for reply in ask(grid, nodes)]
    assert partitions != sorted(partitions)
    assert nodes == list(CohortGrid(app_of(echo), num_nodes=20).get_node_ids())
    assert nodes != list(CohortGrid(app_of(echo), num_nodes=20, seed=1).get_node_ids())


def test_a_client_that_raises_answers_with_an_error_and_the_others_go_on():
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise ValueError("no records [bad] für diesen Client")
        return echo(message, context)

    grid = CohortGrid(app_of(train), num_nodes=3)
    replies = ask(grid, list(grid.get_node_ids()))
    (error,) = [reply.error for reply in replies if reply.has_error()]
    assert error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "ValueError" in error.reason
    assert "no records [bad] für diesen Client" in error.reason
    assert sum(reply.has_content() for reply in replies) == 2


def test_an_unknown_node_answers_with_an_error_that_names_it():
    grid = CohortGrid(app_of(echo), num_nodes=1)
    (reply,) = ask(grid, [12345])
    assert reply.error.code == ErrorCode.NODE_UNAVAILABLE
    assert "12345" in reply.error.reason


def test_a_message_that_no_handler_takes_answers_with_an_error():
    grid = CohortGrid(app_of(echo), num_nodes=1)
    (node,) = grid.get_node_ids()
    (reply,) = grid.send_and_receive([Message(RecordDict(), node, "query.roll_call")])
    assert reply.has_error()


def test_the_context_of_a_node_lasts_and_is_its_own():
    def train(message: Message, context: Context) -> Message:
        before = context.state.config_records.get("count", ConfigRecord({"n": 0}))
        context.state["count"] = ConfigRecord({"n": int(before["n"]) + 1})
        return Message(RecordDict({"count": context.state["count"]}), reply_to=message)

    grid = CohortGrid(app_of(train), num_nodes=2)
    first, second = grid.get_node_ids()
    counts = [ask(grid, [node])[0].content["count"]["n"] for node in (first, first, second, first)]
    assert counts == [1, 2, 1, 3]


@pytest.mark.parametrize("fails", [True, False])
def test_what_a_client_writes_into_its_state_is_kept_only_where_it_succeeds(fails):
    def train(message: Message, context: Context) -> Message:
        if "number" not in context.state:  # the first message
            context.state["number"] = ConfigRecord({"n": 1, "list": [1]})
            context.state["arrays"] = ArrayRecord([np.ones(2)])
        else:
            context.state["number"]["n"] = 2
            context.state["number"]["list"].append(2)
            context.state["arrays"]["0"] = ArrayRecord([np.zeros(2)])["0"]
            context.state["new"] = ConfigRecord()
            if fails:
                raise ValueError("after it wrote")
        return Message(RecordDict(), reply_to=message)

    states = []

    def spy(message: Message, context: Context) -> Message:
        number = context.state.config_records.get("number")
        arrays = context.state.array_records.get("arrays")
        total = arrays and float(arrays["0"].numpy().sum())
        states.append((sorted(context.state), number and copy.deepcopy(dict(number)), total))
        return train(message, context)

    grid = CohortGrid(app_of(spy), num_nodes=1)
    (node,) = grid.get_node_ids()
    replies = [ask(grid, [node])[0] for _ in range(3)]
    assert [reply.has_error() for reply in replies] == [False, fails, fails]
    before = (["arrays", "number"], {"n": 1, "list": [1]}, 2.0)
    after = (["arrays", "new", "number"], {"n": 2, "list": [1, 2]}, 0.0)
    assert states == [([], None, None), before, before if fails else after]


def test_clients_find_the_run_config_and_cannot_change_each_others():
    def train(message: Message, context: Context) -> Message:
        found = ConfigRecord(dict(context.run_config))
        context.run_config["lr"] = 99.0
        return Message(RecordDict({"found": found}), reply_to=message)

    given = {"lr": 0.5}
    grid = CohortGrid(app_of(train), num_nodes=3, run_config=given)
    found = [reply.content["found"]["lr"] for reply in ask(grid, list(grid.get_node_ids()))]
    assert found == [0.5] * 3
    assert given == {"lr": 0.5}


def test_a_client_cannot_alter_what_its_neighbours_receive():
    def train(message: Message, context: Context) -> Message:
        seen = {
            "config": dict(message.content["config"]) == {"lr": 0.5},
            "arrays": message.content["arrays"]["w"].numpy().tolist() == [1.0, 2.0],
            "records": len(message.content) == 2,
        }
        message.content["config"]["lr"] = 99.0
        message.content["config"]["added"] = True
        message.content["arrays"]["w"] = message.content["arrays"]["v"]
        message.content["mine"] = ConfigRecord()
        return Message(RecordDict({"seen": ConfigRecord(seen)}), reply_to=message)

    arrays = ArrayRecord([np.array([1.0, 2.0]), np.array([3.0, 4.0])])
    arrays = ArrayRecord({"w": arrays["0"], "v": arrays["1"]})
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"lr": 0.5})})
    grid = CohortGrid(app_of(train), num_nodes=3)
    for reply in ask(grid, list(grid.get_node_ids()), content):
        assert dict(reply.content["seen"]) == {"config": True, "arrays": True, "records": True}
    assert dict(content["config"]) == {"lr": 0.5}  # nor what the strategy holds
    assert content["arrays"]["w"].numpy().tolist() == [1.0, 2.0]


def test_answers_are_pulled_under_the_ids_that_pushing_gave_once():
    grid = CohortGrid(app_of(echo), num_nodes=3)
    nodes = list(grid.get_node_ids())
    ids = list(grid.push_messages([Message(RecordDict(), node, "train") for node in nodes]))
    assert len(set(ids)) == 3
    (second,) = grid.pull_messages([ids[1]])
    assert second.metadata.src_node_id == nodes[1]
    assert second.metadata.reply_to_message_id == ids[1]
    rest = list(grid.pull_messages([ids[0], ids[2]]))
    assert [reply.metadata.src_node_id for reply in rest] == [nodes[0], nodes[2]]
    for reply in grid.pull_messages([*ids, "no such id"]):  # as Flower says it, in its own name
        assert reply.error.code == ErrorCode.MESSAGE_UNAVAILABLE
        assert reply.metadata.src_node_id == SUPERLINK_NODE_ID


def test_several_messages_to_one_node_are_answered_each():
    grid = CohortGrid(app_of(echo), num_nodes=1)
    (node,) = grid.get_node_ids()
    assert len(ask(grid, [node, node, node])) == 3


def test_a_message_made_by_the_grid_is_delivered():
    grid = CohortGrid(app_of(echo), num_nodes=1)
    (node,) = grid.get_node_ids()
    (reply,) = grid.send_and_receive([grid.create_message(RecordDict(), "train", node, "1")])
    assert reply.content["place"]["node"] == node


@pytest.mark.parametrize("count", [0, -3])
def test_a_grid_without_nodes_is_refused(count: int):
    with pytest.raises(ConfigError, match=f"num_nodes = {count}"):
        CohortGrid(app_of(echo), num_nodes=count)


@pytest.mark.parametrize("strategy", ["fedmeta", "ditto"])  # without and with state on the clients
def test_a_run_on_digits_does_not_depend_on_the_ids_of_nodes(tmp_path, strategy: str):
    values = {"strategy": strategy, "num-clients": 12, "rounds": 2, "clients-per-round": 4}
    models = []
    for seed in (0, 1):
        out = tmp_path / str(seed)
        config = RunConfig.read({**values, "eval-steps": "1", "device": "cpu", "out": str(out)})
        grid = CohortGrid(our_clients, num_nodes=12, run_config=config.to_flower(), seed=seed)
        run(grid, config)
        models.append((out / "model.safetensors").read_bytes())
    assert models[0] == models[1]


def test_flowers_own_loop_runs_on_the_grid_and_contexts_do_not_leak_between_grids():
    def train(message: Message, context: Context) -> Message:
        assert "seen" not in context.state
        context.state["seen"] = ConfigRecord()
        metrics = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": message.content["arrays"], "metrics": metrics})
        return Message(content, reply_to=message)

    for _ in range(2):
        grid = CohortGrid(app_of(train), num_nodes=2)
        strategy = FedAvg(fraction_evaluate=0.0)
        result = strategy.start(grid, ArrayRecord([np.ones(2)]), num_rounds=1, timeout=5)
        assert result.rounds[0].failures == ()
