"""Roll call: one query asks each node for its partition, its role and its name.

Sampling and results then depend on partitions, never on node ids or their order.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from logging import INFO, WARNING

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from ...errors import MetabloomError, shortened
from ...wire import (
    ARCHITECTURE,
    CLIENT_NAME,
    DROPPED,
    ERROR,
    GROUP,
    NUM_PARTITIONS,
    PARTITION_ID,
    PROPERTIES,
    ROLE,
    ROLL_CALL,
)

ROLES = ("train", "validation", "unseen", "surplus")
LONGEST_NAME = 100  # characters: names and errors are what nodes say of themselves
POLL_S = 1.0
GATHER_S = 30.0  # how long to wait for announced nodes that have not connected yet
ROLL_CALL_S = 600.0  # for the first answers of nodes, which may load their data for it
RETRY_S = 60.0  # for a node that was silent before; in deployment an answer takes some 20 s
RETRIES = 3  # in as many rounds; after that a silent node no longer holds any


@dataclass(frozen=True)
class Node:
    """What one node said of itself, known by its id alone where its app knows no roll call."""

    node_id: int
    partition_id: int | None = None
    num_partitions: int = 0
    role: str | None = None
    client: str = ""
    architecture: str = ""  # of its model
    group: str = ""  # that it shares a task with, in its own words
    dropped: int = 0  # clients of its data set that were too small
    error: str = ""  # why it cannot take part, in its own words
    reply_error: str = ""  # the error that came in the place of an answer

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


class Roster:
    """All nodes that were ever heard, and which of them are connected now.

    Args:
        told: names of nodes whose fault is known already, from the part of the run before a resume.
        architectures: what nodes may have; empty: nobody is asked.
    """

    def __init__(self, told: Iterable[str] = (), architectures: Sequence[str] = ()) -> None:
        self._architectures = tuple(architectures)
        self._heard: dict[int, Node] = {}
        self._present: list[int] = []
        self._calls: Counter[int] = Counter()
        self._grace_s = GATHER_S
        self._told = set(told)  # names

    def gather(self, grid: Grid, *, min_nodes: int, timeout_s: float, role: str = "") -> None:
        """Ask nodes that have not answered yet, and wait, within bounds, for those there should be.

        The first time, nodes that others announce (``num-partitions``) have a grace to connect.
        With a ``role``, there should be a node that has it: all could be away for a moment.

        Raises:
            MetabloomError: where fewer than ``min_nodes`` answered in time, none can take part, or
                none has the role.
        """
        deadline = time.monotonic() + timeout_s
        grace_s, self._grace_s = self._grace_s, 0.0
        self._retry(grid, timeout_s)
        grace = time.monotonic() + grace_s
        while True:
            if self._ask_newcomers(grid, timeout_s):
                grace = time.monotonic() + grace_s
            heard = len(self._connected())
            announced = max((node.num_partitions for node in self._heard.values()), default=0)
            enough = heard >= max(min_nodes, 1) and (heard >= announced or time.monotonic() > grace)
            none_can = heard > 0 and len(self._faulty()) == heard
            if enough and not none_can and not (role and not self.with_role(role)):
                return
            late = time.monotonic() > deadline
            if none_can and (late or heard >= announced):  # else a better one may still come
                raise MetabloomError(f"no node can take part; {self.first_fault()}")
            if late:
                needed = f"{min_nodes} are needed" + (f", of them one to {role}" if role else "")
                raise MetabloomError(
                    f"{len(self._present)} nodes are connected, {heard} answered the roll call, "
                    f"{needed}, and {timeout_s:g} s have passed: start more SuperNodes, or lower "
                    "min_available_nodes"
                )
            time.sleep(POLL_S)

    def with_role(self, role: str) -> list[Node]:
        """Return the connected nodes of a role by partition; without any role, all train."""
        usual = "" if self.has_roles else "train"
        faulty = {node.node_id for node, _ in self._faulty()}
        found = [node for node in self._connected() if (node.role or usual) == role]
        return sorted(
            (node for node in found if node.node_id not in faulty), key=lambda node: node.order
        )

    def counts(self) -> dict[str, int]:
        """Return how many connected nodes have each role."""
        return {role: len(self.with_role(role)) for role in ("train", "validation", "unseen")}

    @property
    def has_roles(self) -> bool:
        """Whether most nodes said a role: then one that did not has none. Else it trains.

        Most, not any: one node that claims a role shall not send all others home.
        """
        fit = [node for node in self._connected() if not node.error]
        return 2 * sum(node.role is not None for node in fit) > len(fit)

    @property
    def was_called(self) -> bool:
        """Whether any node was asked."""
        return bool(self._calls or self._heard)

    @property
    def dropped(self) -> int:
        """Clients of the data set that were too small, as nodes report them."""
        return max((node.dropped for node in self._heard.values()), default=0)

    def get(self, node_id: int) -> Node:
        """Return what is known of a node."""
        return self._heard.get(node_id, Node(node_id))

    def new_faults(self) -> list[tuple[str, str]]:
        """Return (name, reason) of nodes that cannot take part and were not told before."""
        new = [(node, fault) for node, fault in self._faulty() if node.name not in self._told]
        self._told |= {node.name for node, _ in new}
        return [(node.name, fault) for node, fault in new]

    @property
    def told(self) -> tuple[str, ...]:
        """The nodes whose fault ``new_faults`` has returned, by name."""
        return tuple(sorted(self._told))

    def first_fault(self) -> str:
        """Return "NAME says: REASON" of the first node that cannot take part; "" if all can."""
        for node, fault in self._faulty():
            return f"{node.name} says: {fault}"
        return ""

    def _faulty(self) -> list[tuple[Node, str]]:
        """Return the connected nodes that cannot take part and why, by partition."""
        # An app that is not ours knows no roll call and answers it with an error; where others
        # have roles, so should this node, and its error is one.
        has_roles = self.has_roles
        faults = [
            (
                node,
                node.error
                or (node.reply_error if has_roles else "")
                or self._fault_of_architecture(node),
            )
            for node in self._connected()
        ]
        found = [(node, fault) for node, fault in faults if fault]
        return sorted(found, key=lambda pair: pair[0].order)

    def _fault_of_architecture(self, node: Node) -> str:
        known = self._architectures
        if not known or node.architecture in known or node.role == "surplus":
            return ""
        said = f"architecture {node.architecture!r}" if node.architecture else "no architecture"
        return f"it says {said}, the server has models of {', '.join(known)}"

    def _connected(self) -> list[Node]:
        return [self._heard[node_id] for node_id in self._present if node_id in self._heard]

    def _ask_newcomers(self, grid: Grid, timeout_s: float) -> bool:
        self._present = list(grid.get_node_ids())
        present = set(self._present)
        self._calls = Counter({n: c for n, c in self._calls.items() if n in present})
        new = [n for n in self._present if n not in self._heard and not self._calls[n]]
        return self._call(grid, new, min(timeout_s, ROLL_CALL_S))

    def _retry(self, grid: Grid, timeout_s: float) -> None:
        silent = [n for n in self._present if n not in self._heard and self._calls[n] <= RETRIES]
        self._call(grid, silent, min(timeout_s, RETRY_S))

    def _call(self, grid: Grid, node_ids: list[int], timeout_s: float) -> bool:
        """Ask ``node_ids``; return whether any answered."""
        if not node_ids:
            return False
        self._calls.update(node_ids)
        answers = call_roll(grid, node_ids, timeout_s=timeout_s)
        self._heard |= answers
        self._tell_apart()
        silent = len(node_ids) - len(answers)
        level = WARNING if silent else INFO
        log(level, "roll call: %d of %d nodes answered", len(answers), len(node_ids))
        return bool(answers)

    def _tell_apart(self) -> None:
        """Give nodes that claim one name names of their own: one could be taken for the other."""
        names = Counter(node.name for node in self._connected())
        for node in self._connected():
            if names[node.name] > 1:
                log(WARNING, "%d nodes say that they are %s", names[node.name], node.name)
                unlike = f"{node.name} (node-{node.node_id})"
                self._heard[node.node_id] = replace(node, client=unlike)


def call_roll(grid: Grid, node_ids: Iterable[int], *, timeout_s: float) -> dict[int, Node]:
    """Ask each node who it is and return those that answered, by id; an error is an answer too."""
    question = RecordDict({"config": ConfigRecord()})
    messages = [
        Message(content=question, message_type=ROLL_CALL, dst_node_id=node_id, ttl=timeout_s)
        for node_id in node_ids
    ]
    replies = list(grid.send_and_receive(messages, timeout=timeout_s))
    asked = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
    nodes = {}
    for reply in replies:
        node_id = asked.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
        if reply.has_content():
            nodes[node_id] = _read(node_id, reply.content)
        elif reply.metadata.src_node_id == node_id:  # else the SuperLink speaks of a lost node
            nodes[node_id] = Node(
                node_id, reply_error=shortened(reply.error.reason or "no reason given")
            )
    return nodes


def _read(node_id: int, content: RecordDict) -> Node:
    said = content.config_records.get(PROPERTIES, ConfigRecord())
    partition = said.get(PARTITION_ID)
    total = said.get(NUM_PARTITIONS)
    role = said.get(ROLE)
    name = said.get(CLIENT_NAME)
    error = said.get(ERROR)
    architecture = said.get(ARCHITECTURE)
    group = said.get(GROUP)
    dropped = said.get(DROPPED)
    return Node(
        node_id,
        partition_id=partition if isinstance(partition, int) else None,
        num_partitions=total if isinstance(total, int) else 0,
        role=str(role) if role in ROLES else None,
        client=shortened(name, LONGEST_NAME) if isinstance(name, str) else "",
        architecture=shortened(architecture, LONGEST_NAME) if isinstance(architecture, str) else "",
        group=shortened(group, LONGEST_NAME) if isinstance(group, str) else "",
        dropped=dropped if isinstance(dropped, int) else 0,
        error=shortened(error) if isinstance(error, str) else "",
    )
