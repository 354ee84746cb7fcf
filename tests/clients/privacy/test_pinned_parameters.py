"""What is pinned on a client: no server's wish makes it weaker."""

from dataclasses import replace

import numpy as np
import pytest

from metabloom.accounting import Budget, Event, epsilon_of
from metabloom.clients import MAMLClient, PrivacyConfig, SGDClient
from metabloom.config import RunConfig
from metabloom.errors import ConfigError, PrivacyError
from metabloom.ledger import PrivacyLedger
from metabloom.pins import privacy_of
from tests.clients.privacy.private_clients import PINNED, Loader, booked, pinned, private

MESSAGE = {"server-round": 3, "run-token": "a run", "kept-round": 2}
EACH = 2  # releases of a round: one inner step, one query gradient
NAN, INF = float("nan"), float("inf")


def fit(file, config=None, *, arrays=None, **options):
    """Return the reply of a client that was built for this message alone."""
    own = private(file, **options)
    return own.fit(own.get_parameters({}) if arrays is None else arrays, config or {})


# --- a server that asks for too much --------------------------------------------------------------

HOSTILE = [
    {"privacy.noise-multiplier": 0},
    {"privacy.noise-multiplier": 0.999},
    {"privacy.noise-multiplier": -1.0},
    {"privacy.noise-multiplier": INF},
    {"privacy.noise-multiplier": NAN},
    {"noise-multiplier": 0.0},
    {"noise_multiplier": 0.0},
    {"privacy.sample-rate": 1},
    {"privacy.sample-rate": 0.0},
    {"sample-rate": 0.51},
    {"privacy.max-grad-norm": INF},
    {"privacy.max-grad-norm": NAN},
    {"max_grad_norm": INF},
    {"max_grad_norm": NAN},
    {"max-grad-norm": "abc"},
    {"max-grad-norm": "0.5"},
    {"max-grad-norm": True},
    {"max-grad-norm": b"0.5"},
    {"max-grad-norm": [0.5]},
    {"privacy.target-epsilon": 1e9},
    {"target-epsilon": INF},
    {"privacy.target-delta": 0.5},
    {"privacy.hvp-noise-multiplier": 0.0},
    {"privacy.hvp-max-norm": INF},
    {"privacy.noise-multiplier": 4.0, "privacy.sample-rate": 1.0},
    {"privacy.noise-multiplier": 4.0, "noise_multiplier": 0.0},
]


@pytest.mark.parametrize("kind", [MAMLClient, SGDClient])
@pytest.mark.parametrize("wish", HOSTILE, ids=str)
def test_a_wish_that_is_weaker_or_no_number_is_refused_before_data_are_touched(file, wish, kind):
    data = Loader()
    with pytest.raises(PrivacyError, match="the server wishes"):
        fit(file, {**MESSAGE, **wish}, data=data, kind=kind)
    assert data.calls == 0
    assert not file.exists()


@pytest.mark.parametrize("wish", HOSTILE, ids=str)
def test_a_weak_wish_is_refused_after_a_round_that_was_answered_too(file, wish):
    """A kept reply is no way round the pins."""
    fit(file, MESSAGE)
    with pytest.raises(PrivacyError, match="the server wishes"):
        fit(file, {**MESSAGE, **wish})
    assert booked(file) == EACH


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        (MAMLClient, {"inner_steps": 10**6}),
        (MAMLClient, {"local_steps": 10**6}),
        (MAMLClient, {"inner_steps": 500, "order": "exact"}),
        (SGDClient, {"local_steps": 10**6}),
    ],
    ids=str,
)
def test_more_steps_than_are_pinned_are_refused_before_data_are_touched(file, kind, steps):
    data = Loader()
    with pytest.raises(PrivacyError, match=r"the round takes \d+ releases, .* at most 1000"):
        fit(file, MESSAGE, data=data, kind=kind, pins={"target_epsilon": 1e9}, **steps)
    assert data.calls == 0
    assert not file.exists()


def test_as_many_steps_as_are_pinned_are_taken(file):
    fit(file, MESSAGE, kind=SGDClient, local_steps=7, pins={"max_releases": 7})
    assert booked(file) == 7


@pytest.mark.parametrize(
    ("wish", "event"),
    [
        ({"privacy.noise-multiplier": 4}, (4.0, 0.5, EACH)),
        ({"noise-multiplier": 4.0}, (4.0, 0.5, EACH)),
        ({"noise_multiplier": 4.0, "privacy.sample-rate": 0.125}, (4.0, 0.125, EACH)),
        ({"privacy.noise-multiplier": 1.0, "privacy.sample-rate": 0.5}, (1.0, 0.5, EACH)),
        ({"privacy.max-grad-norm": 0.25}, (1.0, 0.5, EACH)),
    ],
    ids=str,
)
def test_a_stronger_wish_is_followed_and_booked(file, wish, event):
    _, _, metrics = fit(file, {**MESSAGE, **wish})
    assert PrivacyLedger(file).events == [event]
    assert metrics["privacy-epsilon"] == epsilon_of([Event(*event)], 1e-5)


def test_a_stronger_bound_makes_a_reply_move_less(file):
    """Noise is in proportion to the bound: a thousandth of it moves the model a thousandth."""

    def step(**wishes):
        after = fit(file, {**MESSAGE, **wishes})[0]
        start = private(file).get_parameters({})
        return max(float(np.abs(a - b).max()) for a, b in zip(after, start, strict=True))

    assert 0 < step(**{"max-grad-norm": 1e-3}) < 0.1 * step()  # by 30 standard deviations


def test_a_lower_target_of_the_server_s_is_followed(file):
    with pytest.raises(PrivacyError, match=r"above the target of 0\.1"):
        fit(file, {**MESSAGE, "privacy.target-epsilon": 0.1})
    assert not file.exists()


def test_keys_that_are_no_parameters_are_left_alone(file):
    others = {"lr": 0.5, "max-releases": 10**9, "privacy.public-counts": True, "seed": 1}
    _, count, metrics = fit(file, {**MESSAGE, **others, "privacy.unprotected-metrics": "all"})
    assert count == 1
    assert set(metrics) == {"privacy-epsilon", "privacy-delta"}


def test_wishes_under_two_spellings_that_differ_are_both_kept_to(file):
    """The stronger one is taken, in every process."""
    wishes = {"privacy.noise-multiplier": 2.0, "noise_multiplier": 4.0, "noise-multiplier": 3.0}
    assert pinned(file).under(wishes).noise_multiplier == 4.0
    wishes = {"privacy.sample-rate": 0.3, "sample_rate": 0.1, "sample-rate": 0.2}
    assert pinned(file).under(wishes).sample_rate == 0.1


# --- the parameters -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_multiplier", 0.0),
        ("noise_multiplier", NAN),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", INF),
        ("max_grad_norm", NAN),
        ("sample_rate", 0.0),
        ("sample_rate", 1.5),
        ("target_epsilon", INF),
        ("target_delta", 0.0),
        ("expected_batch_size", 0.0),
        ("expected_batch_size", NAN),
        ("hvp_noise_multiplier", 0.0),
        ("hvp_max_norm", INF),
        ("max_releases", 0),
        ("max_releases", 1.5),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_its_name_and_value(file, name, value):
    with pytest.raises(ConfigError, match=rf"{name} = {value!r}: must"):
        pinned(file, **{name: value})


def test_the_budget_is_what_was_pinned(file):
    assert pinned(file).budget == Budget(200.0, 1e-5, "rdp")
    assert replace(pinned(file), hvp_noise_multiplier=None).hvp_noise == 1.0


def test_what_sums_are_divided_by_says_nothing_of_the_number_of_records():
    """The noise of a reply over what is known would tell it."""
    usual = {**PINNED, "expected_batch_size": None, "sample_rate": 0.25}
    assert PrivacyConfig(**usual).batch_size(7) == PrivacyConfig(**usual).batch_size(7000) == 25.0
    assert PrivacyConfig(**usual, public_counts=True).batch_size(80) == 20.0
    assert PrivacyConfig(**usual, public_counts=True).batch_size(0) == 0.25  # by nothing: 0 / 0
    assert PrivacyConfig(**{**usual, "expected_batch_size": 4.0}).batch_size(80) == 4.0


def test_a_client_without_a_batch_size_of_its_own_trains(file):
    unsaid = {"expected_batch_size": None}
    assert fit(file, MESSAGE, pins=unsaid)[1] == 1
    assert fit(file, {"server-round": 9}, pins={**unsaid, "public_counts": True})[1] == 11


# --- what a node pins -----------------------------------------------------------------------------

PINS = {
    "privacy.noise-multiplier": 2.0,
    "privacy.sample-rate": 0.1,
    "privacy.target-epsilon": 4.0,
    "privacy.expected-batch-size": 5.0,
}


def privacy_with(tmp_path, pins=None, run=None):
    """Return the privacy of node 0 with ``pins``, whose ledgers lie in ``tmp_path``."""
    node = {"partition-id": 0, "num-partitions": 3, **(pins or {})}
    if pins:
        node["privacy.root"] = str(tmp_path)
    config = RunConfig.read({"out": str(tmp_path / "out"), **(run or {})})
    return privacy_of(node, config, "client-3")


def test_without_pins_and_wishes_there_is_no_privacy(tmp_path):
    assert privacy_with(tmp_path) is None


def test_pins_alone_make_a_node_private_whatever_the_run_says(tmp_path):
    found = privacy_with(tmp_path, PINS)
    told = (found.noise_multiplier, found.sample_rate, found.target_epsilon)
    assert told == (2.0, 0.1, 4.0)
    assert found.expected_batch_size == 5.0
    assert found.ledger.path.is_relative_to(tmp_path)


def test_a_run_alone_makes_a_node_private(tmp_path):
    found = privacy_with(tmp_path, run={"privacy.noise-multiplier": 1.5})
    assert found.noise_multiplier == 1.5
    assert found.ledger.path == tmp_path / "out" / "ledgers" / "digits" / "client-3.jsonl"


STRONGER = {"privacy.sample-rate": 0.05, "privacy.target-epsilon": 3.0}


@pytest.mark.parametrize(
    "wish",
    [
        {"privacy.noise-multiplier": 1.9},
        {"privacy.sample-rate": 0.2},
        {"privacy.target-epsilon": 9.0},
        {"privacy.max-grad-norm": 2.0},
        {"privacy.target-delta": 1e-3},
        {"privacy.hvp-max-norm": 1.0},
        {"privacy.hvp-noise-multiplier": 0.1},
    ],
    ids=str,
)
def test_a_run_that_asks_for_less_than_is_pinned_is_refused(tmp_path, wish):
    run = {"privacy.noise-multiplier": 2.0, **STRONGER, **wish}
    with pytest.raises(PrivacyError, match="the server wishes privacy"):
        privacy_with(tmp_path, PINS, run)


def test_a_run_that_asks_for_more_than_is_pinned_is_followed(tmp_path):
    run = {"privacy.noise-multiplier": 3.0, **STRONGER}
    found = privacy_with(tmp_path, PINS, run)
    told = (found.noise_multiplier, found.sample_rate, found.target_epsilon)
    assert told == (3.0, 0.05, 3.0)
    assert found.expected_batch_size == 5.0


def test_what_a_run_leaves_at_its_default_does_not_weaken_a_pin(tmp_path):
    """A target of 8 and a rate of .1 are what a run has that says nothing of them."""
    own = {"privacy.sample-rate": 0.01, "privacy.max-grad-norm": 0.1}
    found = privacy_with(tmp_path, {**PINS, **own}, {"privacy.noise-multiplier": 2.0})
    assert (found.sample_rate, found.max_grad_norm, found.target_epsilon) == (0.01, 0.1, 4.0)


def test_what_a_node_lets_out_is_not_the_run_s_to_say(tmp_path):
    loud = {
        "privacy.noise-multiplier": 3.0,
        **STRONGER,
        "privacy.public-counts": True,
        "privacy.unprotected-metrics": "all",
        "privacy.max-releases": 10**6,
        "privacy.accountant": "prv",
    }
    found = privacy_with(tmp_path, PINS, loud)
    assert (found.public_counts, found.unprotected_metrics) == (False, ())
    assert (found.max_releases, found.accountant) == (1000, "rdp")


def test_no_run_chooses_another_ledger_for_a_node_that_has_pinned_its_own(tmp_path):
    """A new ledger would be a new budget."""
    ledgers = {
        privacy_with(tmp_path, PINS, run).ledger.path
        for run in (
            {},
            {"out": str(tmp_path / "elsewhere")},
            {"privacy.noise-multiplier": 2.0, "privacy.root": str(tmp_path / "elsewhere")},
            {"dataset": "omniglot"},
            {"dataset-args": "ways=2", "seed": 9, "num-clients": 5},
        )
    }
    assert len(ledgers) == 1


def test_pins_without_a_folder_for_the_ledger_are_refused():
    with pytest.raises(ConfigError, match=r"privacy\.root"):
        privacy_of({"partition-id": 0, **PINS}, RunConfig.read({}), "client-3")


@pytest.mark.parametrize(
    "part",
    [
        {"privacy.sample-rate": 0.2},
        {"privacy.sample-rate": 0.1},  # which is the default
        {"privacy.noise-multiplier": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("run", [{}, {"privacy.noise-multiplier": 1.0}], ids=str)
def test_a_pin_that_would_leave_a_node_without_privacy_is_refused(tmp_path, part, run):
    with pytest.raises(ConfigError, match=r"privacy\.noise-multiplier"):
        privacy_with(tmp_path, part, run)


def test_a_root_alone_pins_nothing(tmp_path):
    node = {"privacy.root": str(tmp_path)}
    assert privacy_of(node, RunConfig.read({}), "a") is None
    own = privacy_of(node, RunConfig.read({"privacy.noise-multiplier": 1.0}), "a")
    assert own.ledger.path == tmp_path / "digits" / "a.jsonl"


def test_every_pinned_parameter_of_these_tests_can_be_wished_stronger(file):
    """So that HOSTILE is about weakness, and not about keys that nobody knows."""
    for name, value in PINNED.items():
        if name != "expected_batch_size":
            weaker_low = name in ("noise_multiplier", "hvp_noise_multiplier")
            wish = value * (2 if weaker_low else 0.5)
            assert getattr(pinned(file).under({name: wish}), name) == wish
