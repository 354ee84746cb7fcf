"""What docs/datasets.md says and shows is true."""

import json
from collections import Counter
from pathlib import Path

import pytest

from metabloom.config import RunConfig
from metabloom.errors import ConfigError
from metabloom.sim import DATASETS, dataset_spec, load_federation

DOCS = Path(__file__).parents[2] / "docs" / "datasets.md"


def block_of_docs(number: int) -> str:
    text = DOCS.read_text(encoding="utf-8")
    block = text.split("<!-- run by a test -->\n```python\n")[number].split("```")[0]
    assert len(block.strip().splitlines()) < 15
    return block


def test_the_block_in_the_docs_that_runs_a_strategy_on_it_works(monkeypatch, tmp_path):
    monkeypatch.setattr(DATASETS, "_entries", dict(DATASETS._entries))
    monkeypatch.chdir(tmp_path)
    exec(block_of_docs(1), {})
    run: dict[str, object] = {}
    exec(block_of_docs(2).replace('"rounds": 20', '"rounds": 3, "device": "cpu"'), run)
    results = json.loads((tmp_path / "moons" / "results.json").read_text(encoding="utf-8"))
    assert results["dataset"] == "two-moons"
    assert results["clients"] == {"train": 24, "validation": 3, "unseen": 3}
    assert results["failures"] == 0
    assert {path.name for path in Path(run["folder"]).iterdir()} == {
        "checkpoints",
        "results.json",
        "model.safetensors",
        "report.html",
    }


def test_the_block_in_the_docs_that_registers_a_data_set_works(monkeypatch):
    monkeypatch.setattr(DATASETS, "_entries", dict(DATASETS._entries))
    exec(block_of_docs(1), {})
    federation = load_federation("two-moons", noise=0.2, num_clients=10, support_size=5)
    assert len(federation) == 10
    assert federation.client(0).support[0].shape == (5, 2)
    assert dataset_spec("two-moons").num_classes == 2
    assert Counter(federation.roles) == {"train": 8, "validation": 1, "unseen": 1}
    with pytest.raises(ConfigError, match="did you mean 'noise'"):
        load_federation("two-moons", noize=0.2)


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "two-moons"])
def test_the_docs_name_every_data_set_and_each_of_its_options(name):
    text = DOCS.read_text(encoding="utf-8")
    for word in (name, *DATASETS[name].options()):
        assert f"`{word}`" in text, word


def test_the_docs_say_which_sets_have_a_fixed_split_and_how_own_sets_are_imported():
    text = DOCS.read_text(encoding="utf-8")
    assert "- `shakespeare` and `heart-disease` have `ClientData.fixed_split = True`" in text
    assert "`--set plugins=my_module`" in text
    assert "plugins" in RunConfig.model_fields
