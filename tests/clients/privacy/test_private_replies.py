"""What leaves a private client: an allow-list, constants for failures, nothing of a record."""

import json
import struct

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict

from metabloom.accounting import Event, epsilon_of
from metabloom.clients import ClientData, MAMLClient, SGDClient
from metabloom.clients.privacy.round import FAILED
from metabloom.errors import (
    ConfigError,
    DataError,
    LedgerError,
    ModelError,
    PrivacyError,
)
from metabloom.wire import to_record
from tests.clients.privacy.private_clients import (
    RECORDS,
    Loader,
    Served,
    ask,
    booked,
    bytes_of,
    private,
    reason_of,
    served,
)
from tests.clients.small_clients import client as usual_client
from tests.clients.small_clients import client_data, same

KINDS = pytest.mark.parametrize("kind", [MAMLClient, SGDClient])
ASKED = pytest.mark.parametrize("asked", ["train", "evaluate"])
CANARY = "diagnosis of record 7: 123456.789"
ODD = 123456.789  # a value that nothing but a record has
NO_CLASS = 9_876_543_210  # longer than what a random id of a message would repeat by chance
EACH = 2


@pytest.fixture
def file(tmp_path):
    return tmp_path / "secret-folder" / "anna.jsonl"


def spellings(value: float) -> list[bytes]:
    """Return how a number may lie in a message."""
    packed = [struct.pack(form, value) for form in ("<f", ">f", "<d", ">d")]
    return [*packed, repr(value).encode(), f"{value:.3f}".encode()]


def holds(reply, values) -> bool:
    whole = bytes_of(reply)
    return any(spelt in whole for value in values for spelt in spellings(value))


# --- train replies --------------------------------------------------------------------------------


@KINDS
def test_a_train_reply_holds_arrays_one_example_epsilon_and_delta_alone(file, kind):
    reply = ask(file, "train", kind=kind, local_steps=1)
    releases = booked(file)
    assert set(reply.content) == {"arrays", "metrics"}
    assert isinstance(reply.content["arrays"], ArrayRecord)
    assert dict(reply.content["metrics"]) == {
        "num-examples": 1,
        "privacy-epsilon": epsilon_of([Event(1.0, 0.5, releases)], 1e-5),
        "privacy-delta": 1e-5,
    }


def test_public_counts_tell_the_number_of_records_and_no_more(file):
    reply = ask(file, "train", pins={"public_counts": True})
    metrics = dict(reply.content["metrics"])
    assert metrics.pop("num-examples") == RECORDS
    assert set(metrics) == {"privacy-epsilon", "privacy-delta"}


def losses_of(**options) -> list[float]:
    """Return what a client that is not private would say of the same data."""
    own = usual_client(MAMLClient, **options)
    start = own.get_parameters({})
    _, _, trained = own.fit(start, {"server-round": 1})
    loss, _, curve = own.evaluate(start, {})
    return [loss, *trained.values(), *curve.values()]


def numbers_of_records(data: ClientData) -> list[float]:
    return [float(value) for value in data.all[0].flatten()]


def odd_data() -> ClientData:
    data = client_data()
    data.support[0][0, 0] = ODD
    return data


@ASKED
def test_no_byte_of_a_reply_is_a_record_or_a_loss(file, asked):
    data = odd_data()
    reply = ask(file, asked, data=Loader(data))
    assert not reply.has_error()
    secret = [ODD, *numbers_of_records(data), *losses_of(data=data)]
    assert not holds(reply, [value for value in secret if value not in (0.0, 1.0)])


def test_that_check_finds_what_a_client_without_privacy_says(file):
    data = odd_data()
    usual = Served(lambda held: usual_client(MAMLClient, data=data, context=held))
    secret = [value for value in losses_of(data=data) if value not in (0.0, 1.0)]
    assert holds(usual.ask("train"), secret)
    assert holds(usual.ask("evaluate"), secret)
    assert holds(ask(file, "evaluate", pins={"unprotected_metrics": ("all",)}), losses_of())


def test_arrays_that_are_not_trained_come_back_as_they_were_sent(file):
    reply = ask(file, "train")
    own = private(file)
    assert tuple(reply.content["arrays"]) == own.array_names
    for name, value in zip(own.array_names, own.get_parameters({}), strict=True):
        found = reply.content["arrays"][name].numpy()
        assert (found.shape, found.dtype) == (value.shape, value.dtype)


# --- evaluate replies -----------------------------------------------------------------------------

CURVE = {
    "loss-before",
    "accuracy-before",
    "loss-after-1",
    "accuracy-after-1",
    "loss-after-5",
    "accuracy-after-5",
}


@pytest.mark.parametrize(
    ("told", "names"),
    [
        ((), set()),
        (("accuracy-after-1",), {"accuracy-after-1"}),
        (("accuracy-after-1", "loss-before"), {"accuracy-after-1", "loss-before"}),
        (("loss",), {"loss"}),
        (("a name that is no metric",), set()),
        (("all",), {"loss", *CURVE}),
    ],
    ids=["none", "one", "two", "loss", "unknown", "all"],
)
@KINDS
def test_an_evaluate_reply_holds_the_metrics_that_were_declared_unprotected(
    file, kind, told, names
):
    reply = ask(file, "evaluate", kind=kind, pins={"unprotected_metrics": told})
    assert set(reply.content) == {"metrics"}
    metrics = dict(reply.content["metrics"])
    assert metrics.pop("num-examples") == 1
    assert set(metrics) == names
    assert not file.exists()  # an evaluation releases nothing that is booked


def test_an_evaluate_reply_tells_the_number_of_records_where_it_is_public(file):
    reply = ask(file, "evaluate", pins={"public_counts": True})
    assert dict(reply.content["metrics"]) == {"num-examples": 5}


def test_a_flower_client_gets_nan_in_the_place_of_a_loss(file):
    """Its interface has a loss always."""
    own = private(file)
    loss, count, metrics = own.evaluate(own.get_parameters({}), {})
    assert np.isnan(loss)
    assert (count, metrics) == (1, {})


# --- what fails -----------------------------------------------------------------------------------


def bad_loss(output, target):
    raise ValueError(CANARY)


class OddError(Exception):
    """An error of somebody else's library."""


ERRORS = [
    ValueError(CANARY),
    DataError(CANARY),
    ConfigError(CANARY),
    ModelError(CANARY),
    KeyError(CANARY),
    OSError(CANARY),
    OddError(CANARY),
    LedgerError(CANARY),
    AssertionError(CANARY),
]


TOLD = {"unprotected_metrics": ("all",)}  # else an evaluation touches no data


@ASKED
@KINDS
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_loader_that_fails_says_nothing(file, asked, kind, error, caplog):
    reply = ask(file, asked, kind=kind, data=Loader(error=error), pins=TOLD)
    assert reason_of(reply) == f"PrivacyError: {FAILED}"
    assert CANARY.encode() not in bytes_of(reply)
    assert CANARY in caplog.text  # the client's own log says why


@KINDS
def test_a_loss_that_fails_in_an_evaluation_says_nothing(file, kind, caplog):
    reply = ask(file, "evaluate", kind=kind, loss_fn=bad_loss, pins=TOLD)
    assert reason_of(reply) == f"PrivacyError: {FAILED}"
    assert CANARY.encode() not in bytes_of(reply)
    assert CANARY in caplog.text


@KINDS
def test_a_loss_that_fails_on_made_up_records_is_told_without_its_text(file, kind):
    reply = ask(file, "train", kind=kind, loss_fn=bad_loss)
    assert "the loss of a made-up record fails (ValueError)" in reason_of(reply)
    assert CANARY.encode() not in bytes_of(reply)


def mislabelled():
    """Records of which one has a class beyond the last column."""
    data = client_data()
    data.support[1][0] = NO_CLASS
    return data


@KINDS
def test_a_record_that_cannot_be_computed_with_does_not_fail_the_round(file, kind, caplog):
    """That it fails would tell that the record is there; the log alone says so."""
    options = {"pins": {"sample_rate": 1.0}, "local_steps": 2}
    reply = ask(file, "train", kind=kind, data=Loader(mislabelled()), **options)
    assert reply.has_content()
    assert "records that raise have no share" in caplog.text
    told = bytes_of(ask(file, "evaluate", kind=kind, data=Loader(mislabelled())))
    assert str(NO_CLASS).encode() not in told


def test_an_evaluation_of_which_nothing_is_told_says_not_even_that_it_would_fail(file):
    data = Loader(error=ValueError(CANARY))
    reply = ask(file, "evaluate", data=data)
    assert dict(reply.content["metrics"]) == {"num-examples": 1}
    assert data.calls == 0


def test_the_librarys_own_error_in_an_evaluation_does_not_name_the_largest_target(file):
    data = mislabelled()
    data.query[1][0] = NO_CLASS
    reply = ask(file, "evaluate", data=Loader(data), pins=TOLD)
    assert reason_of(reply) == f"PrivacyError: {FAILED}"


def test_a_personal_model_that_fails_does_not_take_back_what_was_paid_for(file, caplog):
    options = {"kind": SGDClient, "ditto_lambda": 0.1}
    reply = ask(file, "train", data=Loader(mislabelled()), **options)
    assert reply.has_content()
    assert "its personal model is not trained" in caplog.text


def test_what_was_booked_for_a_round_that_failed_stays_booked(file):
    ask(file, "train", data=Loader(error=ValueError(CANARY)))
    assert booked(file) == EACH


def test_what_raises_comes_without_its_cause(file):
    """A traceback that somebody prints further up must not show it either."""
    own = private(file, loss_fn=bad_loss)
    with pytest.raises(PrivacyError) as raised:
        own.fit(own.get_parameters({}), {})
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


def test_a_ledger_that_was_altered_does_not_tell_where_it_lies(file, caplog):
    ask(file, "train")
    content = bytearray(file.read_bytes())
    content[20] ^= 1
    file.write_bytes(content)
    data = Loader()
    reply = served(file, data=data).ask("train", number=2)
    assert reason_of(reply) == f"PrivacyError: {FAILED}"
    assert b"secret-folder" not in bytes_of(reply)
    assert "secret-folder" in caplog.text
    assert data.calls == 0


def test_a_ledger_that_cannot_be_written_does_not_tell_where_it_lies(file):
    file.parent.write_text("no folder")
    data = Loader()
    reply = ask(file, "train", data=data)
    assert reason_of(reply) == f"PrivacyError: {FAILED}"
    assert b"secret-folder" not in bytes_of(reply)
    assert data.calls == 0


def test_the_server_s_own_mistakes_are_told(file):
    """They say nothing of the data, and somebody has to mend them."""
    own = private(file)
    reply = Served(lambda held: own).grid  # any grid: the message is what is wrong
    (node,) = reply.get_node_ids()
    arrays = [value[..., :1] for value in own.get_parameters({})]
    content = RecordDict(
        {
            "arrays": to_record(dict(zip(own.array_names, arrays, strict=True))),
            "config": ConfigRecord({}),
        }
    )
    (answer,) = reply.send_and_receive([reply.create_message(content, "train", node, "0")])
    assert reason_of(answer).startswith("WireError: client 'anna' received 'body.weight' of shape")
    assert not file.exists()


def test_data_whose_records_depend_on_each_other_are_refused(file):
    data = client_data()
    fixed = ClientData(data.support, data.query, fixed_split=True)
    before = [value.copy() for value in private(file).get_parameters({})]
    reply = ask(file, "train", data=Loader(fixed))
    assert "records of this client depend on each other" in reason_of(reply)
    assert same(before, private(file).get_parameters({}))


# --- the rest of what a server can ask ------------------------------------------------------------


def test_the_roll_call_says_nothing_of_the_data(file):
    data = Loader(mislabelled())
    own = Served(lambda held: private(file, context=held, data=data))
    (node,) = own.grid.get_node_ids()
    message = own.grid.create_message(RecordDict({}), "query.roll_call", node, "0")
    (reply,) = own.grid.send_and_receive([message])
    assert dict(reply.content["properties"]) == {
        "partition-id": 0,
        "num-partitions": 1,
        "client": "MAMLClient",
        "architecture": "Net",
    }
    assert data.calls == 0


def test_a_round_leaves_the_head_of_the_ledger_in_the_context_and_not_in_the_reply(file):
    held = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    own = private(file, context=held)
    own.fit(own.get_parameters({}), {})
    last = json.loads(file.read_bytes().splitlines()[-1])
    record = dict(held.state["metabloom.ledger"])
    assert record == {"lines": 2, "checksum": last["checksum"], "path": str(file)}
    reply = served(file).ask("train", number=2)
    assert last["checksum"].encode() not in bytes_of(reply)
    assert b"secret-folder" not in bytes_of(reply)


def test_a_private_client_s_random_state_is_not_the_process_s(file):
    """Noise must not follow a seed that the process was given."""

    def moved():
        with torch.random.fork_rng():
            torch.manual_seed(3)
            own = private(file)
            return own.fit(own.get_parameters({}), {"run-token": str(booked(file))})[0]

    assert not same(moved(), moved())
