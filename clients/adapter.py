"""Serve one NumPyClient to Message-API strategies, legacy servers and the roll call."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
    TEACHER,
    from_record,
    to_record,
)
from .cohort import run_cohort
from .evaluation import LOSS
from .learner import Learner
from .local_update import LocalResult
from .objective import Params
from .training import LocalTraining

ClientFn = Callable[[Context], NumPyClient]
Properties = Callable[[Context], dict[str, str | int | float | bool]]
LEGACY_PREFIXES = ("fitins.", "evaluateins.", "getparametersins.", "getpropertiesins.")


def client_app(
    client_fn: ClientFn, *, mods: Sequence[Mod] = (), properties: Properties | None = None
) -> ClientApp:
    """Return a Flower ClientApp whose clients serve Message-API strategies and legacy ones alike.

    Without mods it also answers many messages at once, see ``CohortApp``.

    Args:
        client_fn: ``client_fn(context) -> NumPyClient``, called for each message.
        mods: Flower mods around the client, the first one outermost.
        properties: what a node says of itself at the roll call, without building its client; None
            asks ``client.get_properties``.
    """
    built: dict[int, NumPyClient] = {}  # of questions that go by themselves after all, by context

    def client_of(context: Context) -> NumPyClient:
        return built.pop(id(context), None) or client_fn(context)

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
        return Message(content(client_of(context), message.content), reply_to=message)

    if mods:  # each is to see each message by itself
        return ClientApp(client_fn=legacy_client, mods=[*mods, bridge])
    return CohortApp(legacy_client, bridge, client_fn, built)


class CohortApp(ClientApp):
    """A ClientApp that can answer many messages at once.

    Args:
        legacy_client: of the ClientApp.
        bridge: its mod, which converts messages.
        client_fn: see ``client_app``.
        built: where ``bridge`` finds the client of a context, by its id, that was built before.
    """

    def __init__(
        self,
        legacy_client: Callable[[Context], Client],
        bridge: Mod,
        client_fn: ClientFn,
        built: dict[int, NumPyClient],
    ) -> None:
        super().__init__(client_fn=legacy_client, mods=[bridge])
        self._client_fn = client_fn
        self._built = built

    def answer_all(
        self, questions: Iterator[tuple[Message, Context]]
    ) -> Iterator[tuple[int, Message | Exception]]:
        """Yield (position, reply, or what the client raised) for each question, in any order.

        Train messages to our own clients with ``kernel = "vmap"`` are computed at once, after all
        questions were taken; each other question is answered before the next one is taken.
        """
        waiting: dict[int, _Asked] = {}
        received: dict[Any, tuple[Params, Any]] = {}
        for position, (message, context) in enumerate(questions):
            try:
                asked = self._for_cohort(message, context, received)
                if asked is None:
                    yield position, self(message, context)
                else:
                    waiting[position] = asked
            except Exception as err:  # a client may raise anything: the others go on
                yield position, err
            finally:
                self._built.clear()
        outcomes = run_cohort([asked.training for asked in waiting.values()])
        for (position, asked), outcome in zip(waiting.items(), outcomes, strict=True):
            try:
                yield position, asked.reply(outcome)
            except Exception as err:  # as above
                yield position, err

    def _for_cohort(
        self, message: Message, context: Context, received: dict[Any, tuple[Params, Any]]
    ) -> "_Asked | None":
        """Return a question that may be answered together with others; None for any other.

        Args:
            message: the question.
            context: of its node.
            received: parameters that were read before, to read the arrays of a broadcast once.
        """
        if message.metadata.message_type != "train" or _is_legacy(message.content):
            return None
        client = self._client_fn(context)
        if not (isinstance(client, Learner) and client.is_for_cohorts):
            self._built[id(context)] = client
            return None
        names, parameters = _received(client, message.content)
        arrays = tuple(_model_in(message.content).values())  # copies of a record share them
        key = (client.model, client.device, *map(id, arrays))
        if key not in received:
            model = client.model
            params = client.load(parameters)
            if client.model is not model:  # it holds more than parameters, which is its own now
                training = client.training(params, _config(message.content))
                return _Asked(message, client, training, names, parameters)
            received[key] = params, arrays  # which keeps the ids taken
        training = client.training(received[key][0], _config(message.content))
        return _Asked(message, client, training, names, parameters)


@dataclass(frozen=True)
class _Asked:
    """A train message to a client of ours, and what it asks for."""

    message: Message
    client: Learner
    training: LocalTraining
    names: tuple[str, ...]
    parameters: list[np.ndarray]

    def reply(self, outcome: LocalResult | Exception) -> Message:
        """Return the reply from what the training came to; raise what it raised."""
        if isinstance(outcome, Exception):
            raise outcome
        trained = self.client.answered(outcome, self.parameters, _config(self.message.content))
        return Message(_trained(self.client, self.names, *trained), reply_to=self.message)


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
    fit_named = getattr(client, "fit_named", None)  # where other arrays travel than the model's
    if fit_named and (said := fit_named(from_record(_model_in(content)), _config(content))):
        named, num_examples, metrics = said
        return RecordDict({ARRAYS: to_record(named), **_measured(metrics, num_examples)})
    names, parameters = _received(client, content, getattr(client, "exchanged_names", ()))
    return _trained(client, names, *client.fit(parameters, _config(content)))


def _trained(
    client: NumPyClient,
    names: tuple[str, ...],
    trained: list[np.ndarray],
    num_examples: int,
    metrics: dict[str, bool | bytes | float | int | str],
) -> RecordDict:
    if len(trained) != len(names):
        raise WireError(
            f"{type(client).__name__}.fit returned {len(trained)} arrays for {len(names)} "
            "received: return one for each, in the order received"
        )
    arrays = to_record(dict(zip(names, map(np.asarray, trained), strict=True)))
    return RecordDict({ARRAYS: arrays, **_measured(metrics, num_examples)})


def _evaluate(client: NumPyClient, content: RecordDict) -> RecordDict:
    _, parameters = _received(client, content, getattr(client, "evaluated_names", ()))
    loss, num_examples, metrics = client.evaluate(parameters, _config(content))
    tells = getattr(client, "tells", lambda metric: True)  # a private client may not tell it
    known = {LOSS: loss} if tells(LOSS) else {}
    return RecordDict(_measured({**known, **metrics}, num_examples))


def _received(
    client: NumPyClient, content: RecordDict, exchanged: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Return the names and arrays of the one ArrayRecord.

    A client with ``array_names`` gets them by name, in its order; arrays that are only numbered
    (``ArrayRecord(list_of_ndarrays)``) go by position.

    Args:
        client: whose names count.
        content: of the message.
        exchanged: the names, where it is not the model that is exchanged.
    """
    arrays = from_record(_model_in(content))
    names = tuple(str(position) for position in range(len(arrays)))
    if set(names) != set(arrays):
        names = exchanged or getattr(client, "array_names", tuple(arrays))
    if set(names) != set(arrays):
        wrong = sorted(set(names) ^ set(arrays))
        raise WireError(
            f"the server's arrays and the client's model differ in {', '.join(wrong)}: "
            "server and client must build the same model"
        )
    if TEACHER in content.array_records and hasattr(client, "take_teacher"):
        client.take_teacher(from_record(content.array_records[TEACHER]))
    return names, [arrays[name] for name in names]


def _model_in(content: RecordDict) -> ArrayRecord:
    """Return the one ArrayRecord, beside which a teacher may have come."""
    records = [one for name, one in content.array_records.items() if name != TEACHER]
    if len(records) != 1:
        raise WireError(
            f"the message holds {len(records)} ArrayRecords, exactly one is needed: "
            f"send {{'{ARRAYS}': ArrayRecord, '{CONFIG}': ConfigRecord}}"
        )
    return records[0]


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
