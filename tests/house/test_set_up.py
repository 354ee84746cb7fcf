"""What a fresh clone is set up from: the ranges, the pins and the links for type checkers."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import metabloom
from tests.house import types_tree

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DECLARED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("declared", DECLARED)
def test_each_dependency_has_a_pin_within_its_range(declared: str):
    requirement = Requirement(declared)
    pin = pins().get(canonicalize_name(requirement.name))
    assert pin is not None, f"{requirement.name} has no pin in constraints.txt"
    assert pin in requirement.specifier


def test_the_pins_name_no_index_and_no_folder():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pin = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9._]+")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not pin.fullmatch(line)] == []


def test_the_package_and_its_project_file_have_the_same_version():
    assert PROJECT["version"] == metabloom.__version__


def test_no_federation_is_declared_because_flower_would_edit_the_file_in_place():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "federations" not in tomllib.loads(text)["tool"]["flwr"]


def make_checkout(folder: Path) -> None:
    for name in ("metabloom", *types_tree.ROOMS):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"# {name}\n")
    (folder / "metabloom" / "wire.py").write_text("")


def test_the_links_for_type_checkers_nest_the_rooms_and_follow_the_files(tmp_path: Path):
    make_checkout(tmp_path)
    for _ in range(2):  # a second run changes nothing
        tree = types_tree.make_types_tree(tmp_path) / "metabloom"
        names = {path.name for path in tree.iterdir()}
        assert names == {"__init__.py", "wire.py", *types_tree.ROOMS}
        assert (tree / "models" / "__init__.py").read_text() == "# models\n"
    (tmp_path / "metabloom" / "wire.py").rename(tmp_path / "metabloom" / "cable.py")
    types_tree.make_types_tree(tmp_path)
    assert not (tree / "wire.py").is_symlink()
    assert (tree / "cable.py").exists()
