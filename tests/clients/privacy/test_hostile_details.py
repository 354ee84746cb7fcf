"""Details that a hostile server, or an unlucky host, could turn into a leak or a free release."""

import os
from contextlib import suppress

import pytest
import torch
from flwr.app import Context, RecordDict

import metabloom.client_app
from metabloom.accounting import Event
from metabloom.clients.privacy import releases as engine
from metabloom.clients.privacy.cohort import cohort_gradients
from metabloom.clients.privacy.noise import seeded_sources
from metabloom.clients.privacy.round import FAILED
from metabloom.config import RunConfig
from metabloom.errors import (
    BudgetExhaustedError,
    ConfigError,
    DataError,
    LedgerError,
    MissingDataError,
    PrivacyError,
    RefusedError,
)
from metabloom.ledger import UNIT, Charge, PrivacyLedger
from metabloom.pins import privacy_of
from tests.clients.privacy.private_clients import Loader, booked, private
from tests.clients.small_clients import context

PINS = {"privacy.noise-multiplier": 2.0, "partition-id": 3}
CANARY = "Smith, John"


def fit(file, config, *, data=None, **options):
    own = private(file, data=data, **options)
    return own.fit(own.get_parameters({}), config)


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"server-round": "1"},
        {"server-round": 1.5},
        {"server-round": True},
        {"server-round": 2**60},
        {"server-round": 1, "kept-round": "x"},
        {"server-round": 1, "kept-round": [3]},
    ],
    ids=str,
)
def test_a_round_that_is_no_number_is_refused_before_it_is_paid_for(file, config):
    data = Loader()
    with pytest.raises(RefusedError, match="a round is a whole number"):
        fit(file, config, data=data)
    assert booked(file) == data.calls == 0


def test_a_token_of_any_length_leaves_a_short_line(file):
    fit(file, {"server-round": 1, "run-token": "x" * 10**6})
    assert file.stat().st_size < 1500


@pytest.mark.parametrize("key", ["max-grad-norm", "hvp-max-norm"])
@pytest.mark.parametrize("norm", [0.75e-45, 1e-46, 1e-30])
def test_a_norm_below_what_floats_can_add_noise_to_is_refused(file, key, norm):
    """At C = 0.75e-45 float32 rounds C up, and the noise that was booked is not there."""
    with pytest.raises(RefusedError, match=r"cannot be.*at least 1e-06"):
        fit(file, {f"privacy.{key}": norm})
    assert booked(file) == 0


@pytest.mark.parametrize("wish", [{"noise-multiplier": 10**400}, {"sample-rate": 1e-7}], ids=str)
def test_a_wish_beyond_any_range_is_refused_as_such(file, wish):
    with pytest.raises(RefusedError, match="the server wishes"):
        fit(file, wish)
    assert booked(file) == 0


def test_under_prv_the_epsilon_that_is_told_is_not_above_the_target(file):
    pins = {"accountant": "prv", "target_epsilon": 12.0}
    told = []
    with suppress(BudgetExhaustedError):
        for number in range(1, 200):
            told.append(fit(file, {"server-round": number}, pins=pins)[2]["privacy-epsilon"])
    assert 0 < len(told) < 199
    assert max(told) <= 12.0
    assert PrivacyLedger(file).epsilon(1e-5) > 12.0, "RDP would have stopped before"


# --- the ledger and its head ----------------------------------------------------------------------


def test_the_head_is_known_by_whichever_path_the_ledger_is_named(file, monkeypatch):
    held = context()
    fit(file, {"server-round": 1}, context=held)
    fit(file, {"server-round": 2}, context=held)
    *lines, _ = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines))
    monkeypatch.chdir(file.parent)
    relative = type(file)(os.path.relpath(file))
    with pytest.raises(PrivacyError, match=FAILED):
        fit(relative, {"server-round": 3}, context=held)


def test_an_open_ledger_that_is_removed_is_not_begun_anew(file):
    ledger = PrivacyLedger(file)
    ledger.reserve([Event(1.0, 0.1, 5)])
    file.unlink()
    with pytest.raises(LedgerError, match="has 0 lines and had 2 before"):
        ledger.reserve([Event(1.0, 0.1)])
    assert not file.read_bytes()


def test_a_ledger_of_clients_is_none_of_records(file):
    PrivacyLedger(file, unit="one client, added or removed").reserve([Event(1.0, 0.1)])
    with pytest.raises(LedgerError, match="'one client', not for 'one record'"):
        PrivacyLedger(file, unit=UNIT).reserve([Event(1.0, 0.1)])
    assert PrivacyLedger(file).events == [(1.0, 0.1, 1)]


# --- pins -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "privacy.noise-multipler",
        "privacy.noise_multiplier",
        "Privacy.noise-multiplier",
        "noise-multiplier",
        "privacy",
    ],
)
def test_a_pin_that_is_misspelt_is_refused_and_not_taken_for_none(tmp_path, key):
    node = {"privacy.root": str(tmp_path), key: 4.0}
    with pytest.raises(ConfigError, match="a pin that nobody reads protects nothing"):
        privacy_of(node, RunConfig.read({}), "a")


def test_a_pinned_node_has_one_ledger_whatever_runs_call_its_data(tmp_path):
    node = {**PINS, "privacy.root": str(tmp_path)}
    runs = [RunConfig.read({"dataset": name}) for name in ("digits", "omniglot")]
    ledgers = {privacy_of(node, run, "a").ledger for run in runs}
    assert {one.path for one in ledgers} == {tmp_path / "partition-3.jsonl"}
    named = privacy_of({**node, "privacy.data": "ward-3"}, runs[0], "a").ledger
    assert (named.path, named.data) == (tmp_path / "ward-3.jsonl", "ward-3")


# --- data that cannot be read ---------------------------------------------------------------------


@pytest.mark.parametrize("asked", [metabloom.client_app.client_fn, metabloom.client_app.properties])
@pytest.mark.parametrize("error", [ValueError(CANARY), DataError(CANARY)], ids=repr)
def test_what_a_private_node_cannot_read_is_not_told(monkeypatch, tmp_path, asked, error):
    def unreadable(*arguments):
        raise error

    monkeypatch.setattr(metabloom.client_app, "federation_of", unreadable)
    place = {"partition-id": 0, "num-partitions": 4}
    pinned = {**place, "privacy.noise-multiplier": 2.0, "privacy.root": str(tmp_path)}
    private_run = {"privacy.noise-multiplier": 1.0}
    for node, run in ((pinned, {}), (place, private_run)):
        held = Context(1, 1, node, RecordDict(), run_config=run)
        with pytest.raises(PrivacyError, match=FAILED):
            asked(held)
    with pytest.raises(type(error), match=CANARY):  # that of a node that is not private is
        asked(Context(1, 1, place, RecordDict(), run_config={}))


def test_a_missing_file_is_told_by_private_nodes_too(monkeypatch):
    def missing(*arguments):
        raise MissingDataError("no such file: fetch it")

    monkeypatch.setattr(metabloom.client_app, "federation_of", missing)
    place = {"partition-id": 0, "num-partitions": 4}
    run = {"privacy.noise-multiplier": 1.0}
    with pytest.raises(MissingDataError, match="fetch it"):
        metabloom.client_app.properties(Context(1, 1, place, RecordDict(), run_config=run))


# --- the engine -----------------------------------------------------------------------------------


def test_a_cohort_with_too_few_sources_of_noise_is_refused():
    """Clients without a generator would be sent without noise."""
    model = torch.nn.Linear(3, 2)
    params = {n: value.detach().expand(4, *value.shape) for n, value in model.named_parameters()}
    batches = (torch.ones(4, 1, 3), torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1))
    with pytest.raises(ConfigError, match="1 generators for 4 clients"):
        cohort_gradients(
            model,
            torch.nn.functional.cross_entropy,
            params,
            batches,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=1.0,
            noise=[seeded_sources(0).noise],
            layers=seeded_sources(1).draws,
        )


def test_records_are_drawn_no_more_often_than_was_booked(monkeypatch):
    """Numbers of torch.rand are multiples of 2^-24, and are below q more often than q says."""
    rates = []

    def sampler(*, sample_rate, num_samples, **rest):
        rates.append(sample_rate)
        return [[]]

    monkeypatch.setattr("opacus.utils.uniform_sampler.UniformWithReplacementSampler", sampler)
    rate = 1.00000001e-5
    releases = engine.Releases(
        torch.nn.Linear(3, 2),
        torch.nn.functional.cross_entropy,
        (torch.ones(5, 3), torch.zeros(5, dtype=torch.long)),
        sample_rate=rate,
        expected_batch_size=1.0,
        charge=Charge({}),
        sources=seeded_sources(0),
    )
    releases.draw()
    (found,) = rates
    assert found <= rate
    assert (found * 2**24).is_integer()
    assert found > rate - 2**-24


def test_an_epsilon_that_is_no_number_is_not_reported():
    from flwr.app import MetricRecord

    from metabloom.strategies.shell.reply_metrics import privacy_in

    def told(**metrics):
        return privacy_in(RecordDict({"metrics": MetricRecord(metrics)}))

    assert told(**{"privacy-epsilon": 2.5, "privacy-delta": 1e-5}) == (2.5, 1e-5)
    for epsilon in (float("nan"), float("inf"), -1.0, [1.0]):
        assert told(**{"privacy-epsilon": epsilon, "privacy-delta": 1e-5}) == (0.0, 0.0)
    assert told() == (0.0, 0.0)
