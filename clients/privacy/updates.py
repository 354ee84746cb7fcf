r"""Private local training: what is computed from releases alone, so free post-processing of them.

| method | releases of a step |
|---|---|
| DP-SGD, Reptile, FedAvg, FedProx, FedNova, SCAFFOLD | 1: w <- w - lr R(grad L(w)) |
| FedPer, FedRep, LG-FedAvg, FedBABU | 1, of the part that the step moves |
| FOMAML, first-order Meta-SGD | K + 1: K inner steps, then the query gradient at theta' |
| second order | 2K + 1: one Hessian-vector product more for each inner step |
| pFedMe | K of a local round: theta <- theta - lr (R(grad L(theta)) + lambda (theta - w_i)) |

Private second order: v = g_Q, then for k = K-1..0: v <- v - H~_k (alpha o v), where H~_k is a
release of the records' products at theta_k, each clipped to c_h ||alpha o v||: v is public by then.
Every release draws a batch of its own from all records, so one record may be in the support and in
the query of a step, and composition accounts for it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch

from ...accounting import Event
from ...errors import ConfigError
from ...inner_rates import rate_name, split_rates
from ..local_update import LocalResult, LocalUpdate, with_personal
from ..meta_gradient import InnerLR, Predicate, check_inner_loop
from ..objective import Params, detached
from .config import PrivacyConfig
from .releases import Releases

PrivateOrder = Literal["exact", "first"]


@dataclass(frozen=True)
class PrivateMetaGradient:
    """One privatised meta-gradient.

    Attributes:
        grads: of the parameters, same names and shapes.
        inner_lr_grads: of the inner learning rates; None where they are a number.
    """

    grads: Params
    inner_lr_grads: Params | None


def meta_events(privacy: PrivacyConfig, *, steps: int, order: PrivateOrder) -> list[Event]:
    """Return the releases of one meta-step of ``steps`` inner steps; see the table above.

    >>> p = PrivacyConfig(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.1,
    ...                   target_epsilon=3.0, target_delta=1e-5, hvp_noise_multiplier=2.0)
    >>> [tuple(event) for event in meta_events(p, steps=3, order="first")]
    [(1.0, 0.1, 4)]
    >>> [tuple(event) for event in meta_events(p, steps=3, order="exact")]
    [(1.0, 0.1, 4), (2.0, 0.1, 3)]
    """
    events = [Event(privacy.noise_multiplier, privacy.sample_rate, steps + 1)]
    if order == "exact":
        events.append(Event(privacy.hvp_noise, privacy.sample_rate, steps))
    return events


def private_meta_gradient(
    releases: Releases,
    params: Params,
    privacy: PrivacyConfig,
    *,
    inner_lr: InnerLR,
    steps: int = 1,
    order: PrivateOrder = "first",
    adapt: Predicate | None = None,
) -> PrivateMetaGradient:
    """Return the privatised meta-gradient of ``steps`` inner steps at ``params``.

    Args:
        releases: with a charge of ``meta_events``.
        params: before adaptation.
        privacy: sigma, C, sigma_h and c_h.
        inner_lr: a number, or a tensor for each adapted parameter (Meta-SGD).
        steps: K >= 1.
        order: "first" (FOMAML), or "exact" by private Hessian-vector products.
        adapt: which names the inner loop moves; None: all.

    Raises:
        ConfigError: where a value is out of range.
        PrivacyError: where the charge does not cover the releases.
    """
    check_inner_loop(inner_lr, steps, params, adapt)
    check_private_order(order)
    names = [name for name in params if adapt is None or adapt(name)]
    rates = {n: inner_lr[n] if isinstance(inner_lr, Mapping) else inner_lr for n in names}
    released = partial(
        releases.gradient,
        noise_multiplier=privacy.noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
    )
    theta, tape = detached(params), []
    for _ in range(steps):
        gradient = released(theta, names=names)
        tape.append((theta, gradient))
        theta = {**theta, **{n: theta[n] - rates[n] * gradient[n] for n in names}}
    v = released(theta)
    lr_grads = {n: torch.zeros_like(theta[n]) for n in names}
    for point, gradient in reversed(tape):
        lr_grads = {n: lr_grads[n] - gradient[n] * v[n] for n in names}
        if order == "exact":
            correction = releases.hessian_product(
                point,
                {n: rates[n] * v[n] for n in names},
                noise_multiplier=privacy.hvp_noise,
                max_norm=privacy.hvp_max_norm,
            )
            v = {n: v[n] - correction[n] for n in v}
    return PrivateMetaGradient(v, lr_grads if isinstance(inner_lr, Mapping) else None)


def private_maml_update(
    releases: Releases,
    privacy: PrivacyConfig,
    *,
    inner_lr: InnerLR,
    outer_lr: float,
    inner_steps: int = 1,
    order: PrivateOrder = "first",
    adapt: Predicate | None = None,
) -> LocalUpdate[Params, int]:
    """Return the update whose every step is w <- w - outer_lr * privatised meta-gradient.

    Its items are step numbers: batches are drawn by ``releases``.
    """

    def step(params: Params, number: int) -> Params:
        found = private_meta_gradient(
            releases,
            params,
            privacy,
            inner_lr=inner_lr,
            steps=inner_steps,
            order=order,
            adapt=adapt,
        )
        return {name: w - outer_lr * found.grads[name] for name, w in params.items()}

    return LocalUpdate(begin=detached, step=step, finish=lambda params: LocalResult(params, {}))


def private_meta_sgd_update(
    releases: Releases,
    privacy: PrivacyConfig,
    *,
    outer_lr: float,
    inner_steps: int = 1,
    order: PrivateOrder = "first",
    adapt: Predicate | None = None,
) -> LocalUpdate[Params, int]:
    """Return the update of ``private_maml_update`` that moves the inner rates too.

    Its parameters hold them under ``inner_lr/NAME``. It takes no further releases.
    """

    def step(params: Params, number: int) -> Params:
        own, rates = split_rates(params)
        found = private_meta_gradient(
            releases, own, privacy, inner_lr=rates, steps=inner_steps, order=order, adapt=adapt
        )
        of_rates = found.inner_lr_grads or {}
        gradient = found.grads | {rate_name(name): value for name, value in of_rates.items()}
        return {name: w - outer_lr * gradient[name] for name, w in params.items()}

    return LocalUpdate(begin=detached, step=step, finish=lambda params: LocalResult(params, {}))


@dataclass(frozen=True)
class _Pulled:
    """Parameters, the received ones that the proximal term pulls them to, and their velocity.

    The velocity is that of what the last step moved; empty before the first.
    """

    params: Params
    anchor: Params
    velocity: Params = field(default_factory=dict)


def private_sgd_update(
    releases: Releases,
    privacy: PrivacyConfig,
    *,
    lr: float,
    proximal_mu: float = 0.0,
    momentum: float = 0.0,
    drift: Params | None = None,
    train: Callable[[int], Predicate | None] | None = None,
) -> LocalUpdate[_Pulled, int]:
    """Return the update whose every step is w <- w - lr v, on what is released.

    v <- momentum v + R(grad L(w)) + mu (w - anchor) + drift

    All but R touches no data, or only what was released before. Its items are step numbers.

    Args:
        releases: with a charge for each step.
        privacy: sigma and C.
        lr: > 0.
        proximal_mu: mu >= 0.
        momentum: in [0, 1), where all steps move the same; v is 0 at first.
        drift: added to each gradient (SCAFFOLD's correction); None: nothing.
        train: step number -> which names it moves, None: all; those alone are released then.
    """

    def step(state: _Pulled, number: int) -> _Pulled:
        moves = train(number) if train else None
        gradient = releases.gradient(
            state.params,
            noise_multiplier=privacy.noise_multiplier,
            max_grad_norm=privacy.max_grad_norm,
            names=None if moves is None else [name for name in state.params if moves(name)],
        )
        velocity = {
            name: g + proximal_mu * (state.params[name] - state.anchor[name])
            for name, g in gradient.items()
        }
        if drift is not None:
            velocity = {name: v + drift[name] for name, v in velocity.items()}
        if momentum and state.velocity:
            velocity = {name: momentum * state.velocity[name] + v for name, v in velocity.items()}
        moved = {name: state.params[name] - lr * v for name, v in velocity.items()}
        return replace(state, params={**state.params, **moved}, velocity=velocity)

    return LocalUpdate(
        begin=lambda params: _Pulled(detached(params), detached(params)),
        step=step,
        finish=lambda state: LocalResult(state.params, {}),
    )


@dataclass(frozen=True)
class _Envelope:
    """The copy w_i of the received model, and the personal model theta."""

    params: Params
    personal: Params


def private_pfedme_update(
    releases: Releases,
    privacy: PrivacyConfig,
    *,
    lr: float,
    steps: int,
    local_lr: float,
    pull: float,
) -> LocalUpdate[_Envelope, int]:
    """Return the update of ``pfedme_update`` whose gradients are releases, ``steps`` for each step.

    The personal model is post-processing of releases too. Its items are step numbers.
    """

    def step(state: _Envelope, number: int) -> _Envelope:
        w, theta = state.params, state.personal
        for _ in range(steps):
            gradient = releases.gradient(
                theta,
                noise_multiplier=privacy.noise_multiplier,
                max_grad_norm=privacy.max_grad_norm,
            )
            theta = {n: v - lr * (gradient[n] + pull * (v - w[n])) for n, v in theta.items()}
        return _Envelope({n: v - local_lr * pull * (v - theta[n]) for n, v in w.items()}, theta)

    return LocalUpdate(
        begin=lambda params: _Envelope(detached(params), detached(params)),
        step=step,
        finish=lambda state: LocalResult(with_personal(state.params, state.personal), {}),
    )


def check_private_order(order: str) -> None:
    """Raise ConfigError for an order that cannot be private."""
    if order not in ("exact", "first"):
        raise ConfigError(
            f"order = {order!r} with privacy: a difference of two gradients of one batch is no "
            "release of its own; use order = 'first', or 'exact' for private Hessian products"
        )
