r"""Records that are made to be found: canaries of the privacy audit, and who watches the releases.

The model is Linear(m, 1) without a bias, so that a record's gradient lies along its input. Canary i
has the input 30 e_i: it moves coordinate i alone and is always clipped. A fair coin decides whether
it is among the records.

    flat canary:    loss = o,          gradient 30 e_i wherever it is taken, no curvature;
    curved canary:  loss = o^2 / 2,    gradient 900 w_i e_i, H_i = 900 e_i e_i^T;
    carrier:        loss = o, input 30 r / sqrt(m) with a public r in {-1, 1}^m, always present;
    probe of i:     loss = o^2 / 2, input sqrt(10) e_i, gradient 10 w_i e_i, always present.

Carriers give every gradient a known direction, so that a Hessian of the canaries that acts on it,
in the open, shows in the coordinates of those that are present. Probes tell where the parameters
stand that a gradient was taken at.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ....streams import torch_stream
from ...data import Batch
from ...objective import Params
from ..releases import Draw, Releases

SCALE = 30.0  # length of an input: far above any clip bound
PROBE_SCALE = math.sqrt(10.0)  # a probe is clipped where |w_i| > 0.1 C
WEIGHT = "weight"
FLAT, CURVED = 0, 1


@dataclass(frozen=True)
class Canaries:
    """m canaries, each with its coin, and the carriers beside them.

    Attributes:
        is_in: (m,) whether each one is among the records.
        signs: (m,) r, public.
        kind: FLAT or CURVED.
        carriers: how many.
        probes: how many for each coordinate.
        scale: length of a canary's input.
    """

    is_in: Tensor
    signs: Tensor
    kind: int
    carriers: int = 0
    probes: int = 0
    scale: float = SCALE

    @classmethod
    def tossed(cls, seed: int, name: str, count: int, kind: int) -> "Canaries":
        """Return ``count`` canaries whose coins depend on ``seed`` and ``name`` alone."""
        stream = torch_stream(seed, "audit", name)
        coins, signs = torch.randint(0, 2, (2, count), generator=stream)
        return cls(coins.bool(), (2 * signs - 1).float(), kind)

    @property
    def records(self) -> Batch:
        """Those present, inputs (n, m) and targets (n,), which say what the loss is."""
        count = len(self.is_in)
        canaries = self.scale * torch.eye(count)[self.is_in]
        probes = PROBE_SCALE * torch.eye(count).repeat(self.probes, 1)
        carrier = SCALE * self.signs / math.sqrt(count)
        inputs = torch.cat([canaries, carrier.expand(self.carriers, count), probes])
        kinds = [self.kind] * len(canaries) + [FLAT] * self.carriers + [CURVED] * len(probes)
        return inputs, torch.tensor(kinds, dtype=torch.long)

    @property
    def none(self) -> Batch:
        """No records, of the same shape."""
        return torch.empty(0, len(self.is_in)), torch.empty(0, dtype=torch.long)


def loss_of_kind(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean of o (target FLAT) or o^2 / 2 (target CURVED): (B, 1), (B,) -> ()."""
    o = output[:, 0]
    return torch.where(target == CURVED, o.square() / 2, o).mean()


def linear(count: int) -> nn.Module:
    """Return Linear(count, 1) without a bias, of weight 0."""
    # Made without values: the usual ones would come from the global generator.
    model = nn.Linear(count, 1, bias=False, device="meta").to_empty(device="cpu")
    nn.init.zeros_(model.weight)
    return model


def params_at(point: Tensor) -> Params:
    """Return ``point`` (m,) as the parameters of ``linear(m)``."""
    return {WEIGHT: point[None].clone()}


@dataclass(frozen=True)
class Release:
    """One release as the server could see it.

    Attributes:
        value: (m,).
        bound: to which each record was clipped.
    """

    value: Tensor
    bound: float


class Watched:
    """``Releases`` whose every release is written down, in order, in ``seen``."""

    def __init__(self, releases: Releases) -> None:
        self._releases = releases
        self.seen: list[Release] = []

    @property
    def as_releases(self) -> Releases:
        """Itself, for what takes ``Releases``."""
        return cast(Releases, self)

    def __getattr__(self, name: str) -> object:
        return getattr(self._releases, name)

    def draw(self) -> Draw:
        """Return a fresh sample."""
        return self._releases.draw()

    def gradient(self, params: Params, **options: object) -> Params:
        """Return one release of the gradient."""
        return self._watched(
            self._releases.gradient, (params,), options, _number(options, "max_grad_norm")
        )

    def hessian_product(self, params: Params, direction: Params, **options: object) -> Params:
        """Return one release of the Hessian-vector product."""
        bound = _number(options, "max_norm") * float(direction[WEIGHT].norm())
        return self._watched(self._releases.hessian_product, (params, direction), options, bound)

    def _watched(
        self,
        release: Callable[..., Params],
        arguments: tuple[Params, ...],
        options: dict[str, object],
        bound: float,
    ) -> Params:
        found = release(*arguments, **options)
        self.seen.append(Release(found[WEIGHT][0], bound))
        return found


def _number(options: dict[str, object], name: str) -> float:
    return float(cast(float, options[name]))
