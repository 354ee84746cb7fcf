"""Clients that keep a part of their model, and an oracle of what they do by plain autograd."""

import numpy as np
import torch
from torch import nn

from metabloom.clients import PartClient
from tests.clients.small_clients import client, context, net
from tests.clients.toy_problems import client_data, loss_at

CROSS_ENTROPY = nn.functional.cross_entropy
F32 = {"rtol": 1e-5, "atol": 1e-6}  # the same steps by another path, in float32
NAMES = ("body.weight", "body.bias", "head.weight", "head.bias")

FEDPER = {"kept": "head", "trained": "all"}
FEDREP = {"kept": "head", "trained": "in-turn"}
LG = {"kept": "body", "trained": "all"}
FEDBABU = {"kept": "head", "trained": "shared"}
METHODS = {"fedper": FEDPER, "fedrep": FEDREP, "lg-fedavg": LG, "fedbabu": FEDBABU}


def of(method, place=None, **options):
    return client(PartClient, context=place or context(), local_lr=0.3, **method, **options)


def shared(own: PartClient, arrays) -> dict[str, np.ndarray]:
    """Return the shared part of a whole model's arrays, by name."""
    return {n: a for n, a in zip(own.array_names, arrays, strict=True) if own.shared(n)}


def kept(own: PartClient, config=None) -> dict[str, np.ndarray]:
    held = own.own.after(config or {}, "cpu")
    return {name: value.numpy() for name, value in held.items()}


def named(arrays) -> dict[str, torch.Tensor]:
    return {n: torch.from_numpy(np.array(a)) for n, a in zip(NAMES, arrays, strict=True)}


def steps(params, moves, *, lr=0.3, epochs=1, data=None):
    """The oracle: full-batch steps of plain autograd on the parameters that ``moves`` names."""
    inputs = (data or client_data()).all
    for _ in range(epochs):
        leaves = {n: v.clone().requires_grad_(moves(n)) for n, v in params.items()}
        own = [value for value in leaves.values() if value.requires_grad]
        found = iter(torch.autograd.grad(loss_at(net(), CROSS_ENTROPY, leaves, inputs), own))
        params = {
            n: (v.detach() - lr * next(found)) if v.requires_grad else v for n, v in leaves.items()
        }
    return params


def is_head(name: str) -> bool:
    return name.startswith("head")


def is_body(name: str) -> bool:
    return not is_head(name)


def after_round(method, params, epochs=1, head_epochs=1):
    """Return the whole model after a round of the method, by the oracle."""
    if method["trained"] == "all":
        return steps(params, lambda name: True, epochs=epochs)
    if method["trained"] == "in-turn":
        params = steps(params, is_head, epochs=head_epochs)
    return steps(params, is_body, epochs=epochs)


def assert_close(found, wanted):
    assert set(found) == set(wanted)
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name], **F32, err_msg=name)


def kept_of(own, params):
    return {name: value for name, value in params.items() if own.kept(name)}
