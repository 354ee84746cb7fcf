"""Small problems for the release engine, and oracles that share no code with it."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from metabloom.clients.privacy.noise import Sources, seeded_sources
from metabloom.clients.privacy.releases import Releases
from metabloom.ledger import Charge
from metabloom.models import MODELS, build_model

CROSS_ENTROPY = nn.functional.cross_entropy
HUGE = 1e12  # a bound that nothing reaches


@dataclass(frozen=True)
class Case:
    """A registered model at its smallest: small sizes run the same code."""

    input_shape: tuple[int, ...] = (1, 8, 8)
    options: dict[str, Any] = field(default_factory=dict)
    characters: bool = False

    def problem(self, name, size, dtype=torch.float64):
        """Return (model, records) of 3 classes."""
        model = build_model(
            name, input_shape=self.input_shape, num_classes=3, seed=0, **self.options
        ).to(dtype)
        draw = generator(7)
        shape = (size, *self.input_shape)
        if self.characters:
            inputs = torch.randint(3, shape, generator=draw)
        else:
            inputs = torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
        return model, (inputs, torch.randint(3, (size,), generator=draw))


SMALL = {
    "mlp": Case((1, 3, 4), {"hidden": "6,5"}),
    "conv4": Case(options={"width": 16}),  # two groups
    "cnn": Case((1, 6, 6), {"dense": 5}),
    "char-lstm": Case((5,), {"embedding": 3, "hidden": 4, "layers": 2}, characters=True),
    "mobilenet-v3-small": Case((1, 16, 16)),
}
CASES = {name: SMALL.get(name, Case()) for name in MODELS}  # a new model is tested unasked


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: v.detach().clone() for n, v in model.named_parameters() if v.requires_grad}


def flat(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([named[name].reshape(-1) for name in sorted(named)])


def charge_of(count: int, sigma: float = 0.0, rate: float = 1.0) -> Charge:
    return Charge({(float(sigma), float(rate)): count})


def releases_of(
    model: nn.Module,
    records,
    *,
    kind=Releases,
    loss_fn=CROSS_ENTROPY,
    rate: float = 1.0,
    size: float = 1.0,
    charge: Charge | None = None,
    sources: Sources | None = None,
) -> Releases:
    return kind(
        model,
        loss_fn,
        records,
        sample_rate=rate,
        expected_batch_size=size,
        charge=charge or charge_of(1000, rate=rate),
        sources=sources or seeded_sources(1),
    )


def clipped_sum(
    model: nn.Module, records, bound: float = HUGE, *, kind=Releases, loss_fn=CROSS_ENTROPY, at=None
) -> Tensor:
    """The engine's sum of clipped gradients over all records, without noise, as one vector."""
    releases = releases_of(model, records, kind=kind, loss_fn=loss_fn)
    found = releases.gradient(at or weights(model), noise_multiplier=0.0, max_grad_norm=bound)
    return flat(found)


def record_gradients(model: nn.Module, records, loss_fn=CROSS_ENTROPY, at=None) -> Tensor:
    """The oracle: torch.func over single records, (B, d) in the order of ``flat``."""
    buffers = dict(model.named_buffers())
    frozen = {n: v.detach() for n, v in model.named_parameters() if not v.requires_grad}

    def loss(params, x, y):
        return loss_fn(functional_call(model, (params, frozen, buffers), (x[None],)), y[None])

    rows = vmap(grad(loss), in_dims=(None, 0, 0))(at or weights(model), *records)
    return torch.cat([rows[name].reshape(len(records[1]), -1) for name in sorted(rows)], dim=1)


def record_products(model: nn.Module, records, params, towards, loss_fn=CROSS_ENTROPY) -> Tensor:
    """The oracle: reverse over reverse, one record after another, (B, d) in the order of flat."""
    rows = []
    for x, y in zip(*records, strict=True):
        point = {name: value.clone().requires_grad_() for name, value in params.items()}
        loss = loss_fn(functional_call(model, point, (x[None],)), y[None])
        slope = torch.autograd.grad(loss, list(point.values()), create_graph=True)
        inner = sum(
            (g * towards[n]).sum() for n, g in zip(point, slope, strict=True) if n in towards
        )
        found = torch.autograd.grad(inner, list(point.values()), allow_unused=True)
        rows.append(
            flat(
                {
                    n: torch.zeros_like(params[n]) if g is None else g
                    for n, g in zip(point, found, strict=True)
                }
            )
        )
    return torch.stack(rows)


def clipped(rows: Tensor, bound: float) -> Tensor:
    """The sum of rows, each at most ``bound`` long: with Opacus' 1e-6 beside the norm."""
    return (rows * (bound / (rows.norm(dim=1) + 1e-6)).clamp(max=1.0)[:, None]).sum(0)


def direction(like, seed: int):
    """A uniformly random direction of length 1."""
    draw = generator(seed)
    drawn = {n: torch.randn(v.shape, generator=draw, dtype=v.dtype) for n, v in like.items()}
    return {name: value / flat(drawn).norm() for name, value in drawn.items()}


def miss(found: Tensor, wanted: Tensor) -> float:
    """The greatest difference over the greatest value."""
    assert wanted.abs().max() > 0
    return float((found - wanted).abs().max() / wanted.abs().max())


def without_noise(**more) -> Any:
    """Parameters that no PrivacyConfig takes: sigma 0 and bounds that nothing reaches."""
    return SimpleNamespace(
        **{
            "noise_multiplier": 0.0,
            "max_grad_norm": HUGE,
            "hvp_noise": 0.0,
            "hvp_max_norm": HUGE,
        }
        | more
    )


class SmoothNet(nn.Module):
    """3 -> 4 -> 3 with tanh, float64."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)
        draw = generator(seed)
        with torch.no_grad():
            for value in self.parameters():
                value.copy_(torch.randn(value.shape, generator=draw))
        self.double()

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def smooth_records(size: int, seed: int = 3):
    draw = generator(seed)
    x = torch.randn(size, 3, generator=draw, dtype=torch.float64)
    return x, torch.randint(3, (size,), generator=draw)


def linear(num_inputs: int, num_outputs: int = 1, dtype=torch.float32) -> nn.Module:
    """A linear layer at zero: with the loss ``output`` its gradient is the record itself."""
    model = nn.Linear(num_inputs, num_outputs, bias=False).to(dtype)
    nn.init.zeros_(model.weight)
    return model


def output_itself(output: Tensor, target: Tensor) -> Tensor:
    return output.mean() + 0 * target.sum()


def nothing(num_inputs: int, dtype=torch.float32):
    """No records."""
    return torch.empty(0, num_inputs, dtype=dtype), torch.empty(0, dtype=torch.long)


def ones_of(size: int):
    """Records whose share in a sum says which of them are in it."""
    return torch.eye(size), torch.zeros(size, dtype=torch.long)


def correlation(left: Tensor, right: Tensor) -> float:
    """Correlation times sqrt(N): standard normal where the two are independent."""
    a, b = (value.double() - value.double().mean() for value in (left, right))
    return float((a * b).sum() / (a.norm() * b.norm())) * math.sqrt(len(a))
