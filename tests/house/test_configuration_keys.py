"""RunConfig, pyproject.toml and docs/configuration.md tell of the same keys."""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from metabloom.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "configuration.md"
PROJECT = ROOT / "pyproject.toml"
SECTION = "[tool.flwr.app.config]\n"
HEADER = """# Configuration

Every key of a run. Give it as `--set key=value`, in a TOML file with `--config run.toml`, or to
Flower as `flwr run . --run-config "key=value"`. An unknown key, or a value that is not allowed, is
refused by name.

<!-- Written by `make docs` from metabloom/config_keys*.py; a test compares. -->

| key | default | allowed | meaning |
|---|---|---|---|
"""
BOUNDS = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
}
TYPES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true, false"}


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"privacy": {"epsilon": 1.0}}`` as ``{"privacy.epsilon": 1.0}``, as Flower reads it."""
    result: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)


def disagreements(declared: Mapping[str, Any], keys: Mapping[str, Any]) -> list[str]:
    """What to do to ``declared`` so that it equals ``keys``; 1, 1.0 and true are three values."""
    todo = []
    for key, value in keys.items():
        line = f"{key} = {toml_value(value)}"
        if key not in declared:
            todo.append(f"add     {line}")
        elif (type(declared[key]), declared[key]) != (type(value), value):
            todo.append(f"change  {key} = {toml_value(declared[key])}  to  {line}")
    return todo + [f"remove  {key}" for key in declared if key not in keys]


def allowed(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(str(choice) for choice in schema["enum"])
    bounds = [text.format(schema[name]) for name, text in BOUNDS.items() if name in schema]
    return " ".join([TYPES[schema["type"]], *bounds])


def page() -> str:
    rows = []
    schemas = RunConfig.model_json_schema(by_alias=True)["properties"]
    for key, default in RunConfig.defaults().items():
        shown = f"`{toml_value(default).strip(chr(34))}`" if default != "" else "(empty)"
        cells = (f"`{key}`", shown, allowed(schemas[key]), schemas[key].get("description", ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return HEADER + "".join(rows)


def with_section(project: str) -> str:
    """Return the text of pyproject.toml with its section of keys written anew."""
    before, rest = project.split(SECTION)
    lines = [f"{key} = {toml_value(value)}\n" for key, value in RunConfig.defaults().items()]
    return before + SECTION + "".join(lines) + rest[rest.index("\n[") :]


@pytest.fixture(scope="module", autouse=True)
def rewritten() -> None:
    if os.environ.get("METABLOOM_REWRITE"):  # make docs
        PROJECT.write_text(with_section(PROJECT.read_text(encoding="utf-8")), encoding="utf-8")
        PAGE.write_text(page(), encoding="utf-8")


def test_pyproject_declares_every_configuration_key_with_its_default():
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))
    todo = disagreements(flat(project["tool"]["flwr"]["app"]["config"]), RunConfig.defaults())
    assert not todo, f"in pyproject.toml, {SECTION}" + "\n".join([*todo, "(or `make docs`)"])


def test_a_missing_a_changed_and_a_surplus_key_are_each_named_with_the_line_to_write():
    keys = {"rounds": 100, "rate": 0.1, "eager": True, "name": "x"}
    assert disagreements(keys, keys) == []
    assert disagreements({"rounds": 100.0, "rate": 0.1, "eager": 1, "old": 2}, keys) == [
        "change  rounds = 100.0  to  rounds = 100",
        "change  eager = 1  to  eager = true",
        'add     name = "x"',
        "remove  old",
    ]


@pytest.mark.parametrize("name", RunConfig.model_fields)
def test_a_configuration_key_has_a_line_of_help(name: str):
    description = RunConfig.model_fields[name].description
    assert description, f"RunConfig.{name} needs a description"
    assert "\n" not in description


def test_the_configuration_page_is_what_the_configuration_says():
    assert PAGE.exists(), "docs/configuration.md is missing: run `make docs`"
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "docs/configuration.md is not what metabloom/config_keys*.py says: run `make docs`"
    )
