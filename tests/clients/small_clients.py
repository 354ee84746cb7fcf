"""Clients with a tiny model and a few records, for the tests of what they answer."""

import numpy as np
import torch
from flwr.app import Context, RecordDict

from tests.clients.toy_problems import (
    client_data,
    small_net,
)


def net(seed: int = 0):
    return small_net(seed, dtype=torch.float32)


def context():
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})


def client(kind, **options):
    model = options.pop("model", None) or net()
    data = options.pop("data", None) or client_data()
    return kind(model, data, **{"name": "anna", "inner_lr": 0.4} | options)


def arrays_of(model):
    return [value.numpy().copy() for value in model.state_dict().values()]


def fit(kind, *, config=None, **options):
    own = client(kind, **options)
    return own.fit(own.get_parameters({}), config or {})


def same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))
