"""Checkpoints: exact round trips, and files that are damaged, half-written or of another run."""

import errno
import itertools
import json
import logging
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metabloom.errors import CheckpointError, ConfigError, MetabloomError
from metabloom.strategies import ClientScore
from metabloom.strategies.shell import reports
from metabloom.strategies.shell.checkpoint import Checkpoints
from tests.strategies import snapshots
from tests.strategies.snapshots import exactly, files, report, rounds, saved, snapshot, through_disk

# --- round trips ----------------------------------------------------------------------------------


def test_a_snapshot_comes_back_as_it_was():
    assert exactly(through_disk()) == exactly(snapshot())
    bare = {"reports": (), "train_metrics": {}, "evaluate_metrics": {}, "offences": {}, "told": ()}
    assert exactly(through_disk(**bare)) == exactly(snapshot(**bare))


@settings(max_examples=100, deadline=None)
@given(snapshots.HISTORIES, snapshots.FLOATS, st.text(), st.text())
def test_any_history_comes_back_to_the_bit(history, loss, name, token):
    score = ClientScore(name, 3, "validation", loss, {name: loss, "float": 1.0})
    parts = {
        "train_metrics": history,
        "server_metrics": history,
        "reports": (replace(report(1, loss), clients=(name,), validation=(score,)),),
        "offences": {name: 3},
        "token": token,
    }
    assert exactly(through_disk(**parts)) == exactly(snapshot(**parts))


def test_the_arrays_of_a_loaded_model_are_read_only():
    for value in through_disk().arrays.values():
        with pytest.raises(ValueError, match="read-only"):
            value[...] = 1


def test_a_report_is_encoded_once_however_often_it_is_saved(tmp_path, monkeypatch):
    encoded, real = [], reports.as_json
    monkeypatch.setattr(reports, "as_json", lambda *told: encoded.append(told[0]) or real(*told))
    checkpoints, past = Checkpoints(tmp_path), ()
    for number in (1, 2, 3):
        past = (*past, report(number, math.nan))
        checkpoints.save(snapshot(number, reports=past))
    assert encoded == [f"report of round {number}" for number in (1, 2, 3)]
    assert exactly(checkpoints.load().reports) == exactly(past)


def test_a_report_that_cannot_be_saved_is_refused_by_its_round(tmp_path):
    odd = report(1, np.float32(1))
    with pytest.raises(CheckpointError, match=r"round 3 .*report of round 1: .* float32"):
        Checkpoints(tmp_path).save(snapshot(3, reports=(odd,)))


def test_a_folder_may_be_a_text(tmp_path):
    Checkpoints(str(tmp_path)).save(snapshot(1))
    assert Checkpoints(str(tmp_path)).load().round == 1
    assert Checkpoints(str(tmp_path)) == Checkpoints(tmp_path)


def test_a_metric_or_a_model_that_cannot_be_saved_is_refused_by_its_name(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"server_metrics: .* float32"):
        checkpoints.save(snapshot(server_metrics={0: {"loss": np.float32(1)}}))
    with pytest.raises(CheckpointError, match="the model's 'w' is a ndarray of object"):
        checkpoints.save(snapshot(arrays={"w": np.array([None])}))
    with pytest.raises(CheckpointError, match="round = 0"):
        checkpoints.save(snapshot(round=0))


@pytest.mark.parametrize(("options", "said"), [({"keep": 0}, "keep = 0"), ({"every": -1}, "-1")])
def test_a_value_out_of_range_is_refused_by_its_name(tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        Checkpoints(tmp_path, **options)


def test_the_record_is_strict_json_that_says_what_it_is(tmp_path):
    path = saved(tmp_path, 3).save(snapshot(4, reports=(report(4, math.nan),)))

    def refuse(token):
        raise AssertionError(token)

    told = json.loads(path.read_text(encoding="ascii"), parse_constant=refuse)
    assert (told["format"], told["round"], told["token"]) == (1, 4, "run-a")
    assert told["names"] == ["z", "a"]
    assert told["arrays"]["bytes"] == (tmp_path / "round-00000004.safetensors").stat().st_size
    assert list(told)[-1] == "checksum"


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_any_damage_is_found_and_the_checkpoint_before_is_used(tmp_path, monkeypatch, suffix):
    told = []
    monkeypatch.setattr(
        "metabloom.strategies.shell.checkpoint.log", lambda *words: told.append(words)
    )
    small = {"reports": (), "train_metrics": {}, "server_metrics": {}, "evaluate_metrics": {}}
    checkpoints = Checkpoints(tmp_path)
    for number in (1, 2):
        checkpoints.save(snapshot(number, **small))
    file = tmp_path / f"round-00000002.{suffix}"
    whole, count = file.read_bytes(), 0
    for content in snapshots.damaged(whole):
        count += 1
        file.write_bytes(content)
        assert checkpoints.load().round == 1, content
    file.unlink()
    assert checkpoints.load().round == 1
    assert len(told) == count + (suffix == "safetensors")  # a lost record: no checkpoint at all
    file.write_bytes(whole)
    assert checkpoints.load().round == 2


def test_a_damaged_checkpoint_is_named_with_the_reason_and_what_is_used_instead(tmp_path, caplog):
    checkpoints = saved(tmp_path, 1, 2, 3)
    (tmp_path / "round-00000003.json").write_text("{}")
    (tmp_path / "round-00000002.safetensors").unlink()
    before = files(tmp_path)
    assert checkpoints.load().round == 1
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "round-00000003.json' cannot be used: it is cut short or altered" in said[0]
    assert "round-00000002.json' cannot be used: round-00000002.safetensors: No such" in said[1]
    assert all(one.endswith("; round-00000001.json, the one before, is used") for one in said)
    assert files(tmp_path) == before  # loading writes nothing


def test_where_none_can_be_read_each_is_named(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    for path in tmp_path.glob("*.json"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"(?s)00000002.json.*00000001.json.*resume = false"):
        checkpoints.load()


def test_a_format_to_come_is_refused_and_an_unknown_one_skipped(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    snapshots.rewrite(tmp_path / "round-00000002.json", format=0)
    assert checkpoints.load().round == 1
    snapshots.rewrite(tmp_path / "round-00000002.json", format=2)
    with pytest.raises(CheckpointError, match="is of format 2, this metabloom reads up to 1"):
        checkpoints.load()


def test_a_record_that_is_whole_and_says_too_little_is_skipped(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    snapshots.rewrite(tmp_path / "round-00000002.json", names=["nobody"])
    assert checkpoints.load().round == 1
    snapshots.rewrite(tmp_path / "round-00000002.json", reports=[{"validation": []}])
    assert checkpoints.load().round == 1


# --- which are kept -------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path, keep):
    checkpoints = saved(tmp_path, *range(1, 7), keep=keep)
    assert rounds(tmp_path) == list(range(7 - keep, 7))
    assert checkpoints.oldest() == 7 - keep
    assert checkpoints.load().round == 6


def test_where_there_is_none_nothing_is_loaded(tmp_path):
    checkpoints = Checkpoints(tmp_path / "nowhere")
    assert (checkpoints.load(), checkpoints.oldest(), checkpoints.set_aside()) == (None, 0, None)
    assert not checkpoints.folder.exists()


def test_a_run_that_goes_back_keeps_what_it_saves(tmp_path):
    """The newest two are damaged, the run resumes at 1 and saves 2: 3 is of no use any more."""
    checkpoints = saved(tmp_path, 1, 2, 3, keep=2)
    checkpoints.save(snapshot(2, token="again"))
    assert rounds(tmp_path) == [2]
    assert checkpoints.load().token == "again"


def test_leftovers_of_a_killed_process_go_and_foreign_files_stay(tmp_path):
    checkpoints = saved(tmp_path, 1)
    ours = [".round-00000002.json.abcd_123", ".round-00000002.safetensors.k3k3k3k3"]
    foreign = ["round-7.safetensors", "notes.txt", ".notes.txt.abcd1234", "round-00000009.txt"]
    foreign += [".round-00000002.json.swp", "round-000000012.safetensors", "x-round-00000005.json"]
    for name in [*ours, *foreign, "round-00000005.safetensors"]:
        (tmp_path / name).write_text("x")
    checkpoints.save(snapshot(2))
    pairs = {f"round-0000000{n}.{kind}" for n in (1, 2) for kind in ("json", "safetensors")}
    assert set(files(tmp_path)) == {*foreign, *pairs}
    assert checkpoints.load().round == 2


def test_a_fresh_run_sets_older_checkpoints_aside_and_never_deletes_any(tmp_path):
    folder = tmp_path / "c"
    checkpoints, names = Checkpoints(folder), ["c-previous", "c-previous-2", "c-previous-3"]
    for number, name in enumerate(names, 1):
        saved(folder, number)
        assert checkpoints.set_aside() == tmp_path / name
        assert not folder.exists()
    assert [Checkpoints(tmp_path / name).load().round for name in names] == [1, 2, 3]
    folder.mkdir()
    (folder / "round-00000001.safetensors").write_text("a run that was killed at once")
    assert checkpoints.set_aside() is None  # there is nothing to go on from


def test_a_folder_that_cannot_be_renamed_is_a_clear_error(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path / "c", 1)

    def refuses(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "rename", refuses)
    with pytest.raises(CheckpointError, match=r"cannot be set aside .* move them away"):
        checkpoints.set_aside()
    assert checkpoints.load().round == 1


# --- settings -------------------------------------------------------------------------------------


def test_settings_that_differ_are_named_with_both_values_and_what_to_do(tmp_path):
    theirs = {"inner-lr": 0.5, "model": "mlp", "seed": 1, "gone": True, "same": 2}
    ours = {"inner-lr": 0.4, "model": "cnn", "seed": 1.0, "new": "x", "same": 2}
    saved(tmp_path, 1, settings=theirs)
    with pytest.raises(ConfigError) as refused:
        Checkpoints(tmp_path, settings=ours).load()
    assert str(refused.value).splitlines() == [
        "round-00000001.json: checkpoint has gone = True, this run no gone",
        "round-00000001.json: checkpoint has inner-lr = 0.5, this run 0.4",
        "round-00000001.json: checkpoint has model = 'mlp', this run 'cnn'",
        "round-00000001.json: checkpoint has no new, this run new = 'x'",
        "a run goes on with the settings it began with: take the checkpoint's, or start anew "
        "with resume = false",
    ]
    assert Checkpoints(tmp_path, settings=theirs).load().round == 1


# --- crashes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt()])
@pytest.mark.parametrize("function", ["replace", "fsync", "unlink"])
def test_whichever_step_fails_the_snapshot_before_or_the_new_one_is_there(
    tmp_path, monkeypatch, function, error
):
    for step in itertools.count(1):
        folder, calls = tmp_path / str(step), itertools.count(1)
        checkpoints = saved(folder, 1, 2, keep=2)
        with monkeypatch.context() as patch:
            failing = snapshots.failing(getattr(os, function), calls, step, error)
            patch.setattr(os, function, failing)
            try:
                checkpoints.save(snapshot(3))
            except (MetabloomError, KeyboardInterrupt):
                assert checkpoints.load().round in (2, 3)
            else:
                assert checkpoints.load().round == 3
        if next(calls) <= step:
            break
        checkpoints.save(snapshot(4))
        assert checkpoints.load().round == 4
        assert len(files(folder)) <= 4  # nothing is left behind for ever
    assert step > 2


def test_a_full_disk_is_a_clear_error_and_the_older_ones_stay(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 1)
    before, full = files(tmp_path), OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", snapshots.failing(os.fsync, itertools.count(1), 1, full))
    with pytest.raises(MetabloomError, match=r"round-00000002.*No space left on device; what was"):
        checkpoints.save(snapshot(2))
    assert files(tmp_path) == before
    assert checkpoints.load().round == 1


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot write to"):
        Checkpoints(tmp_path / "file" / "checkpoints").save(snapshot(1))
    with pytest.raises(ConfigError, match="cannot be looked for: Not a directory; choose another"):
        Checkpoints(tmp_path / "file").load()
    assert Checkpoints(tmp_path / "file").oldest() == 0  # asked each round, which it does not end


def test_a_folder_that_cannot_be_synced_is_no_obstacle(tmp_path, monkeypatch):
    real, refused = os.open, []

    def opens(path, *args, **options):
        if Path(path).is_dir():
            refused.append(path)
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", opens)
    assert saved(tmp_path, 1).load().round == 1
    assert refused == [tmp_path, tmp_path]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="says what a handle is of")
def test_the_arrays_are_in_place_and_synced_before_the_record_is(tmp_path, monkeypatch):
    """The commit mark may not reach the disk before what it commits."""
    order, synced = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: order.append(snapshots.file_of(handle)) or synced(handle)
    )
    moved = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: order.append(Path(b).name) or moved(a, b))
    saved(tmp_path, 1)
    arrays, record = "round-00000001.safetensors", "round-00000001.json"
    folder = tmp_path.name
    assert order == [f"for {arrays}", arrays, folder, f"for {record}", record, folder]


def test_whenever_a_process_is_killed_its_last_whole_save_is_there(tmp_path):
    done = subprocess.run(
        [sys.executable, snapshots.__file__, tmp_path / "checkpoints", "30"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told["rounds"]) == 31
    for saved_round, found in told["rounds"]:
        assert saved_round <= found <= saved_round + 1
    assert told["parts"] > 0  # some kills fell inside a save, else this proves nothing
    assert len(told["left"]) == 4  # two checkpoints of two files: no litter
