"""The wire contract: the names inside messages, and records as named NumPy arrays.

Train and evaluate messages hold ``{"arrays": ArrayRecord, "config": ConfigRecord}``; train replies
``{"arrays": ArrayRecord, "metrics": MetricRecord with "num-examples"}``; evaluate replies
``{"metrics": ...}``. They are Flower's own names, so that our clients serve Flower's strategies and
our strategies serve other people's clients.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Literal

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.common.constant import SType

ARRAYS = "arrays"
CONFIG = "config"
METRICS = "metrics"
NUM_EXAMPLES = "num-examples"
SERVER_ROUND = "server-round"
RUN_TOKEN = "run-token"  # the same over resumes, where Flower's run id is another
PRIVACY_EPSILON = "privacy-epsilon"  # what a private client's ledger has come to
PRIVACY_DELTA = "privacy-delta"  # at which
KEPT_ROUND = "kept-round"  # the oldest round that the server may resume from
TEACHER = "teacher"  # a second ArrayRecord, of a model that the client is to learn from
TEACHER_DIGEST = "teacher-digest"  # which one is meant, also where it does not come along
TEACHER_PRIVATE = "teacher-private"  # whether it was trained with privacy, or is no secret
TEACHER_LR = "teacher-inner-lr"  # the rate at which it was adapted to clients
NOVA_STEPS = "nova/steps"  # beside a model in training: local steps that a client took (FedNova)
CONTROL = "control"  # prefix of control variates, beside a model in training (SCAFFOLD)

ROLL_CALL = "query.roll_call"
PROPERTIES = "properties"
PARTITION_ID = "partition-id"
NUM_PARTITIONS = "num-partitions"
CLIENT_NAME = "client-name"
ROLE = "role"
ARCHITECTURE = "architecture"  # of the model of a node, where a federation has several
GROUP = "group"  # of clients that share a task, where a federation has such
EXCHANGE = "exchange"  # which of a round's exchanges a message is of, where it has several
EXCHANGE_NUMBER = "exchange-number"  # from 1 on, beside the first one of a kind
ADAPT, QUERY, CURVATURE = "adapt", "query", "curvature"  # exchanges of a group's meta-gradient
JOIN, SCORE = "join", "score"  # of the evaluation of a new group
DIRECTION = "direction"  # prefix of the arrays beside a model's that a Hessian is multiplied by
DROPPED = "dropped"  # clients of the data set that were too small to take part
ERROR = "error"  # why a node cannot take part

NPY_1 = b"\x93NUMPY\x01\x00"  # np.save writes this, its header's length in two bytes, a header
HEAD = len(NPY_1) + 2

NamedArrays = Mapping[str, np.ndarray]


def to_record(arrays: NamedArrays) -> ArrayRecord:
    """Return ``arrays`` as a Flower ArrayRecord with the same names, order, shapes and dtypes."""
    return ArrayRecord(
        {  # np.ascontiguousarray would make 0-d arrays 1-d
            name: Array(np.ascontiguousarray(value)) if value.ndim else Array(value)
            for name, value in arrays.items()
        }
    )


def size_of(record: ArrayRecord) -> int:
    """Return the bytes of a record's arrays, their headers among them."""
    return sum(len(array.data) for array in record.values())


def from_record(record: ArrayRecord) -> dict[str, np.ndarray]:
    """Return the arrays of a Flower ArrayRecord by name, as read-only views of its bytes.

    Raises:
        TypeError, ValueError: where an array cannot be read; nothing is ever unpickled.
    """
    return {name: _view(value) for name, value in record.items()}


def _view(array: Array) -> np.ndarray:
    """Return what ``array.numpy()`` does, without its copy."""
    data = array.data
    end = HEAD + int.from_bytes(data[HEAD - 2 : HEAD], "little")
    if array.stype != SType.NUMPY or data[: len(NPY_1)] != NPY_1 or len(data) < end:
        value = array.numpy()  # another format of NumPy's, or Flower's own error
    else:
        shape, order, dtype, count = _layout(data[HEAD - 2 : end])
        value = np.frombuffer(data, dtype, count, end).reshape(shape, order=order)
    value.flags.writeable = False
    return value


@lru_cache(maxsize=4096)  # clients of one model send the same few headers
def _layout(header: bytes) -> tuple[tuple[int, ...], Literal["F", "C"], np.dtype, int]:
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(BytesIO(header))
    if dtype.hasobject or any(size < 0 for size in shape):
        raise ValueError(f"an array of {dtype} and shape {shape} cannot be read")
    return shape, "F" if is_fortran else "C", dtype, math.prod(shape)
