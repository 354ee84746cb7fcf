"""The benchmarks of private training at tiny scale: what they run, choose by, book and write."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from metabloom.ledger import PrivacyLedger

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = {
    "task": "digits",
    "records": 108,
    "q": 0.25,
    "C": 1.0,
    "epsilon": 2.0,
    "rounds": 2,
    "steps": 1,
    "inner-lr": 0.3,
    "server": ["sgd", 1.0],
}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def privacy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return script("privacy")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module("privacy_runs")
    shorter = {**module.TASKS["digits"], "rates": (1.0,)}
    monkeypatch.setattr(module, "TASKS", {**module.TASKS, "digits": shorter})
    monkeypatch.setattr(module, "STEPS", (0, 1))
    module.held_of.cache_clear()
    return module


@pytest.mark.parametrize(
    ("method", "releases"),
    [("FOMAML", 2 * 2), ("reptile", 2 * 1), ("second order", 2 * 3), ("alone", 2 * 1)],
)
def test_what_is_calibrated_for_is_what_each_ledger_books(
    runs: ModuleType, tmp_path: Path, method: str, releases: int
) -> None:
    steps = 2 if method == "alone" else 1
    rounds = 1 if method == "alone" else 2
    settings = {**TINY, "method": method, "steps": steps, "rounds": rounds}
    found = runs.run_job(settings, 0, str(tmp_path), str(tmp_path))
    ledgers = [PrivacyLedger(file) for file in tmp_path.glob("*/*.jsonl")]
    assert len(ledgers) == 10
    for ledger in ledgers:
        assert sum(count for *_, count in ledger.events) == releases
        assert {sigma for sigma, *_ in ledger.events} == {found["noise_multiplier"]}
    assert 1.9 < found["epsilon"] <= 2.0


def test_the_seed_of_tuning_sees_no_test_record_and_a_finished_run_is_kept(
    runs: ModuleType, tmp_path: Path
) -> None:
    settings = {**TINY, "method": "FOMAML", "epsilon": 0.0}
    tuned = runs.run_job(settings, runs.TUNING_SEED, str(tmp_path), str(tmp_path))
    assert "test" not in tuned
    assert not list(tmp_path.glob("*/*.jsonl"))
    (kept,) = tmp_path.glob("*/scores.json")
    kept.write_text(kept.read_text().replace('"seed": 0', '"seed": 99'))
    again = runs.run_job(settings, runs.TUNING_SEED, str(tmp_path), str(tmp_path))
    assert again["seed"] == 99
    final = runs.run_job(settings, 1, str(tmp_path), str(tmp_path))
    assert all(0 <= value <= 1 for curve in final["test"].values() for value in curve)


def test_no_record_is_trained_on_and_tested_on(runs: ModuleType, tmp_path: Path) -> None:
    held = runs.held_of("digits", 1, str(tmp_path))
    for data, (own, roles) in zip(held.training.values(), held.judged, strict=True):
        trained, parts = _images(data.all), [_images(part) for part in roles.values()]
        assert trained == _images(own)
        assert trained.isdisjoint(parts[0] | parts[1])
        assert parts[0].isdisjoint(parts[1])


def _images(records: tuple) -> set[bytes]:
    return {image.numpy().tobytes() for image in records[0]}


def test_writers_that_are_judged_do_not_train(
    runs: ModuleType, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = {**runs.TASKS["mnist-writers"], "clients": 0}
    monkeypatch.setitem(runs.TASKS, "mnist-writers", fewer)
    held = runs.held_of("mnist-writers", 1, str(small_data))
    trained = {image for data in held.training.values() for image in _images(data.all)}
    roles = [role for _, parts in held.judged for role in parts]
    assert {"validation", "test"} == set(roles)
    for own, parts in held.judged:
        (scored,) = map(_images, parts.values())
        assert trained.isdisjoint(scored | _images(own))
        assert own[0].shape[1:] == held.shape


def test_rows_of_one_privacy_differ_in_the_method_alone(privacy: ModuleType) -> None:
    for task in privacy.TASKS:
        points = [
            point
            for method in privacy.methods(task).values()
            if method.get("epsilon") and "like" not in method
            for point in privacy.grid_of(method)
        ]
        for key in ("task", "records", "q", "C"):
            assert len({point[key] for point in points}) == 1, key
        named = {method.get("epsilon") for method in privacy.methods(task).values()}
        assert {0.0, 2.0, 8.0} <= named


def test_settings_rates_and_steps_are_chosen_on_validation_alone(privacy: ModuleType) -> None:
    def run(validation: dict, test: dict) -> dict:
        return {"settings": {"method": "FOMAML"}, "validation": validation, "test": test}

    good = run({"0.1": [0.1, 0.2, 0.5, 0.6, 0.7], "1.0": [0.1, 0.2, 0.3, 0.9, 0.4]}, {})
    bad = run({"0.1": [0.9, 0.9, 0.2, 0.2, 0.9]}, {"0.1": [1.0] * 5})
    assert privacy.quality(good) == pytest.approx(0.7)  # (0.5 + 0.9) / 2: each at its best rate
    assert max([bad, good], key=privacy.quality) is good
    assert privacy.best(good["validation"]) == ("1.0", 20)


def row(privacy: ModuleType, name: str, level: float, *, epsilon: float, target: float) -> dict:
    rate = {"0.1": [0.1, 0.2, 0.5, level, 0.9]}
    method = privacy.methods("digits")[name]
    settings = {"method": method["method"], "epsilon": target, "rounds": 50}
    chosen = {"settings": settings, "validation": rate, "noise_multiplier": 5.5}
    results = [
        {"test": {"0.1": [0.1, 0.2, 0.4, level + 0.02 * seed, 0.9]}, "epsilon": epsilon}
        | {"seconds": 3.0}
        for seed in range(3)
    ]
    made: dict = privacy.row_of(name, method, chosen, results)
    return made


def test_the_table_tells_epsilon_noise_means_and_the_bar(privacy: ModuleType) -> None:
    rows = [
        row(privacy, "FOMAML, epsilon 2", 0.84, epsilon=1.99, target=2.0),
        row(privacy, "local only", 0.7, epsilon=0.0, target=0.0),
    ]
    page = privacy.page_of({"digits": rows})
    want = "| FOMAML, epsilon 2 | 1.990 | 5.50 | 10.0 ± 0.0 | 40.0 ± 0.0 | 86.0 ± 2.0 |"
    assert want in page
    assert "14.0 ± 0.0 after 20" in page
    assert "after 20 steps, is reached: 86.0" in page
    rows[0] = row(privacy, "FOMAML, epsilon 2", 0.7, epsilon=1.99, target=2.0)
    assert "is MISSED: 72.0" in privacy.page_of({"digits": rows})
    json.dumps(rows)


def test_a_run_that_spent_more_than_its_target_gives_no_row(privacy: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="above the target"):
        row(privacy, "FOMAML, epsilon 2", 0.84, epsilon=2.01, target=2.0)


def test_the_page_of_costs_has_a_row_for_each_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cost = script("privacy_cost")
    monkeypatch.setattr(cost, "BATCHES", (4,))
    monkeypatch.setattr(cost, "LINES", (1, 3))
    cost.main(out=tmp_path / "out", repeats=1)
    page = (tmp_path / "out" / "privacy-cost.md").read_text()
    for start in ("| mlp | 4 |", "| conv4 | 4 |", "| read epsilon |", "| 1 |", "| 3 |"):
        assert start in page
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_the_release_that_is_timed_is_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = script("privacy_cost")
    monkeypatch.setattr(cost, "SIGMA", 1e-9)
    monkeypatch.setattr(cost, "CLIP", 1e3)
    released = cost.ours("mlp", 8)()
    model, (inputs, targets) = cost.model_of("mlp"), cost.records_of("mlp", 8)
    loss = cost.torch.nn.functional.cross_entropy(model(inputs), targets)
    slopes = cost.torch.autograd.grad(loss, list(model.parameters()))
    for (name, _), slope in zip(model.named_parameters(), slopes, strict=True):
        # Noise of 1e-6 / 8 and float32; gradients are some 1e-2.
        assert cost.torch.allclose(released[name], slope, rtol=0, atol=1e-5)
