"""Import Opacus late, since it takes seconds, and without what it does to the process's logging."""

import logging
from functools import lru_cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any


@lru_cache(maxsize=1)
def import_opacus() -> None:
    """Import Opacus; the handler that it puts on the root logger would print every line twice."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    import opacus  # noqa: F401  the import is what is wanted

    for handler in [one for one in root.handlers if one not in handlers]:
        root.removeHandler(handler)
    root.setLevel(level)


@lru_cache(maxsize=1)
def rdp_formulas() -> Any:
    """Return Opacus' module of Renyi divergences alone: it needs no torch, its package does.

    Raises:
        ImportError: where Opacus is not installed.
    """
    package = find_spec("opacus")
    if package is None or not package.submodule_search_locations:
        raise ImportError("opacus is not installed")
    file = Path(package.submodule_search_locations[0]) / "accountants" / "analysis" / "rdp.py"
    spec = spec_from_file_location("opacus_rdp_formulas", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no module: another version of opacus is needed")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
