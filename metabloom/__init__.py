"""Federated meta-learning on Flower; distillation and differential privacy are to come.

The import name and the Flower app. The four rooms ``strategies``, ``clients``, ``models`` and
``sim`` are subpackages: nested here in a wheel, beside this folder in a checkout and in an app
bundle.
"""

from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if not (_here / "strategies").is_dir():
    # A checkout or an unpacked bundle: the subpackages are this folder's neighbours.
    __path__.append(str(_here.parent))
