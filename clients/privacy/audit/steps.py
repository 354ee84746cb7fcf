"""Canaries in single releases and in whole steps: mu^ against the mu that was booked.

Every sample rate is 1, where the composition of Gaussian releases is exact.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ....accounting import Event
from ...local_update import run_update
from ...objective import Params
from ..updates import meta_events
from .bench import Bench
from .canaries import CURVED, FLAT, WEIGHT, Canaries, Watched, params_at
from .findings import Finding


def check_gradient(bench: Bench) -> list[Finding]:
    """Release one gradient: coordinate i is N(C / b, (sigma C / b)^2) where i is present, else 0.

    mu = 1 / sigma. Finds a clip bound that is missing or above C, and noise below sigma C / b.
    """
    canaries = bench.canaries(FLAT)
    releases = bench.watched(canaries.records, [Event(1.0, 1.0)])
    releases.gradient(_origin(bench), noise_multiplier=1.0, max_grad_norm=1.0)
    (values,) = bench.standardised(releases)
    return [bench.canary_finding(values, canaries.is_in, "one release of a gradient")]


def check_hvp(bench: Bench) -> list[Finding]:
    """Release one H v with v of random signs: coordinate i moves by v_i c_h ||v|| / b.

    mu = 1 / sigma_h. Finds the same as ``check_gradient`` on the way of Hessian products.
    """
    canaries = bench.canaries(CURVED)
    releases = bench.watched(canaries.records, [Event(1.0, 1.0)])
    releases.hessian_product(
        _origin(bench), params_at(canaries.signs), noise_multiplier=1.0, max_norm=0.1
    )
    (values,) = bench.standardised(releases)
    told = canaries.signs * values
    return [bench.canary_finding(told, canaries.is_in, "one release of a Hessian-vector product")]


def check_fomaml(bench: Bench) -> list[Finding]:
    """Run one FOMAML step of K = 1 and sum both releases: mu = sqrt(2) / sigma.

    The server composes all that was released, also the inner step that it never sees alone.
    """
    canaries = bench.canaries(FLAT)
    releases = bench.watched(canaries.records, meta_events(bench.privacy, steps=1, order="first"))
    found = bench.engine.meta_gradient(
        releases.as_releases, _origin(bench), bench.privacy, inner_lr=0.1, steps=1, order="first"
    )
    output = found.grads[WEIGHT][0]
    return [
        *_transcript(bench, canaries, releases, "all releases of a FOMAML step"),
        bench.canary_finding(output, canaries.is_in, "the output of a FOMAML step"),
    ]


def check_reptile(bench: Bench) -> list[Finding]:
    """Run two DP-SGD steps, as Reptile's client does: mu = sqrt(2) / sigma, all in their sum."""
    canaries = bench.canaries(FLAT)
    releases = bench.watched(canaries.records, [Event(1.0, 1.0, 2)])
    update = bench.engine.sgd_update(releases.as_releases, bench.privacy, lr=0.1)
    start = _origin(bench)
    moved = (run_update(update, start, range(2)).params[WEIGHT] - start[WEIGHT])[0]
    return [
        *_transcript(bench, canaries, releases, "all releases of two DP-SGD steps"),
        bench.canary_finding(-moved, canaries.is_in, "the sum of two DP-SGD steps"),
    ]


def check_inner_step(bench: Bench) -> list[Finding]:
    """Run one FOMAML step whose query gradient reads off where the inner step went.

    Canaries pull theta' by alpha C / b, along with the noise. Twenty probes of each coordinate,
    below their clip bound, send four times that pull back, beside the canary's own query gradient:
    an honest output has mu = 3 / (sqrt(17) sigma). An inner step in the open shows 3 / sigma where
    it clips, and 19 / sigma where it does not, against sqrt(2) / sigma booked at most.
    """
    bench = replace(bench, count=max(FEWEST_PROBED, bench.count // 4))
    canaries = replace(bench.canaries(FLAT), probes=20, scale=3000.0)
    releases = bench.watched(canaries.records, meta_events(bench.privacy, steps=1, order="first"))
    found = bench.engine.meta_gradient(
        releases.as_releases,
        _origin(bench),
        bench.privacy,
        inner_lr=0.02 * bench.batch_size,
        steps=1,
        order="first",
    )
    told = -found.grads[WEIGHT][0]
    return [bench.canary_finding(told, canaries.is_in, "where a FOMAML step's inner step went")]


def check_second_order(bench: Bench) -> list[Finding]:
    """Run one second-order step of K = 1: mu = sqrt(3) / sigma for all, and so for its output.

    The output v - H~ (alpha v) of an honest step shows sqrt(2) of it: the support's own release is
    not in it. Finds curvature that leaves in the open: support Hessians of a graph that was kept
    (create_graph=True) with clip and noise on the query's gradients only.
    """
    canaries, releases, output = second_order_step(bench)
    told = -canaries.signs * output
    return [
        *_transcript(bench, canaries, releases, "all releases of a second-order step", signs=PULLS),
        bench.canary_finding(told, canaries.is_in, "the output of a second-order step"),
    ]


FEWEST_PROBED = 200
# Where a canary pulls the support's, the query's and the curvature's release, in signs of r.
PULLS = (-1, -1, 1)


def second_order_step(bench: Bench) -> tuple[Canaries, Watched, Tensor]:
    """Return the canaries, what was released, and the output (m,) of one second-order step.

    At w = -r canaries pull along -r in the support and in the query, and their curvature, acting
    on v ~ r, along r. m / 2 carriers give alpha v the length b C / c_h, so that gradients and
    curvature weigh the same in the output.
    """
    canaries = replace(bench.canaries(CURVED), carriers=bench.count // 2)
    privacy = replace(bench.privacy, hvp_max_norm=100 / bench.count)
    releases = bench.watched(canaries.records, meta_events(privacy, steps=1, order="exact"))
    found = bench.engine.meta_gradient(
        releases.as_releases,
        params_at(-canaries.signs),
        privacy,
        inner_lr=0.02 * bench.batch_size,
        steps=1,
        order="exact",
    )
    return canaries, releases, found.grads[WEIGHT][0]


def _transcript(
    bench: Bench,
    canaries: Canaries,
    releases: Watched,
    what: str,
    signs: Sequence[int] = (),
) -> list[Finding]:
    """Return what the sum of all releases tells; of a step that made none, its output tells all."""
    values = bench.standardised(releases)
    if not values:
        return []
    if signs:
        values = [pull * canaries.signs * one for pull, one in zip(signs, values, strict=False)]
    return [bench.canary_finding(torch.stack(values).sum(0), canaries.is_in, what)]


def _origin(bench: Bench) -> Params:
    return params_at(torch.zeros(bench.count))
