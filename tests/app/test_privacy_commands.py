"""``metabloom privacy plan``, ``show`` and ``audit``, and what a private run says at its end."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import dp_accounting
import pytest
from typer.testing import CliRunner, Result

from metabloom.accounting import Budget, Event, epsilon_of
from metabloom.cli import app
from metabloom.clients import PrivacyConfig
from metabloom.clients.privacy import updates
from metabloom.config import RunConfig
from metabloom.errors import BudgetExhaustedError, ConfigError
from metabloom.ledger import PrivacyLedger
from metabloom.planning import (
    MOST_RELEASES,
    Plan,
    Schedule,
    at_most,
    least_noise,
    neighbours,
    plan,
)
from metabloom.terminal import assignment

DELTA = 1e-5
WIDE = {"COLUMNS": "250"}
EVENTS = Callable[[Schedule, float], list[Event]]


def privacy(*words: str) -> Result:
    return CliRunner().invoke(app, ["privacy", *words], env=WIDE, catch_exceptions=False)


def planned(**options: object) -> Result:
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return privacy("plan", *(word.replace("_", "-") for word in words))


def rdp_by_google(events: list[Event], delta: float = DELTA) -> float:
    accountant = dp_accounting.rdp.RdpAccountant(list(range(2, 64)))
    return compose(accountant, events).get_epsilon(delta)


def pld_by_google(events: list[Event], delta: float = DELTA) -> float:
    return compose(dp_accounting.pld.PLDAccountant(), events).get_epsilon(delta)


def compose(accountant, events: list[Event]):
    for sigma, rate, count in events:
        gaussian = dp_accounting.GaussianDpEvent(sigma)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, gaussian), count)
    return accountant


# --- what is released -----------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, 0.7, 2.0])
@pytest.mark.parametrize(("method", "order"), [("fomaml", "first"), ("second-order", "exact")])
@pytest.mark.parametrize("inner", [1, 3])
def test_a_meta_step_of_a_plan_releases_what_the_clients_release(
    method: str, order: updates.PrivateOrder, inner: int, ratio: float
):
    schedule = Schedule(
        rounds=7, method=method, inner_steps=inner, local_steps=2, sample_rate=0.05, hvp_ratio=ratio
    )
    config = PrivacyConfig(
        noise_multiplier=1.3,
        max_grad_norm=1.0,
        sample_rate=0.05,
        target_epsilon=3.0,
        target_delta=DELTA,
        hvp_noise_multiplier=1.3 * ratio,
    )
    step = updates.meta_events(config, steps=inner, order=order)
    counts: dict[tuple[float, float], int] = {}
    for sigma, rate, count in step:
        key = (round(sigma, 9), rate)
        counts[key] = counts.get(key, 0) + 2 * count
    found = {(round(s, 9), q): count for s, q, count in schedule.events_of_round(1.3)}
    assert found == counts
    assert schedule.releases == 7 * sum(counts.values())


@pytest.mark.parametrize("method", ["reptile", "dp-sgd"])
def test_plain_methods_release_once_a_local_step_whatever_the_inner_steps(method: str):
    schedule = Schedule(rounds=3, method=method, inner_steps=9, local_steps=4)
    assert schedule.events(1.0) == [Event(1.0, 0.1, 12)]


def test_first_order_meta_sgd_costs_what_fomaml_costs():
    both = [Schedule(rounds=3, method=name, inner_steps=4) for name in ("meta-sgd", "fomaml")]
    assert both[0].events(1.0) == both[1].events(1.0) == [Event(1.0, 0.1, 15)]


def test_what_a_plan_knows_of_the_clients_is_what_they_say():
    (field,) = [one for one in fields(PrivacyConfig) if one.name == "max_releases"]
    assert field.default == MOST_RELEASES


# --- how much noise -------------------------------------------------------------------------------

SCHEDULES = {
    "fomaml": Schedule(rounds=100),
    "reptile": Schedule(rounds=30, method="reptile", local_steps=5, sample_rate=0.02),
    "whole batches": Schedule(rounds=10, method="dp-sgd", sample_rate=1.0),
    "second order": Schedule(rounds=50, method="second-order", inner_steps=3, hvp_ratio=2.0),
    "less noise on products": Schedule(rounds=50, method="second-order", hvp_ratio=0.5),
}


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_the_noise_is_enough_and_not_more_by_an_accountant_of_others(name: str):
    schedule, budget = SCHEDULES[name], Budget(3.0, DELTA)
    sigma = least_noise(schedule, budget)
    assert sigma is not None
    assert epsilon_of(schedule.events(sigma), DELTA) <= 3.0
    # Whole orders alone cost the other accountant up to a percent at these sizes.
    assert 2.99 < rdp_by_google(schedule.events(sigma)) < 3.03
    assert epsilon_of(schedule.events(sigma - 2e-4), DELTA) > 3.0


@pytest.mark.parametrize("name", ["whole batches", "second order"])
def test_by_prv_less_noise_is_enough_and_a_third_accountant_agrees(name: str):
    schedule = SCHEDULES[name]
    by_rdp = least_noise(schedule, Budget(3.0, DELTA))
    sigma = least_noise(schedule, Budget(3.0, DELTA, "prv"))
    assert by_rdp is not None
    assert sigma is not None
    assert sigma < 0.98 * by_rdp
    # PRV is an upper bound with an error of at most 0.01; PLD has none to speak of.
    assert 2.97 < pld_by_google(schedule.events(sigma)) < 3.005


def test_no_noise_is_said_to_be_none():
    schedule = Schedule(rounds=1, method="reptile", sample_rate=1.0)
    assert least_noise(schedule, Budget(1e-9, 1e-9)) is None
    assert least_noise(schedule, Budget(500.0, 0.1)) == 0.1  # the least that is tried


def rounds_within(
    folder: Path, schedule: Schedule, sigma: float, budget: Budget, rounds: int
) -> bool:
    """Return whether a client's ledger lets it take part in so many rounds."""
    ledger = PrivacyLedger(folder / f"{rounds}-{sigma}.jsonl")
    try:
        for number in range(rounds):
            ledger.reserve(
                schedule.events_of_round(sigma), budget=budget, server_round=number, run="r"
            )
    except BudgetExhaustedError:
        return False
    return True


class WithoutQuery(Schedule):
    """The mutant that forgets the query's release."""

    def events_of_round(self, noise_multiplier: float) -> list[Event]:
        return [Event(noise_multiplier, self.sample_rate, self.local_steps * self.inner_steps)]


class OneRound(Schedule):
    """The mutant whose epsilon is that of one round."""

    def events(self, noise_multiplier: float) -> list[Event]:
        return self.events_of_round(noise_multiplier)


@pytest.mark.parametrize(
    ("method", "accountant"),
    [("fomaml", "rdp"), ("reptile", "rdp"), ("second-order", "rdp"), ("fomaml", "prv")],
)
def test_a_client_with_the_planned_noise_is_exhausted_after_the_planned_rounds_and_not_before(
    tmp_path: Path, method: str, accountant
):
    schedule = Schedule(rounds=12, method=method, hvp_ratio=1.5, sample_rate=0.2)
    budget = Budget(4.0, DELTA, accountant)
    sigma = least_noise(schedule, budget)
    assert sigma is not None
    assert rounds_within(tmp_path, schedule, sigma, budget, 12)
    assert not rounds_within(tmp_path, schedule, sigma, budget, 13)


@pytest.mark.parametrize("mutant", [WithoutQuery, OneRound])
def test_a_plan_that_forgets_releases_runs_out_too_early(tmp_path: Path, mutant: type[Schedule]):
    schedule, budget = Schedule(rounds=12, sample_rate=0.2), Budget(4.0, DELTA)
    sigma = least_noise(mutant(rounds=12, sample_rate=0.2), budget)
    assert sigma is not None
    assert not rounds_within(tmp_path, schedule, sigma, budget, 12)


def test_the_neighbours_differ_in_one_choice_each_and_none_is_the_plan_itself():
    schedule = Schedule(rounds=9, sample_rate=0.7)
    found = dict(neighbours(schedule))
    assert list(found) == [
        *(f"method = {name}" for name in ("reptile", "dp-sgd", "meta-sgd", "second-order")),
        *("inner-steps = 2", "inner-steps = 5", "sample-rate = 0.35", "sample-rate = 1"),
        *("rounds = 4", "rounds = 18"),
    ]
    for change, other in found.items():
        name, _, value = change.partition(" = ")
        assert str(getattr(other, name.replace("-", "_"))) in (value, f"{value}.0")
        assert replace(other, **{name.replace("-", "_"): getattr(schedule, name.replace("-", "_"))})
    alone = Schedule(rounds=1, method="reptile", sample_rate=1.0)
    assert [c for c, _ in neighbours(alone) if "method" not in c] == [
        *("local-steps = 2", "local-steps = 5", "sample-rate = 0.5", "rounds = 2")
    ]


@pytest.mark.parametrize("epsilon", [3.0, 2.93001, 0.0999999, 0.00123, 7e-7, 123.456])
def test_a_bound_is_never_rounded_down(epsilon: float):
    assert epsilon <= float(at_most(epsilon)) <= max(epsilon + 0.01, 1.0 * epsilon)
    assert float(at_most(epsilon)) <= 1.15 * epsilon


# --- the command plan -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> Plan:
    return plan(epsilon=3.0, delta=DELTA, rounds=100, sample_rate=0.1)


def test_a_plan_tells_noise_keys_epsilon_by_both_and_the_worst_case(made: Plan):
    done = planned(epsilon=3, delta="1e-5", rounds=100, inner_steps=1, sample_rate=0.1)
    assert done.exit_code == 0
    events = [Event(made.noise_multiplier, 0.1, 200)]
    rdp, prv = epsilon_of(events, DELTA), epsilon_of(events, DELTA, "prv")
    assert (made.epsilon_rdp, made.epsilon_prv) == (rdp, prv)
    assert f"noise multiplier: {made.noise_multiplier}" in done.stdout
    assert f"at most {at_most(rdp)} by RDP, {at_most(prv)} by PRV" in done.stdout
    assert "200 releases: 100 rounds of 2" in done.stdout
    assert "nothing is gained from the server's choice of clients" in done.stdout
    rows = [re.split(r"\s*│\s*", line)[1:-1] for line in done.stdout.splitlines() if "│" in line]
    assert rows == [
        [
            one.change,
            str(one.schedule.releases),
            f"{one.noise_multiplier:.4f}",
            at_most(one.epsilon),
        ]
        for one in made.alternatives
    ]
    for one in made.alternatives:
        assert one.epsilon == epsilon_of(one.schedule.events(made.noise_multiplier), DELTA)
        assert one.noise_multiplier is not None
        assert 2.995 < epsilon_of(one.schedule.events(one.noise_multiplier), DELTA) <= 3.0


def pasted(said: str) -> list[str]:
    """Return the words of the line that is ready to paste."""
    (line,) = (line for line in said.splitlines() if line.startswith("--set "))
    return shlex.split(line)


def read(words: list[str]) -> RunConfig:
    return RunConfig.read(dict(assignment(word) for word in words if word != "--set"))


def test_the_pasted_keys_are_a_configuration():
    done = planned(epsilon=3, rounds=100)
    config = read(pasted(done.stdout))
    assert config.is_private
    assert (config.privacy_target_epsilon, config.privacy_target_delta) == (3.0, 1e-5)
    assert config.privacy_sample_rate == 0.1
    changed = {
        key for key, value in config.to_flower().items() if RunConfig.defaults()[key] != value
    }
    assert changed == {"privacy.noise-multiplier", "privacy.target-epsilon"}


def test_what_else_a_plan_needs_is_pasted_too():
    options = {"method": "second-order", "hvp_noise": 1.5, "inner_steps": 3, "local_steps": 200}
    done = planned(epsilon=1, rounds=1, sample_rate=0.01, accountant="prv", **options)
    config = read(pasted(done.stdout))
    assert (config.order, config.inner_steps, config.local_steps) == ("exact", 3, 200)
    assert config.privacy_accountant == "prv"
    assert config.privacy_max_releases == 200 * 7
    sigma = config.privacy_noise_multiplier
    assert -1e-9 <= config.privacy_hvp_noise_multiplier - 1.5 * sigma <= 1e-4
    events = [Event(sigma, 0.01, 800), Event(config.privacy_hvp_noise_multiplier, 0.01, 600)]
    assert epsilon_of(events, DELTA, "prv") <= 1.0 < epsilon_of(events, DELTA)


def test_a_run_with_the_pasted_keys_lasts_the_planned_rounds_and_its_end_tells_so(tmp_path: Path):
    done = planned(epsilon=2, rounds=2, method="second-order", sample_rate=0.2, hvp_noise=2)
    words = ["simulate", *pasted(done.stdout), "--out", str(tmp_path)]
    for setting in ("privacy.expected-batch-size=5", "rounds=3", "num-clients=5", "device=cpu"):
        words += ["--set", setting]
    run = CliRunner().invoke(app, words, env=WIDE, catch_exceptions=False)
    assert run.exit_code == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [len(entry["exhausted"]) for entry in results["history"]] == [0, 0, 3]
    told = results["privacy"]["record_level"]
    assert 1.9 < told["epsilon_max"] <= 2.0
    assert (
        f"privacy: epsilon at most {at_most(told['epsilon_max'])} (median "
        f"{at_most(told['epsilon_median'])}) at delta 1e-05 over 3 clients; 3 exhausted; protects "
        "one record against the server"
    ) in run.stdout
    assert "evaluation metrics are withheld: privacy.unprotected-metrics names" in run.stdout
    page = (tmp_path / "report.html").read_text()
    assert "<td>exhausted clients</td><td>3</td>" in page
    shown = privacy("show", str(tmp_path), "--target-epsilon", "2")
    assert "3 ledgers" in shown.stdout
    assert "3 exhausted (target 2)" in shown.stdout


@pytest.mark.parametrize(("records", "norm", "warned"), [(100_000, 0.1, 2), (99_999, 1e-4, 0)])
def test_a_delta_for_few_records_and_a_noisy_second_order_are_warned_of(
    records: int, norm: float, warned: int
):
    sizes = {"parameters": 50_000, "batch_size": 8, "inner_lr": 0.5, "hvp_max_norm": norm}
    done = planned(epsilon=3, rounds=5, method="second-order", records=records, **sizes)
    assert done.exit_code == 0
    (sigma,) = re.findall(r"noise multiplier: (\S+)\n", done.stdout)
    ratio = 0.5 * float(sigma) * norm * 50_000**0.5 / 8
    assert f"noise of a Hessian product over its direction: {ratio:.3g}" in done.stdout
    assert done.stdout.count("WARNING") == warned
    assert ("delta = 1e-05 is not below 1 / records" in done.stdout) is (warned > 0)
    assert ("the second-order term is mostly noise" in done.stdout) is (warned > 0)


WRONG_PLANS = {
    "no epsilon": ({"epsilon": 0}, "target_epsilon = 0.0"),
    "epsilon not a number": ({"epsilon": "nan"}, "target_epsilon = nan"),
    "delta of one": ({"delta": 1}, "target_delta = 1.0"),
    "no rounds": ({"rounds": 0}, "rounds = 0"),
    "no inner steps": ({"inner_steps": 0}, "inner_steps = 0"),
    "rate above one": ({"sample_rate": 1.5}, "sample_rate = 1.5"),
    "unknown method": ({"method": "reptlie"}, "did you mean 'reptile'"),
    "unknown accountant": ({"accountant": "gdp"}, "unknown accountant 'gdp'"),
    "no noise on products": ({"hvp_noise": 0}, "hvp_ratio = 0.0"),
    "no records": ({"records": 0}, "--records 0"),
    "half of the sizes": ({"parameters": 9}, "missing: --batch-size, --inner-lr"),
    "sizes without second order": (
        {"parameters": 9, "batch_size": 9, "inner_lr": 1},
        "missing: --method second-order",
    ),
    "no noise is enough": (
        {"epsilon": 1e-9, "delta": 1e-9, "sample_rate": 1},
        "no noise multiplier",
    ),
}


@pytest.mark.parametrize("what", list(WRONG_PLANS))
def test_a_plan_that_cannot_be_made_says_why(what: str):
    options, said = WRONG_PLANS[what]
    with pytest.raises(ConfigError, match=re.escape(said)):
        planned(**{"epsilon": 3, "rounds": 5, **options})
