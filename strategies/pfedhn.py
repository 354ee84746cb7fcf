r"""pFedHN (Shamsian, Navon, Fetaya, Chechik, 2103.04628): a hypernetwork that makes each model.

    theta_i = base + h_phi(v_i)                        sent to client i, v_i its embedding
    theta~_i                                           after K steps of local SGD, sent back
    Delta_i = theta_i - theta~_i
    g_phi_i = (d theta_i / d phi)^T Delta_i            the vector-Jacobian products
    g_v_i   = (d theta_i / d v_i)^T Delta_i
    (phi, base) <- (phi, base) - Optimiser(sum_i q_i (g_phi_i, Delta_i))
    v_i         <- v_i - Optimiser_i(g_v_i)            of the clients of the round alone

Clients share what they learn in phi and base; what is one client's own is the few numbers of its
embedding. The server keeps all of it: a client is sent its own model and nothing else, so that any
client works, also one that knows nothing of this.

A round is one pure function of a state: the phi by which replies are judged is that by which models
were made. Each embedding has an optimiser of its own, which steps when its client answers: momentum
and weight decay move no other embedding. It begins at random, by the client's name.

A client that never trained has no embedding. It is sent the model of the mean embedding, which is
also the model that a run leaves, and adapts that by gradient steps as under any strategy; or, with
``hypernetwork-adapts = "embedding"``, it is sent phi and that embedding and fits the embedding
alone, phi as it is (``clients/embedding.py``). The paper fits it by exchanges with the server,
which keeps phi to itself; with one local step each, they are the same gradient steps.

Differences from the paper: h is zero at first, so that a run begins with the given model (the
paper's is random); several clients a round, whose products are averaged, and any ``aggregation`` of
them; large layers come in chunks (``models/hypernetworks.py``). With ``architectures`` each has a
hypernetwork of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from ..config import RunConfig
from ..errors import ConfigError, MetabloomError, unknown_name
from ..execution import on_one_thread
from ..models.hypernetworks import SENT_BASE as BASE
from ..models.hypernetworks import SENT_EMBEDDING as EMBEDDING
from ..models.hypernetworks import SENT_NETWORK as NETWORK
from ..models.hypernetworks import Hypernetwork, is_generated
from ..streams import numpy_stream, torch_seeded
from ..wire import NamedArrays
from .fedavg import local_sgd
from .fedmeta import optimizer_of
from .recipe import STRATEGIES, Recipe, aggregation_of, weighting_of
from .rules import (
    Aggregation,
    Arrays,
    OptimizerFactory,
    Reply,
    Rule,
    State,
    Weighting,
    is_floating,
    mean,
    server_optimizer,
)
from .shell import RuleStrategy
from .shell.personal import PersonalModels
from .shell.roll_call import Node

Adapts = Literal["model", "embedding"]
Params = dict[str, Tensor]
Make = Callable[[Mapping[str, Tensor], Tensor], Params]  # (phi, v) -> theta


# --- the mathematics ------------------------------------------------------------------------------


def pulled_back(
    make: Make, phi: Mapping[str, Tensor], embedding: Tensor, delta: Mapping[str, Tensor]
) -> tuple[Params, Tensor]:
    """Return ((d theta / d phi)^T Delta, (d theta / d v)^T Delta) for theta = make(phi, v).

    Args:
        make: of the model.
        phi: of the hypernetwork.
        embedding: v, (d,).
        delta: theta - theta~, by the names of theta.

    >>> made = lambda phi, v: {"theta": phi["W"] @ v}
    >>> phi, v = {"W": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}, torch.ones(2)
    >>> found, own = pulled_back(made, phi, v, {"theta": torch.tensor([0.1, 0.2])})
    >>> found["W"], own
    (tensor([[0.1000, 0.1000],
            [0.2000, 0.2000]]), tensor([0.1000, 0.4000]))
    """
    leaves = {name: value.detach().requires_grad_() for name, value in phi.items()}
    own = embedding.detach().requires_grad_()
    with torch.enable_grad():
        theta = make(leaves, own)
    names = list(theta)
    *found, of_embedding = torch.autograd.grad(
        [theta[name] for name in names],
        [*leaves.values(), own],
        [delta[name] for name in names],
        materialize_grads=True,
    )
    return dict(zip(leaves, found, strict=True)), of_embedding


def hypernetwork_rule(
    factory: OptimizerFactory,
    *,
    embedding_size: int = 32,
    width: int = 128,
    weighting: Weighting = "uniform",
    aggregate: Aggregation = mean,
    seed: int = 0,
) -> Rule:
    """Return pFedHN's rule; see the module's text.

    Its state: "phi", the arrays of the base model (``base/NAME``) and of the hypernetwork
    (``network/NAME``); "optimizer" of phi; "clients", by name, each with its "embedding" and the
    "optimizer" of that. Its arrays are those of the model of the mean embedding.

    It computes in float64, on one thread, so that no sum depends on the machine's cores.

    Args:
        factory: as for ``server_optimizer``; of phi, and of each embedding by itself.
        embedding_size: numbers of an embedding.
        width: of the hypernetwork's hidden layers.
        weighting: q_i, "uniform" or by "examples".
        aggregate: how the clients' products become one.
        seed: of the hypernetwork and of embeddings.
    """
    shared = server_optimizer(factory, weighting=weighting, aggregate=aggregate)
    alone = server_optimizer(factory)

    def init(arrays: NamedArrays) -> State:
        with torch_seeded(seed, "hypernetwork"):
            network = network_of(arrays, embedding_size, width)
        phi = {
            **{f"{BASE}{name}": value for name, value in arrays.items()},
            **{f"{NETWORK}{n}": p.detach().numpy().copy() for n, p in network.named_parameters()},
        }
        return {"phi": phi, "optimizer": {}, "clients": {}}

    def update(state: State, sent: NamedArrays, replies: Sequence[Reply]) -> tuple[State, Arrays]:
        phi, clients, pulled = state["phi"], dict(state["clients"]), []
        with on_one_thread():
            make, weights = _maker(phi, sent, embedding_size, width)
            for reply in replies:
                own = clients.get(reply.client) or newcomer(seed, reply.client, embedding_size)
                theta = model_of(phi, sent, own["embedding"], width)
                delta = {
                    name: _as_tensor(theta[name].astype(np.float64) - reply.arrays[name])
                    for name in _generated(sent)
                }
                slopes, slope = pulled_back(make, weights, _as_tensor(own["embedding"]), delta)
                pulled.append(_about_phi(phi, reply, delta, slopes))
                clients[reply.client] = _stepped(alone, own, slope)
            optimizer, phi = shared.update(state["optimizer"], phi, pulled)
            new = model_of(phi, sent, middle(clients, embedding_size), width)
        return {"phi": phi, "optimizer": optimizer, "clients": clients}, new

    return Rule(init, update)


def network_of(arrays: NamedArrays, embedding_size: int, width: int) -> Hypernetwork:
    """Return a hypernetwork for the arrays that it generates: floating ones, no statistics."""
    shapes = {name: arrays[name].shape for name in _generated(arrays)}
    return Hypernetwork(shapes, embedding_size=embedding_size, width=width)


def model_of(phi: NamedArrays, like: NamedArrays, embedding: np.ndarray, width: int) -> Arrays:
    """Return the model of an embedding, in the names, order and dtypes of ``like``."""
    make, weights = _maker(phi, like, len(embedding), width)
    with torch.no_grad():
        added = make(weights, _as_tensor(embedding))
    base = {name: phi[f"{BASE}{name}"] for name in like}
    return {
        name: np.asarray(base[name] + added[name].numpy(), dtype=value.dtype)
        if name in added
        else np.asarray(base[name])
        for name, value in like.items()
    }


def newcomer(seed: int, client: str, embedding_size: int) -> dict[str, Any]:
    """Return what the rule keeps of a client before its first reply: v ~ N(0, 1), by its name.

    Raises:
        MetabloomError: where it has no name.
    """
    if not client:
        raise MetabloomError(
            "a reply without the name of its client: pFedHN has an embedding for each, and runs "
            "under its own strategy PFedHN, which names them"
        )
    drawn = numpy_stream(seed, "embedding", client).standard_normal(embedding_size)
    return {"embedding": drawn.astype(np.float32), "optimizer": {}}


def middle(clients: Mapping[str, Mapping[str, Any]], embedding_size: int) -> np.ndarray:
    """Return the mean embedding of the clients that have one; zeros where none has."""
    held = [one["embedding"] for _, one in sorted(clients.items())] or [np.zeros(embedding_size)]
    return np.asarray(np.mean(held, axis=0, dtype=np.float64), dtype=np.float32)


def _maker(
    phi: NamedArrays, like: NamedArrays, embedding_size: int, width: int
) -> tuple[Make, Params]:
    """Return (weights, v) -> what is added to the base model, and phi's weights in float64."""
    with torch.device("meta"):  # its shape alone: the weights are phi's
        network = network_of(like, embedding_size, width)

    def make(weights: Mapping[str, Tensor], embedding: Tensor) -> Params:
        made: Params = functional_call(network, dict(weights), (embedding,))
        return made

    held = [name for name in phi if name.startswith(NETWORK)]
    return make, {name.removeprefix(NETWORK): _as_tensor(phi[name]) for name in held}


def _about_phi(
    phi: NamedArrays, reply: Reply, delta: Mapping[str, Tensor], slopes: Mapping[str, Tensor]
) -> Reply:
    """Return phi as it would be after a step of rate 1 for this client alone."""
    arrays = {f"{BASE}{name}": value for name, value in reply.arrays.items()}
    for prefix, steps in ((BASE, delta), (NETWORK, slopes)):
        for name, step in steps.items():
            full = f"{prefix}{name}"
            arrays[full] = np.asarray(phi[full] - step.numpy())
    return Reply(arrays, reply.num_examples)


def _stepped(rule: Rule, own: Mapping[str, Any], slope: Tensor) -> dict[str, Any]:
    """Return what is kept of a client after a step of its embedding."""
    before = {EMBEDDING: own["embedding"]}
    goal = {EMBEDDING: own["embedding"] - slope.numpy()}
    optimizer, after = rule.update(own["optimizer"], before, [Reply(goal, 1)])
    return {"embedding": after[EMBEDDING], "optimizer": optimizer}


def _as_tensor(value: Any) -> Tensor:
    return torch.from_numpy(np.array(value, dtype=np.float64))


def _generated(arrays: NamedArrays) -> list[str]:
    return [n for n, value in arrays.items() if is_generated(n, is_floating=is_floating(value))]


# --- the strategy ---------------------------------------------------------------------------------


class PFedHN(RuleStrategy):
    """Send each client a model of its own, made by a hypernetwork from its embedding.

    After the last round the training clients score their own models (``RunResult.trained``).

    Args:
        optimizer: of phi and of embeddings: a name in ``OPTIMIZERS``, or ``factory(parameters)``.
        lr: its learning rate, > 0; not used with a factory.
        embedding_size: numbers of a client's embedding, >= 1.
        width: of the hypernetwork's hidden layers, >= 1.
        adapts: what a client adapts when it is evaluated: its "model"; or its "embedding" alone,
            for which it is sent phi, and must be an ``EmbeddingClient``.
        weighting: "uniform" (q_i = 1/n) or "examples".
        aggregate: how the clients' products become one: ``mean``, ``median()``, ...
        shell: see ``RuleStrategy``.

    Raises:
        ConfigError: where a value is out of range, naming it, or with ``user_privacy``.
    """

    scores_training_clients = True

    def __init__(
        self,
        *,
        optimizer: str | OptimizerFactory = "adam",
        lr: float = 0.01,
        embedding_size: int = 32,
        width: int = 128,
        adapts: Adapts = "model",
        weighting: Weighting = "uniform",
        aggregate: Aggregation = mean,
        **shell: Any,
    ) -> None:
        if shell.get("user_privacy") is not None:
            raise ConfigError(
                "user_privacy with PFedHN: its noise is made for one sum over all clients, and "
                "each embedding is moved by one client alone; privacy.* trains clients privately"
            )
        for name, count in (("embedding_size", embedding_size), ("width", width)):
            if not (isinstance(count, int) and count >= 1):
                raise ConfigError(f"{name} = {count!r}: must be a whole number of at least 1")
        if adapts not in get_args(Adapts):
            raise unknown_name("value of adapts", adapts, get_args(Adapts))
        factory = optimizer_of(optimizer, lr) if isinstance(optimizer, str) else optimizer
        rule = hypernetwork_rule(
            factory,
            embedding_size=embedding_size,
            width=width,
            weighting=weighting,
            aggregate=aggregate,
            seed=shell.get("seed", 0),
        )
        super().__init__(rule, **shell)
        self._kinds = PersonalModels(self._kinds.names, model_of=self._sent_to)
        self.optimizer = optimizer
        self.lr = lr
        self.embedding_size = embedding_size
        self.width = width
        self.adapts = adapts
        self.weighting = weighting

    def _sent_to(self, arrays: NamedArrays, node: Node, is_training: bool) -> NamedArrays:
        """Return what a node is sent, where ``arrays`` are the model of the mean embedding."""
        if self._state is None:
            self._state = self.rule.init(self._arrays)
        held = self._state[node.architecture] if self._kinds.names else self._state
        own = held["clients"].get(node.name)
        if is_training:
            own = own or newcomer(self.seed, node.name, self.embedding_size)
        elif self.adapts == "embedding":
            known = middle(held["clients"], self.embedding_size)
            return {**held["phi"], EMBEDDING: own["embedding"] if own else known}
        if own is None:
            return arrays
        with on_one_thread():
            return model_of(held["phi"], arrays, own["embedding"], self.width)


@STRATEGIES.register("pfedhn")
def recipe(config: RunConfig) -> Recipe:
    """A hypernetwork on the server makes a model for each client, from the client's embedding."""
    sizes = {"embedding_size": config.embedding_size, "width": config.hypernetwork_width}
    fits = config.hypernetwork_adapts == "embedding"
    return Recipe(
        strategy=partial(
            PFedHN,
            optimizer=config.server_optimizer,
            lr=config.outer_lr or 0.01,
            adapts=config.hypernetwork_adapts,
            weighting=weighting_of(config, "uniform"),
            aggregate=aggregation_of(config),
            **sizes,
        ),
        client="embedding" if fits else "sgd",
        client_options={**local_sgd(config), **(sizes if fits else {})},
    )
