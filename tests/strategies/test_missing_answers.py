"""What nodes do not say, say too late or say wrong is noted by name, never trained on."""

from collections.abc import Callable, Iterable

import numpy as np
import pytest
from flwr.app import Message

from metabloom import strategies
from metabloom.errors import ConfigError, MetabloomError
from metabloom.sim import CohortGrid
from metabloom.strategies import FedAvg, FedMeta, Reply, interpolate, server_optimizer
from metabloom.strategies.shell import roll_call
from metabloom.wire import from_record, to_record
from tests.strategies.toy import Toy, bits, model, start, strategy_of

ROLES = ("train", "unseen", "train", "validation", "train")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "POLL_S", 0.01)
    monkeypatch.setattr(roll_call, "GATHER_S", 0.05)


def losing(lose: Callable[[Message, int], bool]) -> type[CohortGrid]:
    """Return a grid that loses the replies for which ``lose(reply, its number)`` holds."""

    class LossyGrid(CohortGrid):
        seen = 0

        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None):
            kept = []
            for reply in super().send_and_receive(messages, timeout=timeout):
                if not lose(reply, self.seen):
                    kept.append(reply)
                self.seen += 1
            return kept

    return LossyGrid


def is_roll_call(reply: Message) -> bool:
    return reply.metadata.message_type == "query.roll_call"


def test_a_node_whose_roll_call_answer_was_lost_does_not_train_and_is_asked_again() -> None:
    toy = Toy(roles=ROLES)
    lost_first = losing(lambda reply, n: is_roll_call(reply) and n < 5 and _is(reply, 1))
    result = start(strategy_of("fedavg"), toy, grid=lost_first)
    assert set(toy.partitions("train")) == {0, 2, 4}
    assert toy.roll_calls.count(1) == 2
    assert [score.client for score in result.unseen] == ["c1"]


def _is(reply: Message, partition: int) -> bool:
    said = reply.content.config_records.get("properties", {})
    return said.get("partition-id") == partition


def test_lost_training_replies_are_failures_of_their_clients() -> None:
    toy = Toy(roles=ROLES)
    lost = losing(
        lambda reply, n: (
            reply.metadata.message_type == "train" and reply.content["metrics"]["num-examples"] == 3
        )
    )
    result = start(strategy_of("fedavg"), toy, grid=lost)
    assert [report.failures for report in result.rounds] == [(("c2", "no reply within 5 s"),)] * 2


def test_a_run_in_which_every_training_reply_was_lost_keeps_the_model_and_says_why() -> None:
    lost = losing(lambda reply, n: reply.metadata.message_type == "train")
    result = start(strategy_of("fedavg"), Toy(roles=ROLES), grid=lost)
    assert bits(result.arrays) == bits(to_record(model()))
    assert all(report.skipped for report in result.rounds)
    assert ("c0", "no reply within 5 s") in result.rounds[0].failures


def test_failures_of_unseen_clients_are_kept_with_their_reasons() -> None:
    toy = Toy(roles=ROLES, fails=lambda partition, number: "no disk" if partition == 1 else "")
    result = start(strategy_of("fedavg"), toy)
    assert result.unseen == []
    ((client, reason),) = result.final_failures
    assert client == "c1"
    assert "no disk" in reason


def test_a_node_that_says_why_it_cannot_take_part_is_left_out() -> None:
    toy = Faulty(roles=ROLES, faulty={2})
    start(strategy_of("fedavg"), toy)
    assert set(toy.partitions("train")) == {0, 4}


def test_where_no_node_can_take_part_the_run_ends_with_the_first_reason_before_any_round() -> None:
    toy = Faulty(roles=ROLES, faulty={0, 1, 2, 3, 4})
    with pytest.raises(MetabloomError, match="no node can take part; c0 says: data are missing"):
        start(strategy_of("fedavg"), toy)
    assert toy.asked == []


class Faulty(Toy):
    """Nodes of which some say at the roll call that their data are missing."""

    def __init__(self, roles: tuple[str, ...], faulty: set[int]) -> None:
        super().__init__(roles=roles)
        self.faulty = faulty

    def _answer_roll_call(self, message, context):
        reply = super()._answer_roll_call(message, context)
        if context.node_config["partition-id"] in self.faulty:
            reply.content["properties"]["error"] = "data are missing"
        return reply


def test_ditto_scores_its_training_clients_after_the_last_round_and_others_do_not() -> None:
    result = start(strategy_of("ditto"), Toy(roles=ROLES))
    assert [score.client for score in result.trained] == ["c0", "c2", "c4"]
    assert start(strategy_of("fedavg"), Toy(roles=ROLES)).trained == []


@pytest.mark.parametrize("counts", [[0.0, 0.0], [-1.0, 3.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_numbers_of_examples_that_are_no_weights_are_refused_with_their_values(counts) -> None:
    rule = interpolate(weighting="examples")
    replies = [Reply(model(), count) for count in counts]
    with pytest.raises(MetabloomError, match="num-examples of the replies are"):
        rule.update({}, model(), replies)


@pytest.mark.parametrize("make", [FedAvg, FedMeta])
def test_an_unknown_weighting_is_refused_with_the_nearest(make) -> None:
    with pytest.raises(ConfigError, match="did you mean 'examples'"):
        make(weighting="exmaples")


def test_running_statistics_take_the_mean_and_never_an_optimisers_step() -> None:
    import torch

    sent = {"bn.running_var": np.array([1.0], np.float32), "w": np.array([1.0], np.float32)}
    answered = {name: np.array([0.05], np.float32) for name in sent}
    rule = server_optimizer(lambda params: torch.optim.Adam(params, lr=0.1))
    state, arrays = rule.init(sent), sent
    for _ in range(15):
        state, arrays = rule.update(state, arrays, [Reply(answered, 1.0)])
    assert arrays["bn.running_var"] == pytest.approx(0.05)
    assert arrays["w"] < 0  # Adam overshoots, as it may for a weight


def test_every_strategy_class_of_the_package_is_exported() -> None:
    made = {type(strategy_of(name)).__name__ for name in strategies.STRATEGIES}
    assert made <= set(strategies.__all__)
    assert len(made) == len(strategies.STRATEGIES)


def test_layers_that_no_client_ever_changes_stay_whatever_weight_decay_the_optimiser_has() -> None:
    import torch

    sent = {name: np.array([1.0], np.float32) for name in ("frozen", "trained")}
    rule = server_optimizer(lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.5))
    state, arrays = rule.init(sent), sent
    for _ in range(3):
        reply = Reply({**arrays, "trained": arrays["trained"] - 0.5}, 1.0)
        state, arrays = rule.update(state, arrays, [reply])
    assert arrays["frozen"] == 1.0
    assert arrays["trained"] < 1.0


def test_a_client_that_counts_no_examples_is_left_out_by_name_and_the_round_goes_on() -> None:
    class Uncounted(Toy):
        def _train(self, message, context):
            reply = super()._train(message, context)
            if context.node_config["partition-id"] == 2:
                reply.content["metrics"]["num-examples"] = 0
            return reply

    result = start(strategy_of("fedavg"), Uncounted(roles=ROLES), rounds=1)
    without = start(strategy_of("fedavg"), Faulty(roles=ROLES, faulty={2}), rounds=1)
    ((client, reason),) = result.rounds[0].quarantined
    assert client == "c2"
    assert "num-examples is 0" in reason
    for name, value in from_record(result.arrays).items():
        assert np.array_equal(value, from_record(without.arrays)[name]), name


def test_the_superlinks_word_on_a_lost_node_is_a_failure_of_that_node_told_once() -> None:
    from flwr.app import Error

    class LosesNode(CohortGrid):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None):
            replies = []
            for reply in super().send_and_receive(messages, timeout=timeout):
                if (
                    reply.metadata.message_type == "train"
                    and reply.content["metrics"]["num-examples"] == 3
                ):
                    lost = Message(Error(5, "Node Unavailable"), reply_to=_asked(reply))
                    lost.metadata.__dict__["_src_node_id"] = 1  # the SuperLink's own id
                    reply = lost
                replies.append(reply)
            return replies

    def _asked(reply: Message) -> Message:
        asked = Message(reply.content, dst_node_id=1, message_type="train")
        asked.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
        return asked

    result = start(strategy_of("fedavg"), Toy(roles=ROLES), rounds=1, grid=LosesNode)
    assert result.rounds[0].failures == (("c2", "Node Unavailable"),)


def test_a_node_that_answers_with_an_error_where_others_have_roles_is_a_named_failure() -> None:
    class Broken(Toy):
        def _answer_roll_call(self, message, context):
            if context.node_config["partition-id"] == 2:
                raise OSError("no such disk")
            return super()._answer_roll_call(message, context)

    toy = Broken(roles=ROLES)
    result = start(strategy_of("fedavg"), toy)
    assert set(toy.partitions("train")) == {0, 4}
    assert result.clients == {"train": 2, "validation": 1, "unseen": 1}
    ((name, reason),) = result.rounds[0].failures
    assert name.startswith("node-")
    assert "no such disk" in reason
    assert result.rounds[1].failures == ()  # told once


def test_where_all_training_nodes_refuse_the_run_ends_with_the_first_reason() -> None:
    with pytest.raises(MetabloomError, match="nobody can train; c0 says: data are missing"):
        start(strategy_of("fedavg"), Faulty(roles=ROLES, faulty={0, 2, 4}))


def test_a_node_that_was_away_for_a_round_comes_back_without_being_asked_again() -> None:
    class Leaving(CohortGrid):
        calls = 0

        def get_node_ids(self) -> Iterable[int]:
            ids = list(self.partitions)
            type(self).calls += 1
            return ids[:-1] if self.calls in (3, 4) else ids

    toy = Toy(roles=ROLES)
    start(strategy_of("fedavg"), toy, rounds=4, grid=Leaving)
    assert toy.roll_calls == [0, 1, 2, 3, 4]
    assert 2 <= toy.partitions("train").count(4) < 4


class TrainersLeave(CohortGrid):
    """A grid from which the training nodes are away for a while after the first round."""

    away_for = 5
    asked = 0

    def get_node_ids(self) -> Iterable[int]:
        ids = list(self.partitions)  # by partition
        self.asked += 1
        is_away = 2 < self.asked <= 2 + self.away_for  # each round asks twice
        return [ids[1], ids[3]] if is_away else ids


def test_a_run_waits_for_training_nodes_that_are_away_for_a_moment() -> None:
    result = start(strategy_of("fedavg"), Toy(roles=ROLES), rounds=3, grid=TrainersLeave)
    assert [report.clients for report in result.rounds] == [("c0", "c2", "c4")] * 3


def test_a_run_does_not_wait_for_ever_for_training_nodes() -> None:
    gone = type("Gone", (TrainersLeave,), {"away_for": 10**9})
    grid = gone(Toy(roles=ROLES).app(), num_nodes=5)
    with pytest.raises(MetabloomError, match=r"2 nodes are connected, .* one to train, and 0.2 s"):
        strategy_of("fedavg").start(grid, to_record(model()), num_rounds=3, timeout=0.2)
