"""Every example in a docstring runs and shows what it says."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("metabloom", "strategies", "clients", "models", "sim")


def modules_with_examples() -> list[str]:
    """Their names as they are imported: ``models/mlp.py`` is ``metabloom.models.mlp``."""
    found = []
    for path in sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if parts[0] == "metabloom" else ("metabloom", *parts)
            found.append(".".join(parts).removesuffix(".__init__"))
    return found


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_of_a_module_are_true(name: str):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0, f"{name} holds >>> that doctest does not find"
    assert result.failed == 0, f"{result.failed} examples of {name} are not true: see above"
