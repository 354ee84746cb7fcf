"""The benchmark of private steps at tiny scale: its sides agree, and a wrong one is refused."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from metabloom.clients.privacy import record_sums
from metabloom.opacus_import import import_opacus

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "dp_step.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("dp_step", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "dp_step", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    # The same graphs without the compiler, which takes seconds for each size.
    monkeypatch.setattr(record_sums, "compiled", lambda function: function)
    monkeypatch.setattr(record_sums, "STEPS", record_sums.Kept(8))
    monkeypatch.setattr(module, "MODELS", {"mlp": module.MODELS["mlp"]})
    monkeypatch.setattr(module, "BATCHES", (8,))
    return module


def test_every_side_has_a_row_and_the_page_says_whether_the_bar_is_kept(
    script: ModuleType, tmp_path: Path
) -> None:
    script.main(out=tmp_path, turns=2)
    rows = json.loads((tmp_path / "dp-step.json").read_text())["rows"]
    assert [row["side"] for row in rows] == list(script.sides("mlp", 8))
    assert all(row["away"] <= 1e-6 for row in rows)
    page = (tmp_path / "dp-step.md").read_text()
    assert "mlp, batch 8: the bar, compiled 2.5 times as fast" in page
    row = script.Row("mlp", 8, "ours, compiled", 1.0, 2.4, 0.0, 0.0)
    assert "is MISSED: 2.40" in script.page_of([row], "")


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_side_with_another_result_gives_no_row(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_opacus()
    honest = record_sums.clipped_sums
    monkeypatch.setattr(
        record_sums,
        "clipped_sums",
        lambda rows, mask, bound: [1.01 * one for one in honest(rows, mask, bound)],
    )
    with pytest.raises(RuntimeError, match=r"ours, compiled is .* from Opacus by hand"):
        list(script.measured("mlp", 8, 1))
