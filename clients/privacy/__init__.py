"""Private clients: releases by Opacus, booked in a ledger before data are touched."""

from ...ledger import PrivacyLedger
from .cohort import cohort_gradients, padded
from .config import PrivacyConfig
from .releases import Releases
from .updates import (
    PrivateMetaGradient,
    meta_events,
    private_maml_update,
    private_meta_gradient,
    private_sgd_update,
)

__all__ = [
    "PrivacyConfig",
    "PrivacyLedger",
    "PrivateMetaGradient",
    "Releases",
    "cohort_gradients",
    "meta_events",
    "padded",
    "private_maml_update",
    "private_meta_gradient",
    "private_sgd_update",
]
