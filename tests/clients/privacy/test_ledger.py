"""The ledger only grows, over rounds, objects and restarts, and holds a budget."""

import random

import pytest

from metabloom.accounting import Budget, Event, aggregated, epsilon_of
from metabloom.errors import BudgetExhaustedError, ConfigError, PrivacyError
from metabloom.ledger import Charge, Head, PrivacyLedger
from tests.clients.privacy.ledgers import (
    DELTA,
    ROUND,
    count_of,
    ledger_at,
    written,
)

# --- it only grows --------------------------------------------------------------------------------


def test_what_was_released_adds_up_over_rounds_and_objects(path):
    spent, costs = [], []
    for number in range(6):
        own = [Event(1.0 + number % 2, 0.05, 3 + number)]
        ledger_at(path).reserve(own, server_round=number)
        spent += own
        fresh = ledger_at(path)
        assert fresh.events == [tuple(event) for event in aggregated(spent)]
        assert fresh.epsilon(DELTA) == epsilon_of(spent, DELTA)
        costs.append(fresh.epsilon(DELTA))
    assert costs == sorted(set(costs))


def test_epsilon_after_fifty_rounds_is_that_of_fifty_and_not_of_one(path):
    for _ in range(50):
        ledger_at(path).reserve(ROUND)
    assert round(ledger_at(path).epsilon(DELTA), 2) == 11.98


def test_an_object_sees_what_another_one_wrote(path):
    one, other = ledger_at(path), ledger_at(path)
    one.reserve(ROUND)
    assert other.events == [(1.0, 0.05, 20)]
    other.reserve(ROUND)
    assert one.events == [(1.0, 0.05, 40)]
    assert one.head == other.head == ledger_at(path).head
    assert one.head.lines == 3


def test_a_reservation_says_all_that_it_was_for(path):
    ledger_at(path).reserve(
        [Event(2.0, 0.1, 3), Event(1.0, 0.1)],
        mechanism="second-order",
        run="7f",
        server_round=12,
        seeded=True,
    )
    (entry,) = ledger_at(path).entries()
    assert entry.events == (Event(1.0, 0.1, 1), Event(2.0, 0.1, 3))
    told = (entry.mechanism, entry.run, entry.server_round, entry.seeded)
    assert told == ("second-order", "7f", 12, True)
    assert entry.time.endswith("+00:00")


def test_a_ledger_that_was_never_written_is_empty_and_makes_no_file(path):
    ledger = ledger_at(path)
    assert (ledger.events, ledger.entries(), ledger.epsilon(DELTA)) == ([], [], 0.0)
    assert ledger.head == Head(0, "")
    ledger.check_not_behind(Head(0, ""))
    assert not path.parent.exists()


def test_an_exception_after_the_reservation_leaves_it_booked(path):
    def release():
        ledger_at(path).reserve(ROUND)
        raise RuntimeError("the round fails")

    for number in range(1, 4):
        with pytest.raises(RuntimeError):
            release()
        assert count_of(path) == 20 * number


def test_a_ledger_has_no_way_to_give_back():
    own = {name for name in vars(PrivacyLedger) if not name.startswith("_")}
    reading = {"events", "epsilon", "head", "entries", "admits", "check_not_behind"}
    assert own == {*reading, "reserve"}


def test_the_file_is_its_owner_s_alone(path):
    ledger_at(path).reserve(ROUND)
    assert path.stat().st_mode & 0o077 == 0


# --- the budget -----------------------------------------------------------------------------------


def test_the_budget_of_a_ledger_lasts_as_long_as_epsilon_says_over_all_objects(path):
    budget, rounds = Budget(5.0, DELTA), 0
    while ledger_at(path).admits(ROUND, budget):
        ledger_at(path).reserve(ROUND, budget=budget)
        rounds += 1
    with pytest.raises(BudgetExhaustedError):
        ledger_at(path).reserve(ROUND, budget=budget)
    assert epsilon_of(ROUND * rounds, DELTA) <= 5.0 < epsilon_of(ROUND * (rounds + 1), DELTA)
    assert count_of(path) == 20 * rounds
    assert not ledger_at(path).admits(ROUND, budget)


def test_a_refused_reservation_books_nothing(path):
    written(path, 3)
    before = path.read_bytes()
    with pytest.raises(BudgetExhaustedError):
        ledger_at(path).reserve([Event(0.1, 1.0)], budget=Budget(1.0, DELTA))
    assert path.read_bytes() == before


def test_a_schedule_is_the_same_in_larger_and_smaller_portions(path):
    """Two rounds' worth at once is no other schedule, so the best order may be looked for."""
    budget, ledger = Budget(11.99, DELTA), ledger_at(path)
    for times in (1, 2, 3, 4, 40):
        ledger.reserve([Event(1.0, 0.05, 20 * times)], budget=budget)
    assert round(ledger.epsilon(DELTA), 2) == 11.98


@pytest.mark.parametrize("seed", range(3))
def test_schedules_that_differ_never_come_above_the_target(path, seed):
    draw, budget, refused = random.Random(seed), Budget(4.0, DELTA), 0
    kinds = [(1.0, 0.05), (2.0, 0.01), (4.0, 0.5), (1.5, 0.1)]
    while refused < 6:
        try:
            own = [Event(*draw.choice(kinds), draw.randrange(1, 9))]
            ledger_at(path).reserve(own, budget=budget)
        except BudgetExhaustedError:
            refused += 1
    assert 0 < ledger_at(path).epsilon(DELTA) <= 4.0


def test_the_filter_goes_on_after_a_restart(path):
    """Whether schedules differed is read from the file, and not only known to one process."""
    budget = Budget(4.0, DELTA)
    ledger = ledger_at(path)
    ledger.reserve([Event(4.0, 0.5)], budget=budget)
    ledger.reserve([Event(1.0, 0.05, 20)], budget=budget)
    for count in range(20, 100, 10):
        own = [Event(1.0, 0.05, count)]
        assert ledger_at(path).admits(own, budget) == ledger.admits(own, budget)
        if not ledger.admits(own, budget):
            assert count < 70  # the best order of the sum would admit 94
            break
    else:
        pytest.fail("a ledger whose schedules differ looks for the best order")


@pytest.mark.parametrize("bad", [Event(0.0, 0.1), Event(1.0, 1.5), Event(1.0, 0.1, 0)])
def test_impossible_events_are_refused_and_not_booked(path, bad):
    with pytest.raises(ConfigError):
        ledger_at(path).reserve([Event(1.0, 0.1), bad])
    assert not path.exists()


def test_a_negative_count_takes_nothing_off_another_one(path):
    with pytest.raises(ConfigError, match="count = -4"):
        ledger_at(path).reserve([Event(1.0, 0.1, 5), Event(1.0, 0.1, -4)])
    assert not path.exists()


def test_each_release_of_a_charge_can_be_taken_once(path):
    charge = ledger_at(path).reserve([Event(1.0, 0.1, 2), Event(2.0, 0.1)])
    charge.take(1.0, 0.1)
    charge.take(2.0, 0.1)
    assert not charge.is_used_up
    charge.take(1.0, 0.1)
    assert charge.is_used_up
    for sigma, rate in ((1.0, 0.1), (2.0, 0.1), (1.0, 0.2), (0.5, 0.1)):
        with pytest.raises(PrivacyError, match=rf"noise_multiplier = {sigma:g} .* not reserved"):
            charge.take(sigma, rate)
    assert Charge.of([]).is_used_up
