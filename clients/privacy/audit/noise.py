r"""Noise of the right size, drawn anew each time, on batches that are drawn anew each time.

Canaries miss noise of .9 sigma, and noise or batches that are used twice look like others to them.
"""

import itertools
import math
from dataclasses import replace

import torch
from torch import Tensor

from ....accounting import Event
from .bench import Bench
from .canaries import CURVED, FLAT, Canaries, Watched, params_at
from .findings import Finding, deviation_ratio
from .steps import PULLS, second_order_step

NOISE_COUNT = 20_000  # coordinates: noise of .9 sigma then lies 20 standard deviations off
RATE = 0.25


def check_noise(bench: Bench) -> list[Finding]:
    """Release without records: sum (x b / (sigma C))^2 is chi^2 with one degree a coordinate.

    Finds a scale off by 2.5 % (at alpha = 1e-6). Does not find noise of another shape.
    """
    wide = replace(bench, count=NOISE_COUNT)
    releases = _released_without_records(wide)
    return [
        bench.ratio_finding(deviation_ratio(values, 1.0), NOISE_COUNT, f"the noise of a {kind}")
        for kind, values in zip(("gradient", "Hessian-vector product"), releases, strict=True)
    ]


def check_fresh_noise(bench: Bench) -> list[Finding]:
    """Release twice on the same records and parameters: the difference is N(0, 2 (sigma C / b)^2).

    Noise from a generator that was seeded again gives 0. So do a gradient and a Hessian product
    without records, where one was given the other's noise.
    """
    canaries = bench.canaries(CURVED)
    releases = bench.watched(canaries.records, [Event(1.0, 1.0, 4)])
    point, direction = params_at(-canaries.signs), params_at(canaries.signs)
    for _ in range(2):
        releases.gradient(point, noise_multiplier=1.0, max_grad_norm=1.0)
    for _ in range(2):
        releases.hessian_product(point, direction, noise_multiplier=1.0, max_norm=0.1)
    first, second, third, fourth = bench.standardised(releases)
    pairs = {
        "two gradients": (first, second),
        "two Hessian-vector products": (third, fourth),
        "a gradient and a Hessian-vector product": _released_without_records(bench),
    }
    return [
        bench.ratio_finding(
            deviation_ratio(one - other, math.sqrt(2)), bench.count, f"noise of {what}, compared"
        )
        for what, (one, other) in pairs.items()
    ]


def check_fresh_batches(bench: Bench) -> list[Finding]:
    """Run one second-order step at q = 1/4, with hardly any noise, so that batches can be seen.

    Each release shows which canaries were in its batch: the shares of those in one, and in two at
    once, are q and q^2, up to the error of a binomial share. Finds batches that are used twice in
    one meta-step, by whatever way, and another sample rate than was booked. A step whose batches
    cannot be told, since it goes around the engine or does not clip, fails too.
    """
    privacy = replace(bench.privacy, sample_rate=RATE, noise_multiplier=0.01)
    canaries, releases, _ = second_order_step(replace(bench, privacy=privacy))
    drawn = _batches(canaries, releases, bench)
    held = int(canaries.is_in.sum())
    if len(drawn) < 3:  # released around the engine: nothing is known of its batches
        return [bench.share_finding(math.nan, RATE, held, "batches of a second-order step")]
    rate = float(torch.stack(drawn).double().mean())
    both = [float((one & other).double().mean()) for one, other in itertools.combinations(drawn, 2)]
    worst = max(both, key=lambda share: abs(share - RATE**2))
    return [
        bench.share_finding(rate, RATE, held * len(drawn), "the sample rate of three batches"),
        bench.share_finding(
            worst, RATE**2, held, "the overlap of two batches of one meta-step", pairs=len(both)
        ),
    ]


def _released_without_records(bench: Bench) -> tuple[Tensor, Tensor]:
    canaries = bench.canaries(FLAT)
    releases = bench.watched(canaries.none, [Event(1.0, 1.0, 2)])
    point, direction = params_at(torch.zeros(bench.count)), params_at(canaries.signs)
    releases.gradient(point, noise_multiplier=1.0, max_grad_norm=1.0)
    releases.hessian_product(point, direction, noise_multiplier=1.0, max_norm=0.1)
    gradient, product = bench.standardised(releases)
    return gradient, product


def _batches(canaries: Canaries, releases: Watched, bench: Bench) -> list[Tensor]:
    """Return for each release which of the canaries present were in its batch, (n,) bool."""
    found = []
    for pull, value in zip(PULLS, bench.standardised(releases), strict=False):
        told = (pull * canaries.signs * value)[canaries.is_in]
        found.append(told > (told.min() + told.max()) / 2)  # two clusters, a clip bound apart
    return found
