r"""Meta-gradients: d (query loss after adaptation) / d (parameters before it).

Inner loop, k = 0..K-1, on the adapted parameters a (all of them by default):

    theta_{k+1} = theta_k - alpha * grad_a L_support(theta_k)

Reverse recursion from v_K = grad L_query(theta_K), for k = K-1..0:

    d alpha -= grad_a L_support(theta_k) o v_a
    v       <- v - H_support(theta_k)[:, a] (alpha * v_a)

and v_0 is the exact meta-gradient. ``order`` says what becomes of the Hessian-vector product:
"exact" computes it by torch.func, "first" drops it (FOMAML), "hf" takes a central difference of
gradients (Hessian-free).

Papers: MAML 1703.03400; Meta-SGD 1707.09835 (alpha a tensor of the parameters' shapes); ANIL
1909.09157 and BOIL 2008.08882 (``adapt``); Per-FedAvg 2002.07948 (``curvature``: the Hessian on a
batch of its own, and the Hessian-free variant).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .data import Batch
from .objective import (
    LossFn,
    Objective,
    Params,
    Pullback,
    detached,
    grad_and_value,
    gradient_and_pullback,
    objective,
)

Order = Literal["exact", "first", "hf"]
InnerLR = float | Mapping[str, Tensor]
Predicate = Callable[[str], bool]


@dataclass(frozen=True)
class MetaGradient:
    """What one meta-gradient computation gives back.

    Attributes:
        grads: dL_query/dtheta, same names, shapes and dtypes as the parameters.
        inner_lr_grads: dL_query/dalpha of the adapted names; None where inner_lr is a number.
        query_loss: the query loss after adaptation, a detached scalar.
    """

    grads: Params
    inner_lr_grads: Params | None
    query_loss: Tensor


def meta_gradient(
    model: nn.Module,
    loss_fn: LossFn,
    params: Params,
    support: Batch,
    query: Batch,
    *,
    inner_lr: InnerLR,
    steps: int = 1,
    order: Order = "exact",
    adapt: Predicate | None = None,
    curvature: Batch | None = None,
    delta: float | None = None,
) -> MetaGradient:
    """Return the meta-gradient of ``steps`` adaptation steps on ``support``, scored on ``query``.

    Args:
        model: called functionally and never changed.
        loss_fn: ``loss_fn(output, target)``, a scalar mean over the batch.
        params: the parameters before adaptation, any floating dtype (float64 for finite
            differences).
        support: ``(inputs, targets)`` to adapt on.
        query: ``(inputs, targets)`` to score on.
        inner_lr: alpha > 0; or, for Meta-SGD, one tensor for each adapted parameter, of its shape
            and any sign.
        steps: K >= 1.
        order: "exact", "first" (no Hessian) or "hf" (central difference of gradients).
        adapt: which parameter names the inner loop moves; None means all. The outer gradient covers
            all parameters in any case.
        curvature: the batch of the Hessian; None means ``support``. Not used by "first".
        delta: step of the central difference along the direction, > 0; None chooses cbrt(eps)
            relative to the parameters.

    Raises:
        ConfigError: where a value is out of range, naming it.
    """
    check_inner_loop(inner_lr, steps, params, adapt)
    check_order(order)
    if delta is not None and not 0 < delta < math.inf:
        raise ConfigError(f"delta = {delta!r}: must be a finite number above 0")

    loss = objective(model, loss_fn)
    names = _adapted_names(params, adapt)
    curved = support if curvature is None else curvature

    theta, tape = detached(params), []
    for _ in range(steps):
        gradient, hessian_product = _linearise(loss, theta, names, support, curved, order, delta)
        tape.append((gradient, hessian_product))
        theta = _descend(theta, gradient, inner_lr)

    v, query_loss = grad_and_value(lambda point: loss(point, query), theta)
    lr_grads = {name: torch.zeros_like(theta[name]) for name in names}
    for gradient, hessian_product in reversed(tape):
        lr_grads = {name: lr_grads[name] - gradient[name] * v[name] for name in names}
        if order != "first":
            correction = hessian_product({name: _rate(inner_lr, name) * v[name] for name in names})
            v = {name: v[name] - correction[name] for name in v}

    wanted = isinstance(inner_lr, Mapping)
    return MetaGradient(
        grads={name: v[name].detach() for name in params},
        inner_lr_grads=detached(lr_grads) if wanted else None,
        query_loss=query_loss.detach(),
    )


def adapt(
    model: nn.Module,
    loss_fn: LossFn,
    params: Params,
    support: Batch,
    *,
    inner_lr: InnerLR,
    steps: int = 1,
    adapt: Predicate | None = None,
) -> Params:
    """Return the parameters after ``steps`` gradient steps on ``support``.

        theta <- theta - alpha * grad L(theta)

    Takes and checks its arguments as ``meta_gradient`` does; names that are not adapted come back
    as they are.
    """
    check_inner_loop(inner_lr, steps, params, adapt)
    loss = objective(model, loss_fn)
    names = _adapted_names(params, adapt)
    theta = detached(params)
    for _ in range(steps):
        theta = _descend(theta, _partial_gradient(loss, theta, names, support), inner_lr)
    return theta


def check_inner_loop(
    inner_lr: InnerLR, steps: int, params: Params, adapt: Predicate | None = None
) -> None:
    """Raise ConfigError where the inner loop cannot work, naming the value and the remedy."""
    if not (isinstance(steps, int) and steps >= 1):
        raise ConfigError(f"steps = {steps!r}: an adaptation needs a whole number of at least 1")
    names = _adapted_names(params, adapt)
    if not names:
        raise ConfigError(f"adapt selects none of the parameters {', '.join(params)}")
    if not isinstance(inner_lr, Mapping):
        if not (isinstance(inner_lr, int | float) and 0 < inner_lr < math.inf):
            raise ConfigError(f"inner_lr = {inner_lr!r}: must be a finite number above 0, e.g. 0.1")
        return
    for name in names:
        shape = tuple(params[name].shape)
        if name not in inner_lr:
            raise ConfigError(f"inner_lr has no tensor for the adapted parameter {name!r}")
        if tuple(inner_lr[name].shape) != shape:
            raise ConfigError(
                f"inner_lr[{name!r}] has shape {tuple(inner_lr[name].shape)}: "
                f"the parameter's {shape} is needed"
            )


def check_order(order: str) -> None:
    """Raise ConfigError where ``order`` is none that ``meta_gradient`` knows."""
    if order not in get_args(Order):
        raise ConfigError(f"order = {order!r}: must be one of {', '.join(get_args(Order))}")


def _adapted_names(params: Params, adapt: Predicate | None) -> tuple[str, ...]:
    return tuple(name for name in params if adapt is None or adapt(name))


def _rate(inner_lr: InnerLR, name: str) -> Tensor | float:
    return inner_lr[name] if isinstance(inner_lr, Mapping) else inner_lr


def _descend(theta: Params, gradient: Params, inner_lr: InnerLR) -> Params:
    moved = {name: theta[name] - _rate(inner_lr, name) * g for name, g in gradient.items()}
    return detached({**theta, **moved})


def _partial_gradient(
    loss: Objective, theta: Params, names: tuple[str, ...], batch: Batch
) -> Params:
    """Return the gradient with respect to ``names`` alone, the other parameters held."""
    part = {name: theta[name] for name in names}
    return grad_and_value(lambda own: loss({**theta, **own}, batch), part)[0]


def _linearise(
    loss: Objective,
    theta: Params,
    names: tuple[str, ...],
    support: Batch,
    curved: Batch,
    order: Order,
    delta: float | None,
) -> tuple[Params, Pullback]:
    """Return the inner gradient at ``theta`` and the map u -> H[:, adapted] u at ``theta``."""
    if order == "exact":
        gradient, product = gradient_and_pullback(lambda p: loss(p, curved), theta, names)
        if not all(one is other for one, other in zip(curved, support, strict=True)):
            gradient = _partial_gradient(loss, theta, names, support)
        return gradient, product
    gradient = _partial_gradient(loss, theta, names, support)
    return gradient, lambda direction: _central_difference(loss, theta, direction, curved, delta)


def _central_difference(
    loss: Objective, theta: Params, direction: Params, batch: Batch, delta: float | None
) -> Params:
    """Return [grad L(theta + h u) - grad L(theta - h u)] / 2h, which is H u up to O(h^2)."""
    size = torch.stack([value.norm() for value in direction.values()]).norm()
    is_zero = size == 0  # no branch on it: under vmap it has a value for each client
    step: Tensor | float
    if delta is None:
        scale = torch.stack([value.norm() for value in theta.values()]).norm()
        chosen = torch.finfo(size.dtype).eps ** (1 / 3) * (1 + scale) / size
        step = torch.where(is_zero, 1.0, chosen)
    else:
        step = delta
    forth = {**theta, **{n: theta[n] + step * u for n, u in direction.items()}}
    back = {**theta, **{n: theta[n] - step * u for n, u in direction.items()}}
    ahead, behind = (
        grad_and_value(lambda point: loss(point, batch), point)[0] for point in (forth, back)
    )
    found = {name: (ahead[name] - behind[name]) / (2 * step) for name in theta}
    return {name: torch.where(is_zero, 0.0, value) for name, value in found.items()}
