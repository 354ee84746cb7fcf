"""Client state that lasts: Ditto's personal model over restarts, replays and damage."""

import errno
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from hypothesis import given
from hypothesis import strategies as st

import metabloom.client_app
from metabloom.client_app import store_of
from metabloom.clients import ClientStore, SGDClient
from metabloom.clients.store import LastingState, Versions, file_name
from metabloom.config import RunConfig
from metabloom.errors import ConfigError, MetabloomError
from metabloom.sim import CohortGrid
from metabloom.task import model_of, recipe_of
from metabloom.wire import KEPT_ROUND, RUN_TOKEN, SERVER_ROUND, to_record
from tests.clients.small_clients import arrays_of, client, net

TOKEN = "run-a"


def new_context(run_id: int = 1) -> Context:
    return Context(run_id=run_id, node_id=1, node_config={}, state=RecordDict(), run_config={})


def told(number: int, kept: int = 0, token: str = TOKEN) -> dict:
    return {SERVER_ROUND: number, KEPT_ROUND: kept, RUN_TOKEN: token}


def ditto(place: Context, store: ClientStore | None, name: str = "anna", **options) -> SGDClient:
    usual = {"ditto_lambda": 0.7, "local_lr": 0.3, "batch_size": 4} | options  # random batches
    return client(SGDClient, context=place, store=store, name=name, **usual)


def train(place, store, number, *, config=None, **options):
    """One round, by a new object as under Flower; the bits of the personal model that it leaves."""
    own, config = ditto(place, store, **options), told(number) if config is None else config
    own.fit(arrays_of(net(number)), config)
    return bits(own, config)


def bits(own: SGDClient, config: dict) -> dict[str, bytes]:
    kept = own.personal.after(config, "cpu") or {}
    return {name: value.numpy().tobytes() for name, value in kept.items()}


def judged(place, store, number, **options):
    return ditto(place, store, **options).evaluate(arrays_of(net(number)), told(number))


def rounds(folder: Path) -> list[int]:
    return sorted(int(path.stem[6:]) for path in folder.rglob("round-*.safetensors"))


@cache
def bits_by_round(last: int = 6) -> list[dict[str, bytes]]:
    """What each round leaves where nothing is ever interrupted and there is no disk."""
    place = new_context()
    return [train(place, None, number) for number in range(1, last + 1)]


@pytest.fixture
def store(tmp_path) -> ClientStore:
    return ClientStore(tmp_path / "clients")


# --- the five cases -------------------------------------------------------------------------------


def test_while_a_context_lasts_nothing_is_read_and_the_disk_changes_nothing(store, monkeypatch):
    def refuse(self, number):
        raise AssertionError("the context has this version")

    monkeypatch.setattr(Versions, "load", refuse)
    place = new_context()
    assert [train(place, store, number) for number in range(1, 7)] == bits_by_round()
    judged(place, store, 6)


@pytest.mark.parametrize("run_id", [1, 2], ids=["a SuperNode restarts", "a server resumes"])
def test_a_new_context_goes_on_to_the_bit(store, run_id):
    place = new_context()
    for number in (1, 2, 3):
        train(place, store, number)
    place = new_context(run_id)
    assert bits(ditto(place, store), told(3)) == bits_by_round()[2]
    assert [train(place, store, number) for number in (4, 5, 6)] == bits_by_round()[3:]
    whole, later = new_context(), new_context(3)
    for number in range(1, 6):
        train(whole, None, number)
    wanted = judged(whole, None, 5)  # a score of round 5 that is asked for again after round 6
    assert judged(later, store, 5) == wanted != judged(new_context(), None, 5)
    assert later.state == RecordDict()  # an evaluation leaves nothing


@pytest.mark.parametrize("same_context", [True, False])
def test_a_server_that_was_killed_plays_rounds_again_from_its_checkpoint(store, same_context):
    """Killed in round 7, its newest checkpoint is of round 5, its oldest of round 3."""
    place = new_context()
    for number in range(1, 8):
        train(place, store, number, config=told(number, kept=3))
    assert rounds(store.folder) == [3, 4, 5, 6, 7]
    place = place if same_context else new_context(2)
    assert train(place, store, 6, config=told(6, kept=3)) == bits_by_round()[5]
    assert rounds(store.folder) == [3, 4, 5, 6]  # 7 is played again
    assert train(place, store, 7, config=told(7, kept=4)) == bits_by_round(7)[6]
    assert rounds(store.folder) == [4, 5, 6, 7]


def test_a_server_that_falls_back_on_its_oldest_checkpoint_finds_its_clients(store):
    """A client that trained in rounds 1, 2 and 6 is as round 2 left it after rounds 3 to 5."""
    place = new_context()
    for number in (1, 2, 6):
        train(place, store, number, config=told(number, kept=4))
    assert rounds(store.folder) == [2, 6]
    assert bits(ditto(new_context(2), store), told(5)) == bits_by_round()[1]


def test_without_a_store_the_context_alone_keeps_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = new_context()
    left = train(place, None, 1)
    assert bits(ditto(place, None), told(5)) == left
    assert bits(ditto(new_context(), None), told(5)) == {}
    assert list(tmp_path.iterdir()) == []


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("same_context", [True, False])
def test_a_message_that_comes_twice_has_one_effect(store, same_context):
    place = new_context()
    for number in (1, 2, 3):
        train(place, store, number)
    again = place if same_context else new_context()
    assert train(again, store, 3) == bits_by_round()[2]
    assert train(again, store, 4) == bits_by_round()[3]


def test_the_first_message_that_comes_twice_begins_at_the_received_model_twice(store):
    place = new_context()
    assert train(place, store, 2) == train(place, store, 2)


@pytest.mark.parametrize("in_time", [True, False])
def test_a_client_that_raises_has_not_advanced_or_can_train_the_round_again(store, in_time):
    """In time: while it trains. Else after it, where Flower discards the context's state alone."""
    place = new_context()
    for number in (1, 2):
        train(place, store, number)
    doomed = Context(1, 1, {}, RecordDict(dict(place.state)), {})
    if in_time:
        own = ditto(doomed, store)
        own.dump = lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            own.fit(arrays_of(net(3)), told(3))
        assert rounds(store.folder) == [1, 2]
        assert bits(ditto(doomed, store), told(9)) == bits_by_round()[1]
    else:
        train(doomed, store, 3)
    assert train(place, store, 3) == bits_by_round()[2]


def test_a_foreign_server_that_tells_no_round_replaces_the_model(store):
    place, oracle = new_context(7), new_context()
    for _ in range(3):
        left = train(place, store, 1, config={})
        assert left == train(oracle, None, 1, config={})
    assert rounds(store.folder) == [0]
    assert bits(ditto(new_context(7), store), {}) == left  # the node restarts
    assert bits(ditto(new_context(8), store), {}) == {}  # another run


def test_a_foreign_server_that_tells_the_round_leaves_two_versions(store):
    place = new_context(7)
    for number in range(1, 7):
        left = train(place, store, number, config={SERVER_ROUND: number})
    assert left == bits_by_round()[5]
    assert rounds(store.folder) == [5, 6]  # one to begin round 6 again


def test_two_runs_and_two_clients_never_mix(store):
    """In one context too: a grid may serve one run after another."""
    place = new_context()
    first = train(place, store, 1)
    assert bits(ditto(new_context(), store, name="ben"), told(9)) == {}
    other = told(2, token="run-b")
    assert bits(ditto(place, store), other) == {}
    assert bits(ditto(place, None), other) == {}
    fresh = train(new_context(), None, 2, config=other)
    assert train(place, store, 2, config=other) == fresh
    assert bits(ditto(new_context(), store), told(9)) == first


# --- files ----------------------------------------------------------------------------------------


def test_a_folder_for_each_run_client_and_kind_holds_the_versions(store):
    train(new_context(), store, 12, name="Gujarati/3")
    (file,) = store.folder.rglob("*.safetensors")
    run, name, kind, version = file.relative_to(store.folder).parts
    assert (run, kind, version) == (TOKEN, "personal", "round-00000012.safetensors")
    assert name.startswith("gujarati-3.")


NAMES = ["..", ".", "", "a b", "a/b", "a-b", "A-B", "a_b", "é", "x" * 300, "x" * 301, "\ud800"]
NAMES += ["../../etc", "a\0b", "a.b", "CON", "-rf", file_name("a/b"), file_name(".."), "\n"]


def test_names_become_different_file_names_that_are_safe_everywhere(tmp_path):
    found = [file_name(name) for name in NAMES]
    assert len({name.lower() for name in found}) == len(NAMES)
    for name in found:
        (tmp_path / name).mkdir()
        assert (tmp_path / name).resolve().parent == tmp_path.resolve()
        assert len(name) <= 80
        assert not name.startswith((".", "-"))


@given(st.text(), st.text())
def test_different_texts_have_different_file_names_whatever_the_case(left, right):
    assert (file_name(left).lower() == file_name(right).lower()) == (left == right)


def test_any_text_may_name_a_client(store):
    for place, name in enumerate(NAMES):
        left = train(new_context(place), store, 1, name=name or "nobody")
        assert bits(ditto(new_context(), store, name=name or "nobody"), told(1)) == left


def test_arrays_of_any_layout_come_back_in_order_and_to_the_bit(store):
    turned = torch.arange(12.0).reshape(3, 4).T.numpy()
    arrays = {"z": turned, "a": np.array(-0.0), "e": np.zeros((0, 2), np.float16), "n": turned[::2]}
    versions = store.versions(TOKEN, "anna", "personal")
    versions.save(1, arrays, kept=0)
    found = versions.load(1)
    assert list(found) == list(arrays)
    for name, value in arrays.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].tobytes() == value.tobytes()


def test_a_damaged_version_is_skipped_with_a_warning_and_the_one_before_used(store, caplog):
    place = new_context()
    for number in (1, 2, 3):
        train(place, store, number)
    (file,) = store.folder.rglob("round-00000003.safetensors")
    whole = file.read_bytes()
    first = 8 + int.from_bytes(whole[:8], "little")  # where the numbers begin
    for position in [*range(first), *range(first, len(whole), 3)]:
        flipped = bytes([whole[position] ^ 1 << position % 8])
        file.write_bytes(whole[:position] + flipped + whole[position + 1 :])
        found = bits(ditto(new_context(), store), told(3))
        # Some of the header means nothing: what is read is right, or it is not read.
        assert found in bits_by_round()[1 : 3 if position < first else 2], position
        file.write_bytes(whole[:position])
        assert bits(ditto(new_context(), store), told(3)) == bits_by_round()[1]
    assert "round-00000003.safetensors cannot be used" in caplog.text


def test_a_version_of_another_client_or_round_is_damage(store):
    train(new_context(), store, 1)
    train(new_context(), store, 1, name="ben")
    one, other = sorted(store.folder.rglob("*.safetensors"))
    other.write_bytes(one.read_bytes())
    (one.parent / "round-00000002.safetensors").write_bytes(one.read_bytes())
    assert bits(ditto(new_context(), store, name="ben"), told(9)) == {}
    assert store.versions(TOKEN, "anna", "personal").load(2) is None
    assert bits(ditto(new_context(), store), told(9)) == bits_by_round(1)[0]


def test_leftovers_of_a_killed_client_go_and_foreign_files_stay(store):
    place = new_context()
    train(place, store, 1)
    (folder,) = {path.parent for path in store.folder.rglob("*.safetensors")}
    for name in (".round-00000002.safetensors.abcd_123", "notes", ".notes.abcd_123"):
        (folder / name).write_text("x")
    train(place, store, 2)
    kept = ["round-00000001.safetensors", "round-00000002.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == [".notes.abcd_123", "notes", *kept]


def test_a_folder_that_cannot_be_written_to_is_refused_with_the_key_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    place = new_context()
    with pytest.raises(ConfigError, match=r"set state-root .* --node-config"):
        train(place, ClientStore(tmp_path / "file"), 1)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(full))
    with pytest.raises(MetabloomError, match=r"No space left .* state-root"):
        train(place, ClientStore(tmp_path / "full"), 1)
    assert place.state == RecordDict()


KILLS = """
import json, random, sys
from pathlib import Path
import numpy as np
from metabloom.clients import ClientStore
from tests.strategies.snapshots import one_kill

def state(number):
    return {"weight": np.full(100_000, number, np.float32)}

versions = ClientStore(Path(sys.argv[1])).versions("run", "anna", "personal")
versions.save(1, state(1), kept=0)
delays, told = random.Random(0), [(1, 1)]
for _ in range(20):
    save = lambda number: versions.save(number, state(number), kept=number - 3)
    saved = one_kill(save, told[-1][1] + 1, delays.uniform(0.001, 0.03))
    held = {number: versions.load(number)["weight"] for number in versions.rounds()}
    assert all((value == number).all() for number, value in held.items())
    told.append((saved, max(held)))
print(json.dumps(told))
"""


def test_whenever_a_client_is_killed_its_last_whole_version_is_there(tmp_path):
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", KILLS, tmp_path / "clients"],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    assert len(reports) == 21
    assert all(saved <= found <= saved + 1 for saved, found in reports)


# --- the app --------------------------------------------------------------------------------------


def configured(tmp_path, **keys) -> RunConfig:
    usual = {"num-clients": 5, "clients-per-round": 2, "device": "cpu", "out": str(tmp_path / "o")}
    return RunConfig.read({**usual, **{key.replace("_", "-"): v for key, v in keys.items()}})


def run_app(config: RunConfig) -> None:
    app = metabloom.client_app.app
    grid = CohortGrid(app, num_nodes=5, run_config=config.to_flower())
    shell = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
    strategy = recipe_of(config).strategy(clients_per_round=2, eval_every=1, **shell)
    arrays = {name: value.numpy() for name, value in model_of(config).state_dict().items()}
    result = strategy.start(grid, to_record(arrays), num_rounds=2)
    assert not [failure for report in result.rounds for failure in report.failures]


@pytest.mark.usefixtures("_threads")
def test_dittos_app_writes_below_the_results_and_fedavgs_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_app(configured(tmp_path, strategy="fedavg"))
    run_app(configured(tmp_path, strategy="ditto", checkpoint_every=0))
    assert list(tmp_path.iterdir()) == []
    run_app(configured(tmp_path, strategy="ditto"))
    assert rounds(tmp_path / "o" / "clients")
    run_app(configured(tmp_path, strategy="ditto", state_root=str(tmp_path / "state")))
    assert rounds(tmp_path / "state") == rounds(tmp_path / "o" / "clients")


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_nodes_own_state_root_comes_before_the_runs(tmp_path, monkeypatch):
    place, config = new_context(), configured(tmp_path, state_root="~/run")
    monkeypatch.setenv("HOME", "/home/anna")
    assert store_of(place, config).folder == Path("/home/anna/run")
    place.node_config["state-root"] = "/var/lib/node"
    assert store_of(place, config).folder == Path("/var/lib/node")
    place.node_config["state-root"] = ""
    assert store_of(place, configured(tmp_path)).folder == tmp_path / "o" / "clients"
    assert store_of(place, configured(tmp_path, checkpoint_every=0)) is None


def test_kinds_of_state_are_apart(store):
    place = new_context()
    states = [LastingState(place, kind=kind, client="anna", store=store) for kind in ("a", "b")]
    for number, one in enumerate(states):
        one.keep(told(1), {"x": np.array(number)})
    assert [int(one.after(told(1))["x"]) for one in states] == [0, 1]
    fresh = LastingState(new_context(), kind="b", client="anna", store=store)
    assert int(fresh.after(told(1))["x"]) == 1
