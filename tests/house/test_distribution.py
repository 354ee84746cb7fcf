"""The wheel, the source archive and Flower's app bundle hold what they should, and import."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("strategies", "clients", "models", "sim")
FOLDERS = ("metabloom", *ROOMS)
AT_ROOT = {
    ".git",
    ".venv",
    ".types",
    ".cache",
    "build",
    "data",
    "dist",
    "metabloom-results",
    "shared",
}

# Imports each named module and prints a complaint for each that does not come from the folder.
# The checkout leaves sys.path first, so that an editable install cannot answer instead.
IMPORT_FROM = """
import importlib, sys
from pathlib import Path
folder, checkout, *names = sys.argv[1:]
sys.path[:] = [folder, *(p for p in sys.path if p and Path(p).resolve() != Path(checkout))]
for name in names:
    file = Path(importlib.import_module(name).__file__)
    if not file.is_relative_to(folder):
        print(name, "comes from", file)
"""


@dataclass(frozen=True)
class Shipped:
    """The three things built, each as a folder that it was unpacked into."""

    wheel: Path
    sdist: Path
    bundle: Path


def files_under(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def modules(folder: Path) -> set[str]:
    """Every module of a checkout, e.g. ``{"metabloom/wire.py", "models/cnn.py"}``."""
    files = {f"{name}/{file}" for name in FOLDERS for file in files_under(folder / name)}
    return {file for file in files if file.endswith(".py")}


def nested(path: str) -> str:
    """Where the wheel has a file of the checkout."""
    return path if path.startswith("metabloom/") else f"metabloom/{path}"


def run(command: list[str], cwd: Path, home: Path) -> str:
    env = os.environ | {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the source: what lies about in a working folder must not decide."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        caches = {name for name in names if name == "__pycache__" or name.endswith("_cache")}
        return caches | (AT_ROOT if Path(folder) == ROOT else set())

    copy = tmp_path_factory.mktemp("source") / "metabloom"  # Flower allows no _ in the name
    return Path(shutil.copytree(ROOT, copy, ignore=left_out))


@pytest.fixture(scope="module")
def shipped(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    made, home = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("home")
    wheel, sdist, bundle = (tmp_path_factory.mktemp(n) for n in ("wheel", "sdist", "bundle"))
    # The wheel is built from the source archive, so the archive is shown to be complete.
    builder = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(made)]
    run([*builder, str(checkout)], made, home)
    flwr = "import sys; from flwr.cli.app import app; sys.exit(app())"
    run([sys.executable, "-c", flwr, "build", "--app", str(checkout)], made, home)
    for archive, folder in (("*.whl", wheel), ("*.fab", bundle)):
        with zipfile.ZipFile(next(made.glob(archive))) as file:
            file.extractall(folder)
    with tarfile.open(next(made.glob("*.tar.gz"))) as file:
        file.extractall(sdist, filter="data")
    return Shipped(wheel, next(sdist.iterdir()), bundle)


def test_the_wheel_holds_the_package_and_nothing_else(checkout: Path, shipped: Shipped):
    files = files_under(shipped.wheel)
    package = {file for file in files if file.startswith("metabloom/")}
    assert all(".dist-info/" in file for file in files - package), files - package
    assert package == {nested(file) for file in modules(checkout)} | {"metabloom/py.typed"}
    assert {f"metabloom/{room}/__init__.py" for room in ROOMS} <= package
    assert any(file.endswith(".dist-info/licenses/LICENSE") for file in files)


def test_the_source_archive_holds_what_a_clone_needs(checkout: Path, shipped: Shipped):
    files = files_under(shipped.sdist)
    assert modules(checkout) <= files
    assert {"README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "Makefile"} <= files
    assert {"pyproject.toml", "metabloom/py.typed", "tests/house/test_distribution.py"} <= files


def test_the_app_bundle_holds_the_five_folders_and_no_test(checkout: Path, shipped: Shipped):
    files = files_under(shipped.bundle)
    assert files == modules(checkout) | {"README.md", "pyproject.toml", ".info/CONTENT"}


@pytest.mark.parametrize("kind", ["wheel", "bundle"])
def test_every_module_imports_from_what_was_shipped(
    kind: str, checkout: Path, shipped: Shipped, tmp_path: Path
):
    folder = shipped.wheel if kind == "wheel" else shipped.bundle
    names = sorted(
        nested(file).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for file in modules(checkout)
        if not file.endswith("/__main__.py")
    )
    command = [sys.executable, "-c", IMPORT_FROM, str(folder), str(ROOT), *names]
    assert run(command, tmp_path, tmp_path) == ""
