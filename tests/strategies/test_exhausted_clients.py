"""Clients whose privacy budget is spent: no failures, not asked again, and no end of the run."""

import json
import re
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from flwr.app import MetricRecord
from flwr.serverapp import strategy as flowers

from metabloom.cli import main
from metabloom.config import RunConfig
from metabloom.errors import BUDGET_EXHAUSTED, BudgetExhaustedError
from metabloom.ledger import PrivacyLedger
from metabloom.sim import CohortGrid
from metabloom.sim.results import results_of
from metabloom.strategies import STRATEGIES, Checkpoints, RoundReport, RunResult, guard
from metabloom.strategies.shell import roll_call
from metabloom.wire import to_record
from tests.strategies.bad_replies import grid_with
from tests.strategies.toy import Toy, bits, model, start, strategy_of

ROLES = ("train", "unseen", "train", "validation", "train")
EVERY = pytest.mark.parametrize("name", list(STRATEGIES))
SPENT_IN = 2  # the round in which client 2 is exhausted
PRIVATE = {"privacy.noise-multiplier": 1.0, "privacy.target-epsilon": 4.0}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "POLL_S", 0.01)
    monkeypatch.setattr(roll_call, "GATHER_S", 0.05)


class Spending(Toy):
    """Clients of which some have no budget left from a round on; evaluations go on."""

    def __init__(self, exhausted: dict[int, int], **more) -> None:
        super().__init__(roles=ROLES, **more)
        self.exhausted = exhausted  # round by partition

    def _train(self, message, context):
        partition = int(context.node_config["partition-id"])
        number = int(message.content["config"]["server-round"])
        if number >= self.exhausted.get(partition, 10**9):
            self.asked.append(("train", partition))
            raise BudgetExhaustedError
        return super()._train(message, context)


def one_spent() -> Spending:
    return Spending({2: SPENT_IN})


def all_spent() -> Spending:
    return Spending({0: SPENT_IN, 2: SPENT_IN, 4: SPENT_IN})


# --- one client -----------------------------------------------------------------------------------


@EVERY
def test_an_exhausted_client_is_counted_as_such_and_not_as_failed(name: str, tmp_path: Path):
    saved = Checkpoints(tmp_path, settings={"seed": 0})
    strategy = strategy_of(name, max_offences=1, checkpoints=saved)
    result = start(strategy, one_spent(), rounds=5)
    assert [report.exhausted for report in result.rounds] == [(), ("c2",), (), (), ()]
    assert not any(report.failures or report.quarantined for report in result.rounds)
    assert not any(report.skipped for report in result.rounds)
    assert not strategy.checkpoints.load().offences  # its own settings may be more
    assert (result.final_failures, result.final_quarantined) == ((), ())


@EVERY
def test_an_exhausted_client_is_not_asked_to_train_again(name: str):
    toy = one_spent()
    result = start(strategy_of(name), toy, rounds=6)
    assert toy.partitions("train").count(2) == SPENT_IN
    assert toy.partitions("train").count(0) == toy.partitions("train").count(4) == 6
    assert [report.clients for report in result.rounds[SPENT_IN:]] == [("c0", "c4")] * 4


def test_a_client_that_fails_is_asked_again_and_counted():
    """So that the tests above tell the two apart."""
    toy = Toy(roles=ROLES, fails=lambda partition, n: "no disk" if (partition, n) == (2, 2) else "")
    result = start(strategy_of("fedmeta"), toy, rounds=4)
    assert [len(report.failures) for report in result.rounds] == [0, 1, 0, 0]
    assert toy.partitions("train").count(2) == 4


def test_what_a_client_s_own_error_says_around_it_does_not_matter():
    """Flower's engines put the type and marks around an error's text."""
    said = f"ClientAppException:<'{BUDGET_EXHAUSTED}'>"
    toy = Toy(roles=ROLES, fails=lambda partition, n: said if partition == 2 else "")
    result = start(strategy_of("fedmeta"), toy, rounds=2)
    assert result.rounds[0].exhausted == ("c2",)
    assert not result.rounds[0].failures


def test_an_exhausted_client_is_still_evaluated():
    """Ditto asks each training client for the score of its personal model."""
    result = start(strategy_of("ditto"), one_spent(), rounds=4)
    assert [score.client for score in result.trained] == ["c0", "c2", "c4"]


@EVERY
def test_a_resumed_run_does_not_ask_it_again(name: str, tmp_path: Path):
    def run(toy: Toy, rounds: int, **more) -> RunResult:
        saved = Checkpoints(tmp_path / "saved", **more)
        return start(strategy_of(name, checkpoints=saved), toy, rounds=rounds)

    run(one_spent(), 3)
    again = one_spent()
    result = run(again, 6, resume=True)
    assert 2 not in again.partitions("train")
    assert [report.exhausted for report in result.rounds] == [(), ("c2",), (), (), (), ()]
    whole = start(strategy_of(name), one_spent(), rounds=6)
    assert bits(result.arrays) == bits(whole.arrays)


def test_under_guard_it_is_no_failure_either():
    few = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
    toy = Spending({2: SPENT_IN})
    nodes = CohortGrid(toy.app(), num_nodes=5)
    result = guard(flowers.FedAvg(fraction_evaluate=0.0, **few)).start(
        nodes, to_record(model()), num_rounds=3, timeout=5
    )
    assert [len(report.exhausted) for report in result.rounds] == [0, 1, 1]
    assert not any(report.failures or report.quarantined for report in result.rounds)
    assert not any(report.skipped for report in result.rounds)


# --- all of them ----------------------------------------------------------------------------------


@EVERY
def test_where_all_are_exhausted_the_run_ends_and_the_model_stays(name: str):
    toy = all_spent()
    result = start(strategy_of(name), toy, rounds=5)
    assert [report.skipped for report in result.rounds] == [False, True, True, True, True]
    assert [report.exhausted for report in result.rounds[2:]] == [()] * 3
    assert len(toy.partitions("train")) == 3 * SPENT_IN  # nobody is asked any more
    before = start(strategy_of(name), Spending({}), rounds=1)
    assert bits(result.arrays) == bits(before.arrays)
    assert [score.client for score in result.unseen] == ["c1"]
    assert result.rounds[-1].validation


def test_under_guard_a_run_in_which_all_are_exhausted_ends_too():
    few = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
    toy = Spending(dict.fromkeys(range(5), 1))
    nodes = CohortGrid(toy.app(), num_nodes=5)
    result = guard(flowers.FedAvg(**few)).start(nodes, to_record(model()), num_rounds=2, timeout=5)
    assert [(len(report.exhausted), report.skipped) for report in result.rounds] == [(5, True)] * 2
    assert bits(result.arrays) == bits(to_record(model()))


# --- the results ----------------------------------------------------------------------------------


def spending(message):
    """Add what a private client says that its ledger has come to."""
    if message.has_content() and "arrays" in message.content:
        content = message.content
        metrics = dict(content["metrics"])
        content["metrics"] = MetricRecord({**metrics, "privacy-epsilon": metrics["num-examples"]})
    return message


def test_the_results_tell_the_largest_epsilon_the_median_and_who_is_exhausted():
    config = RunConfig.read({**PRIVATE, "rounds": 4, "privacy.target-delta": 1e-6})
    grid = grid_with(spending, bad=range(5))
    result = start(strategy_of("fedmeta"), one_spent(), rounds=4, grid=grid)
    assert result.rounds[0].spent == (("c0", 1.0), ("c2", 3.0), ("c4", 5.0))
    assert result.rounds[1].spent == (("c0", 1.0), ("c4", 5.0))
    found = results_of(config, result)
    told = found["privacy"]["record_level"]
    assert (told["epsilon_max"], told["epsilon_median"]) == (5.0, median([1.0, 3.0, 5.0]))
    assert (told["clients"], told["exhausted"]) == (3, 1)
    assert (told["delta"], told["target_epsilon"]) == (1e-6, 4.0)
    assert [entry["exhausted"] for entry in found["history"]] == [[], ["c2"], [], []]
    assert (found["failures"], found["quarantined"], found["skipped"]) == (0, 0, 0)
    json.dumps(found, allow_nan=False)


def test_what_a_client_said_last_counts_and_not_the_sum_of_its_rounds():
    """A ledger's epsilon is over all rounds already."""
    reports = [
        RoundReport(
            round=number,
            clients=("a", "b"),
            failures=(),
            train_metrics={},
            validation=(),
            bytes_down=0,
            bytes_up=0,
            seconds=0.0,
            spent=spent,
        )
        for number, spent in enumerate([(("a", 1.0), ("b", 2.5)), (("a", 1.5),)], 1)
    ]
    result = RunResult(arrays=to_record({}), rounds=reports)
    told = results_of(RunConfig.read(PRIVATE), result)["privacy"]["record_level"]
    assert (told["epsilon_max"], told["epsilon_median"], told["clients"]) == (2.5, 2.0, 2)


def test_without_privacy_the_results_say_nothing_of_it():
    result = start(strategy_of("fedmeta"), Toy(roles=ROLES), rounds=1)
    assert "privacy" not in results_of(RunConfig.read({}), result)


def test_the_epsilon_that_was_reported_lasts_over_a_resume(tmp_path: Path):
    grid = grid_with(spending, bad=range(5))
    saved = Checkpoints(tmp_path)
    start(strategy_of("fedmeta", checkpoints=saved), one_spent(), rounds=3, grid=grid)
    again = Checkpoints(tmp_path, resume=True)
    result = start(strategy_of("fedmeta", checkpoints=again), one_spent(), rounds=4)
    assert result.rounds[0].spent == (("c0", 1.0), ("c2", 3.0), ("c4", 5.0))


# --- the command line -----------------------------------------------------------------------------

DIGITS = (
    "num-clients=8",
    "rounds=3",
    "clients-per-round=6",
    "eval-every=0",
    "device=cpu",
    "privacy.noise-multiplier=1.0",
    "privacy.sample-rate=0.1",
    "privacy.expected-batch-size=10.0",
    "privacy.target-epsilon=3.5",  # five rounds of two releases
)


@pytest.fixture
def simulate(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("METABLOOM_DATA", raising=False)
    threads = torch.get_num_threads()

    def run(out: Path, *more: str) -> tuple[int, str, str]:
        words = [word for setting in (*DIGITS, *more) for word in ("--set", setting)]
        arguments = ["metabloom", "simulate", *words, "--out", str(out)]
        monkeypatch.setattr(sys, "argv", arguments)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    yield run
    torch.set_num_threads(threads)


def results_in(out: Path) -> dict:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_a_second_run_goes_on_from_the_ledgers_and_ends_with_a_clear_error(simulate, tmp_path):
    out = tmp_path / "out"
    status, _, _ = simulate(out)
    assert status == 0
    first = results_in(out)["privacy"]["record_level"]
    ledgers = sorted((out / "ledgers" / "digits").glob("*.jsonl"))
    assert len(ledgers) == first["clients"] == 6
    assert [PrivacyLedger(one).events for one in ledgers] == [[(1.0, 0.1, 6)]] * 6
    assert first["epsilon_max"] == PrivacyLedger(ledgers[0]).epsilon(1e-5)

    status, _, _ = simulate(out)  # two rounds are left of three
    assert status == 0
    second = results_in(out)
    assert [len(entry["exhausted"]) for entry in second["history"]] == [0, 0, 6]
    assert [entry["skipped"] for entry in second["history"]] == [False, False, True]
    told = second["privacy"]["record_level"]
    assert first["epsilon_max"] < told["epsilon_max"] <= 3.5
    assert told["epsilon_median"] == told["epsilon_max"]
    assert told["exhausted"] == 6
    assert second["failures"] == 0

    spent = [one.read_bytes() for one in ledgers]
    status, _, said = simulate(out)
    assert status == 2
    assert re.search(r"no client had any privacy budget left.*the ledgers outlive runs", said)
    assert [one.read_bytes() for one in ledgers] == spent
    third = results_in(out)
    assert third["privacy"]["record_level"]["exhausted"] == 6
    assert third["skipped"] == 3


def test_a_target_below_one_round_ends_with_what_to_change(simulate, tmp_path):
    status, _, said = simulate(tmp_path / "out", "privacy.target-epsilon=0.1")
    assert status == 2
    assert "one round costs epsilon" in said
    assert "raise privacy.noise-multiplier" in said
    assert not (tmp_path / "out" / "ledgers").exists()
