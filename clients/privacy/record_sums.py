r"""Clipped sums over records without hooks: vmap(grad) over a padded, masked batch.

    sum_i m_i g_i min(1, C / (||g_i|| + 1e-6)),   m_i = 0 for padding and where ||g_i|| is no number

Batches are cut into pieces of two sizes, the last one padded, so that two compilations serve all.
What is compiled is traced on tensors that hold no numbers: nothing of a client can be in it.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from logging import WARNING, getLogger

import torch
from flwr.common import log
from torch import Tensor, fx, nn
from torch.func import functional_call

from ...errors import ModelError
from ..batches import Padded, pad
from ..data import Batch
from ..kernel import Kernel, compiled
from ..objective import LossFn, Params, objective
from .identity import Kept, kind_key
from .private_models import made_up_pair
from .record_graphs import scatter_pools, split_outer_products, traced

SIZES = (64, 16)  # of compiled pieces
SMALL = 1e-6  # what Opacus adds to a norm before it divides by it

Rows = Tensor | tuple[Tensor, Tensor]  # (B, *shape), or (B, m) and (B, n) of outer products
Step = Callable[..., Sequence[Tensor]]
SumsOf = Callable[[Padded, Tensor], Sequence[Tensor]]
STEPS: Kept[Step] = Kept(32)
REFUSED: Kept[str] = Kept(256)  # why a kind of model cannot be taken; "" where it can

_log = getLogger(__name__)


def clipped_sums(rows: Sequence[Rows], mask: Tensor, bound: Tensor) -> list[Tensor]:
    """Return the sums over records of ``rows``, each record clipped to ``bound`` over all of them.

    Args:
        rows: of each parameter.
        mask: (B,) bool; a record where it is False has no share, whatever is in its rows.
        bound: C, a scalar.
    """
    norms = torch.stack([_norm(one) for one in rows]).norm(dim=0)  # (P, B) -> (B,)
    # Finite numbers whose norm overflows have no share either: C / inf = 0.
    counts = mask & norms.isfinite()
    shares = torch.where(counts, (bound / (norms + SMALL)).clamp(max=1.0), 0.0)
    return [_sum(one, counts, shares) for one in rows]


def _norm(rows: Rows) -> Tensor:
    if isinstance(rows, Tensor):
        found: Tensor = rows.flatten(1).norm(dim=1) if rows.ndim > 1 else rows.abs()
        return found
    # In float64: there the squares of float32 numbers neither vanish nor overflow. A norm that came
    # out too small would let a record have more influence than C.
    left, right = (torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in rows)
    product: Tensor = (left * right).to(rows[0].dtype)
    return product


def _sum(rows: Rows, counts: Tensor, shares: Tensor) -> Tensor:
    def finite(part: Tensor) -> Tensor:  # NaN * 0 is NaN
        return torch.where(counts.reshape(-1, *[1] * (part.ndim - 1)), part, 0.0)

    if isinstance(rows, Tensor):
        return torch.einsum("i,i...->...", shares, finite(rows))
    left, right = rows
    return (finite(left) * shares[:, None]).T @ finite(right)  # (m, B) (B, n)


class RecordSums:
    """Clipped sums of the gradients of one model's records.

    Args:
        model: called functionally in training mode and never changed.
        loss_fn: a scalar mean over a batch; called for each record alone.
        records: of which shape and dtype the records are; nothing else of them is used.
        kernel: "compiled" or "vmap".

    Raises:
        ModelError: where vmap cannot take the model or the loss (some in-place writes, layers that
            draw random numbers), or, to be compiled, they cannot be told from others of their kind.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, records: Batch, *, kernel: Kernel
    ) -> None:
        in_training = all(module.training for module in model.modules())
        self._model = model if in_training else copy.deepcopy(model).train()
        self._loss_fn = loss_fn
        self._is_compiled = kernel == "compiled"
        device = records[0].device
        self._held = {
            name: value.detach().to(device)
            for name, value in (*model.named_parameters(), *model.named_buffers())
        }
        self.names = tuple(name for name, one in model.named_parameters() if one.requires_grad)
        self._key = kind_key(model, loss_fn, records)
        self._try(records)

    @property
    def sizes(self) -> tuple[int, int] | None:
        """The sizes that pieces of a batch are padded to; None: any is taken as it is."""
        return SIZES if self._is_compiled else None

    def gradient(
        self, params: Params, names: Sequence[str], batch: Padded, bound: Tensor
    ) -> Sequence[Tensor]:
        """Return the clipped sum of the gradients of a batch with respect to ``names``.

        Args:
            params: every trainable parameter.
            names: which gradients are clipped, together.
            batch: inputs (B, ...), targets (B, ...), and a mask (B,), False for padding.
            bound: C, a scalar.
        """
        *records, mask = batch
        state = [params.get(name, value).detach() for name, value in self._held.items()]
        with torch.no_grad():
            if self._is_compiled and not any(map(_has_negative_indices, records)):
                step = self._step(tuple(names), records)
                return step(*state, *records, mask, bound)
            return clipped_sums(self._rows(names)(*state, *records), mask, bound)

    def _rows(self, names: Sequence[str]) -> Callable[..., list[Tensor]]:
        return rows_of(self._model, self._loss_fn, tuple(self._held), names)

    def _step(self, names: tuple[str, ...], records: Sequence[Tensor]) -> Step:
        tensors = (*self._held.values(), *records)
        return STEPS.get_or_make(
            (self._key, names, len(records[0])),
            lambda: compiled(step_of(traced(self._rows(names), tensors))),
        )

    def _try(self, records: Batch) -> None:
        """Raise ModelError where made-up records, of targets 0 each, cannot be summed."""
        if self._is_compiled and self._key is None:
            raise ModelError("it, or the loss, cannot be told from others of its kind")
        inputs = made_up_pair(records[0])
        targets = records[1].new_zeros((2, *records[1].shape[1:]))
        tensors = (*self._held.values(), inputs, targets)

        def attempt() -> str:
            mask = targets.new_ones(2, dtype=torch.bool)
            bound = tensors[0].new_ones(())
            try:
                found = clipped_sums(self._rows(self.names)(*tensors), mask, bound)
                if self._is_compiled:
                    step = step_of(traced(self._rows(self.names), tensors))
                    for one, other in zip(step(*tensors, mask, bound), found, strict=True):
                        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
            except Exception as err:  # whatever vmap and a user's model raise
                text = str(err).strip().partition("\n")[0][:200]
                return f"{type(err).__name__}: {text}"
            return ""

        if reason := REFUSED.get_or_make(self._key and (self._key, self._is_compiled), attempt):
            raise ModelError(reason)


def _has_negative_indices(value: Tensor) -> bool:
    """Return whether whole numbers are negative: compiled code takes -1 for the last one."""
    return not value.is_floating_point() and bool((value < 0).any())


def sums_or_none(
    model: nn.Module, loss_fn: LossFn, records: Batch, kernel: Kernel
) -> RecordSums | None:
    """Return the sums of ``model``; None, with a warning, where they cannot be had."""
    try:
        return RecordSums(model, loss_fn, records, kernel=kernel)
    except ModelError as err:
        _warn_once(type(model).__name__, kernel, str(err))
        return None


@lru_cache(maxsize=256)
def _warn_once(model: str, kernel: str, reason: str) -> None:
    log(
        WARNING,
        "kernel %r cannot take private %s (%s): it trains by hooks, more slowly",
        kernel,
        model,
        reason,
    )


# -- whole batches --------------------------------------------------------------------------------


def sums_over(
    sums_of: SumsOf,
    records: Batch,
    cut: Iterable[tuple[Tensor, int]],
    bound: float,
    like: Params,
) -> list[Tensor]:
    """Return the clipped sums over the records of all pieces.

    Args:
        sums_of: (padded batch, C) -> clipped sums.
        records: all of them.
        cut: which are summed, see ``pieces``.
        bound: C.
        like: in whose shapes and dtypes.
    """
    sums = [torch.zeros_like(value) for value in like.values()]
    limit = sums[0].new_full((), bound)
    for piece, size in cut:
        found = _sound_sums(sums_of, (records[0][piece], records[1][piece]), size, limit)
        sums = [total + part for total, part in zip(sums, found, strict=True)] if found else sums
    return sums


def pieces(rows: Tensor, largest: int, least: int | None = None) -> Iterator[tuple[Tensor, int]]:
    """Yield ``rows`` in pieces, each with the size that it is to be padded to.

    Args:
        rows: (n,).
        largest: size of a piece.
        least: the other size, for what is left; None: what is left is not padded.

    >>> [(len(piece), size) for piece, size in pieces(torch.arange(120), 64, 16)]
    [(64, 64), (56, 64)]
    >>> [(len(piece), size) for piece, size in pieces(torch.arange(90), 64, 16)]
    [(64, 64), (16, 16), (10, 16)]
    >>> [(len(piece), size) for piece, size in pieces(torch.arange(90), 64)]
    [(64, 64), (26, 26)]
    """
    while len(rows):
        size = min(largest, len(rows))
        if least is not None:
            size = largest if len(rows) > largest - least else least
        yield rows[:size], size
        rows = rows[size:]


def noisy(
    sums: Sequence[Tensor], std: float, expected_batch_size: float, generator: torch.Generator
) -> list[Tensor]:
    """Return (sum + N(0, std^2)) / b, parameter by parameter, as Opacus draws it."""
    if not std:
        return [value / expected_batch_size for value in sums]
    return [
        (
            value
            + torch.normal(
                0.0,
                std,
                value.shape,
                generator=generator,
                dtype=value.dtype,
                device=value.device,
            )
        )
        / expected_batch_size
        for value in sums
    ]


def _sound_sums(sums_of: SumsOf, batch: Batch, size: int, bound: Tensor) -> Sequence[Tensor] | None:
    """Return the sums over the records at which nothing raises; None where there is none."""

    def sums(rows: Sequence[int]) -> Sequence[Tensor]:
        inputs, targets = batch
        chosen = list(rows)
        return sums_of(pad((inputs[chosen], targets[chosen]), max(size, len(chosen))), bound)

    def is_sound(row: int) -> bool:
        try:
            sums([row])
        except Exception:
            return False
        return True

    everyone = range(len(batch[1]))
    try:
        return sums(everyone)
    except Exception as err:
        _log.error("records that raise have no share in a release: %s", err)
    sound = [row for row in everyone if is_sound(row)]
    return sums(sound) if sound else None


def rows_of(
    model: nn.Module, loss_fn: LossFn, held: Sequence[str], names: Sequence[str]
) -> Callable[..., list[Tensor]]:
    """Return the map (*state, inputs, targets) -> gradients of each record, (B, *shape) a name.

    Args:
        model: called functionally.
        loss_fn: called for each record alone.
        held: names of the tensors in the state: parameters and buffers.
        names: with respect to which ones.
    """

    def loss(moving: Params, rest: Params, record: Tensor, target: Tensor) -> Tensor:
        output = functional_call(model, {**rest, **moving}, (record[None],))
        return loss_fn(output, target[None]).sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, None, 0, 0))  # no random layers

    def rows(*tensors: Tensor) -> list[Tensor]:
        *values, inputs, targets = tensors
        state = dict(zip(held, values, strict=True))
        moving = {name: state.pop(name) for name in names}
        return list(each(moving, state, inputs, targets).values())

    return rows


def step_of(graph: fx.GraphModule) -> Step:
    """Return the map (*state, inputs, targets, mask, C) -> clipped sums of the rows of ``graph``.

    The graph is changed.
    """
    scatter_pools(graph)
    forms = split_outer_products(graph)

    def private_step(*tensors: Tensor) -> list[Tensor]:
        *given, mask, bound = tensors
        found = iter(graph(*given))
        rows = [(next(found), next(found)) if is_outer else next(found) for is_outer in forms]
        return clipped_sums(rows, mask, bound)

    return private_step


def hessian_products(
    model: nn.Module, loss_fn: LossFn, params: Params, direction: Params
) -> Callable[[Tensor, Tensor], Params]:
    """Return the map (inputs, targets) -> H_i v of each record i: (B, *shape) for each name."""
    loss = objective(model, loss_fn)

    def of_one(record: Tensor, target: Tensor) -> Params:
        def along(point: Params) -> Tensor:
            slope = torch.func.grad(
                lambda part: loss({**point, **part}, (record[None], target[None]))
            )({name: point[name] for name in direction})
            return torch.stack([(slope[n] * direction[n]).sum() for n in direction]).sum()

        found: Params = torch.func.grad(along)(params)
        return found

    return torch.func.vmap(of_one, randomness="different")
