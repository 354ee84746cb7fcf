"""One private round: messages that come again, and the copy of the ledger's head."""

import shutil

import numpy as np
import pytest
from flwr.app import Context

from metabloom.accounting import Event, epsilon_of
from metabloom.clients import SGDClient
from metabloom.clients.privacy import round as one_round
from metabloom.clients.privacy.round import FAILED, PrivateRounds
from metabloom.errors import MetabloomError, PrivacyError, RefusedError
from metabloom.ledger import Charge
from tests.clients.privacy.private_clients import Loader, booked, private
from tests.clients.small_clients import context, same

MESSAGE = {"server-round": 3, "run-token": "a run", "kept-round": 2}
EACH = 2  # releases of a round: one inner step, one query gradient
NAN, INF = float("nan"), float("inf")


def fit(file, config=None, *, arrays=None, **options):
    """Return the reply of a client that was built for this message alone."""
    own = private(file, **options)
    return own.fit(own.get_parameters({}) if arrays is None else arrays, config or {})


def moved_arrays(file):
    return [value + np.float32(0.01) for value in private(file).get_parameters({})]


# --- a message that comes again -------------------------------------------------------------------


def check_redelivery(file):
    first, again = fit(file, MESSAGE), fit(file, MESSAGE)
    assert [a.tobytes() for a in first[0]] == [a.tobytes() for a in again[0]]
    assert first[1:] == again[1:]
    assert booked(file) == EACH


def check_other_parameters(file):
    first = fit(file, MESSAGE)[0]
    moved = moved_arrays(file)
    second = fit(file, MESSAGE, arrays=moved)[0]
    assert booked(file) == 2 * EACH
    noise = [(one - before) for one, before in zip(first, fit_start(file), strict=True)]
    other = [(one - before) for one, before in zip(second, moved, strict=True)]
    assert not any(np.array_equal(a, b) for a, b in zip(noise, other, strict=True))


def fit_start(file):
    return private(file).get_parameters({})


def check_other_config(file, **changes):
    first = fit(file, MESSAGE)
    second = fit(file, {**MESSAGE, **changes})
    assert booked(file) == 2 * EACH
    assert not any(np.array_equal(a, b) for a, b in zip(first[0], second[0], strict=True))


OTHER_CONFIGS = [
    {"server-round": 4},
    {"run-token": "another run"},
    {"privacy.noise-multiplier": 2.0},
    {"privacy.max-grad-norm": 0.5},
    {"privacy.sample-rate": 0.25},
]


def test_a_message_that_comes_again_gets_the_same_bytes_and_costs_nothing(file):
    check_redelivery(file)


def test_other_parameters_get_other_noise_and_are_charged(file):
    check_other_parameters(file)


@pytest.mark.parametrize("changes", OTHER_CONFIGS, ids=str)
def test_another_message_gets_other_noise_and_is_charged(file, changes):
    check_other_config(file, **changes)


@pytest.mark.parametrize(
    "pins",
    [{"noise_multiplier": 2.0}, {"max_grad_norm": 2.0}, {"expected_batch_size": 5.0}],
    ids=str,
)
def test_other_pinned_parameters_get_other_noise_and_are_charged(file, pins):
    first = fit(file, MESSAGE)[0]
    second = fit(file, MESSAGE, pins=pins)[0]
    assert booked(file) == 2 * EACH
    assert not same(first, second)


def test_another_mechanism_of_the_same_cost_is_charged(file):
    """Two steps of SGD cost as much as one meta-step, and are no answer to it."""
    first = fit(file, MESSAGE)[0]
    second = fit(file, MESSAGE, kind=SGDClient, local_steps=EACH)[0]
    assert booked(file) == 2 * EACH
    assert not same(first, second)


def test_an_answer_that_was_lost_is_charged_again_and_has_other_noise(file):
    first = fit(file, MESSAGE)[0]
    shutil.rmtree(file.with_name("anna.replies"))
    second = fit(file, MESSAGE)[0]
    assert booked(file) == 2 * EACH
    assert not same(first, second)


def test_an_answer_that_was_damaged_is_charged_again(file, caplog):
    first = fit(file, MESSAGE)[0]
    (kept,) = file.with_name("anna.replies").rglob("*.safetensors")
    content = bytearray(kept.read_bytes())
    content[-5] ^= 1
    kept.write_bytes(content)
    second = fit(file, MESSAGE)[0]
    assert booked(file) == 2 * EACH
    assert not same(first, second)
    assert "cannot be used" in caplog.text


def test_an_answer_that_cannot_be_kept_is_sent_all_the_same_and_charged_again(
    file, monkeypatch, caplog
):
    def full(*arguments, **more):
        raise MetabloomError("no space left")

    monkeypatch.setattr("metabloom.clients.store.write_atomic", full)
    first = fit(file, MESSAGE)
    second = fit(file, MESSAGE)
    assert booked(file) == 2 * EACH
    assert not same(first[0], second[0])
    assert "a reply is not kept: no space left" in caplog.text


def test_servers_that_tell_neither_round_nor_run_are_answered_by_what_they_sent(file):
    first, again = fit(file, {}), fit(file, {})
    assert same(first[0], again[0])
    assert booked(file) == EACH
    other = fit(file, {}, arrays=moved_arrays(file))
    assert booked(file) == 2 * EACH
    assert not same(first[0], other[0])


def test_flower_s_run_stands_in_for_a_token(file):
    one, other = context(), context()
    other = Context(run_id=2, node_id=1, node_config={}, state=other.state, run_config={})
    message = {"server-round": 3}
    first = fit(file, message, context=one)[0]
    assert same(first, fit(file, message, context=one)[0])
    assert not same(first, fit(file, message, context=other)[0])
    assert booked(file) == 2 * EACH


@pytest.mark.parametrize("told", [True, False], ids=["kept-round", "no kept-round"])
def test_the_answers_that_are_kept_stay_few(file, told):
    folder, most = file.with_name("anna.replies"), 0
    for number in range(1, 51):
        config = {"server-round": number, "run-token": "a run"}
        fit(file, config | ({"kept-round": number - 3} if told else {}))
        most = max(most, sum(path.is_file() for path in folder.rglob("*")))
    assert most <= 5
    assert booked(file) == 50 * EACH


def test_a_message_of_the_round_before_gets_its_own_bytes_again(file):
    earlier, later = ({"server-round": number, "run-token": "a run"} for number in (2, 3))
    first = fit(file, earlier)
    fit(file, later)
    again = fit(file, earlier)
    assert all(np.array_equal(a, b) for a, b in zip(first[0], again[0], strict=True))
    assert booked(file) == 2 * EACH


def test_epsilon_after_rounds_is_that_of_all_of_them(file):
    for number in range(1, 8):
        _, _, metrics = fit(file, {"server-round": number})
        spent = [Event(1.0, 0.5, EACH * number)]
        assert metrics == {"privacy-epsilon": epsilon_of(spent, 1e-5), "privacy-delta": 1e-5}


# Wrong rounds, which the checks above must refuse.


def no_digest(monkeypatch):
    monkeypatch.setattr(one_round, "_digest", lambda *arguments: b"0" * 32)


def nothing_is_kept(monkeypatch):
    monkeypatch.setattr(PrivateRounds, "_kept", lambda *arguments: None)


def free_the_second_time(monkeypatch):
    real, known = PrivateRounds._reserve, set()

    def reserve(self, events, privacy, mechanism, asked):
        if asked.token in known:
            return Charge.of(events)
        known.add(asked.token)
        return real(self, events, privacy, mechanism, asked)

    monkeypatch.setattr(PrivateRounds, "_reserve", reserve)


def noise_from_the_round(monkeypatch):
    from metabloom.clients.privacy.noise import seeded_sources

    monkeypatch.setattr(one_round, "fresh_sources", lambda device: seeded_sources(3, device))


@pytest.mark.parametrize(
    ("plant", "check"),
    [
        (no_digest, check_other_parameters),
        (nothing_is_kept, check_redelivery),
        (free_the_second_time, check_other_parameters),
        (noise_from_the_round, lambda file: check_other_config(file, **{"server-round": 4})),
    ],
    ids=["no digest", "nothing is kept", "free the second time", "noise from the round"],
)
def test_the_checks_refuse_wrong_rounds(file, monkeypatch, plant, check):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(file)


# --- the copy of the ledger's head ----------------------------------------------------------------


def test_a_ledger_that_forgot_is_found_by_the_copy_in_the_context(file):
    held, data = context(), Loader()
    fit(file, {"server-round": 1}, context=held)
    fit(file, {"server-round": 2}, context=held)
    lines = file.read_bytes().splitlines(keepends=True)
    for forgotten in (b"".join(lines[:-1]), lines[0], b""):
        file.write_bytes(forgotten)
        with pytest.raises(PrivacyError, match=FAILED):
            fit(file, {"server-round": 3}, context=held, data=data)
    file.unlink()
    with pytest.raises(PrivacyError, match=FAILED):
        fit(file, {"server-round": 3}, context=held, data=data)
    assert data.calls == 0
    file.write_bytes(b"".join(lines))
    fit(file, {"server-round": 3}, context=held)
    assert booked(file) == 3 * EACH


def test_a_context_that_is_behind_the_ledger_is_no_fault(file):
    """A round that failed leaves no trace in the context, and a line in the ledger."""
    held = context()
    fit(file, {"server-round": 1}, context=held)
    fit(file, {"server-round": 2})
    fit(file, {"server-round": 3}, context=held)
    assert booked(file) == 3 * EACH


def test_replies_of_the_newest_runs_alone_are_kept(file):
    for run in range(9):
        fit(file, {"server-round": 1, "run-token": f"run-{run}"})
    folder = file.with_name(f"{file.stem}.replies")
    assert {run.name for run in folder.iterdir()} == {f"run-{run}" for run in range(5, 9)}
    first = fit(file, {"server-round": 1, "run-token": "run-6"})
    assert booked(file) == 9 * EACH, "it is still there"
    fit(file, {"server-round": 1, "run-token": "run-0"})
    assert booked(file) == 10 * EACH, "it was forgotten, and is charged again"
    assert first[2]["privacy-delta"] == 1e-5


def test_prv_is_for_one_schedule_and_says_so(file):
    fit(file, {"server-round": 1}, pins={"accountant": "prv"})
    with pytest.raises(RefusedError, match=r"'prv' is for a schedule that never changes.*'rdp'"):
        fit(file, {"server-round": 2, "noise-multiplier": 3.0}, pins={"accountant": "prv"})
    fit(file, {"server-round": 2, "noise-multiplier": 3.0})
