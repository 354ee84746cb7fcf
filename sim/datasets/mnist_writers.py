"""MNIST by writer: each of the 539 people who wrote MNIST's training digits is a client.

The writers come from QMNIST's labels (Yadav and Bottou 2019), whose rows follow MNIST's images.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import DataError
from ..federation import register_dataset
from ._files import DOWNLOAD, missing
from ._partition import partition_rows
from ._records import Records, Split
from ._spec import DataSpec
from ._torchvision import VisionSet, build, train_images

MNIST = VisionSet("MNIST", "mnist", "MNIST/raw/train-images-idx3-ubyte")
LABELS = "QMNIST/raw/qmnist-train-labels-idx2-int"  # (60000, 8) int32: class, series, writer, ...

SPEC = DataSpec((1, 28, 28), 10, "cnn", {"dense": 128})


# A fifth to adapt on: the smallest writer has 19 images, so that all 539 stay.
@register_dataset("mnist-writers", SPEC, split=Split(support_fraction=0.2))
def mnist_writers(*, root: Path, download: bool) -> dict[str, Records]:
    """Return the records of every writer, as "writer-0123" by NIST's number."""
    from flwr_datasets.partitioner import NaturalIdPartitioner

    images, labels = train_images("mnist-writers", MNIST, root=root, download=download)
    writers = _writers(root, download, labels)
    parts = partition_rows(NaturalIdPartitioner("writer"), writers, column="writer")
    return {
        f"writer-{writers[rows[0]]:04d}": Records.of_rows(images, labels, rows) for rows in parts
    }


def _writers(root: Path, download: bool, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the writer of each MNIST training image; check that the rows are the same digits."""
    path = root / MNIST.folder / LABELS
    if not path.is_file():
        if not download:
            raise missing("mnist-writers", path, root, DOWNLOAD)
        build("mnist-writers", "QMNIST", path, root, what="train", download=True)
    from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

    table: npt.NDArray[np.int32] = read_sn3_pascalvincent_tensor(str(path)).numpy()
    if len(table) != len(labels) or (table[:, 0] != labels).any():
        raise DataError(
            f"data set 'mnist-writers': the {len(table)} rows of {path} are not the {len(labels)} "
            "training labels of MNIST: delete both folders and fetch them again (download=True)"
        )
    return table[:, 2].astype(np.int64)
