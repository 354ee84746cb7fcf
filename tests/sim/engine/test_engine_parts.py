"""The parts of the engine that need no Ray: blocks, packing, kept states, the runner."""

import gc

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import ErrorCode
from hypothesis import given
from hypothesis import strategies as st

from metabloom.sim import CohortGrid
from metabloom.sim.engine.questions import Question, cut
from metabloom.sim.engine.runner import Runner
from metabloom.sim.engine.states import States
from tests.sim.engine.clients import app, ask, content, messages, partitions


def questions(count: int) -> list[Question]:
    return [Question(str(i), None, lambda: None) for i in range(count)]  # type: ignore[arg-type]


@given(st.integers(1, 5000), st.sets(st.integers(0, 4999)))
def test_blocks_are_consecutive_of_like_reducers_and_of_bounded_size(count: int, summed: set[int]):
    def reducer(pairs):
        return None, []

    asked = questions(count)
    reducers = [reducer if i in summed else None for i in range(count)]
    blocks = cut(asked, [None] * count, reducers)
    assert [one for block in blocks for one in block.questions] == asked
    for block in blocks:
        assert 1 <= len(block.questions) <= 32
        assert {reducers[int(one.id)] for one in block.questions} == {block.reducer}


def test_a_block_costs_what_its_clients_took_and_new_ones_the_mean():
    blocks = cut(questions(130), [1.0, 3.0, None] + [2.0] * 127, [None] * 130)
    assert [len(one.questions) for one in blocks[:2]] == [4, 4]
    assert blocks[0].cost == pytest.approx(1.0 + 3.0 + 2.0 + 2.0)
    assert blocks[1].cost == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("count", "blocks"), [(3, 3), (32, 32), (100, 32), (1000, 32), (1025, 64), (10_000, 320)]
)
def test_a_round_is_cut_so_that_two_to_sixteen_workers_have_equal_shares(count: int, blocks: int):
    sizes = [len(one.questions) for one in cut(questions(count), [None] * count, [None] * count)]
    assert len(sizes) == blocks
    assert max(sizes) - min(sizes) <= 1


def state(value: float, size: int = 1000) -> RecordDict:
    record = ArrayRecord([np.full(size, value)])
    return RecordDict({"w": record, "c": ConfigRecord({"v": value, "l": ["a"]})})


def test_states_beyond_the_bound_go_to_the_disk_and_come_back_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    states = States(limit=50_000)  # six of them
    for node in range(20):
        states.put(node, state(node))
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == 15
    for node in (0, 19, 7, 0):
        assert states.get(node) == state(node)
    states.put(3, state(33.0))
    for node in range(20):
        assert states.get(node) == (state(33.0) if node == 3 else state(node))
    assert states.get(99) == RecordDict()
    assert states._bytes <= 50_000
    del states
    gc.collect()
    assert not folder.exists()


def test_a_state_that_was_emptied_stays_empty():
    states = States(limit=1)
    states.put(1, state(1.0))
    states.put(2, state(2.0))  # 1 lies on the disk
    states.put(1, RecordDict())
    assert states.get(1) == RecordDict()


def test_ten_thousand_clients_keep_a_state_within_the_bound(monkeypatch):
    monkeypatch.setattr("metabloom.sim.engine.states.KEPT_BYTES", 10**6)
    monkeypatch.setattr(States.__init__, "__defaults__", (10**6,))
    with CohortGrid(app, num_nodes=10_000, workers=0) as grid:
        for count in (1, 2):
            replies = ask(grid, content())
            assert {int(one.content["metrics"]["count"]) for one in replies} == {count}
        assert grid._mail._states._bytes <= 10**6
        assert len(grid._mail._states._spilled) > 8000


class Cohort:
    """Answers for many, in an order of its own; ``bad`` raises, after ``dies`` nothing comes."""

    def __init__(self, bad: int = -1, dies: int = -1, silent: int = -1) -> None:
        self.bad, self.dies, self.silent = bad, dies, silent

    def answer_all(self, handed):
        asked = list(handed)
        for position in reversed(range(len(asked))):
            message, context = asked[position]
            if position == self.dies:
                raise RuntimeError("the cohort failed")
            if position == self.silent:
                continue
            context.state["seen"] = ConfigRecord({"position": position})
            bad = ValueError("bad record")
            yield (
                position,
                bad if position == self.bad else Message(message.content, reply_to=message),
            )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["", "", ""]),
        ({"bad": 1}, ["", "ValueError: bad record", ""]),
        ({"dies": 1}, ["RuntimeError: the cohort failed"] * 2 + [""]),
        ({"silent": 0}, ["it was not answered", "", ""]),
    ],
)
def test_an_app_that_answers_for_many_gets_a_block_at_once(options, expected):
    with CohortGrid(Cohort(**options), num_nodes=3) as grid:
        nodes = list(grid.get_node_ids())
        many = messages(grid, content())
        runner = Runner(Cohort(**options))
        context = {"run_id": 1, "node_config": {}, "run_config": {}}
        asked = [
            Question(
                str(i), one, lambda i=i: Context(node_id=nodes[i], state=RecordDict(), **context)
            )
            for i, one in enumerate(many)
        ]
        answers, _ = runner.answers(asked)
    assert [one.reason for one in answers] == expected
    for position, one in enumerate(answers):
        assert (one.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION) == bool(one.reason)
        kept = one.state and dict(one.state["seen"])
        assert kept == (None if one.reason else {"position": position})
    assert runner.in_progress() == []


def test_a_reply_that_is_no_message_is_an_error():
    with CohortGrid(lambda message, context: 42, num_nodes=1) as grid:
        (reply,) = ask(grid, content())
    assert reply.error.reason == "the ClientApp returned int, a Message is needed"


def sums(pairs):
    """Return the sum of the replies and their contents without arrays."""
    total = sum(reply.content["arrays"]["0"].numpy().astype(np.float64) for _, reply in pairs)
    assert all(question.content["arrays"]["0"].numpy().sum() == 0 for question, _ in pairs)
    return total, [RecordDict({"metrics": reply.content["metrics"]}) for _, reply in pairs]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_replies_are_summed_up_where_they_are_made(grid_of, workers: int):
    grid = grid_of(num_nodes=200, workers=workers)
    asked = messages(grid, content(bad=[3], deed="raise"))
    handle = grid.reduced(asked, sums)
    replies = grid.send_and_receive(asked, timeout=60)
    assert partitions(list(replies)) == [i for i in range(200) if i != 3]
    assert not any("arrays" in one.content for one in replies if one.has_content())
    ids = [one for ids, _ in handle.parts for one in ids]
    assert ids == [one.metadata.message_id for one in asked]
    assert len(handle.parts) == 32
    total = sum(part for _, part in handle.parts)
    assert total.tolist() == [sum(i + 1 for i in range(200) if i != 3)] * 3
    # And only those messages: the next ones are as they are.
    assert "arrays" in ask(grid, content())[0].content


def test_a_sum_that_holds_what_was_given_up_is_not_used(grid_of):
    grid = grid_of(num_nodes=200, workers=1)
    ask(grid, content())
    asked = messages(grid, content(seconds=0.4), 4)  # each a block
    several = asked + messages(grid, content())[4:]
    handle = grid.reduced(several, sums)
    replies = list(grid.send_and_receive(several, timeout=1.0))
    summed = {one for ids, _ in handle.parts for one in ids}
    assert {one.metadata.reply_to_message_id for one in replies} == summed
