"""The grid on actors: the same answers as in one process, whatever their number."""

import hashlib
import os
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from metabloom.errors import ConfigError
from metabloom.sim import CohortGrid
from tests.sim.engine.clients import app, ask, content, messages, partitions, pids


def told(replies: Sequence[Message]) -> list[tuple[int, str, str]]:
    """Return who answered what, to the bit and in order, but for process ids."""
    said = []
    for one in replies:
        numbers = {k: v for k, v in one.content["metrics"].items() if k != "pid"}
        arrays = b"".join(array.data for array in one.content["arrays"].values())
        digest = hashlib.sha256(arrays).hexdigest()
        said.append((one.metadata.src_node_id, str(sorted(numbers.items())), digest))
    return said


def test_replies_come_in_the_order_of_the_messages_for_any_number_of_workers(grid_of):
    answers = []
    for workers in (0, 1, 2, 3):
        grid = grid_of(num_nodes=70, workers=workers)
        rounds = [told(ask(grid, content(seconds=0.001), n)) for n in (70, 5, 70)]
        answers.append(rounds)
        assert [node for node, _, _ in rounds[0]] == list(grid.get_node_ids())
        assert grid.workers == workers
    assert all(one == answers[0] for one in answers)


def test_clients_run_in_lasting_processes_that_are_not_this_one(grid_of):
    grid = grid_of(num_nodes=20)
    first, second = (pids(ask(grid, content(seconds=0.02))) for _ in range(2))
    assert first == second
    assert len(first) == 2
    assert os.getpid() not in first


def test_replies_are_streamed_while_others_are_still_at_work(grid):
    ask(grid, content())
    slow = messages(grid, content(seconds=1.0))[-1:]
    begin = time.monotonic()
    replies = grid.send_and_receive(messages(grid, content())[:8] + slow, timeout=60)
    assert replies  # as Flower's strategies ask, before any came
    next(iter(replies))
    assert time.monotonic() - begin < 1.0
    assert len(replies) == 9
    assert [one.metadata.src_node_id for one in replies] == [
        one.metadata.src_node_id for one in replies
    ]  # Flower's strategies may go through them twice
    assert replies[0] is next(iter(replies))


def test_pushing_does_not_wait_and_pulling_gives_what_is_there(grid):
    ask(grid, content())
    begin = time.monotonic()
    ids = list(grid.push_messages(messages(grid, content(seconds=0.5), 2)))
    assert time.monotonic() - begin < 0.4
    assert list(grid.pull_messages(ids)) == []
    found: list[Message] = []
    while len(found) < 2 and time.monotonic() < begin + 60:
        time.sleep(0.1)
        left = [one for one in ids if one not in {m.metadata.reply_to_message_id for m in found}]
        found += grid.pull_messages(left)
    assert {one.metadata.reply_to_message_id for one in found} == set(ids)
    (gone, unknown) = grid.pull_messages([ids[0], "no such id"])
    assert gone.error.code == unknown.error.code == ErrorCode.MESSAGE_UNAVAILABLE


def test_messages_to_one_node_are_answered_one_after_another(grid):
    (message,) = messages(grid, content(), 1)
    node = message.metadata.dst_node_id
    asked = [Message(content(seconds=0.05), node, "train") for _ in range(6)]
    counts = [int(one.content["metrics"]["count"]) for one in grid.send_and_receive(asked)]
    assert counts == list(range(counts[0], counts[0] + 6))


def test_query_and_evaluate_messages_are_answered(grid):
    nodes = list(grid.get_node_ids())[:3]
    for kind in ("query", "evaluate"):
        replies = list(grid.send_and_receive([Message(content(), n, kind) for n in nodes]))
        assert [one.metadata.src_node_id for one in replies] == nodes
        assert {one.metadata.message_type for one in replies} == {kind}
    (wrong,) = grid.send_and_receive([Message(content(), nodes[0], "train.nothing")])
    assert wrong.has_error()


def test_a_model_that_is_written_into_between_rounds_is_sent_as_it_is_now(grid):
    what = content()
    first = ask(grid, what, 4)
    what["arrays"]["0"] = ArrayRecord([np.full(3, 100.0, dtype=np.float32)])["0"]
    second = ask(grid, what, 4)
    for before, after in zip(first, second, strict=True):
        difference = after.content["arrays"]["0"].numpy() - before.content["arrays"]["0"].numpy()
        assert difference.tolist() == [100.0] * 3


def test_odd_records_travel_as_they_are(grid_of):
    grid = grid_of(app=Echo(), num_nodes=2, workers=1)
    sent = RecordDict(
        {
            "arrays": ArrayRecord(
                {
                    "empty": ArrayRecord([np.zeros((0, 3))])["0"],
                    "scalar": ArrayRecord([np.array(2.5)])["0"],
                    "flags": ArrayRecord([np.array([True, False])])["0"],
                    "fortran": ArrayRecord([np.asfortranarray(np.arange(6.0).reshape(2, 3))])["0"],
                }
            ),
            "none": ArrayRecord(),
            "numbers": MetricRecord({"a": 1, "b": 0.1, "c": [1, 2], "d": [0.5]}),
            "texts": ConfigRecord({"t": "ä", "b": b"\x00\xff", "f": True, "l": ["x"], "e": ""}),
        }
    )
    for node in grid.get_node_ids():
        (reply,) = grid.send_and_receive([Message(sent, node, "train")])
        assert reply.content == sent
        assert list(reply.content["arrays"]) == list(sent["arrays"])


class Echo:
    """Not even a ClientApp: what is called like one will do."""

    def __call__(self, message, context):
        return Message(message.content, reply_to=message)


def test_several_threads_may_use_a_grid_at_once(grid):
    nodes = list(grid.get_node_ids())
    found: dict[int, list[int]] = {}

    def talk(number: int) -> None:
        own = nodes[number::4]
        asked = [Message(content(), node, "train") for node in own]
        replies = grid.send_and_receive(asked, timeout=60)
        found[number] = [one.metadata.src_node_id for one in replies]

    threads = [threading.Thread(target=talk, args=(i,)) for i in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert found == {i: nodes[i::4] for i in range(4)}


def test_clients_work_in_the_folder_and_with_the_data_of_the_driver(grid_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METABLOOM_DATA", "some/where")
    grid = grid_of(app=Place(), num_nodes=1, workers=1)
    (node,) = grid.get_node_ids()
    (reply,) = grid.send_and_receive([Message(RecordDict(), node, "query")])
    assert reply.content["place"] == ConfigRecord({"folder": str(tmp_path), "data": "some/where"})


class Place:
    def __call__(self, message, context):
        place = {"folder": os.getcwd(), "data": os.environ.get("METABLOOM_DATA", "")}
        return Message(RecordDict({"place": ConfigRecord(place)}), reply_to=message)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"workers": -1}, "workers = -1"),
        ({"workers": 1.5}, "workers = 1.5"),
        ({"workers": "many"}, "workers = 'many'"),
        ({"workers": 0, "ray_address": "auto"}, "ray_address = 'auto' with workers = 0"),
        ({"workers": 1, "gpus_per_worker": -0.5}, "gpus_per_worker = -0.5"),
        ({"workers": 1, "client_timeout_s": 0}, "client_timeout_s = 0"),
        ({"workers": 1, "gpus_per_worker": 1000.0}, "gpus-per-worker = 1000 for 1 workers"),
    ],
)
def test_options_out_of_range_are_refused(ray_here, options, what: str):
    with pytest.raises(ConfigError, match=what):
        CohortGrid(app, num_nodes=2, **options)


def test_replies_that_nobody_takes_are_forgotten(grid_of):
    grid = grid_of(num_nodes=4, workers=0)
    for _ in range(3):
        grid.send_and_receive(messages(grid, content()))
    assert partitions(ask(grid, content())) == [0, 1, 2, 3]
    assert not grid._mail._pending
