"""The README and four pages of docs are true: names exist, commands and blocks of code work."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from metabloom.cli import app
from metabloom.models import MODELS
from metabloom.sim import DATASETS
from metabloom.strategies import STRATEGIES
from tests.sim.synthetic_data import SMALL, install_fakes

README = Path(__file__).resolve().parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")
NAMES = ("reliability.md", "privacy.md", "scaling.md", "comparing.md")
DOCS = [README.parent / "docs" / name for name in NAMES]
PAGES = TEXT + "".join(page.read_text(encoding="utf-8") for page in DOCS)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES, flags=re.DOTALL)


def table_names(header: str) -> set[str]:
    """Return the `names` in the first column of the table that ``header`` begins."""
    rows = TEXT.split(f"\n| {header} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


OURS = [command for command in commands() if command.startswith("metabloom ")]


def test_the_tables_name_exactly_the_registered_strategies_and_models() -> None:
    assert table_names("strategy") == set(STRATEGIES)
    assert table_names("model") == set(MODELS)


def test_the_readme_names_exactly_the_registered_data_sets() -> None:
    sentence = re.search(r"Data sets: (.*?)\. ", TEXT, flags=re.DOTALL)
    assert sentence
    assert set(re.findall(r"`([^`]+)`", sentence.group(1))) == set(DATASETS)


@pytest.mark.parametrize("code", blocks("python"))
def test_every_block_of_python_runs(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("command", OURS)
def test_every_metabloom_command_runs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, shlex.split(command)[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_every_other_command_is_one_that_another_test_runs() -> None:
    others = [command for command in commands() if command not in OURS]
    # make: .ci/run; flwr run: tests/app/test_flower_projects.py.
    assert all(command.startswith(("make demo", "make test", "flwr run . ")) for command in others)


@pytest.mark.parametrize("model", sorted(MODELS))
def test_every_model_trains_under_its_name(model: str, small_data: Path, tmp_path: Path) -> None:
    dataset = {"char-lstm": "shakespeare"}.get(model, "mnist")
    settings = ["rounds=1", f"model={model}", "clients-per-round=1", f"data-root={small_data}"]
    settings += ["num-clients=3", "eval-steps=1", "batch-size=4"]
    settings += (
        ["dataset-args=limit=60"] if dataset == "mnist" else ["dataset-args=sequence_length=20"]
    )
    simulate(dataset, settings, tmp_path)


@pytest.mark.parametrize("dataset", sorted(DATASETS))
def test_every_data_set_runs_under_its_name_with_its_usual_model(
    dataset: str, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fakes(monkeypatch)
    options = dict(SMALL.get(dataset, {}))
    settings = ["rounds=1", "clients-per-round=1", "eval-steps=1", f"data-root={small_data}"]
    settings += [f"num-clients={options.pop('num_clients', 0)}"]
    settings += ["dataset-args=" + " ".join(f"{key}={value}" for key, value in options.items())]
    simulate(dataset, settings, tmp_path)


def simulate(dataset: str, settings: list[str], out: Path) -> None:
    options = [part for setting in settings for part in ("--set", setting)]
    arguments = ["simulate", "--dataset", dataset, "--out", str(out), *options]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert (out / "results.json").exists()
