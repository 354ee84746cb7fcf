"""The engine's benchmarks at tiny scale: that sides do equal work, and what is made of figures."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from metabloom.models import MODELS
from metabloom.sim import DATASETS

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)  # as they are when one of them is started


@pytest.fixture(autouse=True, scope="module")
def registries_as_before() -> Iterator[None]:
    """Take what the benchmarks' plug-in registers out again: other tests count the names."""
    yield
    for registry in (MODELS, DATASETS):
        for name in [name for name in registry if name.startswith("bench-")]:
            del registry._entries[name]
    for module in [name for name in sys.modules if name.startswith("engine_")]:
        del sys.modules[module]


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def side(tmp_path: Path, name: str, job: dict) -> dict:
    folder = tmp_path / name
    folder.mkdir()
    found: dict = script("engine_side").run_job({"engine": "cohort", "workers": 0, **job}, folder)
    return {**found, "folder": str(folder)}


def test_all_clients_of_the_made_up_data_train_but_two() -> None:
    work = script("engine_work")
    config = work.config_of("FedAvg", 5)
    federation = importlib.import_module("metabloom.task").federation_of(work.read(config))
    assert federation.counts() == {"train": 5, "validation": 1, "unseen": 1}
    inputs, targets = federation.client(0).all
    assert tuple(inputs.shape) == (50, 1, 28, 28)
    assert 0 <= float(inputs.min()) < float(inputs.max()) <= 1
    assert len(targets) == 50


@pytest.mark.parametrize("clients", [4, 10])
def test_one_table_is_cut_among_however_many_clients(clients: int) -> None:
    work = script("engine_work")
    federation = work.bench_images(seed=0, num_clients=clients, records=50, total=60, size=8)
    held = [federation.client(index).num_examples for index in range(clients)]
    assert sum(held) == 60
    assert max(held) - min(held) <= 1


@pytest.mark.parametrize("work", ["FedAvg", "MAML"])
def test_a_side_times_each_round_and_keeps_the_models_asked_for(tmp_path: Path, work: str) -> None:
    turns, config = script("engine_turns"), script("engine_work").config_of(work, 4)
    job = {"rounds": 3, "config": config, "keep": [1, 3]}
    one, other = (side(tmp_path, name, job) for name in ("one", "other"))
    assert len(one["later"]) == 2
    assert one["later_cpu"] >= 0
    assert len(one["aggregation"]) == 3
    assert not one["failures"]
    assert turns.difference(one, other, 1) == turns.difference(one, other, 3) == 0
    slower = {**config, "local-lr": 0.06, "inner-lr": 0.11}
    third = side(tmp_path, "third", {**job, "config": slower})
    assert turns.difference(one, third, 3) > script("engine_rows").TOLERANCE


def test_clients_that_add_one_move_the_model_by_one_a_round(tmp_path: Path) -> None:
    job = {"rounds": 2, "clients": 4, "megabytes": 0.001, "step": 1.0, "keep": [2]}
    side(tmp_path, "echo", job)
    load = importlib.import_module("safetensors.numpy").load_file
    model = load(tmp_path / "echo" / "round-2.safetensors")
    assert all((value == 2).all() for value in model.values())


def test_sides_whose_models_differ_give_no_ratio(tmp_path: Path) -> None:
    rows, save = script("engine_rows"), importlib.import_module("safetensors.numpy").save_file
    for name, value in (("a", 0.0), ("b", 1e-6), ("c", 1e-4)):
        (tmp_path / name).mkdir()
        save({"w": np.full(3, value, np.float32)}, tmp_path / name / "round-1.safetensors")
    found = {name: [{"folder": str(tmp_path / name)}] for name in "abc"}
    assert rows.agreed({"a": found["a"], "b": found["b"]}, 1) == pytest.approx(1e-6)
    with pytest.raises(RuntimeError, match=r"differ by 0\.0001"):
        rows.agreed(found, 1)


def test_a_figure_is_the_median_of_the_turns_and_the_first_round_does_not_count() -> None:
    rows, turns = script("engine_rows"), script("engine_turns")
    found = {
        "slow": [
            {"first": 99.0, "later": later, "later_cpu": sum(later)}
            for later in ([2.0, 4.0, 9.0], [6.0], [8.0])
        ],
        "fast": [{"first": 50.0, "later": later} for later in ([1.0], [2.0], [8.0])],
    }
    assert rows.ratios(found, "slow", "fast") == [4.0, 3.0, 1.0]
    assert rows.ratios(found, "slow", "slow", rows.processors) == [1.0, 1.0, 1.0]
    line = turns.line_of("x", [4.0, 3.0, 1.0], bar=3.0, aim=5.0)
    assert (line.figure, line.low, line.high, line.verdict) == (3.0, 1.0, 4.0, "reached")
    assert turns.line_of("x", [2.9], bar=3.0).verdict == "MISSED"
    assert turns.line_of("x", [1.3], bar=1.2, upper=True).verdict == "MISSED"
    assert turns.line_of("x", [1.1], bar=1.2, upper=True).verdict == "reached"
    assert turns.line_of("x", [1.1]).verdict == ""
    assert turns.Line("x", None, None, None, bar=20.0).verdict == ""


def test_the_page_shows_bars_figures_verdicts_and_what_was_not_measured() -> None:
    turns, page = script("engine_turns"), script("engine_page")
    lines = [
        turns.line_of("up", [4.0, 3.0, 1.0], bar=3.0, aim=5.0, note="sides"),
        turns.line_of("down", [1.3], bar=1.2, aim=1.0, upper=True),
        turns.Line("gpu", None, None, None, bar=20.0, aim=50.0),
    ]
    told = [{**line.as_json(), "verdict": line.verdict} for line in lines]
    text = page.page_of({"flower": {"machine": turns.machine(), "lines": told}})
    assert "| up | 3.00 | 5.00 | 3.00 | 1.00 to 4.00 | reached | sides |" in text
    assert "| down | at most 1.20 | at most 1.00 | 1.30 | 1.30 to 1.30 | MISSED |  |" in text
    assert "| gpu | 20.00 | 50.00 | not measured: no GPU | - |  |  |" in text


def test_memory_and_processor_time_are_those_of_the_whole_tree() -> None:
    processes = script("engine_processes")
    code = "import time; kept = bytearray(40_000_000); time.sleep(60)"
    alone = processes.pss_of(os.getpid())
    assert alone > 10
    with subprocess.Popen([sys.executable, "-c", code]) as child:
        with processes.Peak(os.getpid(), every_s=0.02) as peak:
            while processes.pss_of(child.pid) < 40:
                assert child.poll() is None
        assert child.pid in processes.tree_of(os.getpid())
        assert peak.megabytes > 40
        assert processes.cpu_of([child.pid]) < processes.cpu_of([os.getpid(), child.pid])
        processes.end_all({child.pid: "another one's start"})  # the number came again
        assert child.poll() is None
        processes.end_all({child.pid: peak.family[child.pid]})
        assert child.wait(10) < 0


def test_a_finished_job_is_not_run_again_and_a_failed_one_says_why(tmp_path: Path) -> None:
    turns = script("engine_turns")
    count = tmp_path / "count"
    code = (
        "import json, pathlib, sys\n"
        f"count = pathlib.Path({str(count)!r})\n"
        "count.write_text((count.read_text() if count.exists() else '') + '.')\n"
        "job, out = json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2])\n"
        "assert job['good'], 'this job is bad'\n"
        "(out / 'found.json').write_text(json.dumps({'later': [1.0]}))\n"
    )
    command = tmp_path / "side.py"
    command.write_text(code)
    runner = turns.Turns(tmp_path / "work", timeout_s=60)
    script_of = {"a": (sys.executable, str(command))}
    for _ in range(2):
        found = runner.take({"a": {"good": True}}, 2, script=script_of)
        assert [one["later"] for one in found["a"]] == [[1.0], [1.0]]
    assert count.read_text() == ".."
    with pytest.raises(RuntimeError, match="this job is bad"):
        runner.take({"a": {"good": False}}, 1, script=script_of)


def test_both_means_of_the_same_replies_are_taken_in_turn() -> None:
    found = script("engine_aggregation").in_memory(5, 0.01, 2)
    assert len(found["ours"]) == len(found["Flower"]) == 2


def test_every_row_runs_at_tiny_scale(tmp_path: Path) -> None:
    engine = script("engine")
    engine.main(
        rows="flower,scale,memory,rounds,aggregation,kernels",
        data_root=tmp_path,
        pfl_python="",
        work=tmp_path / "work",
        out=tmp_path / "out",
        quick=True,
    )
    found = json.loads((tmp_path / "out" / "engine.json").read_text())
    assert list(found) == ["flower", "scale", "memory", "rounds", "aggregation", "kernels"]
    assert all(row["lines"] for row in found.values())


def test_a_row_is_written_beside_those_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, turns = script("engine"), script("engine_turns")
    (tmp_path / "engine.json").write_text(
        json.dumps({"scale": {"machine": turns.machine(), "lines": []}})
    )
    monkeypatch.setitem(engine.ROWS, "flower", lambda _: iter([turns.line_of("x", [3.0], bar=2.0)]))
    engine.measure(["flower"], engine.Setting(turns.Turns(tmp_path)), tmp_path)
    known = json.loads((tmp_path / "engine.json").read_text())
    assert set(known) == {"scale", "flower"}
    assert known["flower"]["lines"][0]["verdict"] == "reached"
    assert "| x | 2.00 | - | 3.00 |" in (tmp_path / "engine.md").read_text()
