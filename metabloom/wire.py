"""The wire contract: the names inside messages, and records as named NumPy arrays.

Train and evaluate messages hold ``{"arrays": ArrayRecord, "config": ConfigRecord}``; train replies
``{"arrays": ArrayRecord, "metrics": MetricRecord with "num-examples"}``; evaluate replies
``{"metrics": ...}``. They are Flower's own names, so that our clients serve Flower's strategies and
our strategies serve other people's clients.
"""

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord

ARRAYS = "arrays"
CONFIG = "config"
METRICS = "metrics"
NUM_EXAMPLES = "num-examples"
SERVER_ROUND = "server-round"
RUN_TOKEN = "run-token"  # the same over resumes, where Flower's run id is another
KEPT_ROUND = "kept-round"  # the oldest round that the server may resume from

ROLL_CALL = "query.roll_call"
PROPERTIES = "properties"
PARTITION_ID = "partition-id"
NUM_PARTITIONS = "num-partitions"
CLIENT_NAME = "client-name"
ROLE = "role"
DROPPED = "dropped"  # clients of the data set that were too small to take part
ERROR = "error"  # why a node cannot take part

NamedArrays = Mapping[str, np.ndarray]


def to_record(arrays: NamedArrays) -> ArrayRecord:
    """Return ``arrays`` as a Flower ArrayRecord with the same names, order, shapes and dtypes."""
    return ArrayRecord(
        {  # np.ascontiguousarray would make 0-d arrays 1-d
            name: Array(np.ascontiguousarray(value)) if value.ndim else Array(value)
            for name, value in arrays.items()
        }
    )


def from_record(record: ArrayRecord) -> dict[str, np.ndarray]:
    """Return the arrays of a Flower ArrayRecord by name; the arrays are read-only."""
    arrays = {name: value.numpy() for name, value in record.items()}
    for value in arrays.values():
        value.flags.writeable = False
    return arrays
