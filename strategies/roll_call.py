"""Roll call: one query asks each node for its partition, its role and its name.

Sampling and results then depend on partitions, never on node ids or their order.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from logging import INFO

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from ..wire import (
    CLIENT_NAME,
    DROPPED,
    ERROR,
    NUM_PARTITIONS,
    PARTITION_ID,
    PROPERTIES,
    ROLE,
    ROLL_CALL,
)


@dataclass(frozen=True)
class Node:
    """What is known of one node; one that did not answer is a training client, known by its id."""

    node_id: int
    partition_id: int | None = None
    num_partitions: int = 0
    role: str | None = None
    client: str = ""
    dropped: int = 0  # clients of its data set that were too small
    error: str = ""  # why it cannot take part, in its own words

    @property
    def name(self) -> str:
        """The client's own name, else its partition, else its node id."""
        if self.client:
            return self.client
        if self.partition_id is not None:
            return f"partition-{self.partition_id}"
        return f"node-{self.node_id}"

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: partitions first, by number; then nodes that have none, by id."""
        if self.partition_id is None:
            return (1, self.node_id)
        return (0, self.partition_id)


def call_roll(
    grid: Grid, node_ids: Iterable[int], known: dict[int, Node], *, timeout_s: float
) -> dict[int, Node]:
    """Return the nodes of ``node_ids`` that answered, asking those that are not ``known`` yet.

    An error is an answer: that node's app knows no roll call. A node without an answer is left out,
    to be asked again at the next call; it must not be taken for a training client meanwhile.
    """
    present = list(node_ids)
    new = [node_id for node_id in present if node_id not in known]
    nodes = {node_id: known[node_id] for node_id in present if node_id in known}
    if not new:
        return nodes
    question = RecordDict({"config": ConfigRecord()})
    messages = [
        Message(content=question, message_type=ROLL_CALL, dst_node_id=node_id) for node_id in new
    ]
    for reply in grid.send_and_receive(messages, timeout=timeout_s):
        node_id = reply.metadata.src_node_id
        if node_id in new:
            known_app = reply.has_content()
            nodes[node_id] = _read(node_id, reply.content) if known_app else Node(node_id)
    silent = sum(node_id not in nodes for node_id in new)
    log(INFO, "roll call: %d new nodes, %d without an answer", len(new), silent)
    return nodes


def expected_nodes(nodes: dict[int, Node]) -> int:
    """Return how many nodes there are by what they say themselves; 0 where none says."""
    return max((node.num_partitions for node in nodes.values()), default=0)


def _read(node_id: int, content: RecordDict) -> Node:
    said = content.config_records.get(PROPERTIES, ConfigRecord())
    partition = said.get(PARTITION_ID)
    total = said.get(NUM_PARTITIONS)
    role = said.get(ROLE)
    name = said.get(CLIENT_NAME)
    error = said.get(ERROR)
    dropped = said.get(DROPPED)
    return Node(
        node_id,
        partition_id=partition if isinstance(partition, int) else None,
        num_partitions=total if isinstance(total, int) else 0,
        role=role if isinstance(role, str) else None,
        client=name if isinstance(name, str) else "",
        dropped=dropped if isinstance(dropped, int) else 0,
        error=error if isinstance(error, str) else "",
    )
