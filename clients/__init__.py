"""Client side: pure local updates, NumPyClients around them, and the adapter to Flower."""

from collections.abc import Callable

from .. import __version__ as _v  # noqa: F401  a plain `import clients` fails here: there is no second copy
from ..registry import Registry
from .adapter import client_app
from .data import ClientData
from .embedding import EmbeddingClient
from .evaluation import adaptation_curve
from .fedkd import FedKDClient, mutual_update
from .fednova import NovaClient, nova_update
from .generator import GeneratorClient, generator_update
from .groups import GroupMAMLClient, GroupSGDClient
from .learner import Learner
from .local_update import LocalResult, LocalUpdate, run_update
from .logits import LogitsClient
from .maml import MAMLClient, MetaBatch, maml_update
from .meta_gradient import MetaGradient, adapt, meta_gradient
from .meta_sgd import MetaSGDClient, meta_sgd_update
from .meta_teacher import MetaTeacherClient, teach
from .part import PartClient
from .pfedme import PFedMeClient, pfedme_update
from .privacy import PrivacyConfig, PrivacyLedger
from .scaffold import ScaffoldClient, corrected_update
from .sgd import SGDClient, sgd_update
from .store import ClientStore
from .taught import TaughtClient

CLIENTS: Registry[Callable[..., Learner]] = Registry("client")
CLIENTS.add("embedding", EmbeddingClient)
CLIENTS.add("fedkd", FedKDClient)
CLIENTS.add("fednova", NovaClient)
CLIENTS.add("group-maml", GroupMAMLClient)
CLIENTS.add("group-sgd", GroupSGDClient)
CLIENTS.add("generator", GeneratorClient)
CLIENTS.add("logits", LogitsClient)
CLIENTS.add("maml", MAMLClient)
CLIENTS.add("meta-sgd", MetaSGDClient)
CLIENTS.add("meta-teacher", MetaTeacherClient)
CLIENTS.add("part", PartClient)
CLIENTS.add("pfedme", PFedMeClient)
CLIENTS.add("scaffold", ScaffoldClient)
CLIENTS.add("sgd", SGDClient)
CLIENTS.add("taught", TaughtClient)

__all__ = [
    "CLIENTS",
    "ClientData",
    "ClientStore",
    "EmbeddingClient",
    "FedKDClient",
    "GeneratorClient",
    "GroupMAMLClient",
    "GroupSGDClient",
    "Learner",
    "LocalResult",
    "LocalUpdate",
    "LogitsClient",
    "MAMLClient",
    "MetaBatch",
    "MetaGradient",
    "MetaSGDClient",
    "MetaTeacherClient",
    "NovaClient",
    "PFedMeClient",
    "PartClient",
    "PrivacyConfig",
    "PrivacyLedger",
    "SGDClient",
    "ScaffoldClient",
    "TaughtClient",
    "adapt",
    "adaptation_curve",
    "client_app",
    "corrected_update",
    "generator_update",
    "maml_update",
    "meta_gradient",
    "meta_sgd_update",
    "mutual_update",
    "nova_update",
    "pfedme_update",
    "run_update",
    "sgd_update",
    "teach",
]
