"""A grid whose nodes can be waited for so long and no longer."""

import time
from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from ...errors import MetabloomError


class PatientGrid(Grid):
    """A grid that ends the wait of Flower's sampling, which asks for node ids without an end."""

    def __init__(self, grid: Grid, timeout_s: float) -> None:
        self._grid = grid
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._seen = -1

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes; past the deadline MetabloomError, unless more have come."""
        found = list(self._grid.get_node_ids())
        before, self._seen = self._seen, len(found)
        if time.monotonic() > self._deadline and len(found) <= before:
            raise MetabloomError(
                f"{len(found)} nodes are connected, the strategy waits for more, and "
                f"{self._timeout_s:g} s have passed: start more SuperNodes, or lower "
                "min_available_nodes"
            )
        return found

    def set_run(self, run: Run) -> None:
        """Hand on to the grid."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """Hand on to the grid."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Hand on to the grid."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand on to the grid."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand on to the grid."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Hand on to the grid."""
        return self._grid.send_and_receive(messages, timeout=timeout)
