"""The pure parts of a comparison: the choice, which unseen clients cannot sway; the statistics."""

import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from metabloom.comparison import (
    Method,
    Spread,
    Try,
    Validation,
    chosen_of,
    summary_of,
    tenth_percentile,
    validation_of,
)
from metabloom.comparison_page import Comparison, cell_of
from metabloom.errors import MetabloomError
from metabloom.sim.compare_report import render_comparison
from metabloom.tuning import Budget

OWN = {"accuracy_before": 0.75, "accuracy_after": {"1": 0.7, "5": 0.8}}
ACCURACIES = {1: [0.2, 0.5, 0.9], 2: [0.4, 0.4, 0.7, 0.1]}  # unseen clients by seed


def validated(number: int, accuracy: float | None, loss: float | None) -> dict:
    """Return one round of a history, with nothing told but after five steps."""
    told = {
        "accuracy_before": None,
        "accuracy_after": {"1": None, "5": accuracy},
        "loss_before": None,
        "loss_after": {"1": None, "5": loss},
    }
    return {"round": number, "validation": told}


def results(
    *history: tuple[int, float | None, float | None],
    unseen: Sequence[float | None] = (0.5,),
    rounds: int = 4,
    **more,
) -> dict:
    entries = {number: {"round": number, "validation": None} for number in range(1, rounds + 1)}
    entries |= {number: validated(number, accuracy, loss) for number, accuracy, loss in history}
    clients = [
        {"client": f"c{i}", "accuracy-before": 0.1, "accuracy-after-1": 0.3, "accuracy-after-5": a}
        for i, a in enumerate(unseen)
    ]
    if None in unseen:
        clients = [{k: v for k, v in one.items() if v is not None} for one in clients]
    known = [a for a in unseen if a is not None]
    mean = float(np.mean(known)) if len(known) == len(unseen) else None
    return {
        "clients": {"train": 8, "validation": 1, "unseen": 1},
        "unseen": {
            "accuracy_before": 0.1,
            "accuracy_after": {"1": 0.3, "5": mean},
            "per_client": clients,
        },
        "history": list(entries.values()),
        "bytes_training": 1000 * rounds,
        "bytes_down": 10**9,
        "bytes_up": 10**9,
        "seconds": 2.0 * rounds,
        "skipped": 0,
        **more,
    }


# --- the choice -----------------------------------------------------------------------------------


def tries(runs: Sequence[dict], judge: Callable[[dict], Validation] = validation_of) -> list[Try]:
    return [Try({"number": n}, judge(run), f"run-{n}") for n, run in enumerate(runs)]


def ignores_unseen_clients(judge: Callable[[dict], Validation]) -> None:
    """The better the validation, the worse the unseen clients: and the other way round."""
    scores = (0.3, 0.8, 0.5)
    for sign in (-1, 1):
        runs = [results((4, s, 1.0), unseen=[0.5 + sign * s / 4]) for s in scores]
        assert chosen_of("any", tries(runs, judge)).folder == "run-1"
        for run in runs:
            del run["unseen"]
        assert chosen_of("any", tries(runs, judge)).folder == "run-1"


def test_the_choice_never_sees_unseen_clients():
    ignores_unseen_clients(validation_of)


@pytest.mark.parametrize(
    "peeking",
    [
        lambda run: Validation(run["unseen"]["accuracy_after"]["5"]),
        lambda run: Validation(
            validation_of(run).accuracy + run.get("unseen", {}).get("accuracy_after", {})["5"]
        ),
        lambda run: Validation(
            validation_of(run).accuracy,
            1 - run["unseen"]["accuracy_after"]["5"],
        ),
    ],
)
def test_a_choice_that_peeks_is_found(peeking: Callable[[dict], Validation]):
    with pytest.raises((AssertionError, KeyError)):
        ignores_unseen_clients(peeking)


def test_accuracy_decides_then_the_lower_loss_then_the_order():
    def folder(*scores: tuple[float | None, float | None]) -> str:
        return chosen_of("any", tries([results((4, *score)) for score in scores])).folder

    assert folder((0.5, 0.1), (0.6, 9.0)) == "run-1"
    assert folder((0.5, 0.2), (0.5, 0.1)) == "run-1"
    assert folder((0.5, 0.1), (0.5, 0.1)) == "run-0"
    assert folder((0.1, 0.1), (None, 0.0)) == "run-0"
    assert folder((None, 0.2), (None, 0.1)) == "run-1"
    assert folder((None, None), (0.0, None)) == "run-1"


def test_what_counts_is_the_model_that_the_run_leaves():
    history = ((1, 0.9, 0.1), (2, 0.5, 0.2), (3, 0.7, 0.3))
    assert validation_of(results(*history)) == Validation(
        0.7, 0.3, 3, "5"
    )  # the last, not the best
    best = {"ending": {"model_round": 1, "reason": "patience", "rounds": 3}}
    assert validation_of(results(*history, **best)) == Validation(0.9, 0.1, 1, "5")
    budget = {"ending": {"model_round": None, "reason": "max-bytes", "rounds": 3}}
    assert validation_of(results(*history, **budget)) == Validation(0.7, 0.3, 3, "5")
    assert validation_of(results()) == Validation(None, None, 0)


@pytest.mark.parametrize(
    ("accuracies", "losses", "steps"),
    [
        ((0.5, 0.6, 0.7), (1.0, 1.0, 1.0), "5"),
        ((0.5, 0.8, 0.7), (1.0, 1.0, 1.0), "1"),
        ((0.9, 0.8, 0.7), (1.0, 1.0, 1.0), "before"),  # a method that adaptation harms
        ((0.7, 0.7, 0.7), (1.0, 0.9, 0.9), "1"),  # the lower loss, then the fewer steps
        ((None, 0.1, None), (0.0, 1.0, 0.0), "1"),
        ((None, None, None), (0.5, 0.6, 0.4), "5"),
    ],
)
def test_validation_clients_choose_the_number_of_adaptation_steps(accuracies, losses, steps: str):
    told = {
        "accuracy_before": accuracies[0],
        "accuracy_after": {"5": accuracies[2], "1": accuracies[1]},
        "loss_before": losses[0],
        "loss_after": {"5": losses[2], "1": losses[1]},
    }
    found = validation_of({"history": [{"round": 3, "validation": told}]})
    place = ["before", "1", "5"].index(steps)
    assert found == Validation(accuracies[place], losses[place], 3, steps)


def test_the_percentile_is_of_the_chosen_number_of_steps():
    runs = [results((4, 0.5, 1.0), unseen=a) for a in ACCURACIES.values()]
    assert summary_of(runs, "1")["tenth_percentile"] == pytest.approx(0.3)
    assert summary_of(runs, "before")["tenth_percentile"] == pytest.approx(0.1)


def test_models_that_training_clients_keep_have_a_column_of_their_own():
    plain, keeps = method("fedavg"), method("ditto", trained=OWN)
    page = comparison(plain, keeps).page()
    header = next(line for line in page.splitlines() if line.startswith("| strategy | before"))
    place = header.split(" | ").index("own models")
    rows = {
        line.split("`")[1]: line.split(" | ")
        for line in page.splitlines()
        if line.startswith("| `") and "±" in line
    }
    assert rows["ditto"][place : place + 2] == ["75.0 ± 0.0", "80.0 ± 0.0"]
    assert rows["fedavg"][place : place + 2] == ["-", "-"]
    assert "records that the model has seen" in page
    assert "own models" not in comparison(plain).page()
    assert keeps.summary["own_models"]["1"]["mean"] == pytest.approx(0.7)


def test_where_nobody_told_anything_there_is_no_choice():
    with pytest.raises(MetabloomError, match=r"fedmeta: in none of 2 tries.*lower the rates"):
        chosen_of("fedmeta", tries([results(), results((2, None, None))]))


# --- statistics, against NumPy --------------------------------------------------------------------


def test_the_statistics_of_a_method_are_numpys():
    runs = [results((1, 0.5, 1.0), unseen=a, rounds=s) for s, a in ACCURACIES.items()]
    found = summary_of(runs, "5")
    means = [np.mean(a) for a in ACCURACIES.values()]
    assert found["accuracy"]["5"]["mean"] == pytest.approx(np.mean(means))
    assert found["accuracy"]["5"]["sd"] == pytest.approx(np.std(means, ddof=1))
    assert found["accuracy"]["before"] == {"mean": pytest.approx(0.1), "sd": pytest.approx(0)}
    pooled = np.concatenate(list(ACCURACIES.values()))
    assert found["tenth_percentile"] == pytest.approx(np.percentile(pooled, 10))
    assert (found["clients"], found["bytes"], found["seconds"]) == (7, 1500, 3.0)
    assert found["rounds"] == 1.5


@pytest.mark.parametrize("count", [1, 2, 3, 10, 11, 57])
def test_the_tenth_percentile_is_numpys(count: int):
    values = np.random.default_rng(count).random(count).tolist()
    assert tenth_percentile(values) == pytest.approx(np.percentile(values, 10))


def test_a_mean_over_seeds_is_one_of_all_or_none():
    assert Spread.of([0.5, None]) == Spread(None, None)
    assert Spread.of([]) == Spread(None, None)
    assert tenth_percentile([]) is None
    found = summary_of([results((4, 0.5, 1.0), unseen=[None])], "5")
    assert found["accuracy"]["5"] == {"mean": None, "sd": None}
    assert found["tenth_percentile"] is None


# --- the page -------------------------------------------------------------------------------------


def method(strategy: str, shift: float = 0.0, **more) -> Method:
    runs = {
        seed: results((4, 0.5, 1.0), unseen=[a + shift for a in own], **more)
        for seed, own in ACCURACIES.items()
    }
    settings = [{"local-lr": rate} for rate in (0.1, 0.2, 0.3)]
    found = [
        Try(one, Validation(0.5 + i / 10, 1.0, 4, "5"), f"{strategy}-{i}")
        for i, one in enumerate(settings)
    ]
    folders = {seed: f"{strategy}-seed{seed}" for seed in runs}
    return Method(strategy, {"local-lr": (0.1, 0.2, 0.3)}, found, found[2], runs, folders)


def comparison(*methods: Method, **more) -> Comparison:
    values = {
        "dataset": "digits",
        "command": "metabloom compare --set <b>=1",
        "budget": Budget("rounds", 4),
        "tune_budget": Budget("rounds", 4),
        "tuning_seed": 0,
        "seeds": (1, 2),
        "machine": "2 CPU cores",
        "version": "0",
        "settings": {"clients-per-round": 3},
        "methods": methods,
    }
    return Comparison(**{**values, **more})


def test_the_page_has_the_numbers_the_settings_and_the_command():
    page = comparison(method("fedavg"), method("fedmeta", 0.05)).page()
    means = [100 * np.mean(a) for a in ACCURACIES.values()]
    low = 100 * np.percentile(np.concatenate(list(ACCURACIES.values())), 10)
    row = next(line for line in page.splitlines() if line.startswith("| `fedavg` | 10.0"))
    cell = f"{np.mean(means):.1f} ± {np.std(means, ddof=1):.1f}"
    assert f"| 30.0 ± 0.0 | {cell} | {cell} | 5 | {low:.1f} | 0.00 | 8.0 | 4 |" in row
    assert "| `fedavg` | local-lr 0.3 | 70.0 | local-lr 0.1, 0.2, 0.3 |" in page
    assert "`metabloom compare --set <b>=1`" in page
    assert "3 tries, judged on the validation clients of seed 0 alone" in page
    assert "seeds 1, 2" in page
    assert "`clients-per-round=3`" in page
    assert "On the edge of its grid lies what was chosen for `fedavg` (local-lr)" in page
    assert "Privacy is accounted" not in page
    short = comparison(method("fedavg"), tune_budget=Budget("rounds", 2)).page()
    assert "3 tries with a budget of rounds=2, judged on" in short
    assert max(len(line) for line in page.splitlines()) < 1500


def test_privacy_and_skipped_rounds_are_told():
    told = comparison(
        method("fedavg", skipped=2), settings={"privacy.noise-multiplier": 1.0}
    ).page()
    assert "what all 5 runs tell together is more" in told
    assert "`fedavg` skipped 4 rounds" in told


def test_the_data_are_strict_json_and_hold_every_try_and_run():
    data = json.loads(json.dumps(comparison(method("fedavg")).data(), allow_nan=False))
    (found,) = data["methods"]
    assert [one["settings"] for one in found["tries"]] == [
        {"local-lr": rate} for rate in (0.1, 0.2, 0.3)
    ]
    assert [one["accuracy"] for one in found["tries"]] == pytest.approx([0.5, 0.6, 0.7])
    assert found["chosen"] == {"local-lr": 0.3}
    assert [one["clients"] for one in found["runs"]] == list(ACCURACIES.values())
    assert [one["seed"] for one in found["runs"]] == [1, 2]
    assert found["accuracy"]["5"]["mean"] == pytest.approx(
        np.mean([np.mean(a) for a in ACCURACIES.values()])
    )


def test_the_report_needs_no_network_and_takes_names_as_text():
    page = render_comparison(comparison(method("fedavg"), method("fedmeta")))
    assert page.count("Plotly.newPlot(") == 3
    assert "--set &lt;b&gt;=1" in page
    assert cell_of(Spread(0.3, 0.0)) in page


def test_one_seed_has_no_spread():
    one = method("fedavg")
    single = Method(
        one.strategy, one.grid, one.tries, one.chosen, {1: one.runs[1]}, {1: one.folders[1]}
    )
    page = comparison(single, seeds=(1,)).page()
    assert all("±" not in line for line in page.splitlines() if line.startswith("| `"))
    assert "ran with seed 1," in page
