"""Make ``.types/metabloom``: links that nest the rooms as a wheel does, for type checkers.

A type checker does not run ``metabloom/__init__.py``, so it does not see that the rooms beside
that folder are its subpackages. ``python tests/house/types_tree.py`` may run any number of times.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("strategies", "clients", "models", "sim")


def wanted_links(root: Path) -> dict[str, Path]:
    """Return what ``.types/metabloom`` must hold: each entry of the app's folder, and each room."""
    entries = [path for path in (root / "metabloom").iterdir() if path.name != "__pycache__"]
    return {path.name: path for path in [*entries, *(root / room for room in ROOMS)]}


def make_types_tree(root: Path) -> Path:
    """Bring ``.types/metabloom`` under ``root`` up to date and return ``.types``."""
    tree = root / ".types" / "metabloom"
    tree.mkdir(parents=True, exist_ok=True)
    wanted = {name: os.path.relpath(path, tree) for name, path in wanted_links(root).items()}
    for link in tree.iterdir():
        if not link.is_symlink() or wanted.get(link.name) != os.readlink(link):
            link.unlink()
    for name, target in wanted.items():
        if not (tree / name).is_symlink():
            (tree / name).symlink_to(target)
    return tree.parent


if __name__ == "__main__":
    make_types_tree(ROOT)
