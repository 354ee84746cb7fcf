"""Federations of real data, and the simulator that runs a strategy on them."""

from .. import __version__ as _v  # noqa: F401  an import as plain `sim` fails here: there is no second copy
from ..public import PublicData, check_agrees, fingerprint_of, held_out_rows
from ..registry import discover as _discover
from . import datasets as _datasets
from .federation import (
    DATASETS,
    DataSpec,
    Federation,
    Records,
    Role,
    Split,
    dataset_spec,
    federate,
    load_federation,
    register_dataset,
)
from .grid import CohortGrid
from .public_sources import load_public

_discover(_datasets.__name__, list(_datasets.__path__))

__all__ = [
    "DATASETS",
    "CohortGrid",
    "DataSpec",
    "Federation",
    "PublicData",
    "Records",
    "Role",
    "Split",
    "check_agrees",
    "dataset_spec",
    "federate",
    "fingerprint_of",
    "held_out_rows",
    "load_federation",
    "load_public",
    "register_dataset",
]
