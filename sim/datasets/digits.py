"""Digits: 1,797 handwritten 8x8 digits inside scikit-learn, as few-shot tasks; needs no network.

Each client holds a few classes, renamed in an order of its own: a model that does not adapt can
only guess.
"""

from functools import partial
from typing import Annotated

import numpy as np
from pydantic import Field

from ...streams import numpy_stream, stream_seed
from ..federation import register_dataset
from ._partition import divide
from ._records import Records, Split
from ._spec import DataSpec

DEFAULT_CLIENTS = 60  # about 30 images each
SPLIT = Split(shots=2)
Ways = Annotated[int, Field(ge=2, le=10)]


def digits_spec(ways: int) -> DataSpec:
    """Return the spec of ``ways``-way tasks on 8x8 images in [0, 1]."""
    return DataSpec((1, 8, 8), ways, "mlp", {"hidden": 64})


@register_dataset("digits", digits_spec, split=SPLIT)
def digits(*, seed: int, num_clients: int, ways: Ways = 5) -> dict[str, Records]:
    """Return the records of ``num_clients`` clients (0: 60) with ``ways`` classes each."""
    from flwr_datasets.partitioner import PathologicalPartitioner
    from sklearn.datasets import load_digits

    table = load_digits()
    images = (table.images / 16).astype(np.float32)[:, None]  # (n, 8, 8) 0..16 -> (n, 1, 8, 8)
    parts = divide(
        "digits",
        partial(
            PathologicalPartitioner,
            partition_by="label",
            num_classes_per_partition=ways,
            class_assignment_mode="random",
            seed=stream_seed(seed, "digits", "partition"),
        ),
        table.target,
        num_clients=num_clients or DEFAULT_CLIENTS,
        per_class=SPLIT.shots + 1,
        remedy="lower ways" if ways > 2 else "",
    )
    clients = {}
    for number, rows in enumerate(parts):
        key = f"client-{number:03d}"
        classes = numpy_stream(seed, "labels", key).permutation(np.unique(table.target[rows]))
        new_name = np.argsort(classes)  # classes[j] is named j
        targets = new_name[np.searchsorted(np.sort(classes), table.target[rows])]
        clients[key] = Records(targets, partial(np.take, images, rows, axis=0))
    return clients
