"""A Flower Grid inside one process: virtual nodes that answer at once, one after another.

``Strategy.start`` touches nothing but the Grid, so a strategy runs here as it does under ``flwr
run`` and on a SuperLink.
"""

import copy
import secrets
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from ..errors import ConfigError
from ..streams import stream_seed
from ..wire import NUM_PARTITIONS, PARTITION_ID


@dataclass
class _Node:
    """One virtual node: its context lasts over the rounds."""

    context: Context


class CohortGrid(Grid):
    """Hand messages to virtual nodes in this process.

    Node ids are derived from the seed and are not partition ids, so that nothing comes to rely on
    their order. A client that raises answers with an error message, and what it wrote into its
    context is discarded, as under Flower's own engine. Only one grid at a time: Flower keeps the
    identity of the running task in the process.

    Args:
        app: the ClientApp of every node.
        num_nodes: >= 1; node i has ``partition-id`` i.
        run_config: what clients find in ``context.run_config``.
        seed: of the node ids.

    Raises:
        ConfigError: where num_nodes is below 1.
    """

    def __init__(
        self,
        app: ClientApp,
        *,
        num_nodes: int,
        run_config: UserConfig | None = None,
        seed: int = 0,
    ) -> None:
        if num_nodes < 1:
            raise ConfigError(f"num_nodes = {num_nodes}: a federation needs at least one node")
        self._app = app
        # Another one for each grid: clients key what they keep on disk by it.
        self._run = Run.create_empty(secrets.randbits(63))
        self._lock = threading.Lock()  # legacy servers talk to their clients from many threads
        self._replies: dict[str, Message] = {}
        self._pushed = 0
        self._nodes = {
            node_id: _Node(
                Context(
                    run_id=self._run.run_id,
                    node_id=node_id,
                    node_config={PARTITION_ID: index, NUM_PARTITIONS: num_nodes},
                    state=RecordDict(),
                    run_config=dict(run_config or {}),
                )
            )
            for index, node_id in enumerate(stream_seed(seed, "node", i) for i in range(num_nodes))
        }
        self.set_run(self._run)

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run
        TaskIdentity.task_id = 1
        TaskIdentity.run_id = run.run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    @property
    def run(self) -> Run:
        """Run information."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message of this run to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes, ascending."""
        return sorted(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver messages, wait for each answer, and return the ids to pull answers by."""
        with self._lock:
            return [self._deliver(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the answers to ``message_ids`` and forget them."""
        with self._lock:
            return [self._replies.pop(mid) for mid in message_ids if mid in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Deliver messages and return the answers; nodes answer at once, whatever ``timeout``."""
        del timeout
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, message: Message) -> str:
        self._pushed += 1
        message_id = f"{self._run.run_id}-{self._pushed}"
        message.metadata.__dict__["_message_id"] = message_id  # as Flower's own grids do
        reply = self._answer(message)
        reply.metadata.__dict__["_message_id"] = f"{message_id}-reply"
        self._replies[message_id] = reply
        return message_id

    def _answer(self, message: Message) -> Message:
        node = self._nodes.get(message.metadata.dst_node_id)
        if node is None:
            reason = f"there is no node {message.metadata.dst_node_id} in this grid"
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, reason), reply_to=message)
        # Nodes share the records of a broadcast, and what a failing client wrote is not kept: a
        # client writes into copies of its message and of its context.
        own, context = copy.copy(message), copy.copy(node.context)
        own.content = _copied(message.content)
        context.state, context.run_config = _copied(context.state), dict(context.run_config)
        try:
            reply = self._app(own, context)
        except Exception as err:  # a client may raise anything: the others go on
            reason = f"{type(err).__name__}: {err}"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        node.context = context
        return reply


def _copied(records: RecordDict) -> RecordDict:
    """Return copies of records and of their lists; arrays, whose bytes are fixed, stay shared."""
    copies = {name: record.copy() for name, record in records.items()}
    for record in copies.values():
        for key, value in record.items():
            if isinstance(value, list):
                record[key] = value.copy()  # type: ignore[assignment]  # a copy has its type
    return RecordDict(copies)
