"""Where numbers are very small, or a library is at the end of its range, nothing becomes free."""

import math
import subprocess
import sys

import mpmath
import numpy as np
import pytest

from metabloom.accounting import ORDERS, Budget, Event, epsilon_of, rdp_of
from metabloom.opacus_import import rdp_formulas

DELTA = 1e-5


def of_the_first_term(event: Event, delta: float) -> float:
    """Epsilon of divergences alpha q^2 / (2 sigma^2) alone, which is exact for much noise."""
    sigma, rate, count = event
    return min(
        count * a * (rate / sigma) ** 2 / 2
        + math.log((a - 1) / a)
        - (math.log(delta) + math.log(a)) / (a - 1)
        for a in ORDERS
    )


@pytest.mark.parametrize(
    "event", [Event(14490.372881355932, 1e-3, 10**12), Event(5000.0, 1e-4, 10**11)], ids=str
)
def test_releases_whose_divergence_rounds_to_nothing_still_cost_what_they_cost(event):
    wanted = of_the_first_term(event, DELTA)
    assert wanted > 0
    assert epsilon_of([event], DELTA) == pytest.approx(wanted, rel=0.02)
    assert epsilon_of([event._replace(count=event.count // 2)], DELTA) < epsilon_of([event], DELTA)


@pytest.mark.parametrize("q", [1e-6, 1e-7, 1e-8, 1e-9])
@pytest.mark.parametrize("sigma", [0.7, 1.0, 3.0])
def test_a_divergence_that_is_lost_in_rounding_is_not_free(sigma, q):
    found = dict(zip(ORDERS, rdp_of([Event(sigma, q)]), strict=True))
    for order in (2, 5, 63):
        with mpmath.workdps(60):
            s, rate = mpmath.mpf(sigma), mpmath.mpf(q)
            terms = [
                mpmath.binomial(order, k)
                * (1 - rate) ** (order - k)
                * rate**k
                * mpmath.exp((k * k - k) / (2 * s * s))
                for k in range(order + 1)
            ]
            exact = float(mpmath.log(sum(terms)) / (order - 1))
        assert exact * (1 - 1e-3) <= found[order] <= exact * (1 + 1e-3) + 1e-15  # its rounding


def test_a_budget_is_spent_by_such_releases_too():
    event = Event(5000.0, 1e-4, 2**36)
    target = Budget(0.9 * of_the_first_term(event, DELTA), DELTA)
    assert not target.admits([], [event], first=[event], is_fixed=True)
    assert not target.admits([], [event], first=[event], is_fixed=False)


def test_prv_of_whole_batches_is_that_of_the_gaussian_mechanism():
    from scipy.optimize import brentq
    from scipy.stats import norm

    mu = math.sqrt(20) / 1.5

    def excess(epsilon):
        first, second = norm.cdf(mu / 2 - epsilon / mu), norm.cdf(-mu / 2 - epsilon / mu)
        return first - math.exp(epsilon) * second - DELTA

    exact = brentq(excess, 0.1, 60)
    found = epsilon_of([Event(1.5, 1.0, 20)], DELTA, "prv")
    assert exact <= found <= exact + 0.03


def test_the_formulas_that_are_loaded_alone_are_those_of_the_whole_package():
    from opacus.accountants.analysis.rdp import compute_rdp

    told = {"q": 0.07, "noise_multiplier": 1.1, "steps": 1, "orders": list(ORDERS)}
    assert np.array_equal(rdp_formulas().compute_rdp(**told), compute_rdp(**told))
    assert np.array_equal(rdp_of([Event(1.1, 0.07)]), compute_rdp(**told))


def test_epsilon_is_read_without_torch():
    program = (
        "from metabloom.accounting import Event, epsilon_of\n"
        "epsilon_of([Event(1.0, 0.1, 3)], 1e-5)\nimport sys\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
