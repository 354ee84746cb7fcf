"""The benchmarks of reliability at tiny scale: they run, and measure what they say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("label", ["few large arrays", "many small arrays"])
def test_both_models_weigh_a_megabyte_and_both_sides_give_the_same_model(label: str) -> None:
    reliability = script("reliability")
    arrays = reliability.models()[label]
    assert sum(value.nbytes for value in arrays.values()) == pytest.approx(1e6, rel=0.03)
    row = reliability.firewall_row(label, arrays, clients=3, repeats=1)
    assert row.startswith(f"| {label}")
    assert row.endswith("% |")


def test_the_page_has_a_row_for_each_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reliability = script("reliability")
    small = {"few large arrays": {"a": reliability.np.ones(3, "f4")}}
    monkeypatch.setattr(reliability, "models", lambda: small)
    reliability.main(out=tmp_path / "out", clients=3, repeats=1)
    page = (tmp_path / "out" / "reliability.md").read_text()
    assert page.count("| 1 MB |") == page.count("| 100 MB |") == 2
    assert "| few large arrays" in page


def test_an_attack_ruins_the_mean_and_not_the_median() -> None:
    accuracy = script("bad_clients").accuracy
    assert accuracy("fedavg", "mean", 2, seed=0, rounds=20) < 0.5
    assert accuracy("fedavg", "median", 2, seed=0, rounds=20) > 0.7


def test_its_table_has_every_aggregation() -> None:
    bad_clients = script("bad_clients")
    cells = {
        (s, bad, one): [0.1, 0.2, 0.3]
        for s in bad_clients.STRATEGIES
        for bad in (0, 2)
        for one in bad_clients.AGGREGATIONS
    }
    page = bad_clients.page_of(cells, rounds=60)
    assert "| fedmeta, 2 of 10 bad | 20.0 ± 10.0 | 20.0 ± 10.0 |" in page
