r"""The one door through which records leave a client: draw, clip, sum, add noise, book.

    R(q, sigma, C; phi) = (1 / b) [ sum_{i in B} phi_i min(1, C / ||phi_i||) + N(0, sigma^2 C^2 I) ]

with a fresh Poisson(q) batch B for each release. phi_i is the gradient of record i's loss, or its
Hessian-vector product. Papers: DP-SGD 1607.00133; the engine is Opacus 2109.12298.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from logging import getLogger
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError, PrivacyError
from ...ledger import Charge
from ...opacus_import import import_opacus
from ...streams import torch_drawing_from, torch_seeded
from ..batches import Padded
from ..data import Batch
from ..kernel import Kernel
from ..objective import LossFn, Params
from .identity import Kept, kind_key, values_of
from .noise import Sources
from .private_models import (
    backward,
    check_private_model,
    check_records_are_apart,
    check_rows_are_gradients,
    forget_batch,
    hooked,
    made_up_pair,
)
from .record_sums import (
    SumsOf,
    clipped_sums,
    hessian_products,
    noisy,
    pieces,
    sums_or_none,
    sums_over,
)

GRAIN = 2**24  # torch.rand gives multiples of 1 / GRAIN
LEAST_BOUND = 1e-30  # below it float32 has no room for noise of the right size
CHUNK = 256  # records whose gradients are held at once: bounds the memory of a large batch

PASSED: Kept[bool] = Kept(256)  # checks of models that passed: nothing else of them is kept

_log = getLogger(__name__)


class Draw:
    """A Poisson sample of the records, good for one release.

    Attributes:
        rows: which records are in it, ascending; often none.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._taken = False

    def take(self) -> Tensor:
        """Return the rows, once.

        Raises:
            PrivacyError: the second time. Two releases on one batch are one joint mechanism, with
                less noise than two of their own.
        """
        if self._taken:
            raise PrivacyError(
                "a batch was to be released twice: together that is one mechanism of noise "
                "(sigma_1^-2 + sigma_2^-2)^(-1/2), which was not booked; draw another batch"
            )
        self._taken = True
        return self.rows


class Releases:
    """Give privatised sums over records, each one paid for by a ``Charge``.

    Args:
        model: the plain module; it is copied, never changed.
        loss_fn: a scalar mean over a batch. It is called for each record alone, so that a loss
            that mixes records cannot make one record's share depend on another.
        records: (inputs, targets) of all records; may be empty.
        sample_rate: q in (0, 1].
        expected_batch_size: b > 0.
        charge: what was reserved.
        sources: of batches and noise.
        kernel: "eager": Opacus' hooks; "vmap" and "compiled": the same sums and the same noise
            without hooks. A model that these cannot take stays with the hooks, and a warning says
            so.

    Raises:
        ModelError: where the model mixes records, or has layers without gradients of single
            records, naming the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        records: Batch,
        *,
        sample_rate: float,
        expected_batch_size: float,
        charge: Charge,
        sources: Sources,
        kernel: Kernel = "eager",
    ) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._records = records
        self._sample_rate = sample_rate
        self._expected_batch_size = expected_batch_size
        self._charge = charge
        self._sources = sources
        self._check()
        self._sums = None if kernel == "eager" else sums_or_none(model, loss_fn, records, kernel)

    def _check(self) -> None:
        """Check the model; what passed is not tried again on equal values of an equal model."""
        model, loss_fn, records = self._model, self._loss_fn, self._records
        kind = kind_key(model, loss_fn, records)
        values = kind and values_of(model)

        def passes(check: Callable[..., Any], subject: Callable[[], Any], *rest: object) -> None:
            key = kind and (check, kind, values)
            PASSED.get_or_make(key, lambda: check(subject(), *rest) is None)

        passes(check_private_model, lambda: model)
        passes(_check_hooks, lambda: self._hooked)
        passes(check_records_are_apart, lambda: model, records[0])
        passes(check_rows_are_gradients, lambda: self._hooked, records[0])
        passes(check_loss, lambda: self._hooked, loss_fn, records)

    @cached_property
    def _hooked(self) -> Any:
        return hooked(self._model).to(self._records[0].device)

    @cached_property
    def _parameters(self) -> dict[str, Any]:  # Opacus gives them grad_sample and summed_grad
        return {
            name.removeprefix("_module."): value
            for name, value in self._hooked.named_parameters()
            if value.requires_grad
        }

    def draw(self) -> Draw:
        """Return a fresh Poisson sample: each record is in it with chance q, by itself."""
        import_opacus()
        from opacus.utils.uniform_sampler import UniformWithReplacementSampler

        total = len(self._records[1])
        if not total:
            return Draw(torch.empty(0, dtype=torch.long))
        sampler = UniformWithReplacementSampler(
            num_samples=total,
            sample_rate=math.floor(self._sample_rate * GRAIN) / GRAIN,  # never above what is booked
            generator=self._sources.draws,
            steps=1,
        )
        (rows,) = list(sampler)
        return Draw(torch.tensor(rows, dtype=torch.long))

    def gradient(
        self,
        params: Params,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        names: Iterable[str] | None = None,
        draw: Draw | None = None,
    ) -> Params:
        """Return one release of the loss gradient at ``params``.

        Args:
            params: every trainable parameter.
            noise_multiplier: sigma.
            max_grad_norm: C, over the parameters in ``names`` together.
            names: which parameters are released; None: all.
            draw: the batch; None: a fresh one.

        Raises:
            PrivacyError: where the charge does not hold such a release, or the batch was used.
        """
        if self._sums is not None:
            chosen = self._sums.names if names is None else tuple(names)
            sums_of = partial(self._sums.gradient, params, chosen)
            like = {name: params[name].detach() for name in chosen}
            sizes = self._sums.sizes
            return self._summed(sums_of, sizes, like, noise_multiplier, max_grad_norm, draw)

        def rows_of(inputs: Tensor, targets: Tensor) -> None:
            with torch.enable_grad():
                losses = per_record_loss(self._loss_fn, self._hooked(inputs), targets)
                backward(losses.sum())

        self._load(params)
        return self._release(rows_of, noise_multiplier, max_grad_norm, names, draw)

    def hessian_product(
        self,
        params: Params,
        direction: Params,
        *,
        noise_multiplier: float,
        max_norm: float,
        draw: Draw | None = None,
    ) -> Params:
        r"""Return one release of H v at ``params``: each record's H_i v clipped to c_h ||v||.

        Args:
            params: every trainable parameter.
            direction: v, for some or all of the parameters; public, or released before.
            noise_multiplier: sigma_h.
            max_norm: c_h.
            draw: the batch; None: a fresh one.
        """
        size = float(torch.stack([value.norm() for value in direction.values()]).norm())
        if max_norm * size < LEAST_BOUND:  # as good as H 0 = 0, without looking at the data
            self._charge.take(noise_multiplier, self._sample_rate)
            return {name: torch.zeros_like(value) for name, value in params.items()}
        plain = copy.deepcopy(self._model).to(self._records[0].device).train()  # not hooked
        products = hessian_products(plain, self._loss_fn, params, direction)
        if self._sums is not None:
            like = {name: params[name].detach() for name in self._sums.names}

            def sums_of(batch: Padded, bound: Tensor) -> list[Tensor]:
                rows = products(*batch[:2])
                return clipped_sums([rows[name].detach() for name in like], batch[2], bound)

            return self._summed(sums_of, None, like, noise_multiplier, max_norm * size, draw)

        def rows_of(inputs: Tensor, targets: Tensor) -> None:
            for name, rows in products(inputs, targets).items():
                self._parameters[name].grad_sample = rows.detach()

        return self._release(rows_of, noise_multiplier, max_norm * size, None, draw)

    def _load(self, params: Params) -> None:
        with torch.no_grad():
            for name, value in self._parameters.items():
                value.copy_(params[name])

    def _summed(
        self,
        sums_of: SumsOf,
        sizes: tuple[int, int] | None,
        like: Params,
        noise_multiplier: float,
        max_norm: float,
        draw: Draw | None,
    ) -> Params:
        """Release what ``_release`` does, from clipped sums instead of the records' rows."""
        self._charge.take(noise_multiplier, self._sample_rate)  # first: then nothing can be free
        chosen = (draw or self.draw()).take()
        cut = pieces(chosen, *(sizes or (CHUNK,)))
        sums = sums_over(sums_of, self._records, cut, max_norm, like)
        std, size = noise_multiplier * max_norm, self._expected_batch_size
        return dict(zip(like, noisy(sums, std, size, self._sources.noise), strict=True))

    def _release(
        self,
        rows_of: Callable[[Tensor, Tensor], None],
        noise_multiplier: float,
        max_norm: float,
        names: Iterable[str] | None,
        draw: Draw | None,
    ) -> Params:
        self._charge.take(noise_multiplier, self._sample_rate)  # first: then nothing can be free
        moving = {n: self._parameters[n] for n in (self._parameters if names is None else names)}
        optimizer = self._optimizer(moving, noise_multiplier, max_norm)
        inputs, targets = self._records
        chunks = torch.split((draw or self.draw()).take(), CHUNK)
        for number, rows in enumerate(chunks, 1):
            for value in self._parameters.values():
                value.grad_sample = None
            if len(rows):
                # A server that can compute the masks of dropout sees a record shift those of all
                # records after it: they come from the secret source of the batches.
                with torch_drawing_from(self._sources.draws, device=str(inputs.device)):
                    self._sound_rows(rows_of, inputs[rows], targets[rows])
            keep_finite_rows(moving.values(), len(rows))
            optimizer.signal_skip_step(do_skip=number < len(chunks))
            optimizer.step()  # of rate 0: clips and sums; in the last chunk adds noise, divides
        released = {name: value.grad.detach().clone() for name, value in moving.items()}
        for value in self._parameters.values():
            value.grad = value.grad_sample = value.summed_grad = None
        return released

    def _sound_rows(
        self, rows_of: Callable[[Tensor, Tensor], None], inputs: Tensor, targets: Tensor
    ) -> None:
        """Let ``rows_of`` leave each record's share; a record at which it raises has none.

        That a round fails would tell that such a record is there.
        """
        try:
            return rows_of(inputs, targets)
        except Exception as err:
            _log.error("records that raise have no share in a release: %s", err)
        sound = [
            row for row in range(len(targets)) if self._is_sound(rows_of, inputs, targets, row)
        ]
        forget_batch(self._hooked)
        if sound:
            rows_of(inputs[sound], targets[sound])
        for value in self._parameters.values():
            if value.grad_sample is not None:
                share, value.grad_sample = (
                    value.grad_sample,
                    value.new_zeros((len(targets), *value.shape)),
                )
                value.grad_sample[sound] = share

    def _is_sound(
        self, rows_of: Callable[[Tensor, Tensor], None], inputs: Tensor, targets: Tensor, row: int
    ) -> bool:
        forget_batch(self._hooked)
        try:
            rows_of(inputs[row : row + 1], targets[row : row + 1])
        except Exception:
            return False
        return True

    def _optimizer(
        self, moving: Mapping[str, nn.Parameter], noise_multiplier: float, max_norm: float
    ) -> Any:
        import_opacus()
        from opacus.optimizers import DPOptimizer

        return DPOptimizer(
            torch.optim.SGD(moving.values(), lr=0.0),
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_norm,
            expected_batch_size=self._expected_batch_size,
            generator=self._sources.noise,
        )


def _check_hooks(twin: object) -> None:
    """Do nothing: a model that hooks cannot take has no twin."""


def per_record_loss(loss_fn: LossFn, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each record alone: (B, ...), (B, ...) -> (B,)."""
    if loss_fn is nn.functional.cross_entropy and outputs.ndim == 2 and targets.ndim == 1:
        return nn.functional.cross_entropy(outputs, targets, reduction="none")  # the same, faster
    alone = torch.func.vmap(lambda output, target: loss_fn(output[None], target[None]))
    losses: Tensor = alone(outputs, targets)
    return losses


def check_loss(twin: nn.Module, loss_fn: LossFn, records: Batch) -> None:
    """Raise ModelError where the loss fails for made-up records, of target 0 each."""
    targets = records[1].new_zeros((2, *records[1].shape[1:]))
    with torch.no_grad(), torch_seeded(0, "loss", device=str(records[0].device)):
        outputs = twin(made_up_pair(records[0]))
    try:
        per_record_loss(loss_fn, outputs, targets)
    except Exception as err:
        raise ModelError(
            f"the loss of a made-up record fails ({type(err).__name__}): it is called for outputs "
            f"{tuple(outputs[:1].shape)} and targets {tuple(targets[:1].shape)}"
        ) from err


def keep_finite_rows(parameters: Iterable[nn.Parameter], count: int) -> None:
    """Set the share of a record to zero where any part of it is NaN or infinite.

    One such record would make the whole release NaN, which tells that it is there.
    """
    held = list(parameters)
    for value in held:
        if value.grad_sample is None:  # type: ignore[attr-defined]  # not used in the forward pass
            value.grad_sample = value.new_zeros((count, *value.shape))  # type: ignore[attr-defined]
    if not count:
        return
    sizes = {len(value.grad_sample) for value in held}  # type: ignore[attr-defined]
    if sizes != {count}:  # each row would be clipped by itself, and a record be in several
        raise ModelError(f"{count} records gave {sizes} rows of gradients: one each is needed")
    flat = [value.grad_sample.reshape(count, -1) for value in held]  # type: ignore[attr-defined]
    norms = torch.stack([torch.linalg.vector_norm(rows, dim=1) for rows in flat])
    if norms.isfinite().all():  # a norm that is not may yet be of finite numbers: then look at each
        return
    finite = torch.stack([rows.isfinite().all(1) for rows in flat]).all(0)  # (P, B) -> (B,)
    if not finite.all():
        for value in held:
            value.grad_sample[~finite] = 0.0  # type: ignore[attr-defined]  # NaN * 0 is NaN
