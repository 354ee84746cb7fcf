r"""A client of pFedHN (2103.04628) that adapts its embedding alone, the hypernetwork as it is.

    theta(v) = base + h_phi(v)
    v <- v - alpha * grad_v L_support(theta(v))         every adaptation step

Training is that of ``SGDClient``: it gets a model and sends a model back. An evaluation message
holds phi (``base/NAME``, ``network/NAME``) and an embedding: the client's own where it has trained,
else the mean of those that have. The embedding that it comes to, and what led there, stay here.

The paper fits a new client's embedding by exchanges with a server that keeps phi to itself; with
one local step each, they are these gradient steps.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import ConfigError, WireError
from ..models.hypernetworks import (
    SENT_BASE,
    SENT_EMBEDDING,
    SENT_NETWORK,
    Hypernetwork,
    is_generated,
)
from .data import ClientData
from .evaluation import Advance
from .learner import Config, NDArrays
from .objective import Params, objective
from .sgd import SGDClient


class EmbeddingClient(SGDClient):
    """A Flower NumPyClient that trains by SGD and is evaluated by fitting an embedding.

    Args:
        model: see ``Learner``.
        data: see ``Learner``.
        embedding_size: numbers of an embedding, as the server's.
        width: of the hypernetwork's hidden layers, as the server's.
        sgd: keyword arguments of ``SGDClient``; ``inner_lr`` is the rate of the embedding's steps.

    Raises:
        ConfigError: where a value is out of range, naming it; with ``adapt``, which names
            parameters, and none of them is adapted.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ClientData | Callable[[], ClientData],
        *,
        embedding_size: int = 32,
        width: int = 128,
        **sgd: Any,
    ) -> None:
        super().__init__(model, data, **sgd)
        if self.adapted is not None:
            raise ConfigError(
                "adapt with EmbeddingClient: it adapts the embedding, and no parameter by itself"
            )
        shapes = {
            name: tuple(value.shape)
            for name, value in model.state_dict().items()
            if is_generated(name, is_floating=value.is_floating_point())
        }
        with torch.device("meta"):  # its weights are received
            network = Hypernetwork(shapes, embedding_size=embedding_size, width=width)
        self.network = network
        self._network_names = tuple(name for name, _ in network.named_parameters())
        self.evaluated_names = (
            *(f"{SENT_BASE}{name}" for name in self.array_names),
            *(f"{SENT_NETWORK}{name}" for name in self._network_names),
            SENT_EMBEDDING,
        )
        self._weights: Params = {}
        self._base: Params = {}
        self._embedding = torch.zeros(embedding_size)

    def evaluate(self, parameters: NDArrays, config: Config) -> tuple[float, int, Config]:
        """Return (query loss after the most steps, number of query records, adaptation curve).

        Args:
            parameters: phi and an embedding, in the order of ``evaluated_names``.
            config: see ``Learner``.

        Raises:
            WireError: where they are not those of this client's model.
        """
        if len(parameters) != len(self.evaluated_names):
            raise WireError(
                f"client {self.name!r} received {len(parameters)} arrays to be evaluated with, the "
                f"hypernetwork of its model has {len(self.evaluated_names)} with the embedding: "
                "both ends must have the same hypernetwork-adapts, -width and embedding-size"
            )
        held = dict(zip(self.evaluated_names, parameters, strict=True))
        wanted = {SENT_EMBEDDING: self._embedding.shape} | {
            f"{SENT_NETWORK}{name}": value.shape for name, value in self.network.named_parameters()
        }
        for name, shape in wanted.items():
            if held[name].shape != tuple(shape):
                raise WireError(
                    f"client {self.name!r} received {name!r} of shape {held[name].shape}, its own "
                    f"is {tuple(shape)}: both ends must have the same hypernetwork-width and "
                    "embedding-size"
                )
        self._weights = {n: self._on(held[f"{SENT_NETWORK}{n}"]) for n in self._network_names}
        base = {name: self._on(held[f"{SENT_BASE}{name}"]) for name in self.array_names}
        self._base = {name: base[name] for name in self.network.shapes}
        self._embedding = self._on(held[SENT_EMBEDDING])
        with torch.no_grad():
            theta = {**base, **self._made(self._embedding)}
        return super().evaluate([theta[name].cpu().numpy() for name in self.array_names], config)

    def adaptation(self, params: Params, config: Config | None = None) -> tuple[Params, Advance]:
        """Return the model of the embedding received, and gradient steps of that embedding."""
        del config
        support, loss = self.data.support, objective(self.model, self.loss_fn)
        v = self._embedding

        def advance(point: Params, steps: int) -> Params:
            nonlocal v
            del point  # that of v
            for _ in range(steps):
                v = v.detach().requires_grad_()
                theta = self._made(v)
                value = loss({name: theta.get(name, params[name]) for name in params}, support)
                (slope,) = torch.autograd.grad(value, [v], materialize_grads=True)
                v = (v - self.inner_lr * slope).detach()
            with torch.no_grad():
                theta = self._made(v)
            return {name: theta.get(name, value) for name, value in params.items()}

        return params, advance

    def _made(self, embedding: Tensor) -> Params:
        """Return the generated parameters of an embedding."""
        added: Params = functional_call(self.network, self._weights, (embedding,))
        return {name: self._base[name] + value for name, value in added.items()}

    def _on(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self.device)
