r"""FedOpt (Reddi et al., 2003.00295): FedAdam, FedYogi, FedAdagrad, and FedAvgM (1909.06335).

    Delta = sum_i p_i (w_i - w)                 w_i after local SGD, p_i = n_i / sum_S n
    m     <- beta_1 m + (1 - beta_1) Delta
    v     <- v + Delta^2                                               adagrad
    v     <- v - (1 - beta_2) Delta^2 sign(v - Delta^2)                yogi
    v     <- beta_2 v + (1 - beta_2) Delta^2                           adam
    w     <- w + eta m / (sqrt(v) + tau)

"sgd" is FedAvgM: m <- beta_1 m + Delta, w <- w + eta m. All are elementwise, m starts at 0 and v at
tau^2; both last over the rounds. tau, how far the steps adapt, is large beside the epsilon of an
ordinary Adam: 1e-3 is the paper's.

No bias is corrected, as in the paper: torch's Adam does (``fedmeta``'s), and Flower's FedAdam does,
by a factor on eta that tends to 1; Flower's v starts at 0.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

import torch

from ..config import RunConfig
from ..errors import ConfigError, unknown_name
from .fedavg import local_sgd
from .recipe import STRATEGIES, Recipe, aggregation_of, weighting_of
from .rules import Aggregation, OptimizerFactory, Weighting, mean, server_optimizer
from .shell import RuleStrategy

Second = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]  # (v, Delta^2, beta_2) -> v

SECOND: Final[dict[str, Second]] = {
    "adam": lambda v, square, beta: beta * v + (1 - beta) * square,
    "yogi": lambda v, square, beta: v - (1 - beta) * square * torch.sign(v - square),
    "adagrad": lambda v, square, beta: v + square,
}
SGD: Final = "sgd"
BETAS: Final = {SGD: (0.9, 0.0), "adam": (0.9, 0.99), "yogi": (0.9, 0.99), "adagrad": (0.0, 0.0)}
USUAL_LR: Final = {SGD: 1.0}  # of the others 0.01


class AdaptiveStep(torch.optim.Optimizer):
    """The server's step of FedAdam, FedYogi or FedAdagrad; see the module's text.

    Args:
        params: whose gradients are -Delta.
        kind: "adam", "yogi" or "adagrad".
        lr: eta.
        betas: beta_1 and beta_2.
        tau: > 0.
        first: v before the first step, >= 0.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        *,
        kind: str,
        lr: float,
        betas: tuple[float, float],
        tau: float,
        first: float,
    ) -> None:
        own = {"kind": kind, "lr": lr, "betas": betas, "tau": tau, "first": first}
        super().__init__(params, own)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss
        """Move each parameter that has a gradient."""
        del closure
        for group in self.param_groups:
            second, (beta_1, beta_2) = SECOND[group["kind"]], group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                m = state.get("m", torch.zeros_like(param))
                v = state.get("v", torch.full_like(param, group["first"]))
                state["m"] = beta_1 * m - (1 - beta_1) * param.grad
                state["v"] = second(v, param.grad.square(), beta_2)
                param += group["lr"] * state["m"] / (state["v"].sqrt() + group["tau"])


class FedOpt(RuleStrategy):
    """Give the mean of the clients' updates to an adaptive optimiser that keeps its state.

    Args:
        optimizer: "adam", "yogi", "adagrad" or "sgd"; see the module's text.
        lr: eta > 0; None: 1 for "sgd", else 0.01.
        betas: beta_1 and beta_2, in [0, 1); None: (0.9, 0.99), of adagrad (0, 0).
        tau: > 0; "sgd" has none.
        first: v before the first round, >= 0; None: tau^2.
        weighting: "examples" (p_i = n_i / sum n) or "uniform".
        aggregate: how the clients' models become one: ``mean``, ``median()``, ...
        shell: see ``RuleStrategy``.

    Raises:
        ConfigError: where the optimiser's name is unknown, or a value is out of range, naming it.
    """

    def __init__(
        self,
        *,
        optimizer: str = "adam",
        lr: float | None = None,
        betas: tuple[float, float] | None = None,
        tau: float = 1e-3,
        first: float | None = None,
        weighting: Weighting = "examples",
        aggregate: Aggregation = mean,
        **shell: Any,
    ) -> None:
        if optimizer not in BETAS:
            raise unknown_name("optimiser of fedopt", optimizer, BETAS)
        lr = USUAL_LR.get(optimizer, 0.01) if lr is None else lr
        betas = BETAS[optimizer] if betas is None else betas
        first = tau**2 if first is None else first
        for name, value in (("lr", lr), ("tau", tau)):
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} = {value!r}: must be a finite number above 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"betas = {betas!r}: both must be at least 0 and below 1")
        if not 0 <= first < math.inf:
            raise ConfigError(f"first = {first!r}: must be a finite number >= 0")
        factory = _factory(optimizer, lr, betas, tau, first)
        rule = server_optimizer(factory, weighting=weighting, aggregate=aggregate)
        super().__init__(rule, **shell)
        self.optimizer = optimizer
        self.lr = lr
        self.betas = str(betas)  # a run that is resumed must have the same
        self.tau = tau
        self.first = first
        self.weighting = weighting


def _factory(
    kind: str, lr: float, betas: tuple[float, float], tau: float, first: float
) -> OptimizerFactory:
    if kind == SGD:
        return lambda params: torch.optim.SGD(params, lr=lr, momentum=betas[0])
    return lambda params: AdaptiveStep(params, kind=kind, lr=lr, betas=betas, tau=tau, first=first)


@STRATEGIES.register("fedopt")
def recipe(config: RunConfig) -> Recipe:
    """FedAvg with an adaptive server: FedAdam, FedYogi, FedAdagrad, or FedAvgM."""
    return Recipe(
        strategy=partial(
            FedOpt,
            optimizer=config.server_optimizer,
            lr=config.outer_lr or None,
            tau=config.fedopt_tau,
            weighting=weighting_of(config, "examples"),
            aggregate=aggregation_of(config),
        ),
        client="sgd",
        client_options=local_sgd(config),
    )
