"""Private clients under `flwr run`: epsilon is the composition of all rounds of all runs.

The ledgers outlive the processes and the runs: what a run reports goes on from the one before.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from flwr.app import Context

import metabloom.client_app
from metabloom.accounting import Event, epsilon_of
from metabloom.cli import app as command_line
from metabloom.clients import PrivacyConfig, PrivacyLedger
from metabloom.config import RunConfig
from metabloom.sim import load_federation
from tests.app.flower_runs import REPOSITORY, Flower, flower, results_in, toml_of

CLIENTS = 4
ROUNDS = 3
EVENTS_A_ROUND = 2  # FOMAML with one inner step: K + 1
SIGMA, RATE, DELTA = 4.0, 0.1, 1e-5


@pytest.fixture(scope="module")
def local_flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    with flower(tmp_path_factory.mktemp("flower")) as link:
        yield link


def keys(folder: Path, out: str, **changed: object) -> dict[str, object]:
    """Return a run in which every training client trains in each round."""
    return {
        "strategy": "fedmeta",
        "dataset": "digits",
        "num-clients": CLIENTS,
        "rounds": ROUNDS,
        "clients-per-round": CLIENTS,
        "eval-every": 0,
        "eval-steps": "1",
        "device": "cpu",
        "out": str(folder / out),
        "privacy.noise-multiplier": SIGMA,
        "privacy.sample-rate": RATE,
        "privacy.expected-batch-size": 30.0,
        "privacy.target-epsilon": 8.0,
        "privacy.target-delta": DELTA,
        "privacy.unprotected-metrics": "all",
        "privacy.root": str(folder / "ledgers"),
        **{key.replace("_", "-"): value for key, value in changed.items()},
    }


def run_file(folder: Path, values: dict[str, object]) -> Path:
    file = folder / f"{Path(str(values['out'])).name}.toml"
    file.write_text(toml_of(values), encoding="utf-8")
    return file


def simulate(folder: Path, values: dict[str, object]) -> dict:
    """Return the results of `metabloom simulate`."""
    command = ["simulate", "--config", str(run_file(folder, values))]
    command_line(command, standalone_mode=False)
    return results_in(Path(str(values["out"])))


def fly(link: Flower, folder: Path, values: dict[str, object]) -> dict:
    """Return the results of `flwr run`, which ends normally, and its log."""
    config = run_file(folder, values)
    log = link.run(REPOSITORY, supernodes=CLIENTS, config=config, timeout_s=150)
    out = Path(str(values["out"]))
    assert (out / "results.json").exists(), log
    return {**results_in(out), "log": log}


def training_clients() -> list[str]:
    federation = load_federation("digits", seed=0, num_clients=CLIENTS)
    pairs = zip(federation.client_ids, federation.roles, strict=True)
    return [name for name, role in pairs if role == "train"]


def epsilon_after(rounds: int) -> float:
    return epsilon_of([Event(SIGMA, RATE, EVENTS_A_ROUND * rounds)], DELTA)


def check_composition(folder: Path, results: dict, rounds: int) -> None:
    """Assert that report and ledgers hold the composition of ``rounds`` rounds, over all runs."""
    told = results["privacy"]["record_level"]
    assert told["epsilon_max"] == pytest.approx(epsilon_after(rounds), rel=1e-12), "reported"
    assert told["epsilon_median"] == pytest.approx(epsilon_after(rounds), rel=1e-12), "reported"
    assert told["clients"] == len(training_clients())
    ledgers = folder / "ledgers" / "digits"
    names = sorted(file.stem for file in ledgers.glob("*.jsonl"))
    assert names == training_clients(), "each training client has one ledger, no other has any"
    for name in names:
        ledger = PrivacyLedger(ledgers / f"{name}.jsonl", data=f"digits/{name}")
        assert ledger.events == [(SIGMA, RATE, EVENTS_A_ROUND * rounds)]
        assert ledger.epsilon(DELTA) == pytest.approx(epsilon_after(rounds), rel=1e-12)
        assert len(ledger.entries()) == rounds
        assert not any(entry.seeded for entry in ledger.entries())


def entries_of(folder: Path, name: str) -> list[tuple[str, int]]:
    """Return the run and the round of each reservation, oldest first."""
    entries = PrivacyLedger(folder / "ledgers" / "digits" / f"{name}.jsonl").entries()
    return [(entry.run, entry.server_round) for entry in entries]


def test_the_epsilon_of_one_round_is_no_bound_for_all_rounds():
    """By a second accountant, of the other kind: to take one for the other is no detail."""
    accountant = PLDAccountant()
    one = dp_event.PoissonSampledDpEvent(RATE, dp_event.GaussianDpEvent(SIGMA))
    accountant.compose(one, EVENTS_A_ROUND * ROUNDS)
    truly = accountant.get_epsilon(DELTA)
    assert epsilon_after(1) < 0.9 * truly < truly < epsilon_after(ROUNDS)


def test_the_ledgers_go_on_over_two_flwr_runs_and_a_simulation(
    local_flower: Flower, tmp_path: Path
):
    first = fly(local_flower, tmp_path, keys(tmp_path, "first"))
    check_composition(tmp_path, first, ROUNDS)
    assert first["privacy"]["record_level"]["epsilon_max"] != pytest.approx(epsilon_after(1))
    assert (first["failures"], first["quarantined"], first["skipped"]) == (0, 0, 0)
    assert [entry["exhausted"] for entry in first["history"]] == [[]] * ROUNDS

    # The second run has a budget for as many rounds again, and asks for two more.
    room = (epsilon_after(2 * ROUNDS) + epsilon_after(2 * ROUNDS + 1)) / 2
    wishes = {**keys(tmp_path, "second", rounds=ROUNDS + 2), "privacy.target-epsilon": room}
    second = fly(local_flower, tmp_path, wishes)
    check_composition(tmp_path, second, 2 * ROUNDS)
    assert second["privacy"]["record_level"]["epsilon_max"] <= room
    assert (second["failures"], second["quarantined"]) == (0, 0), second["log"]
    assert second["privacy"]["record_level"]["exhausted"] == len(training_clients())
    assert [sorted(entry["exhausted"]) for entry in second["history"]] == [
        *([[]] * ROUNDS),
        training_clients(),
        [],  # who is exhausted is not asked again
    ]
    assert [entry["skipped"] for entry in second["history"]] == [False] * ROUNDS + [True, True]
    assert "failed" not in second["log"]

    third = simulate(tmp_path, keys(tmp_path, "third", rounds=1))
    check_composition(tmp_path, third, 2 * ROUNDS + 1)
    for name in training_clients():
        runs, rounds = zip(*entries_of(tmp_path, name), strict=True)
        assert rounds == (*range(1, ROUNDS + 1), *range(1, ROUNDS + 1), 1)
        assert len(set(runs)) == 3
        assert runs == tuple(sorted(runs, key=runs.index)), "run after run"


def test_a_simulation_whose_budget_runs_out_ends_normally(tmp_path: Path):
    room = (epsilon_after(2) + epsilon_after(3)) / 2
    results = simulate(tmp_path, {**keys(tmp_path, "out"), "privacy.target-epsilon": room})
    check_composition(tmp_path, results, 2)
    assert results["failures"] == results["quarantined"] == 0
    assert results["privacy"]["record_level"]["exhausted"] == len(training_clients())


# --- the check refuses what it is for -------------------------------------------------------------


def test_the_check_passes_on_the_clients_as_they_are(tmp_path: Path):
    check_composition(tmp_path, simulate(tmp_path, keys(tmp_path, "out")), ROUNDS)


def test_the_check_refuses_clients_that_begin_a_ledger_with_each_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    honest, number = metabloom.client_app.privacy_of, count()

    def forgetful(context: Context, config: RunConfig, client: str) -> PrivacyConfig | None:
        privacy = honest(context, config, client)
        assert privacy is not None
        path = privacy.ledger.path.with_name(f"{client}-{next(number)}.jsonl")
        return replace(privacy, ledger=PrivacyLedger(path))

    monkeypatch.setattr(metabloom.client_app, "privacy_of", forgetful)
    results = simulate(tmp_path, keys(tmp_path, "out"))
    told = results["privacy"]["record_level"]["epsilon_max"]
    assert told == pytest.approx(epsilon_after(1))  # what it would claim, round after round
    with pytest.raises(AssertionError, match="reported"):
        check_composition(tmp_path, results, ROUNDS)


def test_the_check_refuses_clients_that_begin_a_ledger_with_each_run(tmp_path: Path):
    def values(out: str) -> dict[str, object]:
        return {**keys(tmp_path, out), "privacy.root": str(tmp_path / out / "ledgers")}

    check_composition(tmp_path / "first", simulate(tmp_path, values("first")), ROUNDS)
    with pytest.raises(AssertionError, match="reported"):
        check_composition(tmp_path / "second", simulate(tmp_path, values("second")), 2 * ROUNDS)


def test_the_check_refuses_clients_that_report_the_last_round_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def of_the_last(ledger: PrivacyLedger, delta: float, accountant: str = "rdp") -> float:
        return epsilon_of(ledger.entries()[-1].events, delta)

    monkeypatch.setattr(PrivacyLedger, "epsilon", of_the_last)
    results = simulate(tmp_path, keys(tmp_path, "out"))
    with pytest.raises(AssertionError, match="reported"):
        check_composition(tmp_path, results, ROUNDS)
