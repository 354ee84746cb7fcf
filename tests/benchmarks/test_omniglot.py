"""The Omniglot benchmark at tiny scale: what it runs, what it chooses by, what it writes."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "omniglot.py"


@pytest.fixture(scope="module")
def omniglot() -> ModuleType:
    spec = importlib.util.spec_from_file_location("omniglot_benchmark", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_has_the_same_rounds_clients_and_model(omniglot: ModuleType) -> None:
    for model in omniglot.MODELS:
        points = [p for m in omniglot.methods(model).values() for p in omniglot.grid_of(model, m)]
        for key in ("model", "model-args", "dataset-args", "rounds"):
            assert len({point[key] for point in points}) == 1, key
        assert all("clients-per-round" not in point for point in points)


def test_a_job_trains_scores_both_roles_and_is_kept(
    omniglot: ModuleType, small_data: Path, tmp_path: Path
) -> None:
    settings = {
        "strategy": "fedmeta",
        "model": "mlp",
        "dataset-args": "image_size=15",
        "rounds": 1,
        "num-clients": 10,
    }
    found = omniglot.run_job(settings, 1, str(small_data), str(tmp_path))
    for role in ("validation", "unseen"):
        assert set(found[role]) == {str(rate) for rate in omniglot.EVAL_RATES}
        assert all(0 <= value <= 1 for column in found[role].values() for value in column)
    (kept,) = tmp_path.glob("*/scores.json")
    kept.write_text(kept.read_text().replace('"seed": 1', '"seed": 99'))
    assert omniglot.run_job(settings, 1, str(small_data), str(tmp_path))["seed"] == 99


def test_settings_and_rates_are_chosen_by_validation_clients_alone(omniglot: ModuleType) -> None:
    def run(validation: dict, unseen: dict) -> dict:
        return {"settings": {}, "validation": validation, "unseen": unseen}

    good = run({"0.1": [0.2, 0.5, 0.3], "1.0": [0.2, 0.4, 0.9]}, {"0.1": [0.2, 0.0, 0.0]})
    bad = run({"0.1": [0.2, 0.4, 0.5]}, {"0.1": [0.2, 1.0, 1.0]})
    assert omniglot.quality(good) == pytest.approx(0.7)  # the best rate of each column
    assert max([bad, good], key=omniglot.quality) is good
    assert omniglot.best_rates(good["validation"])[1:] == ["0.1", "1.0"]


def test_the_table_tells_means_deviations_and_margins(omniglot: ModuleType) -> None:
    def row(method: str, accuracy: float) -> dict:
        seeds = [[0.2, accuracy, accuracy + 0.1], [0.2, accuracy + 0.02, accuracy + 0.12]]
        return {"method": method, "chosen": {"outer-lr": 0.01}, "unseen": seeds, "seconds": [3.0]}

    page = omniglot.page_of("mlp", [row("FedAvg", 0.3), row("exact MAML", 0.5)])
    assert "| FedAvg | 20.0 ± 0.0 | 31.0 ± 1.4 | 41.0 ± 1.4 | 3 | outer-lr 0.01 |" in page
    assert "exact MAML minus FedAvg: 20.0 ± 0.0 after 1 step, 20.0 ± 0.0 after 5." in page
