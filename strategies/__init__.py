"""Server side: one algorithm a file, each a pure rule inside one shared Flower shell."""

from .. import __version__ as _v  # noqa: F401  a plain `import strategies` fails here: there is no second copy
from ..registry import discover
from .aggregation import median, multi_krum, trimmed_mean
from .checkpoint import Checkpoints
from .ditto import Ditto
from .fedavg import FedAvg
from .fedmeta import FedMeta
from .fedprox import FedProx
from .firewall import Firewall
from .guard import guard
from .per_fedavg import PerFedAvg
from .recipe import STRATEGIES, Recipe
from .reports import ClientScore, RoundReport, RunResult
from .reptile import Reptile
from .rules import Aggregation, Reply, Rule, interpolate, mean, server_optimizer
from .shell import RuleStrategy

discover(__name__, __path__)

__all__ = [
    "STRATEGIES",
    "Aggregation",
    "Checkpoints",
    "ClientScore",
    "Ditto",
    "FedAvg",
    "FedMeta",
    "FedProx",
    "Firewall",
    "PerFedAvg",
    "Recipe",
    "Reply",
    "Reptile",
    "RoundReport",
    "Rule",
    "RuleStrategy",
    "RunResult",
    "guard",
    "interpolate",
    "mean",
    "median",
    "multi_krum",
    "server_optimizer",
    "trimmed_mean",
]
