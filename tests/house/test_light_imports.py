"""A deployed client starts a fresh process for each message: what it imports, it pays each time.

docs/production.md tells what a message costs.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {  # and no need of a client before it knows its data set and its algorithm
    "PIL",
    "datasets",
    "flwr_datasets",
    "matplotlib",
    "opacus",
    "pandas",
    "plotly",
    "pyarrow",
    "ray",
    "scipy",
    "seaborn",
    "sklearn",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torchvision",
}


def heavy_modules_of(statement: str) -> set[str]:
    """Return which heavy modules a fresh Python has loaded after ``statement``."""
    program = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return HEAVY & set(done.stdout.split())


def test_the_client_app_imports_no_heavy_module_beyond_torch_and_flower():
    assert heavy_modules_of("import metabloom.client_app") == set()


def test_a_heavy_module_is_found():
    assert "plotly" in heavy_modules_of("import plotly")
