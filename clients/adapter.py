"""Serve one NumPyClient to Message-API strategies, legacy servers and the roll call."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod

from ..errors import MetabloomError, WireError
from ..wire import (
    ARRAYS,
    CONFIG,
    ERROR,
    METRICS,
    NUM_EXAMPLES,
    NUM_PARTITIONS,
    PARTITION_ID,
    PROPERTIES,
    ROLL_CALL,
    SERVER_ROUND,
    from_record,
    to_record,
)
from .evaluation import LOSS

ClientFn = Callable[[Context], NumPyClient]
Properties = Callable[[Context], dict[str, str | int | float | bool]]
LEGACY_PREFIXES = ("fitins.", "evaluateins.", "getparametersins.", "getpropertiesins.")


def client_app(
    client_fn: ClientFn, *, mods: Sequence[Mod] = (), properties: Properties | None = None
) -> ClientApp:
    """Return a Flower ClientApp whose clients serve Message-API strategies and legacy ones alike.

    Args:
        client_fn: ``client_fn(context) -> NumPyClient``, called for each message.
        mods: Flower mods around the client, the first one outermost.
        properties: what a node says of itself at the roll call, without building its client; None
            asks ``client.get_properties``.
    """

    def legacy_client(context: Context) -> Client:
        return client_fn(context).to_client()

    def bridge(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        kind = message.metadata.message_type
        if kind == ROLL_CALL:
            return _answer_roll_call(message, context, client_fn, properties)
        if kind not in ("train", "evaluate"):
            return call_next(message, context)
        if _is_legacy(message.content):
            return call_next(_with_round(message), context)
        content = _train if kind == "train" else _evaluate
        return Message(content(client_fn(context), message.content), reply_to=message)

    return ClientApp(client_fn=legacy_client, mods=[*mods, bridge])


def _is_legacy(content: RecordDict) -> bool:
    return any(name.startswith(LEGACY_PREFIXES) for name in content)


def _with_round(message: Message) -> Message:
    """Return a legacy message whose config tells the round, which legacy servers keep in group_id.

    Without it a client would draw the same batches in every round.
    """
    for name, record in message.content.config_records.items():
        if name.endswith("ins.config") and SERVER_ROUND not in record:
            group = message.metadata.group_id
            number = int(group) if group.isdigit() else 0
            message.content[name] = ConfigRecord({**record, SERVER_ROUND: number})
    return message


def _answer_roll_call(
    message: Message, context: Context, client_fn: ClientFn, properties: Properties | None
) -> Message:
    place = {
        key: context.node_config[key]
        for key in (PARTITION_ID, NUM_PARTITIONS)
        if key in context.node_config
    }
    said: dict[str, Any]
    try:
        said = properties(context) if properties else client_fn(context).get_properties({})
    except MetabloomError as err:  # the server says it to the user, and leaves this node out
        said = {ERROR: str(err)}
    return Message(RecordDict({PROPERTIES: ConfigRecord({**place, **said})}), reply_to=message)


def _train(client: NumPyClient, content: RecordDict) -> RecordDict:
    names, parameters = _received(client, content)
    trained, num_examples, metrics = client.fit(parameters, _config(content))
    if len(trained) != len(names):
        raise WireError(
            f"{type(client).__name__}.fit returned {len(trained)} arrays for {len(names)} "
            "received: return one for each, in the order received"
        )
    arrays = to_record(dict(zip(names, map(np.asarray, trained), strict=True)))
    return RecordDict({ARRAYS: arrays, **_measured(metrics, num_examples)})


def _evaluate(client: NumPyClient, content: RecordDict) -> RecordDict:
    _, parameters = _received(client, content)
    loss, num_examples, metrics = client.evaluate(parameters, _config(content))
    tells = getattr(client, "tells", lambda metric: True)  # a private client may not tell it
    known = {LOSS: loss} if tells(LOSS) else {}
    return RecordDict(_measured({**known, **metrics}, num_examples))


def _received(client: NumPyClient, content: RecordDict) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Return the names and arrays of the one ArrayRecord.

    A client with ``array_names`` gets them by name, in its order; arrays that are only numbered
    (``ArrayRecord(list_of_ndarrays)``) go by position.
    """
    if len(content.array_records) != 1:
        raise WireError(
            f"the message holds {len(content.array_records)} ArrayRecords, exactly one is needed: "
            f"send {{'{ARRAYS}': ArrayRecord, '{CONFIG}': ConfigRecord}}"
        )
    (record,) = content.array_records.values()
    arrays = from_record(record)
    names = tuple(str(position) for position in range(len(arrays)))
    if set(names) != set(arrays):
        names = getattr(client, "array_names", tuple(arrays))
    if set(names) != set(arrays):
        wrong = sorted(set(names) ^ set(arrays))
        raise WireError(
            f"the server's arrays and the client's model differ in {', '.join(wrong)}: "
            "server and client must build the same model"
        )
    return names, [arrays[name] for name in names]


def _config(content: RecordDict) -> dict[str, bool | bytes | float | int | str]:
    """Return the message's config; lists pass as they are, though NumPyClient's type has none."""
    merged: dict[str, Any] = {}
    for record in content.config_records.values():
        merged |= record
    return merged


def _measured(
    metrics: dict[str, bool | bytes | float | int | str], num_examples: int
) -> dict[str, ArrayRecord | MetricRecord | ConfigRecord]:
    """Return numbers as a MetricRecord, and text, which that cannot hold, as a ConfigRecord."""
    numbers: dict[str, Any] = {
        name: int(value) if isinstance(value, bool | int | np.integer) else float(value)
        for name, value in metrics.items()
        if not isinstance(value, str | bytes)
    }
    texts: dict[str, Any] = {
        name: value for name, value in metrics.items() if isinstance(value, str | bytes)
    }
    records: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {
        METRICS: MetricRecord({**numbers, NUM_EXAMPLES: int(num_examples)})
    }
    if texts:
        records[PROPERTIES] = ConfigRecord(texts)
    return records
