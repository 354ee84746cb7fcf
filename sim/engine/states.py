"""What virtual nodes keep between messages: in memory up to a bound, the rest on the disk."""

import shutil
import tempfile
import weakref
from collections import OrderedDict
from pathlib import Path

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from ...wire import size_of

KEPT_BYTES = 512 * 2**20
SMALL = 1024  # bytes that a state counts for beside its arrays


class States:
    """Hold the ``Context.state`` of each node.

    Beyond ``limit`` bytes of arrays the states that were used longest ago are written to a
    temporary folder, which goes with this object: no run is resumed from it.
    """

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self._limit = limit
        self._kept: OrderedDict[int, RecordDict] = OrderedDict()  # used last stands last
        self._bytes = 0
        self._spilled: set[int] = set()
        self._folder: Path | None = None

    def get(self, node_id: int) -> RecordDict:
        """Return the state of a node, empty where it has none; not to be changed."""
        if node_id in self._kept:
            self._kept.move_to_end(node_id)
            return self._kept[node_id]
        if node_id not in self._spilled:
            return RecordDict()
        blob = self._file(node_id).read_bytes()
        state = recorddict_from_proto(ProtoRecordDict.FromString(blob))
        self._keep(node_id, state)
        return state

    def put(self, node_id: int, state: RecordDict) -> None:
        """Take the state of a node."""
        if node_id in self._kept:
            self._bytes -= _size(self._kept.pop(node_id))
        self._spilled.discard(node_id)  # what lies on the disk is old
        self._keep(node_id, state)

    def _keep(self, node_id: int, state: RecordDict) -> None:
        if not state:
            return
        self._kept[node_id] = state
        self._bytes += _size(state)
        while self._bytes > self._limit and len(self._kept) > 1:
            oldest, spilt = self._kept.popitem(last=False)
            self._bytes -= _size(spilt)
            if oldest not in self._spilled:  # else the disk has it as it is
                proto = recorddict_to_proto(spilt)
                self._file(oldest).write_bytes(proto.SerializeToString())
                self._spilled.add(oldest)

    def _file(self, node_id: int) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="metabloom-states-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder / str(node_id)


def _size(state: RecordDict) -> int:
    return SMALL + sum(map(size_of, state.array_records.values()))
