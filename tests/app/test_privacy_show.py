"""``metabloom privacy show`` and ``audit``: what they say of ledgers, and what they refuse."""

import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import dp_accounting
import pytest
from typer.testing import CliRunner, Result

from metabloom.accounting import Accountant, Budget, Event, epsilon_of
from metabloom.cli import app
from metabloom.clients.privacy import audit
from metabloom.clients.privacy.audit import Finding
from metabloom.errors import BudgetExhaustedError, ConfigError, LedgerError
from metabloom.ledger import PrivacyLedger
from metabloom.planning import at_most

DELTA = 1e-5
WIDE = {"COLUMNS": "250"}
STEP = [Event(1.5, 0.1, 2)]


def privacy(*words: object) -> Result:
    return CliRunner().invoke(app, ["privacy", *map(str, words)], env=WIDE, catch_exceptions=False)


def rows(said: str) -> list[list[str]]:
    return [re.split(r"\s*│\s*", line)[1:-1] for line in said.splitlines() if "│" in line]


def written(path: Path, reservations: int = 3, **options) -> PrivacyLedger:
    ledger = PrivacyLedger(path, data="digits/client-007")
    for number in range(reservations):
        ledger.reserve(STEP, mechanism="fomaml", run="abc", server_round=number + 1, **options)
    return ledger


# --- one ledger -----------------------------------------------------------------------------------


def test_a_ledger_is_shown_with_its_data_spending_mechanisms_and_epsilon(tmp_path: Path):
    ledger = written(tmp_path / "one.jsonl")
    ledger.reserve([Event(2.0, 0.2, 5), Event(1.5, 0.1)], mechanism="[bold]", run="def")
    before = ledger.path.read_bytes()
    done = privacy("show", ledger.path, "--delta", "1e-6", "--accountant", "prv")
    assert done.exit_code == 0
    for part in ("data: digits/client-007", "one record, added or removed", "reservations: 4"):
        assert part in done.stdout
    assert "WARNING" not in done.stdout

    accountant = dp_accounting.rdp.RdpAccountant([1 + n / 10 for n in range(1, 640)])
    for sigma, rate, count in [(1.5, 0.1, 7), (2.0, 0.2, 5)]:
        gaussian = dp_accounting.GaussianDpEvent(sigma)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, gaussian), count)
    (rdp, prv) = re.findall(r"([\d.]+) by (?:RDP|PRV)\n?", done.stdout.split("at most")[-1])
    assert float(rdp) == pytest.approx(accountant.get_epsilon(1e-6), abs=0.011)  # a rounded bound
    whole = [Event(1.5, 0.1, 7), Event(2.0, 0.2, 5)]
    assert prv == at_most(epsilon_of(whole, 1e-6, "prv"))
    assert float(prv) < float(rdp)

    told = rows(done.stdout)
    spent = [at_most(epsilon_of([Event(1.5, 0.1, 2 * n)], 1e-6)) for n in (1, 2, 3)]
    assert [row[2:] for row in told[:3]] == [
        ["abc", str(n), "fomaml", str(2 * n), spent[n - 1]] for n in (1, 2, 3)
    ]
    assert told[3][2:] == ["def", "-", "[bold]", "12", rdp]
    alone = [
        at_most(epsilon_of(events, 1e-6, "prv"))
        for events in ([Event(1.5, 0.1, 6)], [Event(1.5, 0.1), Event(2.0, 0.2, 5)])
    ]
    assert told[4:] == [
        ["fomaml", "1.5, 0.1", "6", alone[0]],
        ["[bold]", "1.5, 0.1; 2, 0.2", "6", alone[1]],
    ]
    assert ledger.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["one.jsonl"]


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (20, 20), (21, 20), (97, 20)])
def test_of_many_reservations_twenty_are_shown_the_first_and_the_last_among_them(
    tmp_path: Path, count: int, shown: int
):
    done = privacy("show", written(tmp_path / "one.jsonl", count).path)
    numbers = [int(row[0]) for row in rows(done.stdout) if row[0].isdigit()]
    assert len(numbers) == shown
    assert (numbers[0], numbers[-1]) == (1, count)
    gaps = [after - before for before, after in pairwise(numbers)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_seeded_noise_is_warned_of_even_where_it_was_one_reservation_of_many(tmp_path: Path):
    ledger = written(tmp_path / "one.jsonl")
    assert "WARNING" not in privacy("show", ledger.path).stdout
    ledger.reserve(STEP, seeded=True)
    said = privacy("show", ledger.path).stdout
    assert "WARNING: 1 of its reservations were seeded" in said
    assert "protects nobody" in said
    assert "WARNING: 1 ledgers hold seeded noise" in privacy("show", tmp_path).stdout


def until_exhausted(ledger: PrivacyLedger, events: list[Event], budget: Budget) -> int:
    count = 0
    while True:
        try:
            ledger.reserve(events, budget=budget)
        except BudgetExhaustedError:
            return count
        count += 1


@pytest.mark.parametrize(("accountant", "change"), [("rdp", False), ("rdp", True), ("prv", False)])
def test_so_many_reservations_remain_as_the_client_can_really_make(
    tmp_path: Path, accountant: Accountant, change: bool
):
    ledger = written(tmp_path / "one.jsonl")
    last = [Event(3.0, 0.2, 3)] if change else STEP  # a change makes the client stop earlier
    if change:
        ledger.reserve(last)
    words = ("--target-epsilon", 4, "--accountant", accountant)
    said = privacy("show", ledger.path, *words).stdout
    remaining = 4 - ledger.epsilon(DELTA, accountant)
    found = re.search(r"target 4 by (\w+): (\S+) remains, (\d+) more reservations", said)
    assert found is not None
    assert (found[1], found[2]) == (accountant.upper(), f"{remaining:.3g}")
    real = until_exhausted(ledger, last, Budget(4.0, DELTA, accountant))
    assert int(found[3]) == real > 3
    after = privacy("show", ledger.path, *words).stdout
    assert "exhausted: not one more like the last one" in after


def test_noise_that_costs_next_to_nothing_leaves_more_than_can_be_counted(tmp_path: Path):
    ledger = PrivacyLedger(tmp_path / "one.jsonl")
    ledger.reserve([Event(1e6, 0.01)])
    said = privacy("show", ledger.path, "--target-epsilon", 3).stdout
    assert f"more than {2**30} more reservations" in said


def test_a_ledger_on_which_nothing_was_reserved_costs_nothing(tmp_path: Path):
    (tmp_path / "one.jsonl").touch()  # as a refused first round leaves it
    done = privacy("show", tmp_path / "one.jsonl", "--target-epsilon", "3", "--accountant", "prv")
    assert done.exit_code == 0
    assert "reservations: 0" in done.stdout
    assert "at most 0 by RDP" in done.stdout
    assert "all of it remains" in done.stdout


# --- a folder -------------------------------------------------------------------------------------


def test_a_folder_has_a_row_for_each_ledger_and_tells_maximum_median_and_the_exhausted(
    tmp_path: Path,
):
    counts = {"a.jsonl": 1, "deep/er/b.jsonl": 4, "deep/c.jsonl": 2}
    for name, count in counts.items():
        written(tmp_path / name, count)
    (tmp_path / "notes.txt").write_text("no ledger")
    costs = [epsilon_of([Event(1.5, 0.1, 2 * n)], DELTA) for n in (1, 2, 4)]
    target = (costs[1] + costs[2]) / 2  # no room after two
    done = privacy("show", tmp_path, "--target-epsilon", target)
    assert done.exit_code == 0
    names = ["a.jsonl", "deep/c.jsonl", "deep/er/b.jsonl"]
    told = rows(done.stdout)
    assert [row[:3] for row in told] == [
        [name, "digits/client-007", str(counts[name])] for name in names
    ]
    assert [row[3] for row in told] == [at_most(cost) for cost in costs]
    third = epsilon_of([Event(1.5, 0.1, 6)], DELTA)
    exhausted = [False, third > target, True]
    assert ["exhausted" in row for row in told] == exhausted
    assert f"3 ledgers: epsilon at most {at_most(costs[2])}, median {at_most(costs[1])}" in (
        done.stdout
    )
    assert f"{sum(exhausted)} exhausted" in done.stdout
    assert "exhausted" not in privacy("show", tmp_path).stdout


def test_a_damaged_ledger_among_others_is_named_and_the_others_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name in "abc":
        written(tmp_path / f"{name}.jsonl")
    altered(tmp_path / "b.jsonl")
    with pytest.raises(LedgerError, match=r"line 2 of the privacy ledger .*b\.jsonl") as raised:
        privacy("show", tmp_path)
    assert "more are damaged" not in str(raised.value)
    altered(tmp_path / "c.jsonl")
    with pytest.raises(LedgerError, match=r"b\.jsonl.*\(and 1 more are damaged\)"):
        privacy("show", tmp_path)
    runner = CliRunner().invoke(app, ["privacy", "show", str(tmp_path)], env=WIDE)
    assert [row[-1] for row in rows(runner.stdout)] == ["", "damaged", "damaged"]


# --- what is refused ------------------------------------------------------------------------------


def altered(path: Path) -> None:
    content = path.read_bytes()
    assert b"1.5" in content
    path.write_bytes(content.replace(b"1.5", b"9.5", 1))


def without_the_first_line(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))


def other_text(path: Path) -> None:
    path.write_bytes(b'{"a": 1}\n\xff\xfe\n')


@pytest.mark.parametrize("damage", [altered, without_the_first_line, other_text])
def test_a_damaged_ledger_is_refused(tmp_path: Path, damage):
    ledger = written(tmp_path / "one.jsonl")
    damage(ledger.path)
    before = ledger.path.read_bytes()
    with pytest.raises(LedgerError, match=r"line \d of the privacy ledger .*one\.jsonl"):
        privacy("show", ledger.path, "--target-epsilon", "3")
    assert ledger.path.read_bytes() == before


@pytest.mark.parametrize("path", ["nowhere.jsonl", "deep/nowhere", "one.jsonl/below"])
def test_a_path_that_is_not_there_is_refused_and_nothing_is_made(tmp_path: Path, path: str):
    written(tmp_path / "one.jsonl")
    with pytest.raises(ConfigError, match="privacy ledger"):
        privacy("show", tmp_path / path, "--target-epsilon", "3")
    assert [path.name for path in tmp_path.rglob("*")] == ["one.jsonl"]


def test_a_folder_without_a_ledger_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no privacy ledger"):
        privacy("show", tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--delta", "2"), "delta = 2.0"),
        (("--target-epsilon", "-1"), "target_epsilon = -1.0"),
        (("--accountant", "gdp"), "unknown accountant 'gdp'"),
    ],
)
def test_a_value_out_of_range_is_refused(tmp_path: Path, words: tuple[str, str], said: str):
    ledger = written(tmp_path / "one.jsonl")
    with pytest.raises(ConfigError, match=re.escape(said)):
        privacy("show", ledger.path, *words)


def test_the_installed_command_ends_with_one_message_and_status_2(tmp_path: Path):
    ledger = written(tmp_path / "[one].jsonl")
    altered(ledger.path)
    command = str(Path(sys.executable).parent / "metabloom")
    words = [command, "privacy", "show", str(ledger.path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: line 2 of the privacy ledger")
    assert "[one].jsonl" in done.stderr
    assert "Traceback" not in done.stderr


# --- audit ----------------------------------------------------------------------------------------


GRADIENT = Finding(
    check="gradient",
    what="one release",
    unit="mu",
    estimate=1.1,
    measured=0.92,
    claimed=1.0,
    bound_kind="at most",
    alpha=1e-4,
)
NOISE = replace(GRADIENT, check="noise", bound_kind="within", measured=1.004, tolerance=0.02)
BROKEN = replace(GRADIENT, check="[hvp]", measured=1.71)


@pytest.mark.parametrize(("findings", "status"), [([GRADIENT, NOISE], 0), ([GRADIENT, BROKEN], 1)])
def test_an_audit_tells_each_finding_and_its_status_the_verdict(
    monkeypatch: pytest.MonkeyPatch, findings: list[Finding], status: int
):
    asked = {}

    def run_audit(*, seed: int = 0, only: tuple[str, ...] = ()) -> list[Finding]:
        asked.update(seed=seed, only=only)
        return findings

    monkeypatch.setattr(audit, "run_audit", run_audit)
    done = privacy("audit", "--seed", 7, "--only", "gradient", "--only", "hvp")
    assert asked == {"seed": 7, "only": ("gradient", "hvp")}
    assert done.exit_code == status
    told = rows(done.stdout)
    assert told[0] == ["gradient", "one release, mu", "0.92", "at most 1", "kept"]
    if status:
        assert told[1] == ["[hvp]", "one release, mu", "1.71", "at most 1", "FAILED"]
        assert "1 of 2 comparisons failed ([hvp])" in done.stdout
    else:
        assert told[1] == ["noise", "one release, mu", "1.004", "1 ± 0.02", "kept"]
        assert "2 comparisons: what is claimed is kept" in done.stdout


def test_an_audit_that_checks_nothing_is_no_good_news(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(audit, "run_audit", lambda **_: [])
    with pytest.raises(ConfigError, match="made no check"):
        privacy("audit")


def test_a_check_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match="gradiant"):
        privacy("audit", "--only", "gradiant")


# --- what starting costs --------------------------------------------------------------------------


def loaded_after(statement: str) -> set[str]:
    """Return the top-level modules that a fresh Python has loaded after ``statement``."""
    program = f"{statement}\nimport sys\nprint(*sys.modules)"
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_the_planning_and_the_command_line_import_neither_torch_nor_flower():
    statement = "import metabloom.planning, metabloom.ledger, metabloom.cli_privacy, metabloom.cli"
    assert loaded_after(statement) & {"torch", "flwr", "opacus", "plotly"} == set()
    assert "torch" in loaded_after("import metabloom.clients.privacy")  # so it would be found
