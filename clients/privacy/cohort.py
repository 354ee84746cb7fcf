r"""The same release for many clients at once, by vmap over clients and records.

Poisson batches differ in size: they are padded to the largest, and a mask gives what is padding no
share at all. Each client's noise comes from its own generator, parameter by parameter, as Opacus
draws it: the result is that of ``Releases.gradient``, client by client, up to rounding.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...errors import ConfigError, ModelError
from ...streams import torch_drawing_from
from ..data import Batch
from ..objective import LossFn, Params, objective
from .private_models import check_records_are_apart
from .releases import Draw

SMALL = 1e-6  # what Opacus adds to a norm before it divides by it


def padded(records: Sequence[Batch], draws: Sequence[Draw]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the drawn records of each client as (inputs (N, B, ...), targets (N, B), mask (N, B)).

    B is the size of the largest batch, at least 1. Padding is zeros; its mask is 0.

    Raises:
        ConfigError: where there are not as many draws as clients.
        PrivacyError: where a draw was used before.
    """
    if len(records) != len(draws) or not records:
        raise ConfigError(f"{len(draws)} draws for {len(records)} clients: one each is needed")
    rows = [draw.take() for draw in draws]
    size = max(1, *(len(one) for one in rows))
    inputs, targets, masks = [], [], []
    for (x, y), one in zip(records, rows, strict=True):
        lack = size - len(one)
        inputs.append(torch.cat([x[one], x.new_zeros((lack, *x.shape[1:]))]))
        targets.append(torch.cat([y[one], y.new_zeros((lack, *y.shape[1:]))]))
        masks.append(torch.cat([y.new_ones(len(one)), y.new_zeros(lack)]))
    return torch.stack(inputs), torch.stack(targets), torch.stack(masks)


def cohort_gradients(
    model: nn.Module,
    loss_fn: LossFn,
    params: Params,
    batches: tuple[Tensor, Tensor, Tensor],
    *,
    noise_multiplier: float,
    max_grad_norm: float,
    expected_batch_size: float,
    noise: Sequence[torch.Generator],
    layers: torch.Generator,
) -> Params:
    """Return one gradient release for each of N clients.

    What it takes from each client's charge is for the caller to take first.

    Args:
        model: called functionally and never changed.
        loss_fn: a scalar mean over a batch; called for each record alone.
        params: of each client, (N, *shape) for each name.
        batches: see ``padded``.
        noise_multiplier: sigma.
        max_grad_norm: C.
        expected_batch_size: b.
        noise: the generator of each client.
        layers: of the masks of dropout, on the CPU; nobody must know it.

    Raises:
        ConfigError: where there are not as many generators as clients, or b is out of range.
        ModelError: where the model mixes records, or takes whole numbers: vmap joins the tables of
            all clients' embeddings, and an index out of range would reach into another client's.

    Returns:
        The releases, (N, *shape) for each name.
    """
    inputs, targets, mask = batches
    if noise_multiplier and len(noise) != len(mask):
        raise ConfigError(f"{len(noise)} generators for {len(mask)} clients: one each is needed")
    if not 0 < expected_batch_size < math.inf:
        raise ConfigError(f"expected_batch_size = {expected_batch_size!r}: must be above 0")
    if not inputs.is_floating_point():
        raise ModelError(
            f"inputs of {inputs.dtype} cannot be computed for many clients at once: an index out "
            "of range would reach into another client's embedding; take one client at a time"
        )
    loss = objective(model, loss_fn)

    def of_one(point: Params, record: Tensor, target: Tensor) -> Params:
        found: Params = torch.func.grad(lambda p: loss(p, (record[None], target[None])))(point)
        return found

    of_records = torch.func.vmap(of_one, in_dims=(None, 0, 0), randomness="different")
    of_clients = torch.func.vmap(of_records, randomness="different")
    check_records_are_apart(model, inputs[0])
    with torch_drawing_from(layers, device=str(inputs.device)):
        rows: Params = of_clients(params, inputs, targets)
    flat = torch.cat([value.flatten(2) for value in rows.values()], dim=2)  # (N, B, d)
    is_counted = mask.to(flat).bool() & flat.isfinite().all(2)
    norms = torch.stack([value.flatten(2).norm(dim=2) for value in rows.values()]).norm(dim=0)
    shares = torch.where(is_counted, (max_grad_norm / (norms + SMALL)).clamp(max=1.0), 0.0)
    std = noise_multiplier * max_grad_norm
    released = {}
    for name, value in rows.items():
        finite = torch.where(
            is_counted.reshape(*is_counted.shape, *[1] * (value.ndim - 2)), value, 0
        )
        released[name] = torch.einsum("nb,nb...->n...", shares, finite)
    for client, generator in enumerate(noise if std else ()):
        for value in released.values():
            value[client] += torch.normal(
                0.0,
                std,
                value.shape[1:],
                generator=generator,
                dtype=value.dtype,
                device=value.device,
            )
    return {name: value / expected_batch_size for name, value in released.items()}
