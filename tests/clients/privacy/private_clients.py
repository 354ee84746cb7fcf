"""Private clients with a tiny model, whose data say when they are touched."""

from pathlib import Path

from flwr.app import ConfigRecord, RecordDict
from flwr.common.serde import message_to_proto

from metabloom.clients import MAMLClient, PrivacyConfig, PrivacyLedger, client_app
from metabloom.sim import CohortGrid
from metabloom.wire import to_record
from tests.clients.small_clients import client_data, context, net

PINNED = {
    "noise_multiplier": 1.0,
    "max_grad_norm": 1.0,
    "sample_rate": 0.5,
    "expected_batch_size": 4.0,
    "target_epsilon": 200.0,
    "target_delta": 1e-5,
    "hvp_noise_multiplier": 2.0,
    "hvp_max_norm": 0.1,
}
RECORDS = 11  # of client_data


class Loader:
    """A client's data, and how often they were asked for."""

    def __init__(self, data=None, *, error=None):
        self.data = client_data() if data is None else data
        self.error = error
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.error is not None:
            raise self.error
        return self.data


def pinned(file: Path, **more) -> PrivacyConfig:
    return PrivacyConfig(**{**PINNED, "ledger": PrivacyLedger(file, data="toy/anna"), **more})


def private(file: Path, kind=MAMLClient, *, data=None, pins=None, **options):
    """Return a client with a ledger at ``file``; ``pins`` take the place of ``PINNED``."""
    own = {"name": "anna", "inner_lr": 0.4, "privacy": pinned(file, **(pins or {}))}
    return kind(net(), data or Loader(), **{**own, **options})


def booked(file: Path) -> int:
    """Return how many releases are in the ledger."""
    return sum(count for *_, count in PrivacyLedger(file).events)


class Served:
    """A client behind Flower's messages."""

    def __init__(self, make):
        self.make = make
        self.grid = CohortGrid(client_app(make), num_nodes=1)

    def ask(self, asked, *, number=1):
        """Return the reply to a message with the client's own parameters."""
        own = self.make(context())
        arrays = dict(zip(own.array_names, own.get_parameters({}), strict=True))
        content = RecordDict(
            {"arrays": to_record(arrays), "config": ConfigRecord({"server-round": number})}
        )
        (node,) = self.grid.get_node_ids()
        message = self.grid.create_message(content, asked, node, "0")
        (reply,) = self.grid.send_and_receive([message])
        return reply


def served(file, **options):
    return Served(lambda held: private(file, context=held, **options))


def ask(file, asked, **options):
    return served(file, **options).ask(asked)


def bytes_of(reply) -> bytes:
    """Return all of a reply as it goes over the wire."""
    return message_to_proto(reply).SerializeToString()


def reason_of(reply) -> str:
    assert reply.has_error()
    return reply.error.reason
