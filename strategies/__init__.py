"""Server side: one algorithm a file, each a pure rule inside one shared Flower shell."""

from .. import __version__ as _v  # noqa: F401  a plain `import strategies` fails here: there is no second copy
from ..registry import discover
from .aggregation import median, multi_krum, trimmed_mean
from .anil import ANIL
from .autoregressive import Autoregressive
from .boil import BOIL
from .distilled import Distillation
from .ditto import Ditto
from .ds_fl import DSFL
from .fedavg import FedAvg
from .fedbabu import FedBABU
from .feddf import FedDF
from .fedkd import FedKD
from .fedmd import FedMD
from .fedmeta import FedMeta
from .fednova import FedNova
from .fedopt import FedOpt
from .fedper import FedPer
from .fedprox import FedProx
from .fedrep import FedRep
from .group_maml import GroupMAML
from .group_reptile import GroupReptile
from .lg_fedavg import LGFedAvg
from .meta_sgd import MetaSGD
from .meta_teacher import MetaTeacher
from .per_fedavg import PerFedAvg
from .pfedhn import PFedHN
from .pfedme import PFedMe
from .recipe import STRATEGIES, Recipe
from .reptile import Reptile
from .rules import Aggregation, Reply, Rule, interpolate, mean, server_optimizer
from .scaffold import SCAFFOLD
from .shell import RuleStrategy
from .shell.checkpoint import Checkpoints
from .shell.ending import Ending
from .shell.firewall import Firewall
from .shell.guard import guard
from .shell.reports import ClientScore, RoundReport, RunResult
from .shell.user_account import UserLevelSpent
from .teacher_student import TeacherStudent
from .user_level import UserLevelPrivacy, with_user_privacy

discover(__name__, __path__)

__all__ = [
    "ANIL",
    "BOIL",
    "DSFL",
    "SCAFFOLD",
    "STRATEGIES",
    "Aggregation",
    "Autoregressive",
    "Checkpoints",
    "ClientScore",
    "Distillation",
    "Ditto",
    "Ending",
    "FedAvg",
    "FedBABU",
    "FedDF",
    "FedKD",
    "FedMD",
    "FedMeta",
    "FedNova",
    "FedOpt",
    "FedPer",
    "FedProx",
    "FedRep",
    "Firewall",
    "GroupMAML",
    "GroupReptile",
    "LGFedAvg",
    "MetaSGD",
    "MetaTeacher",
    "PFedHN",
    "PFedMe",
    "PerFedAvg",
    "Recipe",
    "Reply",
    "Reptile",
    "RoundReport",
    "Rule",
    "RuleStrategy",
    "RunResult",
    "TeacherStudent",
    "UserLevelPrivacy",
    "UserLevelSpent",
    "guard",
    "interpolate",
    "mean",
    "median",
    "multi_krum",
    "server_optimizer",
    "trimmed_mean",
    "with_user_privacy",
]
