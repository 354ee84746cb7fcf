"""What is saved of a run, and when: nothing of it may end the run, or depend on later rounds."""

import errno
import logging
import os

import pytest
from flwr.app import MetricRecord

from metabloom.errors import CheckpointError
from metabloom.strategies import Checkpoints
from metabloom.strategies.shell.history import History
from metabloom.strategies.shell.resume import Saver
from tests.strategies import snapshots
from tests.strategies.snapshots import exactly, report, rounds, snapshot
from tests.strategies.toy import Toy, bits, start, strategy_of

# --- a disk that fails ----------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """A list; while there is something in it the disk is full."""
    real, full = os.fsync, []

    def syncs(handle):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", syncs)
    return full


def errors(caplog) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]


@pytest.mark.parametrize("every", [1, 2])
def test_a_full_disk_is_told_each_time_and_tried_again_with_the_next_round(
    tmp_path, caplog, full_disk, every
):
    saver = Saver(Checkpoints(tmp_path, every), None)
    for number in (1, 2):
        saver.offer(snapshot(number))
    full_disk.append(True)
    for number in (3, 4, 5):
        saver.offer(snapshot(number))
    saver.flush()
    told = errors(caplog)
    assert [one.split(",")[0] for one in told] == [
        f"round {number} could not be saved" for number in (3, 4, 5, 5)[every - 1 :]
    ]
    assert all("No space left on device; what was there before is kept" in one for one in told)
    assert max(rounds(tmp_path)) == 2
    full_disk.clear()
    saver.offer(snapshot(7))  # overdue, whatever its number
    assert Checkpoints(tmp_path).load().round == 7
    saver.offer(snapshot(9))
    assert Checkpoints(tmp_path).load().round == (9 if every == 1 else 7)


def test_a_folder_that_goes_away_does_not_end_a_run(tmp_path, caplog):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "c"):  # not to be read; not to be made
        Saver(Checkpoints(folder), None).offer(snapshot(1))
    assert ["round 1 could not be saved" in one for one in errors(caplog)] == [True, True]


def test_a_run_on_a_full_disk_has_the_result_of_any_other(tmp_path, caplog, full_disk):
    whole = start(strategy_of("fedmeta"), Toy(), rounds=3)
    full_disk.append(True)
    strategy = strategy_of("fedmeta", checkpoints=Checkpoints(tmp_path / "c"))
    assert bits(start(strategy, Toy(), rounds=3).arrays) == bits(whole.arrays)
    assert len(errors(caplog)) >= 3
    assert rounds(tmp_path / "c") == []


# --- a state that can never be saved --------------------------------------------------------------


def test_a_state_that_can_never_be_saved_is_told_once_and_at_the_first_save(tmp_path, caplog):
    saver = Saver(Checkpoints(tmp_path), None)
    with pytest.raises(CheckpointError, match="is a Foo"):
        saver.offer(snapshot(1, state={"x": snapshots.Foo()}))
    saver.flush()  # on the way out
    assert errors(caplog) == []


@pytest.mark.parametrize("error", [CheckpointError("a Foo"), RuntimeError("a mistake of ours")])
def test_what_goes_wrong_on_the_way_out_of_an_exception_is_logged_only(
    tmp_path, caplog, monkeypatch, error
):
    def fails(*_):
        raise error

    monkeypatch.setattr(Checkpoints, "save", fails)
    saver = Saver(Checkpoints(tmp_path, every=10), None)
    saver.offer(snapshot(3))
    saver.flush(failing=True)
    assert errors(caplog) == [
        f"round 3 could not be saved, the checkpoints before it are kept: {error}"
    ]
    saver.offer(snapshot(4))
    with pytest.raises(type(error)):
        saver.flush()


# --- the state after a whole round ----------------------------------------------------------------


def close(history: History, number: int) -> None:
    history.train_metrics[number] = MetricRecord({"loss": 1 / number})
    history.server_metrics[number] = MetricRecord({"loss": 2 / number})
    history.reports.append(report(number))
    history.offences["ben"] += 1


def test_a_snapshot_is_not_changed_by_what_comes_after_it():
    history = History(server_metrics={0: MetricRecord({"loss": 4.0})})
    close(history, 1)
    first = history.snapshot(1, {}, None, ("7",))
    before = exactly(first)
    history.train_metrics[1]["loss"] = 9.0
    close(history, 2)
    second = history.snapshot(2, {}, None, ("7",))
    assert exactly(first) == before
    assert second.train_metrics == {1: {"loss": 1.0}, 2: {"loss": 0.5}}
    assert second.server_metrics == {0: {"loss": 4.0}, 1: {"loss": 2.0}, 2: {"loss": 1.0}}
    assert second.evaluate_metrics == {}
    assert (second.offences, len(second.reports)) == ({"ben": 2}, 2)


def test_the_metrics_of_a_round_are_copied_once():
    history = History()
    close(history, 1)
    first = history.snapshot(1, {}, None, ()).train_metrics
    close(history, 2)
    assert history.snapshot(2, {}, None, ()).train_metrics[1] is first[1]


def test_a_history_goes_on_from_its_snapshot():
    history = History(token="run-a")
    close(history, 1)
    kept = history.snapshot(1, {}, None, ())
    again = History.of(kept)
    assert again == history
    for one in (history, again):
        close(one, 2)
    assert exactly(again.snapshot(2, {}, None, ())) == exactly(history.snapshot(2, {}, None, ()))
