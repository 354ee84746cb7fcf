"""Replies that no aggregation may see, and a grid on which one client sends them."""

import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict

from metabloom.sim import CohortGrid
from metabloom.wire import from_record, to_record
from tests.strategies.toy import Arrays

BAD = 2  # the partition of the client that sends bad replies

Tamper = Callable[[Message], Message | None]


def reply_with(message: Message, **records: ArrayRecord | MetricRecord) -> Message:
    """Return the reply with other records."""
    message.content = RecordDict(records)
    return message


def arrays_of(change: Callable[[Arrays], Arrays]) -> Tamper:
    """Return what changes the arrays of a reply."""

    def tamper(message: Message) -> Message:
        arrays = {name: value.copy() for name, value in from_record(_arrays(message)).items()}
        return reply_with(message, arrays=to_record(change(arrays)), metrics=_metrics(message))

    return tamper


def array_of(change: Callable[[np.ndarray], np.ndarray]) -> Tamper:
    """Return what changes the array "bias", two float64, of a reply."""
    return arrays_of(lambda arrays: {**arrays, "bias": change(arrays["bias"])})


def raw(array: Callable[[Array], Array]) -> Tamper:
    """Return what changes the serialised array "bias" of a reply."""

    def tamper(message: Message) -> Message:
        record = ArrayRecord({**_arrays(message), "bias": array(_arrays(message)["bias"])})
        return reply_with(message, arrays=record, metrics=_metrics(message))

    return tamper


def metrics_of(**values: object) -> Tamper:
    """Return what sets metrics of a reply; None takes one away."""

    def tamper(message: Message) -> Message:
        named = {name.replace("_", "-"): value for name, value in values.items()}
        metrics = {**_metrics(message), **named}
        record = MetricRecord({n: v for n, v in metrics.items() if v is not None})
        return reply_with(message, arrays=_arrays(message), metrics=record)

    return tamper


def with_value(value: float) -> Tamper:
    return array_of(lambda bias: np.array([bias[0], value], dtype=bias.dtype))


def half_nan(arrays: Arrays) -> Arrays:
    return {**arrays, "half": np.full_like(arrays["half"], np.nan)}


def weight_column(arrays: Arrays) -> Arrays:
    return {**arrays, "weight": arrays["weight"].T.copy()}


def renamed(arrays: Arrays) -> Arrays:
    return {("biaS" if name == "bias" else name): value for name, value in arrays.items()}


def without(arrays: Arrays, name: str) -> Arrays:
    return {key: value for key, value in arrays.items() if key != name}


def objects(array: Array) -> Array:
    """Return an array whose bytes are NumPy's header of objects and a pickle."""
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (2,), }"
    return Array(array.dtype, array.shape, array.stype, header.ljust(128) + pickle.dumps([1, 2]))


def lying_header(array: Array) -> Array:
    """Return an array whose header promises more than there is."""
    data = array.data.replace(b"'shape': (2,)", b"'shape': (9,)")
    return Array(array.dtype, array.shape, array.stype, data)


def raises(message: Message) -> Message:
    return Message(Error(1, "RuntimeError: out of memory"), reply_to=_question(message))


@dataclass(frozen=True)
class Bad:
    """How a reply is bad, and what is said of it; "" where it is let through."""

    tamper: Tamper
    said: str = ""


BAD_REPLIES = {
    "raises": Bad(raises, "out of memory"),
    "no reply in time": Bad(lambda message: None, r"no reply within 5 s"),
    "no ArrayRecord": Bad(lambda m: reply_with(m, metrics=_metrics(m)), "0 ArrayRecords"),
    "two ArrayRecords": Bad(
        lambda m: reply_with(m, arrays=_arrays(m), more=_arrays(m), metrics=_metrics(m)),
        "2 ArrayRecords",
    ),
    "no records at all": Bad(lambda m: reply_with(m), "0 ArrayRecords"),
    "missing array": Bad(arrays_of(lambda a: without(a, "bias")), "'bias' is missing"),
    "extra array": Bad(arrays_of(lambda a: {**a, "x": a["bias"]}), "'x' was not sent"),
    "renamed array": Bad(arrays_of(renamed), "'bias' is missing"),
    "other shape": Bad(arrays_of(weight_column), r"'weight' has shape \(3, 2\).*\(2, 3\)"),
    "(1,) for (2,)": Bad(array_of(lambda b: b[:1]), r"'bias' has shape \(1,\).*\(2,\)"),
    "0-d for (2,)": Bad(array_of(lambda b: np.array(b[0])), r"'bias' has shape \(\)"),
    "empty array": Bad(array_of(lambda b: b[:0]), r"'bias' has shape \(0,\)"),
    "other dtype": Bad(array_of(lambda b: b.astype(np.float32)), "'bias' is of float32.*float64"),
    "whole numbers": Bad(array_of(lambda b: b.astype(np.int64)), "'bias' is of int64"),
    "complex": Bad(array_of(lambda b: b.astype(np.complex128)), "'bias' is of complex128"),
    "texts": Bad(array_of(lambda b: np.array(["a", "b"])), "'bias' is of <U1"),
    "NaN": Bad(with_value(np.nan), "'bias' holds NaN or infinity"),
    "NaN in half precision": Bad(arrays_of(half_nan), "'half' holds NaN or infinity"),
    "+inf": Bad(with_value(np.inf), "'bias' holds NaN or infinity"),
    "-inf": Bad(with_value(-np.inf), "'bias' holds NaN or infinity"),
    "1e30": Bad(with_value(1e30), r"'bias' holds 1e\+30, above 1e\+20"),
    "-1e200": Bad(with_value(-1e200), r"'bias' holds 1e\+200, above 1e\+20"),
    "pickled objects": Bad(raw(objects), "cannot be read: ValueError"),
    "lying header": Bad(raw(lying_header), "cannot be read: ValueError"),
    "no bytes": Bad(raw(lambda a: Array(a.dtype, a.shape, a.stype, b"")), "cannot be read"),
    "unknown format": Bad(raw(lambda a: Array(a.dtype, a.shape, "x", a.data)), "cannot be read"),
    "no MetricRecord": Bad(lambda m: reply_with(m, arrays=_arrays(m)), "0 MetricRecords"),
    "two MetricRecords": Bad(
        lambda m: reply_with(m, arrays=_arrays(m), metrics=_metrics(m), more=_metrics(m)),
        "2 MetricRecords",
    ),
    "no weight": Bad(metrics_of(num_examples=None), "'num-examples' is missing"),
    "NaN metric": Bad(metrics_of(loss=np.nan), "'loss' holds NaN or infinity"),
    "inf in a list": Bad(metrics_of(losses=[1.0, np.inf]), "'losses' holds NaN or infinity"),
    "a number too long": Bad(metrics_of(loss=10**400), "'loss' holds NaN or infinity"),
    "weight as a list": Bad(metrics_of(num_examples=[3.0]), "num-examples is a list"),
    "weight 0": Bad(metrics_of(num_examples=0), "num-examples is 0:"),
    "weight negative": Bad(metrics_of(num_examples=-3), "num-examples is -3:"),
    "weight NaN": Bad(metrics_of(num_examples=np.nan), "num-examples is nan:"),
    "weight inf": Bad(metrics_of(num_examples=np.inf), "num-examples is inf:"),
    "weight 1e12": Bad(metrics_of(num_examples=10**12), "num-examples is 1000000000000:"),
    "weight too long": Bad(metrics_of(num_examples=10**5000), "cannot be read"),
    "a share of 99%": Bad(metrics_of(num_examples=12_000), r"num-examples is 99\.9% of the total"),
    # What some replies have and others lack is aggregated over those that have it.
    "missing metric": Bad(metrics_of(loss=None)),
    "extra metric": Bad(metrics_of(more=1.0)),
    "metric as a list": Bad(metrics_of(loss=[1.0, 2.0])),
    "arrays in another order": Bad(arrays_of(lambda a: dict(reversed(a.items())))),
    "other names of records": Bad(lambda m: reply_with(m, model=_arrays(m), seen=_metrics(m))),
}


class TamperingGrid(CohortGrid):
    """A grid that changes the training replies of one client, and returns replies by partition."""

    tamper: Tamper = staticmethod(lambda message: message)
    bad: Iterable[int] = (BAD,)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        partitions = {node_id: index for index, node_id in enumerate(self.partitions)}
        replies = list(super().send_and_receive(messages, timeout=timeout))
        replies.sort(key=lambda reply: partitions[reply.metadata.src_node_id])
        return [
            changed
            for reply in replies
            if (changed := self._changed(reply, partitions[reply.metadata.src_node_id])) is not None
        ]

    def _changed(self, reply: Message, partition: int) -> Message | None:
        is_bad = reply.metadata.message_type == "train" and partition in self.bad
        return type(self).tamper(reply) if is_bad else reply


def grid_with(tamper: Tamper, bad: Iterable[int] = (BAD,)) -> type[TamperingGrid]:
    """Return a grid whose clients ``bad`` send what ``tamper`` makes of their training replies."""
    return type("Grid", (TamperingGrid,), {"tamper": staticmethod(tamper), "bad": tuple(bad)})


class GridWithout(TamperingGrid):
    """A grid from which the bad client is missing from the beginning."""

    def get_node_ids(self) -> Iterable[int]:
        return [node_id for index, node_id in enumerate(self.partitions) if index != BAD]


def _arrays(message: Message) -> ArrayRecord:
    return message.content["arrays"]


def _metrics(message: Message) -> MetricRecord:
    return message.content["metrics"]


def _question(reply: Message) -> Message:
    """Return a message that a reply could be the answer to."""
    metadata = reply.metadata
    question = Message(RecordDict(), metadata.src_node_id, metadata.message_type)
    question.metadata.__dict__["_message_id"] = metadata.reply_to_message_id
    question.metadata.__dict__["_run_id"] = metadata.run_id
    return question
