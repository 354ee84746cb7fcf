"""results.json, model.safetensors and report.html of a run."""

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from metabloom.config import RunConfig
from metabloom.errors import ConfigError, MetabloomError
from metabloom.sim.report import PAGE, privacy_lines, render_report
from metabloom.sim.results import results_of, write_results
from metabloom.strategies import ClientScore, RoundReport, RunResult
from metabloom.wire import to_record

CONFIG = RunConfig.read({"rounds": 2, "eval-steps": "1,3"})
ARRAYS = {
    "body.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "scale": np.array(0.5),
    "batches": np.array(3, dtype=np.int64),
}


def score(client: str, role: str, accuracy: float, count: int = 10) -> ClientScore:
    metrics = {"accuracy-before": accuracy, "loss-before": 1.0}
    metrics |= {f"accuracy-after-{n}": accuracy + 0.1 * n for n in (1, 3)}
    metrics |= {f"loss-after-{n}": 1 / (1 + n) for n in (1, 3)}
    return ClientScore(client, 0, role, count, metrics)


def report(number: int, validation: tuple[ClientScore, ...] = (), **changed) -> RoundReport:
    values = {
        "round": number,
        "clients": ("a", "b"),
        "failures": (("b", "ValueError: <script>alert(1)</script> Ünïcode"),),
        "train_metrics": {"query-loss": 0.5},
        "validation": validation,
        "bytes_down": 200,
        "bytes_up": 100,
        "seconds": 1.5,
    }
    return RoundReport(**{**values, **changed})


def result() -> RunResult:
    return RunResult(
        arrays=to_record(ARRAYS),
        rounds=[report(1), report(2, (score("v", "validation", 0.4),))],
        unseen=[score("x", "unseen", 0.2, count=1), score("<b>y</b> é", "unseen", 0.4, count=99)],
        clients={"train": 3, "validation": 1, "unseen": 2},
    )


def results(config: RunConfig = CONFIG) -> dict:
    return results_of(config, result())


def test_the_data_hold_what_design_promises():
    data = results()
    promised = {"version", "strategy", "dataset", "seed", "rounds", "clients", "unseen"}
    assert promised | {"bytes_up", "bytes_down", "seconds", "history", "config"} <= set(data)
    assert data["clients"] == {"train": 3, "validation": 1, "unseen": 2}
    assert data["rounds"] == 2
    assert (data["bytes_down"], data["bytes_up"]) == (400, 200)
    assert data["seconds"] == 3.0
    assert data["failures"] == 2
    assert data["config"] == CONFIG.to_flower()


def test_unseen_accuracies_are_macro_averages_whatever_the_clients_sizes():
    unseen = results()["unseen"]
    assert unseen["average"] == "macro"
    assert unseen["accuracy_before"] == pytest.approx(0.3)  # 1 and 99 records count alike
    assert unseen["accuracy_after"] == {"1": pytest.approx(0.4), "3": pytest.approx(0.6)}
    assert unseen["loss_after"] == {"1": pytest.approx(0.5), "3": pytest.approx(0.25)}
    assert [one["client"] for one in unseen["per_client"]] == ["x", "<b>y</b> é"]
    assert [one["num_examples"] for one in unseen["per_client"]] == [1, 99]


def test_failures_of_rounds_and_of_unseen_clients_are_counted_and_the_report_tells_the_first():
    told = result()
    told.final_failures = (("z", "ValueError: <i>no</i> records"),)
    told.dropped = 7
    data = results_of(CONFIG, told)
    assert data["failures"] == 3
    assert data["dropped"] == 7
    assert data["unseen"]["failures"] == [
        {"client": "z", "reason": "ValueError: <i>no</i> records"}
    ]
    page = render_report(data)
    assert "<td>round 1, b</td><td>ValueError: &lt;script&gt;alert(1)" in page
    assert "<td>unseen clients, z</td><td>ValueError: &lt;i&gt;no&lt;/i&gt; records</td>" in page
    assert "<td>left out, too small for the split</td><td>7</td>" in page
    assert "more, in results.json" not in page


def test_the_report_tells_five_failures_and_how_many_more_there_are_and_none_where_there_are_none():
    told = result()
    told.rounds = [report(n) for n in range(1, 9)]
    page = render_report(results_of(CONFIG, told))
    assert [f"round {n}, b" in page for n in (1, 5, 6)] == [True, True, False]
    assert "And 3 more, in results.json." in page
    told.rounds = [report(1, failures=())]
    data = results_of(CONFIG, told)
    assert "Failed replies" not in render_report(data)
    assert data["dropped"] == 0
    assert "left out" not in render_report(data)
    del data["unseen"]["failures"]  # results of an earlier version
    assert "Failed replies" not in render_report(data)


def test_metrics_that_a_client_lacks_have_no_mean_and_the_report_goes_without():
    def losses_only(client: str, role: str) -> ClientScore:
        one = score(client, role, 0.5)
        kept = {name: value for name, value in one.metrics.items() if name.startswith("loss")}
        return ClientScore(client, 0, role, 10, kept)

    told = result()
    told.unseen = [losses_only("x", "unseen"), losses_only("y", "unseen")]
    told.rounds = [report(1, (losses_only("v", "validation"),))]
    data = results_of(CONFIG, told)
    assert data["unseen"]["accuracy_before"] is None
    assert data["unseen"]["accuracy_after"] == {"1": None, "3": None}
    assert data["unseen"]["loss_before"] == 1.0
    page = render_report(data)
    assert "The clients report no accuracy" in page
    assert "The validation clients report no accuracy" in page
    told.unseen = [losses_only("x", "unseen"), score("y", "unseen", 0.4)]
    data = results_of(CONFIG, told)
    assert data["unseen"]["accuracy_before"] is None  # not the mean of the one that has it
    assert data["unseen"]["loss_before"] == 1.0
    assert "Plotly.newPlot(" in render_report(data)


def test_the_report_draws_its_progress_where_there_is_no_unseen_client():
    told = result()
    told.unseen = []
    page = render_report(results_of(CONFIG, told))
    assert page.count("Plotly.newPlot(") == 1
    assert page.index("plotly.js v") < page.index("Plotly.newPlot(")


def test_the_page_has_one_css_rule_and_one_element_a_line():
    lines = PAGE.splitlines()
    assert all(line.count("{{") <= 1 and line.count("}}") == line.count("{{") for line in lines)
    assert all(len(re.findall(r"<[a-z]", line)) <= 1 for line in lines)


def test_the_history_tells_each_round():
    first, second = results()["history"]
    assert first["clients"] == ["a", "b"]
    assert first["failures"][0]["client"] == "b"
    assert first["train"] == {"query-loss": 0.5}
    assert first["validation"] is None
    assert second["validation"]["accuracy_before"] == pytest.approx(0.4)


def test_a_run_without_unseen_clients_has_no_accuracy_rather_than_a_wrong_one():
    data = results_of(CONFIG, RunResult(arrays=to_record(ARRAYS)))
    assert data["unseen"]["accuracy_before"] is None
    assert data["unseen"]["accuracy_after"] == {"1": None, "3": None}
    assert "No unseen client was evaluated" in render_report(data)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path, bad: float):
    told = RunResult(
        arrays=to_record(ARRAYS),
        rounds=[report(1, train_metrics={"query-loss": bad})],
        unseen=[ClientScore("x", 0, "unseen", 1, {"accuracy-before": bad, "loss-before": bad})],
    )
    write_results(tmp_path, results_of(CONFIG, told), told.arrays)
    text = (tmp_path / "results.json").read_text()
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in results.json"))
    assert data["history"][0]["train"]["query-loss"] is None
    assert data["unseen"]["accuracy_before"] is None
    assert data["unseen"]["per_client"][0]["loss-before"] is None


def test_the_files_are_written_and_the_model_keeps_names_shapes_and_dtypes(tmp_path: Path):
    folder = write_results(tmp_path / "deep" / "er", results(), result().arrays)
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors",
        "report.html",
        "results.json",
    ]
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == results()
    loaded = load_file(folder / "model.safetensors")
    assert set(loaded) == set(ARRAYS)
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(loaded[name], value)
        assert (loaded[name].dtype, loaded[name].shape) == (value.dtype, value.shape)


def test_a_write_that_breaks_off_leaves_the_earlier_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_results(tmp_path, results(), result().arrays)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken(handle: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(MetabloomError, match="the disk is full"):
        write_results(tmp_path, {**results(), "seed": 9}, to_record({"w": np.ones(3)}))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_named_with_the_remedy(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"cannot write to .*file.*choose another folder"):
        write_results(tmp_path / "file" / "out", results(), result().arrays)


def test_the_report_needs_no_network():
    page = render_report(results())
    tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page)
    assert [tag for tag in tags if re.search(r"(?:src|href)\s*=", tag)] == []
    assert "@import" not in page
    assert page.count("Plotly.newPlot(") == 2  # adaptation, progress
    assert "plotly.js v" in page  # the script itself is in the page


def test_the_report_shows_the_figures_and_escapes_what_users_name():
    data = results(RunConfig.read({"rounds": 2, "eval-steps": "1,3", "out": "<img src=x> & more"}))
    page = render_report(data)
    assert "30.0%" in page  # unseen before
    assert "40.0%" in page  # after 1 step
    assert "<img src=x>" not in page
    assert "&lt;img src=x&gt; &amp; more" in page
    assert "<b>y</b>" not in page.replace("\\u003cb\\u003ey\\u003c\\u002fb\\u003e", "")


def test_personal_models_of_training_clients_are_told_apart_from_the_unseen():
    told = result()
    told.trained = [score("t", "train", 0.9)]
    data = results_of(CONFIG, told)
    assert [one["client"] for one in data["trained"]["per_client"]] == ["t"]
    assert [one["client"] for one in data["unseen"]["per_client"]] == ["x", "<b>y</b> é"]
    assert "trained" not in results_of(CONFIG, result())


# --- privacy --------------------------------------------------------------------------------------

PRIVATE = {"privacy.noise-multiplier": 2.0, "privacy.target-epsilon": 3.0}


def private_result(unprotected: str = "", **changed) -> dict:
    """Return the results of a run whose clients send only the metrics that they may."""
    config = RunConfig.read(
        {"rounds": 2, "eval-steps": "1,3", **PRIVATE, "privacy.unprotected-metrics": unprotected}
    )
    told = result()
    kept = {*unprotected.split(",")} - {""}

    def only_told(one: ClientScore) -> ClientScore:
        metrics = {n: value for n, value in one.metrics.items() if n in kept or "all" in kept}
        return ClientScore(one.client, one.partition_id, one.role, 1, metrics)

    told.unseen = [only_told(one) for one in told.unseen]
    spent = {"spent": (("a", 2.5), ("b", 2.93)), "exhausted": ("c",)} | changed
    validation = (only_told(score("v", "validation", 0.4)),)
    told.rounds = [report(1), report(2, validation, **spent)]
    return results_of(config, told)


def test_the_report_of_a_private_run_shows_what_was_spent_and_that_metrics_are_withheld():
    data = private_result()
    page = render_report(data)
    for name, value in (
        ("epsilon of a client, at most", "2.93"),
        ("median", "2.72"),  # 2.715, never rounded down
        ("at delta", "1e-05"),
        ("target", "epsilon 3"),
        ("clients that released", "2"),
        ("exhausted clients", "1"),
        ("metrics sent without protection", "none, they are withheld"),
    ):
        assert f"<td>{name}</td><td>{value}</td>" in page
    assert page.count("Evaluation metrics are withheld: privacy.unprotected-metrics names") == 2
    assert "Their losses are in results.json" not in page
    assert "Plotly.newPlot(" not in page
    spent, withheld = privacy_lines(data)
    assert spent.startswith(
        "privacy: epsilon at most 2.93 (median 2.72) at delta 1e-05 over 2 clients; 1 exhausted; "
        "protects one record against the server"
    )
    assert withheld.startswith("evaluation metrics are withheld")


@pytest.mark.parametrize(("unprotected", "plots"), [("all", 2), ("accuracy-after-3", 2)])
def test_metrics_that_are_declared_unprotected_are_drawn_as_far_as_they_go(
    unprotected: str, plots: int
):
    data = private_result(unprotected)
    page = render_report(data)
    assert page.count("Plotly.newPlot(") == plots
    assert "withheld" not in page
    assert f"<td>metrics sent without protection</td><td>{unprotected}</td>" in page
    assert len(privacy_lines(data)) == 1


def test_a_private_run_in_which_nobody_released_has_no_epsilon_to_show():
    data = private_result(spent=())
    assert "<td>epsilon of a client, at most</td><td>-</td>" in render_report(data)
    assert privacy_lines(data)[0].startswith("privacy: nothing was released over 0 clients")


def test_the_privacy_of_whole_clients_is_told_apart_from_that_of_records():
    data = results()
    data["privacy"] = {
        "user_level": {
            "epsilon": 4.501,
            "delta": 1e-6,
            "adjacency": "leave out",
            "protects_against": "all who see the models",
            "seeded": False,
        }
    }
    line = "privacy of whole clients: epsilon at most 4.51 at delta 1e-06 (leave out)"
    assert privacy_lines(data) == [f"{line}; protects one client against all who see the models"]
    page = render_report(data)
    assert "<td>one client (leave out), against all who see the models</td>" in page
    assert "exhausted clients" not in page
    data["privacy"]["user_level"]["seeded"] = True
    assert "it protects nobody" in privacy_lines(data)[1]


def test_a_run_without_privacy_says_nothing_of_it():
    assert privacy_lines(results()) == []
    assert "Privacy" not in render_report(results()).split("</script>", 1)[1]
