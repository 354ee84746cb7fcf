"""Release engines with a planted bug each: the laws of the engine must refuse them.

Each is a mistake that was made in public, or that is easy to make, under the name of ``Releases``.
"""

import math
from unittest import mock

import torch

from metabloom.clients.privacy import releases as module
from metabloom.clients.privacy.noise import Sources, seeded_sources
from metabloom.clients.privacy.releases import Draw, Releases
from metabloom.ledger import Charge


class NoClip(Releases):
    """Gradients are summed as they are; the noise is that of the bound."""

    def _optimizer(self, moving, noise_multiplier, max_norm):
        return super()._optimizer(moving, noise_multiplier * max_norm / 1e18, 1e18)


class ClipOfTheMean(Releases):
    """The gradient of the batch is clipped, not that of each record."""

    def _optimizer(self, moving, noise_multiplier, max_norm):
        found = super()._optimizer(moving, noise_multiplier, max_norm)

        def clip_and_accumulate():
            sums = [value.grad_sample.sum(0) for value in found.params]
            count = max(1, len(found.params[0].grad_sample))
            length = torch.stack([value.norm() for value in sums]).norm() / count
            factor = (max_norm / (length + 1e-6)).clamp(max=1.0)
            for value, total in zip(found.params, sums, strict=True):
                value.summed_grad = factor * total

        found.clip_and_accumulate = clip_and_accumulate
        return found


class ClipByLayer(Releases):
    """Each parameter's part is clipped to C by itself: together they are longer."""

    def _optimizer(self, moving, noise_multiplier, max_norm):
        found = super()._optimizer(moving, noise_multiplier, max_norm)

        def clip_and_accumulate():
            for value in found.params:
                norms = value.grad_sample.flatten(1).norm(dim=1)
                factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
                value.summed_grad = torch.einsum("i,i...", factors, value.grad_sample)

        found.clip_and_accumulate = clip_and_accumulate
        return found


class NoiseOfSigmaAlone(Releases):
    """The standard deviation is sigma, whatever C is."""

    def _optimizer(self, moving, noise_multiplier, max_norm):
        return super()._optimizer(moving, noise_multiplier / max_norm, max_norm)


class NoiseOverTheRootOfTheBatch(Releases):
    """The noise is divided by sqrt(b) once more."""

    def _optimizer(self, moving, noise_multiplier, max_norm):
        root = math.sqrt(self._expected_batch_size)
        return super()._optimizer(moving, noise_multiplier / root, max_norm)


class NoiseThatComesAgain(Releases):
    """The generator is seeded anew for each release."""

    def _optimizer(self, moving, noise_multiplier, max_norm):
        self._sources = Sources(self._sources.draws, seeded_sources(0).noise)
        return super()._optimizer(moving, noise_multiplier, max_norm)


class NoiseForFilledBatchesOnly(Releases):
    """An empty batch gives zeros: that nobody was in it is told without noise."""

    def _release(self, rows_of, noise_multiplier, max_norm, names, draw):
        chosen = (draw or self.draw()).take()
        if len(chosen):
            return super()._release(rows_of, noise_multiplier, max_norm, names, Draw(chosen))
        self._charge.take(noise_multiplier, self._sample_rate)
        return {n: torch.zeros_like(v) for n, v in self._parameters.items()}


def _multiplied(parameters, count):
    for value in parameters:
        if value.grad_sample is None:
            value.grad_sample = value.new_zeros((count, *value.shape))
        if count:
            finite = value.grad_sample.reshape(count, -1).isfinite().all(1)
            value.grad_sample *= finite.reshape(-1, *[1] * value.ndim)  # NaN * 0 is NaN


class NotFiniteTimesZero(Releases):
    """Rows that are not finite are multiplied by zero."""

    def _release(self, *arguments):
        with mock.patch.object(module, "keep_finite_rows", _multiplied):
            return super()._release(*arguments)


class OneDrawForAll(Releases):
    """The first batch serves every release."""

    def draw(self):
        if not hasattr(self, "_first"):
            self._first = super().draw().rows
        return Draw(self._first)


class BatchesOfOneSize(Releases):
    """q n records without replacement, booked as Poisson."""

    def draw(self):
        total = len(self._records[1])
        size = round(self._sample_rate * total)
        rows = torch.randperm(total, generator=self._sources.draws)[:size]
        return Draw(rows.sort().values)


class NothingBooked(Releases):
    """Releases are free."""

    def __init__(self, *arguments, charge, **more):
        super().__init__(*arguments, charge=_Free({}), **more)


class _Free(Charge):
    def take(self, noise_multiplier, sample_rate):
        pass


class EmptyIsFree(NoiseForFilledBatchesOnly):
    """An empty batch releases its noise, and books nothing."""

    def _release(self, rows_of, noise_multiplier, max_norm, names, draw):
        chosen = (draw or self.draw()).take()
        if not len(chosen):
            self._charge.left[noise_multiplier, self._sample_rate] += 1
        return Releases._release(self, rows_of, noise_multiplier, max_norm, names, Draw(chosen))


class NoiseTimesNineTenths(Releases):
    """A tenth of the noise is missing: the audit by canaries does not see it."""

    def _optimizer(self, moving, noise_multiplier, max_norm):
        return super()._optimizer(moving, 0.9 * noise_multiplier, max_norm)


class NoiseOfAUniformLaw(Releases):
    """The noise has the right deviation and the wrong law."""

    def _optimizer(self, moving, noise_multiplier, max_norm):
        found = super()._optimizer(moving, noise_multiplier, max_norm)

        def add_noise():
            std = noise_multiplier * max_norm
            for value in found.params:
                drawn = torch.rand(value.shape, generator=self._sources.noise) - 0.5
                value.grad = value.summed_grad + std * math.sqrt(12) * drawn

        found.add_noise = add_noise
        return found
