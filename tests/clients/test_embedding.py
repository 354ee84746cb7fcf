"""A client that fits an embedding: gradient steps of v alone, against finite differences."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from metabloom.clients import EmbeddingClient, SGDClient
from metabloom.clients.evaluation import score
from metabloom.errors import ConfigError, WireError
from metabloom.models import Hypernetwork
from tests.clients.cohorts import CONFIG
from tests.clients.small_clients import arrays_of, same
from tests.clients.toy_problems import (
    Shifted,
    client_data,
    initialised,
    loss_at,
    slope,
    small_net,
    weights,
)

CROSS_ENTROPY = nn.functional.cross_entropy
SIZES = {"embedding_size": 3, "width": 6}


def client(model: nn.Module | None = None, **options) -> EmbeddingClient:
    data = client_data(dtype=torch.float64)
    return EmbeddingClient(model or small_net(), data, **{"name": "anna", **SIZES} | options)


def phi_of(model: nn.Module) -> tuple[Hypernetwork, np.ndarray, list[np.ndarray]]:
    """Return a hypernetwork for ``model``, an embedding, and what a message holds of both."""
    shapes = {name: value.shape for name, value in model.state_dict().items() if value.ndim}
    network = initialised(Hypernetwork(shapes, **SIZES).double(), 3)
    v = np.array([0.3, -0.8, 1.1])
    arrays = [p.detach().numpy() for p in network.parameters()]
    return network, v, [*arrays_of(model), *arrays, v]


def theta(model: nn.Module, network: Hypernetwork, v: torch.Tensor) -> dict[str, torch.Tensor]:
    added = functional_call(network, weights(network), (v,))
    return {name: value + added[name] for name, value in weights(model).items()}


def test_it_trains_as_sgd_does_and_never_sees_the_hypernetwork():
    sent = arrays_of(small_net())
    options = {"local_lr": 0.2, "local_epochs": 2, "batch_size": 4}
    data = client_data(dtype=torch.float64)
    plain = SGDClient(small_net(), data, name="anna", **options).fit(sent, CONFIG)
    own = client(**options).fit(sent, CONFIG)
    assert same(own[0], plain[0])
    assert own[1:] == plain[1:]


def test_the_curve_is_that_of_gradient_steps_on_the_embedding_alone():
    model = small_net()
    network, v, sent = phi_of(model)
    own = client(model, eval_steps=(1, 3), inner_lr=0.4)
    before = [value.copy() for value in sent]
    _, _, curve = own.evaluate(sent, CONFIG)
    assert same(sent, before)

    def support_loss(at: torch.Tensor) -> float:
        return loss_at(model, CROSS_ENTROPY, theta(model, network, at), own.data.support).item()

    at, losses = torch.from_numpy(v), []
    for _ in range(4):
        found, _ = score(model, CROSS_ENTROPY, theta(model, network, at), own.data.query)
        losses.append(found)
        with torch.no_grad():  # the oracle: central differences, one coordinate after another
            steps = [
                slope(lambda h, at=at, e=e: support_loss(at + h * e), 1e-3) for e in torch.eye(3)
            ]
        at = at - 0.4 * torch.tensor(steps, dtype=torch.float64)
    told = [curve[f"loss-{when}"] for when in ("before", "after-1", "after-3")]
    # Five points are 1e-10 off in a slope, and three steps carry that on.
    assert told == pytest.approx([losses[0], losses[1], losses[3]], rel=1e-7)
    assert len(set(told)) == 3


def test_buffers_are_received_and_not_generated():
    model = initialised(Shifted()).double()
    model.seen.fill_(5)
    shapes = {n: v.shape for n, v in model.state_dict().items() if v.is_floating_point()}
    network = Hypernetwork(shapes, **SIZES).double()  # it adds nothing yet
    other = Shifted().double()
    own = client(other, eval_steps=(1,))
    sent = [*arrays_of(model), *(p.detach().numpy() for p in network.parameters()), np.ones(3)]
    _, _, curve = own.evaluate(sent, CONFIG)
    wanted, _ = score(model, CROSS_ENTROPY, weights(model), own.data.query)
    assert curve["loss-before"] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sent: sent[:-1], "received .* arrays to be evaluated with"),
        (lambda sent: [*sent[:-1], np.zeros(4)], "'embedding' of shape .4,., its own is .3,."),
        (lambda sent: [*sent[:-3], sent[-3][:, :2], *sent[-2:]], "both ends must have the same"),
    ],
)
def test_another_hypernetwork_is_refused_by_name(change, message: str):
    model = small_net()
    with pytest.raises(WireError, match=message):
        client(model).evaluate(change(phi_of(model)[2]), CONFIG)


def test_parameters_cannot_be_adapted_one_by_one():
    with pytest.raises(ConfigError, match="adapts the embedding"):
        client(adapt=lambda name: True)
