"""Messages made by hand, and clients to answer them."""

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client import NumPyClient

from metabloom.clients import SGDClient
from tests.clients.toy_problems import Shifted, client_data, initialised


def place(partition=3, partitions=7):
    return Context(
        run_id=1,
        node_id=1,
        node_config={"partition-id": partition, "num-partitions": partitions},
        state=RecordDict(),
        run_config={},
    )


def ask(app, kind, content, *, context=None):
    """Hand ``app`` a message as Flower does and return the answer's content."""
    message = Message(RecordDict(content), dst_node_id=1, message_type=kind)
    message.metadata.__dict__["_message_id"] = "1"
    reply = app(message, context or place())
    assert reply.has_content()
    assert reply.metadata.reply_to_message_id == "1"
    return reply.content


def record_of(arrays, order=None):
    return ArrayRecord({name: Array(arrays[name]) for name in order or arrays})


def as_numpy(record):
    return {name: value.numpy() for name, value in record.items()}


def learner(kind=SGDClient, **options):
    return kind(initialised(Shifted()), client_data(), name="anna", inner_lr=0.4, **options)


def arrays_of(own):
    return dict(zip(own.array_names, own.get_parameters({}), strict=True))


class Echo(NumPyClient):
    """A client of somebody else: it knows no names. It records what it was given."""

    def __init__(self, *, drop=0, metrics=None):
        self.drop = drop
        self.metrics = metrics or {}
        self.seen = []

    def fit(self, parameters, config):
        self.seen.append((parameters, config))
        return [a * 2 for a in parameters[self.drop :]], 17, self.metrics

    def evaluate(self, parameters, config):
        self.seen.append((parameters, config))
        return 0.5, 4, self.metrics


NAMED = {
    "z": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array(3, dtype=np.int64),
    "m.half": np.ones(2, dtype=np.float16),
}


def message_of(arrays=None, config=None):
    return {
        "arrays": record_of(NAMED if arrays is None else arrays),
        "config": ConfigRecord(config or {}),
    }
