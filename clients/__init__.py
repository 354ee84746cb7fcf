"""Client side: pure local updates, NumPyClients around them, and the adapter to Flower."""

from collections.abc import Callable

from .. import __version__ as _v  # noqa: F401  a plain `import clients` fails here: there is no second copy
from ..registry import Registry
from .adapter import client_app
from .data import ClientData
from .evaluation import adaptation_curve
from .learner import Learner
from .local_update import LocalResult, LocalUpdate, run_update
from .maml import MAMLClient, MetaBatch, maml_update
from .meta_gradient import MetaGradient, adapt, meta_gradient
from .privacy import PrivacyConfig, PrivacyLedger
from .sgd import SGDClient, sgd_update
from .store import ClientStore

CLIENTS: Registry[Callable[..., Learner]] = Registry("client")
CLIENTS.add("maml", MAMLClient)
CLIENTS.add("sgd", SGDClient)

__all__ = [
    "CLIENTS",
    "ClientData",
    "ClientStore",
    "Learner",
    "LocalResult",
    "LocalUpdate",
    "MAMLClient",
    "MetaBatch",
    "MetaGradient",
    "PrivacyConfig",
    "PrivacyLedger",
    "SGDClient",
    "adapt",
    "adaptation_curve",
    "client_app",
    "maml_update",
    "meta_gradient",
    "run_update",
    "sgd_update",
]
