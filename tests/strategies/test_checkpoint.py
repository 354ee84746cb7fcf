"""Checkpoints: exact round trips, and files that are damaged, half-written or of another run."""

import errno
import itertools
import json
import logging
import math
import os
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metabloom.errors import CheckpointError, ConfigError, MetabloomError
from metabloom.strategies import ClientScore, server_optimizer
from metabloom.strategies.fedmeta import OPTIMIZERS
from metabloom.strategies.rules import Reply
from metabloom.strategies.shell.checkpoint import Checkpoints
from tests.strategies import snapshots
from tests.strategies.snapshots import exactly, files, report, rounds, saved, snapshot, through_disk

# --- round trips ----------------------------------------------------------------------------------


def test_a_snapshot_comes_back_as_it_was():
    assert exactly(through_disk()) == exactly(snapshot())
    bare = snapshot(reports=(), train_metrics={}, evaluate_metrics={}, offences={}, told=())
    assert exactly(through_disk(**vars(bare))) == exactly(bare)


@settings(max_examples=200, deadline=None)
@given(st.none() | st.dictionaries(st.text(), snapshots.TREES, max_size=3))
def test_any_state_of_a_rule_comes_back_to_the_bit(state):
    assert exactly(through_disk(state=state).state) == exactly(state)


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


def test_tensors_of_every_kind_come_back_to_the_bit():
    whole = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    state = {
        "brain": torch.tensor([1.5, math.nan, -0.0]).bfloat16(),
        "scalar": torch.tensor(2.5).bfloat16(),
        "empty": torch.empty(0, 3).bfloat16(),
        "half": torch.tensor([1e-7, 65504.0]).half(),
        "turned": whole.T,
        "strided": whole[:, ::2],
        "shared": [whole, whole[1]],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "flag": torch.tensor(True),
        "count": torch.tensor(2**62),
    }
    found = through_disk(state=state).state
    assert exactly(found) == exactly(state)
    found["half"].add_(1)  # torch's own memory: an optimiser writes into it


def test_other_kinds_of_mappings_come_back_as_dicts_and_big_endian_arrays_as_native_ones():
    state = {"teacher": OrderedDict(b=1, a=2), "array": np.arange(3, dtype=">f4")}
    found = through_disk(state=state).state
    assert exactly(found["teacher"]) == exactly({"b": 1, "a": 2})
    assert exactly(found["array"]) == exactly(np.arange(3, dtype="f4"))


def test_loaded_arrays_are_read_only():
    found = through_disk(state={"mean": np.zeros(2)})
    for value in (*found.arrays.values(), found.state["mean"]):
        with pytest.raises(ValueError, match="read-only"):
            value[...] = 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_goes_on_from_its_saved_state_to_the_bit(name):
    rule = server_optimizer(lambda params: OPTIMIZERS[name](params, lr=0.1))
    rng = np.random.default_rng(0)
    model = {"weight": rng.normal(size=(3, 2)).astype(np.float32), "bias": rng.normal(size=2)}

    def step(state, model, number):
        shift = np.random.default_rng(number).normal()
        return rule.update(state, model, [Reply({n: a + shift for n, a in model.items()}, 1.0)])

    state = rule.init(model)
    for number in (1, 2):
        state, model = step(state, model, number)
    found = through_disk(state=state, arrays=model)
    assert exactly(found.state) == exactly(state)
    assert exactly(step(found.state, found.arrays, 3)) == exactly(step(state, model, 3))


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ({"optimizer": {"x": snapshots.Foo()}}, r"state\['optimizer'\]\['x'\] is a Foo"),
        ({"all": [1, (2, snapshots.Foo)]}, r"state\['all'\]\[1\]\[1\] is a type"),
        ({"x": {1.5: 2}}, r"state\['x'\] has the key 1.5"),
        ({"x": {True: 2}}, r"state\['x'\] has the key True"),
        ({"x": 1j}, r"state\['x'\] is a complex"),
        ({"x": {1}}, r"state\['x'\] is a set"),
        ({"x": np.array(["a"])}, r"state\['x'\] is a ndarray of <U1"),
        ({"x": np.ma.masked_array([1])}, r"state\['x'\] is a MaskedArray"),
        ({"x": torch.zeros(2, dtype=torch.complex64)}, r"a Tensor of torch.complex64"),
        ({"x": torch.eye(2).to_sparse()}, r"state\['x'\] is a Tensor"),
        ({"x": torch.zeros(2, device="meta")}, r"state\['x'\] is a Tensor"),
        ({"x": 10**5000}, r"round 1 cannot be saved: state"),
        ({"x": snapshots.ENDLESS}, "nested too deeply"),
    ],
)
def test_a_state_that_cannot_be_saved_is_refused_by_its_path(tmp_path, state, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        Checkpoints(tmp_path / "new").save(snapshot(state=state))
    assert not (tmp_path / "new").exists()


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


def test_a_fresh_run_sets_older_checkpoints_aside(tmp_path):
    folder, aside = tmp_path / "checkpoints", tmp_path / "checkpoints-previous"
    checkpoints = saved(folder, 1)
    assert checkpoints.set_aside() == aside
    assert not folder.exists()
    assert Checkpoints(aside).load().round == 1
    saved(folder, 2)
    assert checkpoints.set_aside() == aside  # in the place of the first
    assert Checkpoints(aside).load().round == 2
    assert rounds(aside) == [2]
    folder.mkdir()
    (folder / "round-00000001.safetensors").write_text("a run that was killed at once")
    assert checkpoints.set_aside() is None  # it would take the place of good ones
    assert Checkpoints(aside).load().round == 2


def test_a_folder_with_foreign_files_is_not_replaced(tmp_path):
    checkpoints = saved(tmp_path / "c", 1)
    saved(tmp_path / "c-previous", 5)
    (tmp_path / "c-previous" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"cannot be set aside .* move them away"):
        checkpoints.set_aside()
    assert Checkpoints(tmp_path / "c-previous").load().round == 5
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
    with pytest.raises(CheckpointError, match="cannot be looked for"):
        Checkpoints(tmp_path / "file").load()


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
