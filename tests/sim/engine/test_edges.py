"""What callers and clients can do to a grid without harm to the exchanges after it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from metabloom.errors import ConfigError, MetabloomError
from metabloom.sim import CohortGrid
from tests.sim.engine.clients import app, ask, content, messages, partitions, pids

ROOT = Path(__file__).parents[3]


def app_of(answer) -> ClientApp:
    found = ClientApp()
    found.train()(answer)
    return found


def echo(message: Message, context) -> Message:
    return Message(message.content, reply_to=message)


def test_ctrl_c_in_a_client_leaves_the_grid_usable():
    calls: list[int] = []

    def interrupted(message: Message, context) -> Message:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return echo(message, context)

    with CohortGrid(app_of(interrupted), num_nodes=4) as grid:
        with pytest.raises(KeyboardInterrupt):
            ask(grid, content())
        assert len(ask(grid, content(), timeout=5)) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reducer_that_raises_gives_errors_and_the_grid_goes_on(grid_of, workers: int):
    grid = grid_of(num_nodes=4, workers=workers)
    asked = messages(grid, content())
    grid.reduced(asked, fails)
    replies = list(grid.send_and_receive(asked, timeout=60))
    assert all("ZeroDivisionError" in one.error.reason for one in replies)
    assert len(replies) == 4
    assert partitions(ask(grid, content())) == [0, 1, 2, 3]


def fails(pairs):
    raise ZeroDivisionError("in the reducer")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_pushed_holds_nothing_up(grid_of, workers: int):
    grid = grid_of(num_nodes=3, workers=workers)
    good = messages(grid, content())

    def broken():
        yield good[0]
        raise RuntimeError("no second message")

    with pytest.raises(RuntimeError, match="no second message"):
        grid.push_messages(broken())
    empty = Message(Error(1, "instead of content"), reply_to=good[1])
    empty.metadata.__dict__["_dst_node_id"] = good[1].metadata.dst_node_id
    first, second, third = grid.send_and_receive([good[0], empty, good[2]], timeout=60)
    assert second.error.reason == "the message has no content"
    assert partitions([first, third]) == sorted(partitions([first, third]))
    assert partitions(ask(grid, content())) == [0, 1, 2]


def test_a_reply_that_is_no_record_is_an_error_of_its_client_alone():
    def odd(message: Message, context) -> Message:
        reply = echo(message, context)
        if context.node_config["partition-id"] == 1:
            reply.content = {"loss": 1.0}
        if context.node_config["partition-id"] == 2:
            context.state = None
        return reply

    with CohortGrid(app_of(odd), num_nodes=200) as grid:
        replies = ask(grid, content())
        assert len(replies) == 200
        reasons = [one.error.reason for one in replies if one.has_error()]
    assert len(reasons) == 2
    assert any("the reply holds dict, not a RecordDict" in one for one in reasons)


def test_replies_after_an_error_are_no_shorter_list(grid_of):
    grid = grid_of(num_nodes=3, workers=1)
    replies = grid.send_and_receive(messages(grid, content(seconds=30.0)), timeout=60)
    threading.Timer(1.0, grid.close).start()
    for _ in range(2):
        with pytest.raises(MetabloomError, match=r"closed|not all taken"):
            list(replies)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_closed_grid_says_so(grid_of, workers: int):
    import ray

    grid = grid_of(num_nodes=2, workers=workers)
    grid.close()
    with pytest.raises(MetabloomError, match="the grid is closed"):
        grid.send_and_receive(messages(grid, content()))
    assert ray.is_initialized()  # the one of the tests, and no other


def test_a_script_that_forgets_to_close_leaves_no_process(tmp_path: Path):
    code = (
        "import psutil\n"
        "from metabloom.sim import CohortGrid\n"
        "from tests.sim.engine.clients import app, ask, content\n"
        "grid = CohortGrid(app, num_nodes=4, workers=1)\n"
        "assert len(ask(grid, content())) == 4\n"
        "print(*(one.pid for one in psutil.Process().children(recursive=True)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    children = [int(pid) for pid in done.stdout.splitlines()[-1].split()]
    end = time.monotonic() + 60
    while any(map(psutil.pid_exists, children)) and time.monotonic() < end:
        time.sleep(0.2)
    assert not any(map(psutil.pid_exists, children))


def test_idle_actors_that_were_killed_cost_no_client(grid_of):
    grid = grid_of(num_nodes=40, workers=2)
    victims = pids(ask(grid, content(seconds=0.05)))
    assert len(victims) == 2
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    (reply,) = ask(grid, content(), 1)  # a single message, and both actors are dead
    assert reply.has_content()


def test_an_abandoned_client_behind_another_one_holds_nobody_up(grid_of):
    grid = grid_of(num_nodes=3, workers=1)
    ask(grid, content())
    slow, hanging = messages(grid, content(seconds=2.0), 1) + messages(grid, content())[1:2]
    hanging.content["config"]["bad"] = [0, 1, 2]
    hanging.content["config"]["deed"] = "sleep"
    hanging.metadata.__dict__["_ttl"] = 1.0
    replies = list(grid.send_and_receive([slow, hanging], timeout=60))
    assert [one.has_error() for one in replies] == [False, True]
    assert partitions(ask(grid, content(), timeout=60)) == [0, 1, 2]


def test_an_app_that_cannot_be_sent_is_refused_in_words(ray_here):
    lock = threading.Lock()

    def locked(message: Message, context) -> Message:
        with lock:
            return echo(message, context)

    with pytest.raises(ConfigError, match="the ClientApp cannot be sent to other processes"):
        CohortGrid(app_of(locked), num_nodes=1, workers=1)


def test_a_cluster_cannot_be_joined_from_within_another_ray(ray_here):
    with pytest.raises(ConfigError, match="connected to a Ray already"):
        CohortGrid(app, num_nodes=1, workers=1, ray_address="203.0.113.9:6379")


@pytest.mark.parametrize("workers", [0, 1])
def test_the_bytes_of_arrays_that_clients_write_are_their_own_and_are_kept(grid_of, workers: int):
    grid = grid_of(app=app_of(writes), num_nodes=2, workers=workers)
    what = content()
    for count in range(3):
        replies = ask(grid, what)
        seen = [one.content["arrays"]["seen"].numpy().tolist() for one in replies]
        kept = [one.content["arrays"]["kept"].numpy().tolist() for one in replies]
        assert seen == [[0.0] * 3] * 2
        assert kept == [[float(count)] * 3] * 2


def writes(message: Message, context) -> Message:
    """Answer what the message and the state hold, and write into the arrays of both."""
    if "own" not in context.state:
        context.state["own"] = ArrayRecord({"w": _array(0.0)})
    own, sent = context.state["own"]["w"], message.content["arrays"]["0"]
    arrays = ArrayRecord({"seen": _array(sent.numpy()[0]), "kept": _array(own.numpy()[0])})
    own.data = _array(float(own.numpy()[0]) + 1).data
    sent.data = _array(99.0).data
    return Message(RecordDict({"arrays": arrays}), reply_to=message)


def _array(value: float):
    return ArrayRecord([np.full(3, value, dtype=np.float32)])["0"]


def test_replies_that_nobody_pulls_in_time_are_forgotten():
    with CohortGrid(app_of(echo), num_nodes=3) as grid:
        asked = messages(grid, content())
        for one in asked:
            one.metadata.__dict__["_ttl"] = 0.2
        ids = list(grid.push_messages(asked))
        time.sleep(0.3)
        (reply, *_) = grid.pull_messages(ids)
        assert reply.has_error()
        assert not grid._mail._pending
