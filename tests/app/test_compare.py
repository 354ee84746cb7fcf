"""``metabloom compare``: a tiny real one, stopped at every place, and what is refused."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from metabloom import server_app, trials
from metabloom.cli import app
from metabloom.config import RunConfig
from metabloom.errors import ConfigError, MetabloomError
from metabloom.trials import folder_of, run_once

COMMAND = "from metabloom.cli import main; main()"
SMALL = ("num-clients=10", "clients-per-round=3", "device=cpu", "eval-every=2")
GRID = "fedavg:local-lr=0.001,0.3 fedmeta:outer-lr=0.0001,0.01 inner-lr=0.5"
USUAL = ("--dataset", "digits", "--strategies", "fedavg,fedmeta", "--seeds", "2", "--grid", GRID)
RUNS = 2 * (2 + 2)


def words(out: Path, *more: str, settings: tuple[str, ...] = SMALL) -> list[str]:
    given = [word for setting in settings for word in ("--set", setting)]
    return ["compare", *USUAL, "--budget", "rounds=4", *given, *more, "--out", str(out)]


def compare(out: Path, *more: str, settings: tuple[str, ...] = SMALL) -> Result:
    arguments = words(out, *more, settings=settings)
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"}, catch_exceptions=False)


def told(out: Path) -> dict:
    """Return all of compare.json but how long it took, and where it lies."""
    data = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    del data["command"], data["machine"]
    for method in data["methods"]:
        del method["seconds"]
        for run in method["runs"]:
            del run["seconds"]
    return data


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that nobody stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert compare(out).exit_code == 0
    return out


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rounds that are played, in all runs."""
    rounds: list[int] = []

    def run(grid, config, *, on_round=None):
        def advance(report) -> None:
            rounds.append(report.round)
            on_round(report)

        return server_app.run(grid, config, on_round=advance)

    monkeypatch.setattr(trials, "run", run)
    return rounds


# --- what it does ---------------------------------------------------------------------------------


def test_each_method_is_tuned_by_validation_and_scored_on_unseen_clients(whole: Path):
    assert {path.name for path in whole.iterdir()} == {
        *("compare.json", "compare.md", "compare.html", "trials")
    }
    data = told(whole)
    assert (data["dataset"], data["tuning_seed"], data["seeds"]) == ("digits", 0, [1, 2])
    assert [one["strategy"] for one in data["methods"]] == ["fedavg", "fedmeta"]
    for method in data["methods"]:
        by_rate = [one["accuracy"] for one in method["tries"]]
        assert len(by_rate) == 2
        best = method["tries"][int(np.argmax(by_rate))]
        assert method["chosen"] == best["settings"]
        for run in method["runs"]:
            results = json.loads((whole / "trials" / run["folder"] / "results.json").read_text())
            config = RunConfig.read(results["config"])
            assert config.seed == run["seed"]
            assert {key: results["config"][key] for key in method["chosen"]} == method["chosen"]
            assert run["accuracy"]["5"] == results["unseen"]["accuracy_after"]["5"]
            assert run["rounds"] == 4
        for one in method["tries"]:
            results = json.loads((whole / "trials" / one["folder"] / "results.json").read_text())
            last = results["history"][-1]
            assert (last["round"], results["seed"]) == (one["round"], 0)
            told_there = {"before": last["validation"]["accuracy_before"]}
            told_there |= last["validation"]["accuracy_after"]
            assert one["accuracy"] == told_there[one["steps"]] == max(told_there.values())
            assert results["unseen"]["per_client"] == []  # nobody looked
        means = [run["accuracy"]["5"] for run in method["runs"]]
        assert method["accuracy"]["5"]["mean"] == pytest.approx(np.mean(means))
        assert method["accuracy"]["5"]["sd"] == pytest.approx(np.std(means, ddof=1))
        clients = np.concatenate([run["clients"] for run in method["runs"]])
        assert method["tenth_percentile"] == pytest.approx(np.percentile(clients, 10))
    assert len(list((whole / "trials").iterdir())) == RUNS
    assert not list(whole.rglob("checkpoints"))


def test_the_page_and_the_terminal_tell_the_same(whole: Path):
    page = (whole / "compare.md").read_text(encoding="utf-8")
    again = compare(whole)
    for method in told(whole)["methods"]:
        for column in ("before", method["steps"]):
            mean, sd = (method["accuracy"][column][name] for name in ("mean", "sd"))
            cell = f"{100 * mean:.1f} ± {100 * sd:.1f}"
            assert cell in page
            assert cell in again.output
    assert "metabloom compare --dataset digits --strategies fedavg,fedmeta" in page
    assert f"results: {whole}/compare.md" in again.output.replace("\n", "")


def test_more_seeds_and_another_strategy_run_nothing_twice(
    whole: Path, tmp_path: Path, played: list[int]
):
    assert compare(tmp_path, "--seeds", "1").exit_code == 0
    assert len(played) == 4 * 2 * (2 + 1)
    assert compare(tmp_path).exit_code == 0
    assert len(played) == 4 * RUNS
    assert told(tmp_path) == told(whole)
    more = ("--strategies", "fedavg,fedmeta,reptile", "--tries", "1")
    assert compare(tmp_path, *more).exit_code == 0
    # One of two points is drawn of each, and may be another one than was chosen.
    assert all(len(one["tries"]) == 1 for one in told(tmp_path)["methods"])


def test_a_budget_of_bytes_ends_each_run(tmp_path: Path):
    assert compare(tmp_path, "--budget", "bytes=600000", "--seeds", "1").exit_code == 0
    data = told(tmp_path)
    for method in data["methods"]:
        (run,) = method["runs"]
        of_a_round = run["bytes"] / run["rounds"]
        assert run["bytes"] >= 600000 > run["bytes"] - of_a_round
        assert run["ended"].startswith("max-bytes = 600000")
    assert data["methods"][0]["rounds"] == data["methods"][1]["rounds"] < 1000


def test_patience_lets_a_run_end_and_its_best_model_is_judged(tmp_path: Path):
    settings = (*SMALL[:3], "eval-every=1", "patience=1", "inner-lr=0.0001", "eval-steps=1")
    more = ("--grid", "fedavg:local-lr=0.5 fedmeta:outer-lr=0.1", "--seeds", "1")
    arguments = words(tmp_path, settings=settings)
    arguments[arguments.index("--grid") : arguments.index("--grid") + 2] = more[:2]
    result = CliRunner().invoke(
        app, [*arguments, "--budget", "rounds=12", *more[2:]], catch_exceptions=False
    )
    assert result.exit_code == 0
    for method in told(tmp_path)["methods"]:
        (one,) = method["tries"]
        results = json.loads((tmp_path / "trials" / one["folder"] / "results.json").read_text())
        assert results["ending"]["model_round"] == one["round"]
        scores = [e["validation"]["accuracy_after"]["1"] for e in results["history"]]
        of_best = results["history"][one["round"] - 1]["validation"]
        assert of_best["accuracy_after"]["1"] == max(scores)
        assert one["accuracy"] == max(of_best["accuracy_before"], max(scores))


# --- stopped and gone on with ---------------------------------------------------------------------


class KilledError(Exception):
    """Stands in for what ends a process between two runs."""


@pytest.mark.parametrize("after", [3, RUNS - 1])
def test_a_comparison_that_is_stopped_between_runs_does_none_again(
    after: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done: list[str] = []

    def run(grid, config, *, on_round=None):
        if len(done) == after:
            raise KilledError
        done.append(config.out)
        return server_app.run(grid, config, on_round=on_round)

    monkeypatch.setattr(trials, "run", run)
    with pytest.raises(KilledError):
        compare(tmp_path)
    assert not (tmp_path / "compare.json").exists()
    first, after = list(done), RUNS + 1
    assert compare(tmp_path).exit_code == 0
    assert len(done) == RUNS
    assert not set(first) & set(done[len(first) :])
    assert told(tmp_path) == told(whole)


@pytest.mark.parametrize("number", [2, 4 * RUNS - 1])
def test_a_run_that_is_interrupted_goes_on_from_its_checkpoint(
    number: int, whole: Path, tmp_path: Path, played: list[int], monkeypatch: pytest.MonkeyPatch
):
    run = trials.run

    def interrupted(grid, config, *, on_round=None):
        def advance(report) -> None:
            on_round(report)
            if len(played) == number:
                raise KeyboardInterrupt

        return run(grid, config, on_round=advance)

    monkeypatch.setattr(trials, "run", interrupted)
    stopped = compare(tmp_path)
    assert stopped.exit_code == 130
    assert "the same command goes on" in stopped.output
    assert len(played) == number
    assert compare(tmp_path).exit_code == 0
    assert len(played) == 4 * RUNS  # no round twice
    assert told(tmp_path) == told(whole)


def test_a_comparison_that_was_killed_goes_on(whole: Path, tmp_path: Path):
    run = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.rglob("results.json"))) < 3 and time.monotonic() < deadline:
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=60)
    assert run.returncode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")}
    assert 3 <= len(before) < RUNS
    assert compare(tmp_path).exit_code == 0
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    assert told(tmp_path) == told(whole)


# --- several at once, other budgets, methods with keys of their own -------------------------------


def test_runs_in_processes_of_their_own_come_to_the_same(whole: Path, tmp_path: Path):
    said = compare(tmp_path, "--workers", "2")
    assert said.exit_code == 0
    assert told(tmp_path) == told(whole)
    data = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert "--workers 2" in data["command"]
    assert data["machine"].endswith(", 2 runs at once")


def test_a_pool_that_was_killed_leaves_no_process_and_goes_on(whole: Path, tmp_path: Path):
    run = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words(tmp_path, "--workers", "2")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    deadline = time.monotonic() + 300
    while len(list(tmp_path.rglob("results.json"))) < 2 and time.monotonic() < deadline:
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=60)  # its children hold the pipes as long as they live
    assert compare(tmp_path).exit_code == 0
    assert told(tmp_path) == told(whole)


def test_tries_may_have_a_smaller_budget(tmp_path: Path):
    assert compare(tmp_path, "--tune-budget", "rounds=2", "--seeds", "1").exit_code == 0
    data = told(tmp_path)
    assert (data["tune_budget"], data["budget"]) == ("rounds=2", "rounds=4")
    for method in data["methods"]:
        assert {one["round"] for one in method["tries"]} == {2}
        assert [run["rounds"] for run in method["runs"]] == [4]
    assert "with a budget of rounds=2" in (tmp_path / "compare.md").read_text(encoding="utf-8")


def test_a_strategy_twice_with_a_key_of_its_own_and_one_that_keeps_models(tmp_path: Path):
    first = RunConfig.read({"dataset": "digits", "rounds": 1, "num-clients": 10})
    start = folder_of(first, tmp_path / "start")
    results = run_once(first, tmp_path / "start")
    assert results["unseen"]["per_client"]
    method = f"fedavg:init={start}"
    more = ("--strategies", f"fedavg,{method},ditto", "--seeds", "1")
    arguments = words(tmp_path / "out", *more)
    place = arguments.index("--grid") + 1
    arguments[place] = "local-lr=0.01 inner-lr=0.5 ditto-lambda=0.1"
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    plain, started, ditto = told(tmp_path / "out")["methods"]
    assert (plain["fixed"], started["fixed"]) == ({}, {"init": str(start)})
    assert started["strategy"] == method
    assert started["runs"][0]["accuracy"] != plain["runs"][0]["accuracy"]
    assert plain["own_models"]["before"]["mean"] is None
    (run,) = ditto["runs"]
    file = tmp_path / "out" / "trials" / run["folder"] / "results.json"
    kept = json.loads(file.read_text(encoding="utf-8"))["trained"]
    assert ditto["own_models"]["before"]["mean"] == kept["accuracy_before"] > 0
    assert run["own_models"]["5"] == kept["accuracy_after"]["5"]


# --- what is refused ------------------------------------------------------------------------------

WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "no strategy": (("--strategies", " , "), "--strategies ' , ': name one or more"),
    "unknown strategy": (("--strategies", "fedavg,fedmeat"), "did you mean 'fedmeta'"),
    "no seeds": (("--seeds", "0"), "--seeds 0: must be at least 1"),
    "unknown budget": (("--budget", "steps=3"), "unknown budget 'steps'"),
    "key twice": (
        ("--strategies", "fedmeta:order=first", "--set", "order=exact"),
        "order is set for all runs ('exact') and by --strategies 'fedmeta:order=first'",
    ),
    "own key of no effect": (
        ("--strategies", "fedmeta,fedavg:order=first"),
        "--strategies 'fedavg:order=first': order has no effect under fedavg",
    ),
    "no workers": (("--workers", "0"), "--workers 0: must be at least 1"),
    "workers twice": (("--workers", "2", "--set", "workers=2"), "workers = 2 beside --workers 2"),
    "unknown tune budget": (("--tune-budget", "steps=3"), "unknown budget 'steps'"),
    "too many tries": (("--tries", "3"), "--tries 3: must be from 1 to 2"),
    "axis nobody reads": (("--grid", "distill-lr=1"), "no effect under fedavg and fedmeta"),
    "value out of range": (("--grid", "fedavg:local-lr=-1"), "local-lr = -1"),
    "set and tuned": (("--set", "inner-lr=0.2"), "inner-lr is set for all runs (0.2)"),
    "rounds beside the budget": (("--set", "rounds=9"), "rounds = 9 beside --budget rounds=4"),
    "strategy by a key": (("--set", "strategy=fedavg"), "use --strategies"),
    "folder by a key": (("--set", "out=x"), "use --out"),
    "resume": (("--set", "resume=true"), "the same command again"),
    "bytes by a key": (("--set", "max-bytes=5"), "use --budget bytes="),
    "seldom validated": (("--set", "eval-every=5"), "no round is validated"),
    "never validated": (("--set", "eval-every=0"), "no round is validated"),
    "unknown key": (("--set", "eval-evry=5"), "did you mean 'eval-every'"),
    "missing data": (("--dataset", "omniglot", "--set", "data-root=/nowhere"), "/nowhere"),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_what_cannot_be_compared_is_refused_before_anything_runs(what: str, tmp_path: Path):
    more, message = WRONG[what]
    with pytest.raises(MetabloomError) as refused:
        compare(tmp_path / "out", *more)
    assert message in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_clients_have_the_same_records_where_one_method_holds_some_out(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: dict[str, object] = {}

    def run(grid, config, *, on_round=None):
        seen[config.strategy] = config.dataset_args
        return server_app.run(grid, config, on_round=on_round)

    monkeypatch.setattr(trials, "run", run)
    settings = (f"data-root={small_data}", "num-clients=4", "clients-per-round=2", "device=cpu")
    settings += ("public-size=50", "distill-steps=2", "batch-size=20", "eval-steps=1")
    more = ("--dataset", "mnist", "--strategies", "fedavg,feddf", "--seeds", "1")
    more += ("--grid", "local-lr=0.1", "--budget", "rounds=1", "--tries", "1")
    arguments = words(tmp_path, *more, settings=(*settings, "dataset-args=alpha=10"))
    del arguments[arguments.index("--grid") : arguments.index("--grid") + 2]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    assert seen == {"fedavg": "alpha=10 held_out=50", "feddf": "alpha=10 held_out=50"}
    wrong = [*arguments, "--set", "dataset-args=held_out=7"]
    with pytest.raises(ConfigError, match=r"holds out 7 records.*50"):
        CliRunner().invoke(app, wrong, catch_exceptions=False)
