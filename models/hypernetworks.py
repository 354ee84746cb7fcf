r"""Networks that generate the parameters of another network, layer by layer.

A layer is what one module of the other network owns: its weight and its bias, as one vector. Large
layers come in chunks, so that a generator does not grow with the layer: the n numbers of a layer
are m chunks of k = ceil(n / m) numbers each, and every chunk has a learnt place e_j,

    theta_j = W (s o e_j),    W (k, d),  s and e_j (d,)                       ``ParameterHead``

Autoregressive generator, from a set of labelled records (nearest published: HyperTransformer,
2201.04182, where a transformer has the place of set encoder and state):

    z       = mean over the support set of psi(x, y),   psi(x, y) = f(x) o B y
    s_0     = z
    theta_l = base_l + U_l(s_{l-1})                     ``ParameterHead``; zero at first
    s_l     = GRU(s_{l-1}, E_l(theta_l))                ``GRU``, ``ParameterReader``

Nothing is detached: what layer l costs the layers after it reaches everything that made it. Since
U_l is zero at first, the first generated model is the base model, to the bit.

Hypernetwork of pFedHN (2103.04628), from an embedding v of each client:

    delta_l = W_l f(v),    f a multilayer perceptron    ``Hypernetwork``; zero at first
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import ceil, prod

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import ConfigError

Params = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]

LARGEST = 1024  # numbers of a chunk
BASE, GENERATOR = "base.", "generator."  # how names of parameters of a ``GeneratedModel`` begin
STATISTICS = ("running_mean", "running_var")  # of BatchNorm: they are counted, not generated
SENT_BASE, SENT_NETWORK, SENT_EMBEDDING = "base/", "network/", "embedding"  # arrays of pFedHN
REMEMBERS = 2.0  # bias of the update gate at first: a state keeps 88% of itself over a layer


# --- parts ----------------------------------------------------------------------------------------


class ParameterHead(nn.Module):
    """Map a state (d,) to the n numbers of a layer, chunk after chunk; zero at first.

    Args:
        width: d.
        size: n.
        largest: numbers of a chunk, at most.

    >>> head = ParameterHead(4, 10, largest=4)
    >>> head(torch.ones(4)).shape, head.weight.shape, head.places.shape
    (torch.Size([10]), torch.Size([4, 4]), torch.Size([3, 4]))
    """

    def __init__(self, width: int, size: int, *, largest: int = LARGEST) -> None:
        super().__init__()
        self.size = size
        chunks, length = _cut(size, largest)
        self.weight = nn.Parameter(torch.zeros(length, width))
        self.places = nn.Parameter(_places(chunks, width))

    def forward(self, state: Tensor) -> Tensor:
        """Return theta (n,) of ``state`` (d,)."""
        chunks = (state * self.places) @ self.weight.T  # (m, d) -> (m, k)
        return chunks.flatten()[: self.size]


class ParameterReader(nn.Module):
    """Map the n numbers of a layer to (d,): the mean over chunks of (R theta_j) o e_j.

    Arguments as ``ParameterHead``.
    """

    def __init__(self, width: int, size: int, *, largest: int = LARGEST) -> None:
        super().__init__()
        chunks, length = _cut(size, largest)
        self.lacking = chunks * length - size
        self.read = nn.Linear(length, width)
        self.places = nn.Parameter(_places(chunks, width))

    def forward(self, theta: Tensor) -> Tensor:
        """Return what is said of ``theta`` (n,), (d,)."""
        chunks = nn.functional.pad(theta, (0, self.lacking)).reshape(len(self.places), -1)
        said: Tensor = (self.read(chunks) * self.places).mean(0)  # (m, k) -> (m, d) -> (d,)
        return said


class GRU(nn.Module):
    """One step of a gated recurrent unit (1406.1078), of linear layers.

        r, u = sigmoid(W x + b + V s + c)
        n    = tanh(W_n x + b_n + r o (V_n s + c_n))
        s'   = (1 - u) o n + u o s

    It computes what torch's GRUCell does, which has no double backward on a GPU and no batching
    rule for vmap.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.from_input = nn.Linear(width, 3 * width)
        self.from_state = nn.Linear(width, 3 * width)
        with torch.no_grad():
            self.from_input.bias[width : 2 * width] += REMEMBERS

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """Return the next state (d,) of ``state`` (d,) and ``x`` (d,)."""
        (r_x, u_x, n_x), (r_s, u_s, n_s) = (
            value.chunk(3, dim=-1) for value in (self.from_input(x), self.from_state(state))
        )
        new, update = (n_x + (r_x + r_s).sigmoid() * n_s).tanh(), (u_x + u_s).sigmoid()
        after: Tensor = (1 - update) * new + update * state
        return after


class SetEncoder(nn.Module):
    """Map a set of labelled records to (d,): the mean of psi(x, y) = f(x) o B y.

    The product binds a class to what is seen of it; the order of records does not matter.

    Args:
        features: f, records (S, ...) to (S, d).
        num_classes: C; targets are classes below it, or rows of C numbers.
        width: d.
    """

    def __init__(self, features: nn.Module, num_classes: int, width: int) -> None:
        super().__init__()
        self.features = features
        self.classes = nn.Parameter(nn.init.normal_(torch.empty(num_classes, width)))

    def forward(self, inputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return z (d,) of records (S, ...); of those that ``mask`` (S,) calls real, if given."""
        psi = self.features(inputs) * (self._rows(targets) @ self.classes)  # (S, d)
        if mask is not None:
            psi = torch.where(mask[:, None], psi, 0.0)
        z: Tensor = psi.mean(0) if mask is None else psi.sum(0) / mask.sum()
        return z

    def _rows(self, targets: Tensor) -> Tensor:
        """Return the targets as rows (S, C); a class as its unit vector."""
        if targets.is_floating_point():
            return targets.reshape(len(targets), -1).to(self.classes.dtype)
        classes = torch.arange(len(self.classes), device=targets.device)
        return (targets[:, None] == classes).to(self.classes.dtype)


# --- from a support set -------------------------------------------------------------------------


def autoregressive(
    state: Tensor,
    base: Sequence[Tensor],
    give: Sequence[Callable[[Tensor], Tensor]],
    take: Sequence[Callable[[Tensor, Tensor], Tensor]],
) -> list[Tensor]:
    """Return theta_l = base_l + give_l(s_{l-1}) of each layer, s_l = take_l(s_{l-1}, theta_l).

    Args:
        state: s_0.
        base: of each layer.
        give: U_l of each layer.
        take: of each layer but the last, which nothing follows.
    """
    made = [base[0] + give[0](state)]
    for layer, one, absorb in zip(base[1:], give[1:], take, strict=True):
        state = absorb(state, made[-1])
        made.append(layer + one(state))
    return made


class Generator(nn.Module):
    """Generate parameters from a support set and base parameters; see the module's text.

    Args:
        features: f of the set encoder, records (S, ...) to (S, width).
        shapes: of the parameters, by name and in the order of the layers.
        num_classes: C of the targets.
        width: d, of the state.
        largest: numbers of a chunk, at most.
    """

    def __init__(
        self,
        features: nn.Module,
        shapes: Shapes,
        *,
        num_classes: int,
        width: int,
        largest: int = LARGEST,
    ) -> None:
        super().__init__()
        self.shapes = dict(shapes)
        self.layers = layers_of(shapes)
        sizes = [sum(prod(shapes[name]) for name in names) for names in self.layers]
        self.encoder = SetEncoder(features, num_classes, width)
        self.heads = nn.ModuleList(ParameterHead(width, n, largest=largest) for n in sizes)
        self.readers = nn.ModuleList(ParameterReader(width, n, largest=largest) for n in sizes[:-1])
        self.gru = GRU(width)

    def forward(
        self, inputs: Tensor, targets: Tensor, base: Params, mask: Tensor | None = None
    ) -> Params:
        """Return the generated parameters, with the names and shapes of ``base``.

        Args:
            inputs: of the support set, (S, ...).
            targets: (S,) classes, or (S, C).
            base: the parameters that it adds to.
            mask: (S,) bool, which records are real; None: all.
        """
        made = autoregressive(
            self.encoder(inputs, targets, mask),
            [torch.cat([base[name].flatten() for name in names]) for names in self.layers],
            list(self.heads),
            [partial(self._absorbed, read) for read in self.readers],
        )
        return _apart(zip(self.layers, made, strict=True), self.shapes)

    def _absorbed(self, read: nn.Module, state: Tensor, theta: Tensor) -> Tensor:
        """Return the state that follows ``state`` where ``theta`` (n,) is a layer's."""
        after: Tensor = self.gru(state, read(theta))
        return after


class GeneratedModel(nn.Module):
    """A model beside the generator of its parameters; called, it is the base model.

    Args:
        base: the model; its parameters without requires_grad are not generated.
        generator: of the others.
    """

    def __init__(self, base: nn.Module, generator: Generator) -> None:
        super().__init__()
        self.base = base
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """Return what the base model says of ``x``."""
        said: Tensor = self.base(x)
        return said


def with_generator(
    base: nn.Module,
    *,
    build: Callable[[int], nn.Module],
    num_classes: int,
    input_dtype: torch.dtype,
    width: int,
) -> GeneratedModel:
    """Return ``base`` with a generator whose features are made by a model of its architecture.

    Args:
        base: the model whose parameters are generated.
        build: returns another model of its architecture, with so many outputs.
        num_classes: outputs of ``base``.
        input_dtype: of the records.
        width: of the generator's state.

    Raises:
        ConfigError: where records are characters.
    """
    if not input_dtype.is_floating_point:
        raise ConfigError(
            f"the generator's set encoder takes images and tables, the records are {input_dtype}: "
            "a model of characters has as many outputs as there are characters, no features of "
            "another width; use another strategy for text"
        )
    shapes = {n: tuple(p.shape) for n, p in base.named_parameters() if p.requires_grad}
    generator = Generator(build(width), shapes, num_classes=num_classes, width=width)
    return GeneratedModel(base, generator)


def generated(
    model: GeneratedModel, params: Params, support: tuple[Tensor, Tensor] | tuple[Tensor, ...]
) -> Params:
    """Return ``params`` with those of the base model generated from ``support``.

    Args:
        model: called functionally and never changed.
        params: of the base model and of its generator, as ``model`` names them.
        support: inputs (S, ...), targets (S, ...) and, where it was padded, a mask (S,).
    """
    base, own = (
        {n.removeprefix(kind): value for n, value in params.items() if n.startswith(kind)}
        for kind in (BASE, GENERATOR)
    )
    inputs, targets, *mask = support
    made: Params = functional_call(model.generator, own, (inputs, targets, base, *mask))
    return {**params, **{f"{BASE}{name}": value for name, value in made.items()}}


# --- from an embedding --------------------------------------------------------------------------


class Hypernetwork(nn.Module):
    """Map the embedding of a client to what is added to each parameter: nothing at first.

    Args:
        shapes: of the parameters, by name and in the order of the layers.
        embedding_size: of v.
        width: of the hidden layers, three as in the paper.
        largest: numbers of a chunk, at most.

    >>> network = Hypernetwork({"w": (2, 3)}, embedding_size=4, width=8)
    >>> network(torch.ones(4))["w"].shape
    torch.Size([2, 3])
    """

    def __init__(
        self, shapes: Shapes, *, embedding_size: int, width: int, largest: int = LARGEST
    ) -> None:
        super().__init__()
        self.shapes = dict(shapes)
        self.layers = layers_of(shapes)
        trunk: list[nn.Module] = []
        for width_in in (embedding_size, width, width):
            trunk += [nn.Linear(width_in, width), nn.ReLU()]
        self.trunk = nn.Sequential(*trunk)
        self.heads = nn.ModuleList(
            ParameterHead(width, sum(prod(shapes[name]) for name in names), largest=largest)
            for names in self.layers
        )

    def forward(self, embedding: Tensor) -> Params:
        """Return what is added to each parameter for the client of ``embedding``."""
        state = self.trunk(embedding)
        made = [head(state) for head in self.heads]
        return _apart(zip(self.layers, made, strict=True), self.shapes)


def is_generated(name: str, *, is_floating: bool) -> bool:
    """Return whether pFedHN generates an array of a model: a floating one that is no statistic."""
    return is_floating and not name.endswith(STATISTICS)


def layers_of(names: Sequence[str] | Shapes) -> list[tuple[str, ...]]:
    """Return the parameters of each layer, those that one module owns, in the order given.

    >>> layers_of(["body.0.weight", "body.0.bias", "head.weight"])
    [('body.0.weight', 'body.0.bias'), ('head.weight',)]
    """
    owners: dict[str, list[str]] = {}
    for name in names:
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    return [tuple(own) for own in owners.values()]


def _apart(layers: Iterable[tuple[tuple[str, ...], Tensor]], shapes: Shapes) -> Params:
    """Return the parameters that lie one after another in the vector of each layer."""
    found: Params = {}
    for names, vector in layers:
        sizes = [prod(shapes[name]) for name in names]
        for name, part in zip(names, torch.split(vector, sizes), strict=True):
            found[name] = part.reshape(shapes[name])
    return {name: found[name] for name in shapes}


def _cut(size: int, largest: int) -> tuple[int, int]:
    """Return how many chunks a layer has, and the numbers of each.

    >>> _cut(10, 4), _cut(4, 4)
    ((3, 4), (1, 4))
    """
    chunks = max(1, ceil(size / largest))
    return chunks, ceil(size / chunks)


def _places(chunks: int, width: int) -> Tensor:
    """Return e_j of each chunk, (m, d); ones where there is one chunk, which needs no place."""
    if chunks == 1:
        return torch.ones(1, width)
    return nn.init.normal_(torch.empty(chunks, width))
