"""Strategies with a teacher: who is sent it and when, its bytes, and what becomes of the run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from torch import nn

from metabloom.clients import MetaTeacherClient, TaughtClient, client_app
from metabloom.clients.privacy.config import PrivacyConfig
from metabloom.config import RunConfig
from metabloom.errors import ConfigError
from metabloom.sim import CohortGrid
from metabloom.strategies import (
    STRATEGIES,
    Checkpoints,
    FedAvg,
    FedMeta,
    MetaTeacher,
    RuleStrategy,
    TeacherStudent,
)
from metabloom.strategies.shell import roll_call
from metabloom.teacher import Teacher
from metabloom.wire import (
    ROLE,
    TEACHER,
    TEACHER_DIGEST,
    TEACHER_LR,
    TEACHER_PRIVATE,
    from_record,
    size_of,
    to_record,
)
from tests.clients.toy_problems import client_data, initialised, small_net
from tests.strategies.summing_grid import BlockGrid
from tests.strategies.toy import Toy, bits, start

ROLES = ("train", "train", "train", "validation", "unseen")
ARRAYS = {"body": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "scale": np.array(0.5)}
BYTES = size_of(to_record(ARRAYS))
USUAL = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "POLL_S", 0.01)
    monkeypatch.setattr(roll_call, "GATHER_S", 0.05)


def teacher(arrays=ARRAYS, **more) -> Teacher:
    return Teacher(nn.Identity(), arrays, **more)


def taught_by(kind: type[RuleStrategy] = TeacherStudent, *, by=None, **more) -> RuleStrategy:
    return kind(teacher=by or teacher(), **{**USUAL, **more})


@dataclass
class Watched(Toy):
    """A toy that notes (kind, round, partition) of the messages that held the teacher."""

    sent: list[tuple[str, int, int]] = field(default_factory=list)

    def _note(self, kind: str, message: Message, context: Context) -> tuple[int, int]:
        if TEACHER in message.content:
            arrays = from_record(message.content[TEACHER])
            assert all(np.array_equal(arrays[name], value) for name, value in ARRAYS.items())
            number = int(message.content["config"]["server-round"])
            self.sent.append((kind, number, int(context.node_config["partition-id"])))
        return super()._note(kind, message, context)


def sum_of_bytes(result) -> int:
    return sum(report.bytes_down for report in result.rounds)


# --- who is sent the teacher ----------------------------------------------------------------------


def test_each_training_client_is_sent_the_teacher_once_and_the_bytes_are_counted():
    toy = Watched(roles=ROLES)
    result = start(taught_by(), toy, rounds=3)
    assert sorted(toy.sent) == [("train", 1, 0), ("train", 1, 1), ("train", 1, 2)]
    plain = start(FedAvg(**USUAL), Toy(roles=ROLES), rounds=3)
    extra = [a.bytes_down - b.bytes_down for a, b in zip(result.rounds, plain.rounds, strict=True)]
    assert extra == [3 * BYTES, 0, 0]
    assert [one.bytes_up for one in result.rounds] == [one.bytes_up for one in plain.rounds]
    assert bits(result.arrays) == bits(plain.arrays)  # of clients that ignore it


def test_clients_that_are_sampled_later_are_sent_it_then():
    toy = Watched()
    result = start(taught_by(clients_per_round=2, eval_every=0), toy, rounds=6)
    asked = [(number, one) for number, r in enumerate(result.rounds, 1) for one in r.clients]
    first = {client: number for number, client in reversed(asked)}
    assert {f"partition-{place}": number for _, number, place in toy.sent} == first
    assert len(toy.sent) == len(first) > 2


def test_a_client_that_fails_is_sent_it_again_and_one_that_is_good_is_not():
    def fails(partition: int, number: int) -> str:
        return "its disk was full" if partition == 1 and number in (1, 3) else ""

    toy = Watched(roles=ROLES, fails=fails)
    result = start(taught_by(), toy, rounds=5)
    assert [one[1:] for one in toy.sent if one[2] == 1] == [(1, 1), (2, 1), (4, 1)]
    assert [one[1:] for one in toy.sent if one[2] != 1] == [(1, 0), (1, 2)]
    plain = start(FedAvg(**USUAL), Toy(roles=ROLES, fails=fails), rounds=5)
    assert sum_of_bytes(result) - sum_of_bytes(plain) == 5 * BYTES


def test_a_reply_that_the_firewall_refuses_does_not_count_as_one_that_has_the_teacher():
    def learns(arrays, partition, number):
        wild = {"weight": arrays["weight"] + np.nan} if (partition, number) == (2, 1) else {}
        return {**arrays, **wild}

    toy = Watched(roles=ROLES, learns=learns)
    result = start(taught_by(), toy, rounds=3)
    assert [client for client, _ in result.rounds[0].quarantined] == ["c2"]
    assert [one[1] for one in toy.sent if one[2] == 2] == [1, 2]


def test_a_second_run_of_the_same_strategy_sends_it_anew():
    strategy = taught_by()
    for _ in range(2):
        toy = Watched(roles=ROLES)
        start(strategy, toy, rounds=2)
        assert len(toy.sent) == 3


def test_a_meta_teacher_comes_with_evaluations_alone():
    toy = Watched(roles=ROLES)
    result = start(taught_by(MetaTeacher), toy, rounds=3)
    assert toy.sent == [("evaluate", 1, 3), ("evaluate", 3, 4)]  # unseen: once, at the end
    for (kind, _), config in zip(toy.asked, toy.configs, strict=True):
        assert (TEACHER_DIGEST in config) is (kind == "evaluate")
    plain = start(FedMeta(**USUAL), Toy(roles=ROLES), rounds=3)
    assert bits(result.arrays) == bits(plain.arrays)
    extra = [a.bytes_down - b.bytes_down for a, b in zip(result.rounds, plain.rounds, strict=True)]
    assert extra == [BYTES, 0, 0]


@pytest.mark.parametrize(
    ("by", "may", "lr"),
    [
        (teacher(), False, None),
        (teacher(was_private=True, inner_lr=0.3), True, 0.3),
        (teacher(is_public=True), True, None),
    ],
)
def test_clients_are_told_which_teacher_it_is_and_whether_it_may_teach_private_ones(by, may, lr):
    toy = Watched(roles=ROLES)
    start(taught_by(by=by), toy, rounds=1)
    config = toy.configs[0]
    assert config[TEACHER_DIGEST] == by.digest
    assert config[TEACHER_PRIVATE] is may
    assert config.get(TEACHER_LR) == lr


def test_replies_are_summed_beside_the_clients_as_ever():
    toy = Watched()
    summed = start(taught_by(eval_every=0), toy, nodes=8, rounds=2, grid=BlockGrid)
    single = start(taught_by(eval_every=0, partial_sums=False), Toy(), nodes=8, rounds=2)
    assert len(toy.sent) == 8
    for name, value in from_record(single.arrays).items():
        np.testing.assert_allclose(from_record(summed.arrays)[name], value, rtol=1e-3)  # float16


# --- resume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TeacherStudent, MetaTeacher])
@pytest.mark.parametrize("settings", [{}, {"teacher": "results/large"}])
def test_two_halves_are_the_whole_and_the_teacher_is_sent_again(kind, settings, tmp_path: Path):
    make = partial(Checkpoints, tmp_path, settings=settings)
    whole = start(taught_by(kind), Watched(roles=ROLES), rounds=4)
    start(taught_by(kind, checkpoints=make()), Watched(roles=ROLES), rounds=2)
    toy = Watched(roles=ROLES)
    halves = start(taught_by(kind, checkpoints=make(resume=True)), toy, rounds=4)
    assert bits(halves.arrays) == bits(whole.arrays)
    assert [r.clients for r in halves.rounds] == [r.clients for r in whole.rounds]
    assert [number for _, number, _ in toy.sent] == ([3] * 3 if kind is TeacherStudent else [3, 4])


@pytest.mark.parametrize("settings", [{}, {"teacher": "results/large"}])
def test_a_run_that_is_resumed_must_have_the_same_teacher(settings, tmp_path: Path):
    """A file of the same name may hold other weights by now."""
    make = partial(Checkpoints, tmp_path, settings=settings)
    start(taught_by(checkpoints=make()), Toy(), rounds=2)
    other = teacher({**ARRAYS, "scale": np.array(0.25)})
    with pytest.raises(ConfigError, match="teacher"):
        start(taught_by(by=other, checkpoints=make(resume=True)), Toy(), rounds=3)


# --- with clients of ours -------------------------------------------------------------------------

LARGE = initialised(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)), seed=5)
WEIGHTS = {name: value.numpy() for name, value in LARGE.state_dict().items()}


def never(index: int, call: int) -> bool:
    return False


def app_of(kind=TaughtClient, *, roles=ROLES, loses: Callable[[int, int], bool] = never, **options):
    """An app of small clients; ``loses(partition, call)`` says when one has lost its state."""
    model, calls = small_net().float(), dict.fromkeys(range(5), 0)

    def client_fn(context: Context):
        index = int(context.node_config["partition-id"])
        calls[index] += 1
        if loses(index, calls[index]):
            context.state.clear()
        own = {"name": f"c{index}", "teacher": LARGE, "context": context} | options
        return kind(model, client_data(seed=index), **own)

    def properties(context: Context):
        index = int(context.node_config["partition-id"])
        return {ROLE: roles[index], "client-name": f"c{index}"}

    return client_app(client_fn, properties=properties)


def play(strategy: RuleStrategy, app, *, rounds: int = 3, nodes: int = 5):
    arrays = {name: value.numpy() for name, value in small_net(3).float().state_dict().items()}
    grid = CohortGrid(app, num_nodes=nodes)
    return strategy.start(grid, to_record(arrays), num_rounds=rounds, timeout=60)


def test_with_one_client_the_model_is_that_of_its_local_run():
    by, place = teacher(WEIGHTS), Context(1, 1, {}, RecordDict(), {})
    options = {"batch_size": 4, "local_epochs": 2}
    own = TaughtClient(
        small_net().float(), client_data(), teacher=LARGE, name="c0", context=place, **options
    )
    own.take_teacher(WEIGHTS)
    sent = [value.numpy() for value in small_net(3).float().state_dict().values()]
    alone, _, _ = own.fit(sent, {"server-round": 1, TEACHER_DIGEST: by.digest})
    app = app_of(roles=("train", "validation", "unseen"), **options)
    result = play(taught_by(by=by), app, rounds=1, nodes=3)
    for found, wanted in zip(from_record(result.arrays).values(), alone, strict=True):
        assert np.array_equal(found, wanted)
    assert not any(np.array_equal(one, other) for one, other in zip(alone, sent, strict=True))


def test_a_client_that_lost_what_it_kept_fails_by_name_and_is_taught_again():
    by = teacher(WEIGHTS)
    whole = play(taught_by(by=by, eval_every=0), app_of(), rounds=4)
    lost = app_of(loses=lambda index, call: index == 1 and call == 2)
    result = play(taught_by(by=by, eval_every=0), lost, rounds=4)
    assert [len(report.failures) for report in result.rounds] == [0, 1, 0, 0]
    ((client, reason),) = result.rounds[1].failures
    assert client == "c1"
    assert f"client 'c1' has no outputs of teacher {by.digest}" in reason
    assert result.rounds[2].bytes_down - whole.rounds[2].bytes_down == size_of(to_record(WEIGHTS))
    assert result.rounds[3].bytes_down == whole.rounds[3].bytes_down


def test_students_that_are_taught_alone_come_to_say_what_the_teacher_says():
    by = teacher(WEIGHTS)
    options = {"alpha": 1.0, "temperature": 2.0, "local_lr": 0.5, "local_epochs": 10}
    records = torch.cat([client_data(seed=index).all[0] for index in range(3)])
    with torch.no_grad():
        wanted = LARGE(records).softmax(1)

    def distance(arrays) -> float:
        net = small_net().float()
        net.load_state_dict({n: torch.tensor(v) for n, v in from_record(arrays).items()})
        with torch.no_grad():
            return float((net(records).softmax(1) - wanted).abs().mean())

    made = taught_by(by=by, eval_every=0)
    before = distance(play(made, app_of(alpha=0.0, local_lr=1e-9), rounds=1).arrays)
    after = distance(play(made, app_of(**options), rounds=10).arrays)
    assert after < before / 3


def test_private_clients_refuse_a_teacher_that_was_not_counted_by_name(tmp_path: Path):
    def app():
        def privacy(index):
            return PrivacyConfig(
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                sample_rate=0.5,
                expected_batch_size=4.0,
                target_epsilon=200.0,
                target_delta=1e-5,
                ledger=tmp_path / f"{index}.jsonl",
            )

        model = small_net().float()

        def client_fn(context: Context):
            index = int(context.node_config["partition-id"])
            options = {"teacher": LARGE, "context": context, "privacy": privacy(index)}
            return TaughtClient(model, client_data(seed=index), name=f"c{index}", **options)

        return client_app(client_fn, properties=lambda c: {ROLE: "train"})

    refused = play(taught_by(by=teacher(WEIGHTS), eval_every=0), app(), rounds=1)
    assert len(refused.rounds[0].failures) == 5
    assert all("refuses the teacher" in reason for _, reason in refused.rounds[0].failures)
    assert refused.rounds[0].skipped
    trusted = teacher(WEIGHTS, was_private=True)
    result = play(taught_by(by=trusted, eval_every=0), app(), rounds=2)
    assert not any(report.failures for report in result.rounds)
    assert len(result.rounds[1].spent) == 5


@pytest.mark.parametrize("kernel", ["eager", "vmap"])
def test_a_meta_teacher_s_run_scores_both_students_and_the_teacher(kernel):
    by = teacher(WEIGHTS, inner_lr=0.2)
    app = app_of(MetaTeacherClient, eval_steps=(1,), kernel=kernel, teach_steps=5)
    result = play(taught_by(MetaTeacher, by=by), app, rounds=2)
    (unseen,) = result.unseen
    names = {"accuracy-before", "accuracy-after-1", "taught-accuracy", "teacher-accuracy"}
    assert names <= set(unseen.metrics)
    first, second = (report.validation[0].metrics for report in result.rounds)
    assert first["teacher-loss"] == second["teacher-loss"]  # kept by the client
    assert first["taught-loss"] != second["taught-loss"]
    assert not result.final_failures


# --- recipes --------------------------------------------------------------------------------------


def test_the_recipes_hand_the_keys_to_the_clients():
    keys = {"distill-alpha": 0.7, "distill-temperature": 3, "local-epochs": 2, "batch-size": 8}
    config = RunConfig.read({"strategy": "teacher-student", **keys})
    recipe = STRATEGIES["teacher-student"](config)
    assert (recipe.needs, recipe.client_needs) == (("teacher",), ("teacher",))
    wanted = {"alpha": 0.7, "temperature": 3.0, "local_epochs": 2, "batch_size": 8}
    assert recipe.client_options == {**wanted, "local_lr": config.local_lr}
    assert isinstance(recipe.strategy(teacher=teacher(), **USUAL), TeacherStudent)

    keys = {"teach-steps": 9, "teach-lr": 0.2, "distill-alpha": 0.7, "inner-steps": 2}
    recipe = STRATEGIES["meta-teacher"](RunConfig.read({"strategy": "meta-teacher", **keys}))
    options = recipe.client_options
    assert (options["teach_steps"], options["teach_lr"], options["alpha"]) == (9, 0.2, 0.7)
    assert (options["inner_steps"], options["outer_lr"]) == (2, 1.0)
    assert recipe.client == "meta-teacher"
    assert isinstance(recipe.strategy(teacher=teacher(), **USUAL), MetaTeacher)
