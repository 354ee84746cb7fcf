"""Torch modules that are safe under second derivatives and per-sample gradients, by name.

A new model costs one file here: a builder under ``@register_model("name")``. A user's own nn.Module
needs no name; ``check_model`` says whether it is safe.
"""

# An import as plain `models` fails on the next line: there is no second copy.
from .. import __version__ as _v  # noqa: F401
from ..registry import discover
from ._build import MODELS, build_model, register_model
from ._check import check_layers, check_model
from .char_lstm import CharLSTM
from .cnn import FemnistCNN
from .conv4 import Conv4
from .distillation import cross_entropy, distillation_loss, kl_to, soft_cross_entropy
from .head import head_names, is_body, is_head
from .hypernetworks import GeneratedModel, Hypernetwork
from .mlp import MLP
from .mutual_distillation import MutualLosses, mutual_losses

discover(__name__, list(__path__))

__all__ = [
    "MLP",
    "MODELS",
    "CharLSTM",
    "Conv4",
    "FemnistCNN",
    "GeneratedModel",
    "Hypernetwork",
    "MutualLosses",
    "build_model",
    "check_layers",
    "check_model",
    "cross_entropy",
    "distillation_loss",
    "head_names",
    "is_body",
    "is_head",
    "kl_to",
    "mutual_losses",
    "register_model",
    "soft_cross_entropy",
]
