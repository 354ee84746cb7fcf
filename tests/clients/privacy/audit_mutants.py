"""Engines that give away more than they book, kept: the audit must refuse each of them.

Each is a mistake that was made in public, or that is easy to make.
"""

import math
from functools import partial

import torch
from torch.func import functional_call, grad, vmap

from metabloom.clients.privacy import PrivateMetaGradient, Releases, private_meta_gradient
from metabloom.clients.privacy.noise import Sources
from metabloom.clients.privacy.releases import Draw
from metabloom.ledger import PrivacyLedger

# -- one release -----------------------------------------------------------------------------------


class WithoutClip(Releases):
    """The noise is there, the clip is not."""

    def _optimizer(self, moving, noise_multiplier, max_norm):
        return super()._optimizer(moving, noise_multiplier * max_norm / 1e9, 1e9)


class ClipAtTwice(Releases):
    """Records are clipped to 2 C, the noise is of C."""

    def _optimizer(self, moving, noise_multiplier, max_norm):
        return super()._optimizer(moving, noise_multiplier / 2, 2 * max_norm)


class ProductsAtTheGradientsClip(Releases):
    """Hessian products are clipped to a number that knows nothing of ||v||."""

    def hessian_product(self, params, direction, *, noise_multiplier, max_norm, draw=None):
        size = float(torch.stack([v.norm() for v in direction.values()]).norm())
        wide = 10 / (max_norm * size)  # the clip is 10, the noise is of c_h ||v||
        return super().hessian_product(
            params,
            direction,
            noise_multiplier=noise_multiplier,
            max_norm=max_norm * wide,
            draw=draw,
        )

    def _optimizer(self, moving, noise_multiplier, max_norm):
        noise = noise_multiplier / max_norm if max_norm == 10 else noise_multiplier
        return super()._optimizer(moving, noise, max_norm)


class NoiseTimesSeventyPercent(Releases):
    """The noise is a little small."""

    SCALE = 0.7

    def _optimizer(self, moving, noise_multiplier, max_norm):
        return super()._optimizer(moving, self.SCALE * noise_multiplier, max_norm)


class NoiseTimesNinetyPercent(NoiseTimesSeventyPercent):
    """The noise is hardly too small."""

    SCALE = 0.9


class NoiseOverRootOfBatch(Releases):
    """The noise is that of the mean of b noises."""

    def _optimizer(self, moving, noise_multiplier, max_norm):
        noise = noise_multiplier / math.sqrt(self._expected_batch_size)
        return super()._optimizer(moving, noise, max_norm)


class NoiseSeededAgain(Releases):
    """Each release seeds the generator of its noise."""

    def _optimizer(self, moving, noise_multiplier, max_norm):
        self._sources.noise.manual_seed(7)
        return super()._optimizer(moving, noise_multiplier, max_norm)


# -- batches ---------------------------------------------------------------------------------------


class BatchDrawnOnce(Releases):
    """Every release of a step sees the first one's batch, and is booked as one of its own."""

    _rows = None

    def draw(self):
        self._rows = super().draw().rows if self._rows is None else self._rows
        return Draw(self._rows)


class SampledAtTwiceTheRate(Releases):
    """Support and query are halves that were drawn at twice the rate that is booked."""

    def draw(self):
        booked, self._sample_rate = self._sample_rate, min(1.0, 2 * self._sample_rate)
        drawn = super().draw()
        self._sample_rate = booked
        return drawn


def curvature_on_the_support_batch(releases, params, privacy, **options):
    """The Hessian product is taken on the batch of the support gradient, as in plain MAML."""
    rows = iter([(support := releases.draw().rows), releases.draw().rows, support])

    class Fixed:
        def gradient(self, *arguments, **more):
            return releases.gradient(*arguments, draw=Draw(next(rows)), **more)

        def hessian_product(self, *arguments, **more):
            return releases.hessian_product(*arguments, draw=Draw(next(rows)), **more)

    return private_meta_gradient(Fixed(), params, privacy, **options)


# -- steps -----------------------------------------------------------------------------------------


class InTheOpen(Releases):
    """The real engine beside an engine of one's own, which has model, loss and records at hand."""

    def __init__(self, model, loss_fn, records, *, expected_batch_size, sources, **rest):
        super().__init__(
            model,
            loss_fn,
            records,
            expected_batch_size=expected_batch_size,
            sources=sources,
            **rest,
        )
        self.records, self.batch_size, self.noise = records, expected_batch_size, sources.noise
        self.call, self.loss_fn = partial(functional_call, model), loss_fn

    def mean_loss(self, params):
        inputs, targets = self.records
        return self.loss_fn(self.call(params, (inputs,)), targets)

    def one_loss(self, params, x, y):
        return self.loss_fn(self.call(params, (x[None],)), y[None])


def second_order_by_create_graph(releases, params, privacy, *, inner_lr, steps, order):
    """Per-record query gradients are taken through the inner step, clipped and noised.

    So each is bounded, and yet each holds the Hessian of all support records in the open.
    """
    if order == "first":
        return private_meta_gradient(
            releases, params, privacy, inner_lr=inner_lr, steps=steps, order=order
        )

    def adapted(start):
        slope = grad(releases.mean_loss)(start)
        return {name: start[name] - inner_lr * slope[name] for name in start}

    def of_one(x, y):
        return grad(lambda start: releases.one_loss(adapted(start), x, y))(params)

    rows = vmap(of_one, chunk_size=256)(*releases.records)
    sums = {}
    for name, total in clipped_sum(rows, privacy).items():
        noise = torch.empty_like(total).normal_(generator=releases.noise)
        noise = privacy.noise_multiplier * privacy.max_grad_norm * noise
        sums[name] = (total + noise) / releases.batch_size
    return PrivateMetaGradient(sums, None)


def inner_step_in_the_open(releases, params, privacy, *, inner_lr, steps, order):
    """Only what is sent is privatised: the query gradient at a theta' that is not private."""
    for _ in range(steps):
        slope = grad(releases.mean_loss)(params)
        params = {name: params[name] - inner_lr * slope[name] for name in params}
    return _query(releases, params, privacy)


def inner_step_without_noise(releases, params, privacy, *, inner_lr, steps, order):
    """The inner step is clipped record by record, "as it never leaves" without noise."""
    for _ in range(steps):
        rows = vmap(partial(grad(releases.one_loss), params), chunk_size=256)(*releases.records)
        slope = {n: v / releases.batch_size for n, v in clipped_sum(rows, privacy).items()}
        params = {name: params[name] - inner_lr * slope[name] for name in params}
    return _query(releases, params, privacy)


def _query(releases, params, privacy):
    released = releases.gradient(
        params,
        noise_multiplier=privacy.noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
    )
    return PrivateMetaGradient(released, None)


def clipped_sum(rows, privacy):
    norms = torch.stack([v.flatten(1).norm(dim=1) for v in rows.values()]).norm(dim=0)
    factor = (privacy.max_grad_norm / norms.clamp_min(1e-6)).clamp(max=1)
    return {name: torch.einsum("n,n...->...", factor, value) for name, value in rows.items()}


# -- ledgers and rounds ----------------------------------------------------------------------------


class LedgerOfOneMessage(PrivacyLedger):
    """An engine, and its ledger, is built for each message, as in Flower's Opacus example."""

    def reserve(self, events, **options):
        self.path.unlink(missing_ok=True)
        self._state = type(self._state)()  # else it remembers, and refuses
        return super().reserve(events, **options)


class LedgerOfTheLastMessage(PrivacyLedger):
    """The ledger is whole, and what is told is the last entry's epsilon."""

    def epsilon(self, delta, accountant="rdp"):
        last = PrivacyLedger(self.path.with_name("last.jsonl"))
        last.path.unlink(missing_ok=True)
        last.reserve(self.entries()[-1].events)
        return last.epsilon(delta, accountant)


def sources_of_a_seed(device="cpu"):
    """Every round draws the noise that every round draws."""
    return Sources(torch.Generator().manual_seed(1), torch.Generator(device).manual_seed(2))
