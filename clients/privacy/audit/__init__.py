r"""An audit of the privacy that is claimed: canaries through the real engine, in one run.

Each check plants records that are made to be found, lets the real code release what it releases,
and holds the separation mu^ of canaries present from those absent against what the ledger booked:

    mu = sqrt(sum_j count_j / sigma_j^2)    (sample rate 1, Gaussian DP),

and fails where the lower confidence bound of mu^ is above it. So an audit finds an engine that
gives away more than it books. It proves nothing: it shows a lower bound, for these records and
this model.

| check | what is watched | what it finds |
|---|---|---|
| gradient, hvp | one release | no clip or a wide one, noise below about .85 of what is booked |
| fomaml, reptile | the sum of all releases of a step | a release that is not booked |
| inner-step | a query gradient that shows theta' | an inner step in the open |
| second-order | all 2K + 1 releases; the output alone | curvature that leaves without noise |
| noise | releases without records | noise off by more than 2.5 % |
| fresh-noise | pairs of releases | noise that is used twice |
| fresh-batches | batches of one meta-step, sample rate 1/4 | batches used twice, another rate |
| rounds | 20 rounds of a client, with its ledger's file | a budget that is forgotten |

What no check finds: a leak in other layers or losses, through other fields of a reply, by timing;
noise of the right size and another shape; a source of noise that somebody can guess; a wrong gain
from sampling, as canaries are only ever compared at sample rate 1.

Papers: one-run audits, Steinke, Nasr and Jagielski, 2305.08846; Gaussian DP, Dong, Roth and Su,
1905.02383. Differences: the estimate is Gaussian and not a count of guesses, since here the noise
is known to be; see ``findings``.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ....errors import ConfigError, unknown_name
from .bench import Bench, Engine
from .findings import Finding
from .noise import check_fresh_batches, check_fresh_noise, check_noise
from .rounds import check_rounds
from .steps import (
    check_fomaml,
    check_gradient,
    check_hvp,
    check_inner_step,
    check_reptile,
    check_second_order,
)

__all__ = ["CHECKS", "REAL", "Engine", "Finding", "run_audit"]

CHECKS: dict[str, Callable[[Bench], list[Finding]]] = {
    "gradient": check_gradient,
    "hvp": check_hvp,
    "fomaml": check_fomaml,
    "inner-step": check_inner_step,
    "reptile": check_reptile,
    "second-order": check_second_order,
    "noise": check_noise,
    "fresh-noise": check_fresh_noise,
    "fresh-batches": check_fresh_batches,
    "rounds": check_rounds,
}
REAL = Engine()
FEWEST = 200  # canaries: the bounds are those of many


def run_audit(
    *,
    seed: int = 0,
    only: Sequence[str] = (),
    engine: Engine = REAL,
    canaries: int = 2000,
    alpha: float = 1e-4,
) -> list[Finding]:
    """Run the checks and return what they found; an engine passes where every one ``is_ok``.

    Args:
        seed: of the coins that decide which canaries are present; noise comes from the system.
        only: names of checks, of ``CHECKS``; empty: all.
        engine: what is audited.
        canaries: m, at least 200. With 2000 an honest release shows mu = .82, and 1.2 is noticed.
        alpha: in (0, 0.1], the chance that an honest engine fails one "at most" comparison; of
            "within" comparisons a hundredth of it. All of them at 1e-4: .12 % of honest audits.

    Raises:
        ConfigError: where a check is unknown, or a value out of range.
    """
    for name in only:
        if name not in CHECKS:
            raise unknown_name("check of the privacy audit", name, CHECKS)
    if not (isinstance(canaries, int) and canaries >= FEWEST):
        raise ConfigError(
            f"canaries = {canaries!r}: must be a whole number of at least {FEWEST}, for the "
            "confidence bounds are those of many"
        )
    if not 0 < alpha <= 0.1:
        raise ConfigError(f"alpha = {alpha!r}: must lie in (0, 0.1]; it is a chance of error")
    found: list[Finding] = []
    for name in only or CHECKS:
        with tempfile.TemporaryDirectory(prefix="metabloom-audit-") as folder:
            bench = Bench(name, seed, engine, canaries, alpha, Path(folder))
            found += CHECKS[name](bench)
    return found
