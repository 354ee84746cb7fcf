"""FedKD in runs where not all is well: lost states, skipped rounds, resumes, bad replies, leaks."""

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.common.serde import recorddict_to_proto

from metabloom.clients import ClientStore, FedKDClient
from metabloom.errors import ConfigError
from metabloom.sim import CohortGrid
from metabloom.strategies import Checkpoints, RunResult
from metabloom.strategies.shell import roll_call
from metabloom.wire import from_record, to_record
from tests.strategies.bad_replies import BAD, GridWithout, grid_with, objects
from tests.strategies.fedkd_runs import (
    INITIAL,
    MENTOR,
    Whole,
    app,
    bases,
    fedkd,
    has_no_faults,
    listening,
    run,
    told,
)
from tests.strategies.toy import bits


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(roll_call, "POLL_S", 0.01)
    monkeypatch.setattr(roll_call, "GATHER_S", 0.05)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: a second thread only waits
    yield
    torch.set_num_threads(threads)


# --- who holds what -------------------------------------------------------------------------------


class Forgetful(FedKDClient):
    """A client whose state is lost before it answers in round 3, where it is c2."""

    def fit_named(self, arrays, config):
        if self.name == "c2" and config["server-round"] == 3:
            for name in list(self.context.state):
                del self.context.state[name]
        return super().fit_named(arrays, config)


def test_a_client_that_lost_its_mentee_fails_by_name_once_and_then_gets_the_whole_one():
    grid = listening()
    result = run(clients=app(Forgetful), rounds=5, grid=grid)
    ((client, reason),) = result.rounds[2].failures
    assert client == "c2"
    assert "mentee of round 2, and holds none: its lasting state was lost" in reason
    assert bases(grid)[3] == [2, 2, 2]
    assert bases(grid)[4] == [0, 3, 3]
    assert bases(grid)[5] == [4, 4, 4]
    assert [len(report.failures) for report in result.rounds] == [0, 0, 1, 0, 0]


class Busy(FedKDClient):
    """A client that fails in round 2, unless it is c0."""

    def fit_named(self, arrays, config):
        if self.name != "c0" and config["server-round"] == 2:
            raise RuntimeError("busy")
        return super().fit_named(arrays, config)


def test_after_a_skipped_round_whoever_was_asked_in_it_gets_the_whole_mentee():
    grid = listening()
    result = run(fedkd(min_fit_replies=2), app(Busy), grid=grid)
    assert [report.skipped for report in result.rounds] == [False, True, False, False]
    assert bases(grid) == {1: [0, 0, 0], 2: [1, 1, 1], 3: [0, 0, 0], 4: [3, 3, 3]}
    assert not result.rounds[2].failures


def test_clients_that_take_part_now_and_then_train_from_the_same_mentee():
    grid = listening()
    sampled = run(fedkd(clients_per_round=2, rounds=8), rounds=8, grid=grid)
    whole = run(fedkd(Whole, clients_per_round=2, rounds=8), rounds=8)
    assert bits(sampled.arrays) == bits(whole.arrays)
    assert has_no_faults(sampled)
    assert {0} < {base for told in bases(grid).values() for base in told}


def test_two_halves_are_the_whole_to_the_bit_and_to_the_byte(tmp_path: Path):
    def part(name: str, rounds: int, *, resume: bool = False) -> RunResult:
        saved = Checkpoints(tmp_path / name, resume=resume)
        clients = app(store=ClientStore(tmp_path / f"{name}-clients"))
        strategy = fedkd(rounds=6, clients_per_round=2, checkpoints=saved)
        return run(strategy, clients, rounds=rounds)  # with contexts of its own: a new process

    whole = part("whole", 6)
    part("halves", 3)
    resumed = part("halves", 6, resume=True)
    assert told(resumed) == told(whole)
    assert has_no_faults(resumed)
    with pytest.raises(ConfigError, match=r"energy = '0\.95 to 0\.98', this run '0\.5 to 0\.98'"):
        run(fedkd(energy=(0.5, 0.98), checkpoints=Checkpoints(tmp_path / "whole", resume=True)))


# --- bad replies ----------------------------------------------------------------------------------


def arrays_of(change: Callable[[dict], dict]) -> Callable[[Message], Message]:
    """Return what changes the arrays of a reply, and nothing else of it."""

    def tamper(message: Message) -> Message:
        arrays = {
            name: value.copy() for name, value in from_record(message.content["arrays"]).items()
        }
        message.content = RecordDict({**message.content, "arrays": to_record(change(arrays))})
        return message

    return tamper


def without(arrays: dict, name: str) -> dict:
    return {key: value for key, value in arrays.items() if key != name}


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Message], Message]:
    return arrays_of(lambda arrays: {**arrays, name: change(arrays[name])})


def with_nan(array: np.ndarray) -> np.ndarray:
    return np.where(np.arange(array.size).reshape(array.shape) == 0, np.nan, array).astype("f4")


def with_pickle(message: Message) -> Message:
    record = message.content["arrays"]
    spoilt = ArrayRecord({**record, "0.bias": objects(record["0.bias"])})
    message.content = RecordDict({**message.content, "arrays": spoilt})
    return message


def two_records(message: Message) -> Message:
    message.content = RecordDict({**message.content, "more": message.content["arrays"]})
    return message


BAD_UPDATES = {
    "foreign name": (arrays_of(lambda a: {**a, "x": a["0.bias"]}), "not expected, 'x' first"),
    "missing factor": (
        arrays_of(lambda a: without(a, "0.weight/s")),
        "nor its factor '0.weight/s'",
    ),
    "missing array": (arrays_of(lambda a: without(a, "2.bias")), "'2.bias' did not come"),
    "wrong shape": (changed("0.weight/v", lambda v: v[:, 1:]), r"'0.weight/v' has shape .*wanted"),
    "wrong dtype": (changed("0.bias", lambda b: b.astype("f8")), "'0.bias' has .*float64, wanted"),
    "NaN factor": (changed("0.weight/u", with_nan), "'0.weight' holds NaN or infinity"),
    "NaN array": (changed("0.bias", with_nan), "'0.bias' holds NaN or infinity"),
    "huge factors": (changed("0.weight/s", lambda s: s * 1e30), "'0.weight' holds .*above 1e.20"),
    "pickled objects": (with_pickle, "cannot be read: ValueError"),
    "two ArrayRecords": (two_records, "2 ArrayRecords: exactly one is needed"),
    "no arrays": (lambda m: (m.content.pop("arrays"), m)[1], "0 ArrayRecords"),
}


@pytest.mark.parametrize("how", list(BAD_UPDATES))
def test_a_bad_update_is_quarantined_by_name_and_the_others_decide_the_model(how: str):
    tamper, said = BAD_UPDATES[how]
    result = run(grid=grid_with(tamper), rounds=2)
    reference = run(grid=GridWithout, rounds=2)
    assert bits(result.arrays) == bits(reference.arrays)
    assert result.train_metrics_clientapp == reference.train_metrics_clientapp
    for report, alone in zip(result.rounds, reference.rounds, strict=True):
        assert not report.failures
        ((client, reason),) = report.quarantined
        assert client == f"c{BAD}"
        assert re.search(said, reason), reason
        assert report.bytes_up == alone.bytes_up


def test_a_client_of_bad_updates_is_not_sampled_again_after_so_many():
    tamper, _ = BAD_UPDATES["missing factor"]
    result = run(fedkd(max_offences=2), grid=grid_with(tamper), rounds=3)
    assert [len(report.quarantined) for report in result.rounds] == [1, 1, 0]
    assert [len(report.clients) for report in result.rounds] == [3, 3, 2]


def test_where_all_updates_are_bad_the_mentee_stays():
    tamper, _ = BAD_UPDATES["wrong shape"]
    result = run(grid=grid_with(tamper, bad=range(4)), rounds=2)
    assert bits(result.arrays) == bits(to_record(INITIAL))
    assert [report.skipped for report in result.rounds] == [True, True]
    assert all(len(report.quarantined) == 3 for report in result.rounds)


class Twice(CohortGrid):
    """A grid on which each reply comes twice, the second one spoilt."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None):
        replies = list(super().send_and_receive(messages, timeout=timeout))
        tamper = BAD_UPDATES["missing factor"][0]
        return [*replies, *(tamper(copy.copy(r)) for r in replies if is_train(r))]


def is_train(reply: Message) -> bool:
    return reply.metadata.message_type == "train"


def test_of_two_replies_to_one_message_the_first_counts():
    once, twice = run(), run(grid=Twice)
    assert told(once) == told(twice)


# --- the mentor stays -----------------------------------------------------------------------------


def leaks_of(kind: type[FedKDClient]) -> int:
    """Return how many arrays of trained or initial mentors were heard on the wire."""
    mentors: list[dict[str, np.ndarray]] = []

    class Watched(kind):
        def fit(self, parameters, config):
            result = super().fit(parameters, config)
            kept = self._mentors.after(config, "cpu")
            mentors.append({name: value.numpy() for name, value in kept.items()})
            return result

    grid = listening()
    run(clients=app(Watched), rounds=3, grid=grid)
    heard = [recorddict_to_proto(content).SerializeToString() for _, content in grid.heard]
    assert len(mentors) == 9
    assert any(INITIAL["0.weight"].tobytes() in text for text in heard)  # what is sent is found
    secret = [*mentors, {n: value.numpy() for n, value in MENTOR.state_dict().items()}]
    return sum(
        value.tobytes() in text for arrays in secret for value in arrays.values() for text in heard
    )


class Leaky(FedKDClient):
    def fit_named(self, arrays, config):
        reply, count, metrics = super().fit_named(arrays, config)
        mentor = self._mentors.after(config, "cpu")
        return {**reply, "bias": mentor["2.bias"].numpy()}, count, metrics


def test_no_array_of_a_mentor_is_in_any_message():
    assert leaks_of(FedKDClient) == 0
    assert leaks_of(Leaky) > 0
