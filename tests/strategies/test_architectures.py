"""Several architectures under every strategy: each one is trained by its own clients alone."""

from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from metabloom.architectures import joined, part_of
from metabloom.errors import ConfigError, MetabloomError
from metabloom.sim import CohortGrid
from metabloom.strategies import STRATEGIES, Checkpoints, Reply, UserLevelPrivacy, interpolate
from metabloom.strategies.by_architecture import by_architecture
from metabloom.strategies.shell import roll_call
from metabloom.wire import from_record
from tests.strategies.toy import (
    AVERAGING,
    ShuffledGrid,
    Toy,
    bits,
    larger,
    model,
    moved,
    start,
    strategy_of,
)

# fedkd refuses them: there it is the mentors that differ.
EVERY = pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "fedkd"])
APART = pytest.mark.parametrize("name", AVERAGING)  # the others let architectures teach each other
KINDS = ("small", "large")
OF_NODES = ("small", "large", "small", "large", "large")
UNIFORM = {"weighting": "uniform"}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "POLL_S", 0.01)
    monkeypatch.setattr(roll_call, "GATHER_S", 0.05)


def both() -> dict[str, np.ndarray]:
    return joined({"small": model(), "large": larger()})


def heterogeneous(name: str, toy: Toy | None = None, *, rounds: int = 3, **more):
    grid = more.pop("grid", None)
    options = {"grid": grid} if grid else {}
    strategy = strategy_of(name, UNIFORM, architectures=KINDS, **more)
    toy = toy or Toy(architectures=OF_NODES)
    return start(strategy, toy, nodes=5, rounds=rounds, arrays=both(), **options)


@APART
def test_each_architecture_is_what_it_is_among_its_own_clients_alone(name: str):
    found = from_record(heterogeneous(name).arrays)
    assert list(found) == list(both())
    for kind, arrays in (("small", model()), ("large", larger())):
        ids = [i for i, own in enumerate(OF_NODES) if own == kind]
        alone = Toy(learns=lambda sent, place, number, ids=ids: moved(sent, ids[place], number))
        wanted = start(strategy_of(name, UNIFORM), alone, nodes=len(ids), rounds=3, arrays=arrays)
        ours = part_of(found, kind)
        assert {key: value.tobytes() for key, value in ours.items()} == bits(wanted.arrays)


def test_a_client_is_sent_its_own_model_alone_under_the_names_of_its_model():
    seen = {}

    def learns(arrays, partition, number):
        seen[partition] = list(arrays)
        return arrays

    result = heterogeneous("fedavg", Toy(architectures=OF_NODES, learns=learns), rounds=1)
    assert seen == {
        i: list(model() if own == "small" else larger()) for i, own in enumerate(OF_NODES)
    }
    (report,) = result.rounds
    assert (
        report.bytes_down
        == report.bytes_up
        + sum(  # the five are evaluated too, as no roles are
            len(array.data)
            for i, own in enumerate(OF_NODES)
            for full, array in result.arrays.items()
            if full.startswith(own)
        )
    )


@EVERY
def test_the_order_of_replies_does_not_matter_to_the_bit(name: str):
    plain, shuffled = heterogeneous(name), heterogeneous(name, grid=ShuffledGrid)
    assert bits(plain.arrays) == bits(shuffled.arrays)


@EVERY
def test_two_halves_are_the_whole(name: str, tmp_path: Path):
    whole = heterogeneous(name, rounds=4)
    heterogeneous(name, rounds=2, checkpoints=Checkpoints(tmp_path))
    resumed = heterogeneous(name, rounds=4, checkpoints=Checkpoints(tmp_path, resume=True))
    assert bits(resumed.arrays) == bits(whole.arrays)


def test_an_architecture_of_which_nobody_answers_stays_and_the_run_goes_on():
    toy = Toy(
        architectures=OF_NODES, fails=lambda i, number: "no" if OF_NODES[i] == "large" else ""
    )
    result = heterogeneous("fedmeta", toy)
    found = from_record(result.arrays)
    assert all(np.array_equal(part_of(found, "large")[key], larger()[key]) for key in larger())
    assert not np.array_equal(found["small/weight"], model()["weight"])
    assert not any(report.skipped for report in result.rounds)


def test_a_node_of_an_architecture_that_nobody_knows_is_left_out_by_name():
    result = heterogeneous("fedavg", Toy(architectures=("small", "huge", "small", "large", "")))
    (first, *later) = result.rounds
    told = dict(first.failures)
    assert set(told) == {"partition-1", "partition-4"}
    assert "'huge'" in told["partition-1"]
    assert "small, large" in told["partition-1"]
    assert "no architecture" in told["partition-4"]
    assert not any(report.failures for report in later)
    assert sorted(first.clients) == ["partition-0", "partition-2", "partition-3"]


def test_where_no_node_has_a_known_architecture_the_error_says_what_they_say():
    with pytest.raises(MetabloomError, match="'huge', the server has models of small, large"):
        heterogeneous("fedavg", Toy(architectures=("huge",) * 5))


def test_a_reply_of_another_architecture_is_quarantined_and_the_others_count():
    def learns(arrays, partition, number):
        return larger() if partition == 0 else moved(arrays, partition, number)

    result = heterogeneous("fedavg", Toy(architectures=OF_NODES, learns=learns), rounds=1)
    (report,) = result.rounds
    assert [who for who, _ in report.quarantined] == ["partition-0"]
    wanted = moved(model(), 2, 1)  # the other small one
    assert np.allclose(from_record(result.arrays)["small/weight"], wanted["weight"])


def test_the_share_of_a_heavy_client_is_that_among_its_own_architecture():
    """Four small clients of one record and three large ones of a million: all are good."""

    class Heavy(Toy):
        def _train(self, message, context):
            reply = super()._train(message, context)
            heavy = self.architectures[int(context.node_config["partition-id"])] == "large"
            reply.content["metrics"]["num-examples"] = 10**6 if heavy else 1
            return reply

    kinds = ("small",) * 3 + ("large",) * 2
    toy = Heavy(architectures=kinds)
    (report,) = heterogeneous("fedavg", toy, rounds=1).rounds
    assert not report.quarantined


def test_scores_say_the_architecture_of_their_client():
    roles = ("train", "train", "unseen", "unseen", "validation")
    result = heterogeneous("fedavg", Toy(architectures=OF_NODES, roles=roles))
    assert [one.architecture for one in result.unseen] == ["small", "large"]


def test_user_level_privacy_is_refused():
    privacy = UserLevelPrivacy(
        noise_multiplier=1.0, max_update_norm=1.0, expected_clients=2, target_delta=1e-5
    )
    with pytest.raises(ConfigError, match="each architecture has a sum of its own"):
        strategy_of("fedavg", architectures=KINDS, user_privacy=privacy)


def test_the_rule_keeps_the_state_of_each_architecture_apart():
    calls = []

    def update(state, sent, replies):
        calls.append((sorted(sent), [sorted(one.arrays) for one in replies]))
        return {"n": state["n"] + len(replies)}, dict(sent)

    inner = interpolate()
    rule = by_architecture(type(inner)(lambda arrays: {"n": len(arrays)}, update), ["a", "b"])
    arrays = {"a/x": np.zeros(1), "a/y": np.zeros(1), "b/x": np.zeros(1)}
    state = rule.init(arrays)
    assert state == {"a": {"n": 2}, "b": {"n": 1}}
    state, new = rule.update(state, arrays, [Reply({"b/x": np.ones(1)}, 1)] * 3)
    assert state == {"a": {"n": 2}, "b": {"n": 4}}
    assert calls == [(["x"], [["x"]] * 3)]
    assert list(new) == list(arrays)
    assert rule.mean_by is None  # the mean over all architectures would be none of any model


def test_replies_where_nobody_was_asked_are_left_out():
    toy = Toy(architectures=OF_NODES)
    strategy = strategy_of("fedavg", architectures=KINDS)
    start(strategy, toy, nodes=5, rounds=1, arrays=both())
    grid = CohortGrid(toy.app(), num_nodes=1)
    (node_id,) = grid.get_node_ids()
    asked = Message(RecordDict({"config": ConfigRecord()}), node_id, "query.roll_call")
    stray = list(grid.send_and_receive([asked]))
    strategy._round.messages = []
    assert strategy.aggregate_train(2, stray) == (None, None)
