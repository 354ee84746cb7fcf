"""Small problems whose answers are known, and oracles that share no code with the library."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metabloom.clients import ClientData, adapt

Params = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


class Point(nn.Module):
    """The output is the parameters, in named pieces: the loss is any function of them."""

    def __init__(self, **pieces):
        super().__init__()
        for name, value in pieces.items():
            self.register_parameter(name, nn.Parameter(torch.as_tensor(value, dtype=torch.float64)))

    def forward(self, matrix):
        return torch.cat([value.reshape(-1) for value in self.parameters()]), matrix


def quadratic_loss(output, centre):
    """1/2 (w - c)^T A (w - c) on the "batch" (A, c)."""
    point, matrix = output
    away = point - centre
    return away @ matrix @ away / 2


def parabola(a: float, c: float) -> Batch:
    """The batch whose quadratic loss is a/2 (w - c)^2."""
    return (
        torch.tensor([[a]], dtype=torch.float64),
        torch.tensor([c], dtype=torch.float64),
    )


class Product(nn.Module):
    """The output is h * b, for the loss 1/2 (h b - 1)^2."""

    def __init__(self, h: float, b: float):
        super().__init__()
        self.h = nn.Parameter(torch.tensor(h, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(b, dtype=torch.float64))

    def forward(self, inputs):
        return self.h * self.b


def half_square(output, target):
    return (output - target) ** 2 / 2


ONE = (torch.zeros(1), torch.tensor(1.0, dtype=torch.float64))  # the batch of Product


class Shifted(nn.Module):
    """A small smooth net with a floating and an integer buffer that its output depends on."""

    def __init__(self, num_inputs: int = 3, num_classes: int = 3, width: int = 4):
        super().__init__()
        self.register_buffer("shift", torch.full((num_inputs,), 0.5))
        self.body = nn.Linear(num_inputs, width)
        self.register_buffer("seen", torch.tensor(2))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x + self.shift * self.seen)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def initialised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return ``model`` with parameters drawn from a stream of its own."""
    draw = generator(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=draw, dtype=torch.float64) / 2)
    return model


def small_net(seed: int = 0, *, dtype=torch.float64) -> nn.Module:
    """3 -> 4 -> 3 with tanh: smooth, so that finite differences hold everywhere."""
    return initialised(Net(), seed).to(dtype)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def records(size: int, seed: int, *, dtype=torch.float64, features: int = 3) -> Batch:
    """Random inputs with random classes below 3."""
    draw = generator(seed)
    inputs = torch.randn(size, features, generator=draw, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(3, (size,), generator=draw)


def client_data(support: int = 6, query: int = 5, *, seed: int = 0, dtype=torch.float32):
    """A client whose support set holds each of three classes in turn."""
    xs, _ = records(support, seed, dtype=dtype)
    return ClientData((xs, torch.arange(support) % 3), records(query, seed + 1000, dtype=dtype))


def weights(model: nn.Module) -> Params:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def flat(named: Params) -> Tensor:
    return torch.cat([named[name].reshape(-1) for name in sorted(named)])


def dot(left: Params, right: Params) -> float:
    return sum((left[name] * right[name]).sum().item() for name in left)


def direction(like: Params, seed: int) -> Params:
    """A uniformly random direction of length 1."""
    draw = generator(seed)
    drawn = {
        name: torch.randn(value.shape, generator=draw, dtype=value.dtype)
        for name, value in like.items()
    }
    length = flat(drawn).norm()
    return {name: value / length for name, value in drawn.items()}


def moved(at: Params, towards: Params, step: float) -> Params:
    return {name: value + step * towards[name] for name, value in at.items()}


def slope(function, step: float) -> float:
    """The derivative of ``function`` at 0 by five points: its error is step^4 f'''''/30."""
    near = function(step) - function(-step)
    far = function(2 * step) - function(-2 * step)
    return (8 * near - far) / (12 * step)


def loss_at(model, loss_fn, params: Params, batch: Batch) -> Tensor:
    return loss_fn(functional_call(model, params, (batch[0],)), batch[1])


def loss_after_adapting(model, loss_fn, params, support, query, **options) -> float:
    """The function that a meta-gradient is the gradient of."""
    adapted = adapt(model, loss_fn, params, support, **options)
    with torch.no_grad():
        return loss_at(model, loss_fn, adapted, query).item()


def meta_gradient_by_graph(
    model, loss_fn, params, support, query, *, inner_lr, steps, adapt=None
) -> tuple[Params, Params]:
    """The oracle: plain autograd through the inner loop as it is written in MAML's algorithm 1.

    Returns (dL/dtheta, dL/dalpha); alpha is a number or a dict of tensors.
    """
    theta = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    names = [name for name in theta if adapt is None or adapt(name)]
    alpha = {
        name: (
            inner_lr[name].detach().clone()
            if isinstance(inner_lr, dict)
            else torch.full_like(params[name], inner_lr)
        ).requires_grad_()
        for name in names
    }
    now = dict(theta)
    for _ in range(steps):
        found = torch.autograd.grad(
            loss_at(model, loss_fn, now, support), [now[name] for name in names], create_graph=True
        )
        now |= {name: now[name] - alpha[name] * g for name, g in zip(names, found, strict=True)}
    wanted = [*theta.values(), *alpha.values()]
    found = torch.autograd.grad(loss_at(model, loss_fn, now, query), wanted)
    grads = dict(zip(theta, found[: len(theta)], strict=True))
    return grads, dict(zip(names, found[len(theta) :], strict=True))


def head(name: str) -> bool:
    return name.startswith("head")


def body(name: str) -> bool:
    return not head(name)


def random_rates(params, seed, scale=0.3):
    draw = generator(seed)
    return {
        name: scale * torch.randn(value.shape, generator=draw, dtype=value.dtype)
        for name, value in params.items()
    }


def random_quadratic(size, draw):
    """(A, c) with the eigenvalues of A in [.2, 2] and a random basis."""
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))
    eigenvalues = 0.2 + 1.8 * torch.rand(size, generator=draw, dtype=torch.float64)
    matrix = basis * eigenvalues @ basis.T
    return (matrix + matrix.T) / 2, torch.randn(size, generator=draw, dtype=torch.float64)
