"""Clients that raise, die and hang, and actors that are killed: the others are not hurt."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from metabloom.errors import MetabloomError
from metabloom.sim import CohortGrid
from metabloom.sim.engine import pool
from tests.sim.engine.clients import ask, content, messages, partitions, pids

ALL = list(range(200))  # nodes of ``grid``: blocks of four
BUT_3 = [i for i in ALL if i != 3]


def errors(replies: list[Message]) -> list[str]:
    return [f"{one.error.code} {one.error.reason}" for one in replies if one.has_error()]


def test_a_client_that_raises_hurts_nobody(grid):
    replies = ask(grid, content(bad=[3], deed="raise"))
    assert partitions(replies) == BUT_3
    assert errors(replies) == [
        f"{ErrorCode.CLIENT_APP_RAISED_EXCEPTION} ValueError: client 3 is unwell"
    ]


@pytest.mark.parametrize("deed", ["exit", "kill"])
def test_clients_of_an_actor_that_dies_run_again(grid, tmp_path: Path, deed: str):
    before = counts(grid)
    replies = ask(grid, content(bad=[3, 120], deed=deed, flag=str(tmp_path)))
    assert partitions(replies) == ALL
    assert len(list(tmp_path.iterdir())) == 2
    assert counts(grid) == [one + 1 for one in before]  # nothing is left of what was lost


def counts(grid: CohortGrid) -> list[int]:
    """Return how often each client has trained, of which it keeps count in its state."""
    asked = [Message(content(), node, "evaluate") for node in grid.get_node_ids()]
    return [int(one.content["metrics"]["n"]) for one in grid.send_and_receive(asked)]


@pytest.mark.parametrize("deed", ["exit", "kill", "overflow"])
def test_a_client_that_kills_every_actor_is_an_error_and_the_others_are_not(grid, deed: str):
    replies = ask(grid, content(bad=[3], deed=deed))
    assert partitions(replies) == BUT_3
    (error,) = errors(replies)
    assert error.startswith(f"{ErrorCode.CLIENT_APP_CRASHED} the process that ran it died, 2 times")
    assert partitions(ask(grid, content())) == ALL  # and the grid goes on


def test_actors_that_are_killed_from_outside_in_the_middle_of_a_round_are_replaced(grid):
    victims = pids(ask(grid, content(seconds=0.01)))
    killer = threading.Timer(0.3, lambda: [os.kill(pid, signal.SIGKILL) for pid in victims])
    killer.start()
    replies = ask(grid, content(seconds=0.01))
    killer.join()
    assert partitions(replies) == ALL
    assert not victims & pids(ask(grid, content()))


def test_actors_that_are_killed_between_rounds_are_replaced(grid):
    victims = pids(ask(grid, content(seconds=0.01)))
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    replies = ask(grid, content())
    assert partitions(replies) == ALL
    assert not victims & pids(replies)


def test_what_is_late_at_the_timeout_of_a_round_is_given_up_and_its_actor_is_free_again(grid):
    ask(grid, content())
    begin = time.monotonic()
    replies = ask(grid, content(bad=[3], deed="sleep"), timeout=4.0)
    assert time.monotonic() - begin < 30
    lost = set(ALL) - set(partitions(replies))
    assert 3 in lost
    assert len(lost) <= 7  # its block; that which waited behind it went to the other actor
    assert partitions(ask(grid, content())) == ALL


def test_a_message_whose_time_to_live_is_over_gives_flowers_error(grid):
    late, good = messages(grid, content(bad=ALL, deed="sleep"), 1) + messages(grid, content())[-1:]
    late.metadata.__dict__["_ttl"] = 1.0
    replies = list(grid.send_and_receive([late, good], timeout=60))
    assert [one.has_error() for one in replies] == [True, False]
    assert replies[0].error.code == ErrorCode.MESSAGE_UNAVAILABLE
    assert partitions(ask(grid, content())) == ALL


@pytest.mark.parametrize("deed", ["sleep", "busy"])
def test_a_client_that_hangs_is_given_up_and_the_others_are_not(impatient, monkeypatch, deed: str):
    monkeypatch.setattr(pool, "ASKING_S", 1.0)
    ask(impatient, content())
    replies = ask(impatient, content(bad=[3], deed=deed))
    assert partitions(replies) == [i for i in range(80) if i != 3]
    (error,) = errors(replies)
    assert error.endswith("the client took longer than client_timeout_s = 1.5")
    assert partitions(ask(impatient, content())) == list(range(80))


def test_clients_within_their_timeout_are_not_given_up_where_their_block_takes_longer(impatient):
    ask(impatient, content())
    asked = messages(impatient, content(seconds=1.0), 4) + messages(impatient, content())[4:]
    replies = list(impatient.send_and_receive(asked, timeout=60))  # two blocks of two seconds each
    assert partitions(replies) == list(range(80))


def test_an_app_that_starts_nowhere_ends_the_run_with_its_reason(grid_of):
    grid = grid_of(app=NotImportable())
    with pytest.raises(MetabloomError, match="no such module here"):
        ask(grid, content())


class NotImportable(ClientApp):
    """An app whose module only the driver has."""

    def __reduce__(self):
        return raises, ("no such module here",)


def raises(text: str):
    raise ImportError(text)
