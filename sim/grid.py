"""A Flower Grid of many virtual nodes: in this process, on this machine or on a Ray cluster.

``Strategy.start`` touches nothing but the Grid, so a strategy runs here as it does under ``flwr
run`` and on a SuperLink.
"""

import math
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Literal, Self

from flwr.app import Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from ..errors import ConfigError, MetabloomError
from ..streams import stream_seed
from .engine.questions import Reducer
from .engine.replies import Reduced, Replies

WAKE_S = 0.5  # no wait is longer at once: Ctrl-C and timeouts come through


class CohortGrid(Grid):
    """Hand messages to virtual nodes: in this process, or in Ray actors that last.

    Node ids are derived from the seed and are not partition ids, so that nothing comes to rely on
    their order. A client that raises answers with an error message, and what it wrote into its
    context is discarded, as under Flower's own engine. Replies come in the order of the messages,
    and no result depends on the number of workers. Only one grid at a time: Flower keeps the
    identity of the running task in the process.

    It is a context manager; ``close`` stops the actors.

    Args:
        app: the ClientApp of every node. One with ``answer_all`` answers for many nodes at once.
        num_nodes: >= 1; node i has ``partition-id`` i.
        run_config: what clients find in ``context.run_config``.
        seed: of the node ids.
        workers: 0: clients run one after another in this process; n: in n Ray actors; "auto": in
            one for each processor core.
        ray_address: of a Ray cluster to join, "auto" for one on this machine; empty: none.
        gpus_per_worker: >= 0; 0: GPUs are shared out equally, at most one for each worker. None
            are where the run config says ``device = "cpu"``.
        client_timeout_s: > 0: a client that takes longer is given up, where there are workers;
            None: never.

    Raises:
        ConfigError: where a value is out of range, or the Ray cluster cannot be reached.
        MetabloomError: where Ray does not start.
    """

    def __init__(
        self,
        app: ClientApp,
        *,
        num_nodes: int,
        run_config: UserConfig | None = None,
        seed: int = 0,
        workers: int | Literal["auto"] = 0,
        ray_address: str = "",
        gpus_per_worker: float = 0.0,
        client_timeout_s: float | None = None,
    ) -> None:
        # Ray takes a second to import, and only the simulator needs it.
        from .engine.backends import Backend, backend_of
        from .engine.mailbox import Mailbox

        _check(num_nodes, workers, ray_address, gpus_per_worker, client_timeout_s)
        partitions = {stream_seed(seed, "node", i): i for i in range(num_nodes)}
        config = dict(run_config or {})
        self._lock = threading.Condition()  # legacy servers talk to their clients from many threads
        self._mail = Mailbox(partitions, config, self._lock)
        self._reduced: dict[int, tuple[Message, Reduced]] = {}  # by id() of a message
        self._left: deque[list[str]] = deque()  # ids of replies that nobody took
        # Another one for each grid: clients key what they keep on disk by it.
        self.set_run(Run.create_empty(secrets.randbits(63)))
        self._backend: Backend = backend_of(
            app,
            self._mail,
            self._lock,
            num_nodes=num_nodes,
            run_config=config,
            workers=workers,
            ray_address=ray_address,
            gpus_per_worker=gpus_per_worker,
            client_timeout_s=client_timeout_s,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the actors, and a Ray that was started for them; may be called again.

        What still waits for replies gets a MetabloomError.
        """
        self._backend.close()

    @property
    def workers(self) -> int:
        """How many processes run clients; 0: this one."""
        return self._backend.workers

    @property
    def partitions(self) -> Mapping[int, int]:
        """The partition of each node by its id, in the order of the partitions."""
        return self._mail.partitions

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run
        self._mail.run_id = run.run_id
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
        return sorted(self._mail.partitions)

    def reduced(self, messages: Iterable[Message], reducer: Reducer) -> Reduced:
        """Let the replies to ``messages``, which are pushed next, be summed up where they are made.

        Args:
            messages: the very objects that will be pushed.
            reducer: ``reducer(pairs) -> (part, contents)`` from the (message, reply) pairs of a
                block, in their order, to what they come to together and the content with which each
                reply travels on. It must be one that pickles.

        Returns:
            What holds the parts once the replies were taken.
        """
        handle = Reduced(reducer)
        with self._lock:
            self._reduced = {id(one): (one, handle) for one in messages}
        return handle

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to their nodes and return the ids to pull replies by.

        Without workers they are answered by then. A message to a node that is still at another one
        waits for it.
        """
        pushed = list(messages)  # what makes them may take its time
        with self._lock:
            self._tidy()
            ids: list[str] = []
            try:
                for one in pushed:
                    _, reduced = self._reduced.get(id(one), (one, None))
                    ids.append(self._mail.accept(one, reduced))
                self._backend.submit(self._mail.blocks())
            except BaseException:  # Ctrl-C: nobody waits for these, and nothing behind them
                self._mail.forget(ids)
                raise
            finally:
                self._reduced = {}
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that there are to ``message_ids``, and forget them.

        An id that is unknown, or was pulled before, gives an error message, as in Flower.
        """
        with self._lock:
            self._tidy()
            return [self._mail.pull(one) for one in message_ids if self._mail.is_there(one)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Replies:
        """Hand messages to their nodes, and return the replies as they come, in that order.

        Args:
            messages: to any nodes.
            timeout: seconds after which those that have not answered are given up; None: never.

        Raises (while replies are taken):
            MetabloomError: where no worker can be started any more.
        """
        end = math.inf if timeout is None else time.monotonic() + timeout
        ids = list(self.push_messages(messages))
        replies = Replies(self._stream(ids, end), bool(ids))
        weakref.finalize(replies, self._left.append, ids)
        return replies

    def _stream(self, ids: Sequence[str], end: float) -> Iterator[Message]:
        """Yield the replies to ``ids`` in their order; what is late at ``end`` is given up."""
        late: set[str] = set()
        for message_id in ids:
            with self._lock:
                while not self._mail.is_there(message_id) and (left := end - time.monotonic()) > 0:
                    self._tidy()
                    if not self._mail.is_there(message_id):
                        self._lock.wait(min(WAKE_S, left))
                if not self._mail.is_there(message_id):  # at once: what comes later is in no sum
                    late = {one for one in ids if not self._mail.is_there(one)}
                    self._forget(late)
                reply = None if message_id in late else self._mail.pull(message_id)
            if reply is not None:
                yield reply

    def _tidy(self) -> None:
        """Give up what is too old, or of no use to anybody."""
        if self._backend.fault:
            raise MetabloomError(self._backend.fault)
        if self._mail.expire():
            self._stop_unwanted()
        while self._left:
            self._forget(self._left.popleft())

    def _forget(self, ids: Iterable[str]) -> None:
        if self._mail.forget(ids):
            self._stop_unwanted()

    def _stop_unwanted(self) -> None:
        self._backend.give_up()
        self._backend.submit(self._mail.blocks())  # to nodes that were kept waiting


def _check(
    num_nodes: int,
    workers: int | str,
    ray_address: str,
    gpus_per_worker: float,
    client_timeout_s: float | None,
) -> None:
    if num_nodes < 1:
        raise ConfigError(f"num_nodes = {num_nodes}: a federation needs at least one node")
    if workers != "auto" and not (isinstance(workers, int) and workers >= 0):
        raise ConfigError(f"workers = {workers!r}: 'auto' or a whole number of at least 0")
    if ray_address and workers == 0:
        raise ConfigError(
            f"ray_address = {ray_address!r} with workers = 0: all clients run in this process; set "
            "workers to 'auto' or a number above 0"
        )
    if not 0 <= gpus_per_worker < math.inf:
        raise ConfigError(f"gpus_per_worker = {gpus_per_worker!r}: must be at least 0")
    if client_timeout_s is not None and not client_timeout_s > 0:
        raise ConfigError(f"client_timeout_s = {client_timeout_s!r}: must be above 0, or None")
