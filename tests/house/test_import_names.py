"""A room has one import name, ``metabloom.<room>``: a second copy would have second registries."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("strategies", "clients", "models", "sim")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_does_not_import_under_its_bare_name(room: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match="beyond top-level package"):
        importlib.import_module(room)
    assert room not in sys.modules


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_as_a_subpackage(room: str):
    module = importlib.import_module(f"metabloom.{room}")
    assert Path(str(module.__file__)).parent.name == room
