"""Runs with user-level privacy: what is booked, who takes part, and what the results say."""

import logging
import math
from pathlib import Path

import numpy as np
import pytest

from metabloom.accounting import Event, epsilon_of
from metabloom.errors import BUDGET_EXHAUSTED, ConfigError, PrivacyError
from metabloom.ledger import PrivacyLedger
from metabloom.strategies import Checkpoints, Firewall, UserLevelPrivacy
from metabloom.strategies.shell import roll_call
from metabloom.strategies.shell.user_account import SPENT, UserAccount
from metabloom.streams import numpy_stream
from metabloom.wire import from_record
from tests.strategies.toy import OF_MODELS, Toy, bits, exchanged, model, moved, start, strategy_of

EVERY = pytest.mark.parametrize("name", [n for n in OF_MODELS if n != "pfedhn"])  # others refuse it
ROLES = ("train", "unseen", "train", "validation", "train")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "POLL_S", 0.01)
    monkeypatch.setattr(roll_call, "GATHER_S", 0.05)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "user-level.jsonl"


def privacy(ledger: Path, **changed) -> UserLevelPrivacy:
    usual = {
        "noise_multiplier": 1.0,
        "max_update_norm": 0.1,
        "expected_clients": 3.0,
        "target_delta": 1e-5,
        "ledger": ledger,
    }
    return UserLevelPrivacy(**{**usual, **changed})


def echo(arrays, partition, number):
    return arrays


# --- every strategy -------------------------------------------------------------------------------


@EVERY
def test_every_strategy_runs_with_it_and_books_each_round(name: str, ledger: Path):
    strategy = strategy_of(name, user_privacy=privacy(ledger, adaptive_quantile=0.5))
    result = start(strategy, Toy(roles=ROLES), rounds=3)
    new = from_record(result.arrays)
    for key, value in model().items():
        assert (new[key].shape, new[key].dtype) == (value.shape, value.dtype), key
        stays = np.issubdtype(value.dtype, np.integer) or key not in exchanged(name)
        assert np.array_equal(new[key], value) == stays, key
    assert not any(report.skipped for report in result.rounds)
    assert [score.client for score in result.unseen] == ["c1"]
    assert PrivacyLedger(ledger).events == [(1.0, 1.0, 3)]
    assert [entry.mechanism for entry in PrivacyLedger(ledger).entries()] == 3 * ["user-level"]
    told = result.user_level
    assert told.epsilon == epsilon_of([Event(1.0, 1.0, 3)], 1e-5)
    assert (told.rounds, told.adjacency, told.seeded) == (3, "leave out", False)
    assert told.max_update_norm != 0.1  # it has adapted


@EVERY
def test_without_replies_a_round_releases_noise_and_is_booked(name: str, ledger: Path):
    """A chance of 1e-9 of anyone, in ten draws: the test fails by itself with chance 1e-8."""
    toy = Toy(roles=ROLES)
    strategy = strategy_of(name, user_privacy=privacy(ledger, sample_rate=1e-9))
    result = start(strategy, toy, rounds=2)
    assert toy.partitions("train") == []
    assert [(report.clients, report.skipped) for report in result.rounds] == 2 * [((), False)]
    assert not np.array_equal(from_record(result.arrays)["weight"], model()["weight"])
    assert result.user_level.rounds == 2
    assert result.user_level.adjacency == "add or remove"


@EVERY
def test_two_runs_differ_whatever_their_seed(name: str, ledger: Path):
    """The noise, and with a rate the sample, are of nothing that a run's configuration tells."""
    one, other = (
        start(strategy_of(name, user_privacy=privacy(ledger), seed=5), Toy(), rounds=1)
        for _ in range(2)
    )
    assert bits(one.arrays) != bits(other.arrays)
    assert one.rounds[0].clients == other.rounds[0].clients  # a fixed-size sample is public


def test_noise_from_the_runs_seed_is_found(ledger: Path, monkeypatch: pytest.MonkeyPatch):
    """The check above, with the bug planted, sees two equal models."""
    monkeypatch.setattr(
        UserAccount, "_generator", lambda self, purpose: numpy_stream(5, purpose, 1)
    )
    with pytest.raises(AssertionError):
        test_two_runs_differ_whatever_their_seed("fedavg", ledger)


# --- the model ------------------------------------------------------------------------------------


def test_fedavg_is_the_mean_of_clipped_updates_where_the_noise_is_taken_out(tmp_path: Path):
    """The same seed gives the same noise; clients that learn nothing leave only that."""
    initial = {"w": np.zeros((2, 3)), "b": np.array(1.0)}

    def after_one_round(learns, file: str) -> dict:
        chosen = privacy(tmp_path / file, seed=1, max_update_norm=0.25)
        strategy = strategy_of("fedavg", user_privacy=chosen)
        clients = Toy(learns=learns)
        return from_record(start(strategy, clients, nodes=4, rounds=1, arrays=initial).arrays)

    models = [after_one_round(moved, "loud"), after_one_round(echo, "still")]
    expected = np.zeros(7)
    for partition in range(4):
        step = np.sin(1.7 * partition + 1) / 7
        update = np.array(6 * [step] + [2 * step])
        expected += update * min(1.0, 0.25 / np.linalg.norm(update))
    loud, still = (np.append(one["w"].ravel(), one["b"]) for one in models)
    np.testing.assert_allclose(loud - still, expected / 3.0, atol=1e-12)


def test_a_client_that_diverges_or_is_huge_does_not_decide_the_model(ledger: Path):
    def learns(arrays, partition, number):
        wild = {0: math.nan, 1: 1e15}.get(partition)
        if wild is None:
            return arrays
        return {name: np.full_like(value, wild) for name, value in arrays.items()}

    initial = {"w": np.zeros(50, dtype=np.float32)}
    strategy = strategy_of("fedavg", user_privacy=privacy(ledger, expected_clients=5.0))
    result = start(strategy, Toy(learns=learns), nodes=5, rounds=1, arrays=initial)
    # One client moves it by C / m = 0.02; noise of 50 coordinates by 0.14, and never by 1.
    assert np.linalg.norm(from_record(result.arrays)["w"]) < 1.0
    assert [client for client, _ in result.rounds[0].quarantined] == ["partition-0"]


def test_a_heavy_client_is_not_thrown_out_since_that_would_move_others(ledger: Path):
    firewall = Firewall(max_share=0.4)  # the last of three has half of all records
    plain = start(strategy_of("fedavg", firewall=firewall), Toy(), nodes=3, rounds=1)
    assert plain.rounds[0].quarantined
    strategy = strategy_of("fedavg", firewall=firewall, user_privacy=privacy(ledger))
    assert not start(strategy, Toy(), nodes=3, rounds=1).rounds[0].quarantined


# --- who takes part -------------------------------------------------------------------------------


def test_a_poisson_sample_is_not_the_runs_seeds(ledger: Path):
    """Twenty coins over three rounds: two runs agree with chance 2^-60."""
    one, other = (
        start(
            strategy_of("fedavg", seed=7, user_privacy=privacy(ledger, sample_rate=0.5)),
            Toy(),
            nodes=20,
            rounds=3,
        )
        for _ in range(2)
    )
    assert [r.clients for r in one.rounds] != [r.clients for r in other.rounds]


def test_a_sample_of_fixed_size_is_that_of_a_run_without_privacy(ledger: Path):
    chosen = {"seed": 7, "clients_per_round": 2}
    plain = start(strategy_of("fedavg", **chosen), Toy(), rounds=4)
    private = start(strategy_of("fedavg", user_privacy=privacy(ledger), **chosen), Toy(), rounds=4)
    assert [r.clients for r in plain.rounds] == [r.clients for r in private.rounds]


def test_in_a_sample_of_fixed_size_nobody_takes_the_place_of_one_that_is_exhausted(ledger: Path):
    def fails(partition: int, number: int) -> str:
        return BUDGET_EXHAUSTED if partition in (1, 2) else ""

    chosen = {"seed": 3, "clients_per_round": 2}
    whole, with_exhausted = (
        start(
            strategy_of("fedavg", user_privacy=privacy(ledger), **chosen),
            Toy(fails=those),
            rounds=5,
        )
        for those in (lambda partition, number: "", fails)
    )
    assert [r.clients for r in whole.rounds] == [r.clients for r in with_exhausted.rounds]
    without_privacy = start(strategy_of("fedavg", **chosen), Toy(fails=fails), rounds=5)
    assert [r.clients for r in whole.rounds] != [r.clients for r in without_privacy.rounds]


@pytest.mark.parametrize(
    ("changed", "shell", "complaint"),
    [
        ({}, {"min_fit_replies": 2}, "min_fit_replies = 2 with user-level privacy"),
        ({}, {"max_offences": 3}, "max_offences = 3 with user-level privacy"),
        ({"sample_rate": 0.5}, {"max_offences": 3}, ""),
    ],
)
def test_settings_by_which_clients_decide_on_others_are_refused(changed, shell, complaint, ledger):
    chosen = privacy(ledger, **changed)
    if not complaint:
        assert strategy_of("fedavg", user_privacy=chosen, **shell)
        return
    with pytest.raises(ConfigError, match=complaint):
        strategy_of("fedavg", user_privacy=chosen, **shell)


# --- the budget -----------------------------------------------------------------------------------


def test_at_the_budget_training_ends_and_the_run_ends_as_usual(ledger: Path, caplog):
    budget = epsilon_of([Event(1.0, 1.0, 2)], 1e-5) + 0.01
    toy = Toy(roles=ROLES)
    strategy = strategy_of("fedavg", user_privacy=privacy(ledger, target_epsilon=budget))
    with caplog.at_level(logging.WARNING, logger="flwr"):
        result = start(strategy, toy, rounds=5)
    assert [report.skipped for report in result.rounds] == [False, False, True, True, True]
    assert sum(len(report.clients) for report in result.rounds) == len(toy.partitions("train")) == 6
    assert SPENT in caplog.text
    assert result.user_level.rounds == 2
    assert result.user_level.epsilon <= budget
    assert len(result.unseen) == 1
    # It stays spent, for every later run on the same clients.
    again = start(strategy_of("fedavg", user_privacy=strategy.user_privacy), Toy(), rounds=1)
    assert again.rounds[0].skipped


def test_a_budget_below_one_round_is_refused_with_its_cost(ledger: Path):
    strategy = strategy_of("fedavg", user_privacy=privacy(ledger, target_epsilon=0.5))
    cost = epsilon_of([Event(1.0, 1.0)], 1e-5)
    with pytest.raises(ConfigError, match=rf"one round costs epsilon = {cost:.2f} at user level"):
        start(strategy, Toy(), rounds=1)


def test_noise_that_was_not_booked_is_refused_and_so_is_a_second_release(ledger: Path):
    account = UserAccount.of(privacy(ledger), min_fit_replies=1, max_offences=None)
    with pytest.raises(PrivacyError, match="not reserved"):
        account.noise()
    assert account.reserve("run", 1, num_clients=5)
    account.noise()
    with pytest.raises(PrivacyError, match="not reserved"):
        account.noise()
    assert PrivacyLedger(ledger).events == [(1.0, 1.0, 1)]


def test_a_round_is_booked_before_any_client_is_asked(ledger: Path):
    booked = []

    def learns(arrays, partition, number):
        booked.append(sum(count for _, _, count in PrivacyLedger(ledger).events))
        return arrays

    start(strategy_of("fedavg", user_privacy=privacy(ledger)), Toy(learns=learns), rounds=2)
    assert booked == 5 * [1] + 5 * [2]


def test_a_ledger_of_records_and_a_seeded_one_are_told(ledger: Path):
    with pytest.raises(ConfigError, match="one record"):
        strategy_of("fedavg", user_privacy=privacy(PrivacyLedger(ledger)))
    chosen = privacy(ledger, seed=1)
    result = start(strategy_of("fedavg", user_privacy=chosen), Toy(), rounds=1)
    assert result.user_level.seeded


def test_one_round_of_fixed_size_makes_the_weaker_claim_for_all(ledger: Path):
    start(strategy_of("fedavg", user_privacy=privacy(ledger)), Toy(), rounds=1)
    sampled = privacy(ledger, sample_rate=0.5)
    result = start(strategy_of("fedavg", user_privacy=sampled), Toy(), rounds=1)
    assert result.user_level.adjacency == "leave out"
    assert result.user_level.rounds == 2


def test_a_delta_that_could_give_a_client_away_is_told(ledger: Path, caplog):
    with caplog.at_level(logging.WARNING, logger="flwr"):
        chosen = privacy(ledger, target_delta=0.3)
        start(strategy_of("fedavg", user_privacy=chosen), Toy(), rounds=1)
    assert "target_delta = 0.3 is not below 1 / 5 clients" in caplog.text


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_with_its_norm_and_its_ledger(tmp_path: Path, ledger: Path):
    """With seeded noise by ledger line, two halves are the whole to the bit."""

    def run(name: str, rounds: int, *, resume: bool, folder: str):
        chosen = privacy(tmp_path / name, adaptive_quantile=0.3, seed=1)
        kept = Checkpoints(tmp_path / folder, resume=resume)
        return start(
            strategy_of("fedmeta", user_privacy=chosen, checkpoints=kept), Toy(), rounds=rounds
        )

    whole = run("whole.jsonl", 4, resume=False, folder="whole")
    run("halves.jsonl", 2, resume=False, folder="halves")
    halves = run("halves.jsonl", 4, resume=True, folder="halves")
    assert halves.user_level == whole.user_level
    assert halves.user_level.rounds == 4
    assert bits(halves.arrays) == bits(whole.arrays)


def test_a_round_that_is_played_again_is_booked_again(tmp_path: Path, ledger: Path):
    def learns(arrays, partition, number):
        if number == 3 and partition == 2:
            raise KeyboardInterrupt
        return arrays

    def chosen(**more) -> dict:
        return {
            "user_privacy": privacy(ledger),
            "checkpoints": Checkpoints(tmp_path / "kept", **more),
        }

    with pytest.raises(KeyboardInterrupt):
        start(strategy_of("fedavg", **chosen()), Toy(learns=learns), rounds=4)
    result = start(strategy_of("fedavg", **chosen(resume=True)), Toy(), rounds=4)
    assert [report.round for report in result.rounds] == [1, 2, 3, 4]
    assert [entry.server_round for entry in PrivacyLedger(ledger).entries()] == [1, 2, 3, 3, 4]
    assert len({entry.run for entry in PrivacyLedger(ledger).entries()}) == 1
    assert result.user_level.rounds == 5


def test_a_run_with_other_parameters_is_not_resumed(tmp_path: Path, ledger: Path):
    def run(*, resume: bool, **changed):
        kept = Checkpoints(tmp_path / "kept", resume=resume)
        chosen = privacy(**{"ledger": ledger, **changed})
        strategy = strategy_of("fedavg", user_privacy=chosen, checkpoints=kept)
        return start(strategy, Toy(), rounds=1)

    run(resume=False)
    with pytest.raises(ConfigError, match=r"user_privacy.noise_multiplier = 1\.0, this run 2\.0"):
        run(resume=True, noise_multiplier=2.0)
    assert run(resume=True, ledger=tmp_path / "moved.jsonl")
