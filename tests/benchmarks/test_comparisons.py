"""What README and docs tell of comparisons stands in the figures that lie beside them."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "results" / "compare"
TABLES = sorted(FOLDER.glob("*.json"))


def cells_of(file: Path) -> set[str]:
    """Return every mean and deviation of a comparison, in per cent, as pages write them."""
    found = set()
    for method in json.loads(file.read_text(encoding="utf-8"))["methods"]:
        for spread in (*method["accuracy"].values(), *method["own_models"].values()):
            if spread["mean"] is not None:
                found.add(f"{100 * spread['mean']:.1f} ± {100 * (spread['sd'] or 0):.1f}")
    return found


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.stem)
def test_a_page_is_that_of_its_figures_and_names_its_command(file: Path):
    page = file.with_suffix(".md").read_text(encoding="utf-8")
    told = json.loads(file.read_text(encoding="utf-8"))
    assert f"`{told['command']}`" in page
    assert len(told["seeds"]) == 3
    assert len({len(method["tries"]) for method in told["methods"]}) == 1
    table = page.split("| strategy | chosen |")[0]
    assert set(re.findall(r"\d+\.\d ± \d+\.\d", table)) <= cells_of(file)
    for method in told["methods"]:
        assert f"| `{method['strategy']}` |" in table


def test_the_page_on_choosing_tells_figures_of_the_tables_alone():
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    known = set().union(*map(cells_of, TABLES))
    told = re.findall(r"\d+\.\d ± \d+\.\d", page)
    assert len(told) > 80
    assert not [one for one in told if one not in known]


def test_the_readme_tells_those_of_the_table_it_names():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    part = text.split("| | unseen client, adapted |")[1].split("\n\n")[0]
    told = re.findall(r"\d+\.\d ± \d+\.\d", part)
    assert len(told) == 8
    assert set(told) <= cells_of(FOLDER / "mnist-2-classes.json")
