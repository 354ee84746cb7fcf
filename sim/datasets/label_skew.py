"""torchvision's classification sets, divided by label skew: mnist, fashion-mnist, cifar10, ...

The divisions are flwr_datasets' own: Dirichlet (Hsu, Qi, Brown 2019), pathological (a fixed number
of classes each; McMahan et al. 2017) and iid.
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from ...public import held_out_rows
from ...registry import Registry
from ...streams import numpy_stream, stream_seed
from ..federation import register_dataset
from ._partition import divide
from ._records import Records, Split
from ._spec import DataSpec
from ._torchvision import VisionSet, train_images

DEFAULT_CLIENTS = 100
SPLIT = Split(support_fraction=0.8)  # the usual share of a client that trains

VISION_SETS: Registry[VisionSet] = Registry("torchvision data set")

Partition = Literal["dirichlet", "pathological", "iid"]
Alpha = Annotated[float, Field(gt=0)]
Limit = Annotated[int, Field(ge=0)]


def register_vision_set(name: str, source: VisionSet) -> None:
    """Register a torchvision classification set under ``name``, divided by label skew."""
    VISION_SETS.add(name, source)
    spec = DataSpec(source.input_shape, source.num_classes, "cnn", {"dense": 128})

    @register_dataset(name, spec, split=SPLIT)
    def load(
        *,
        root: Path,
        seed: int,
        num_clients: int,
        download: bool,
        partition: Partition = "dirichlet",
        alpha: Alpha = 0.3,
        classes_per_client: Annotated[int, Field(ge=1, le=source.num_classes)] = 2,
        limit: Limit = 0,
        held_out: Limit = 0,
    ) -> dict[str, Records]:
        """Return the records of ``num_clients`` clients (0: 100) of ``limit`` images (0: all).

        ``held_out`` images are nobody's: they are for the server, as public records.
        """
        images, labels = train_images(name, source, root=root, download=download)
        left = held_out_rows(len(labels), held_out, seed)[1] if held_out else np.arange(len(labels))
        order = numpy_stream(seed, name, "limit").permutation(len(left))
        chosen = left[order[: limit or len(left)]]
        if partition != "iid":
            chosen = np.sort(chosen)  # iid cuts the rows in their order: there the order is random
        parts = divide(
            name,
            partial(
                _partitioner,
                partition=partition,
                alpha=alpha,
                classes=classes_per_client,
                seed=stream_seed(seed, name, "partition"),
            ),
            labels[chosen],
            num_clients=num_clients or DEFAULT_CLIENTS,
            remedy="use more images (limit)" if limit else "",
        )
        return {
            f"client-{number:03d}": Records.of_rows(images, labels, chosen[part])
            for number, part in enumerate(parts)
        }


def _partitioner(
    num_clients: int, *, partition: Partition, alpha: float, classes: int, seed: int
) -> Any:
    from flwr_datasets import partitioner as kinds

    if partition == "iid":
        return kinds.IidPartitioner(num_clients)
    if partition == "pathological":
        return kinds.PathologicalPartitioner(
            num_clients, "label", classes, class_assignment_mode="random", seed=seed
        )
    # No minimum here, which would draw again until luck provides it: the split drops and counts.
    return kinds.DirichletPartitioner(
        num_clients, "label", alpha, min_partition_size=0, self_balancing=False, seed=seed
    )


def _mnist_like(class_name: str, folder: str) -> VisionSet:
    return VisionSet(class_name, folder, f"{class_name}/raw/train-images-idx3-ubyte")


register_vision_set("mnist", _mnist_like("MNIST", "mnist"))
register_vision_set("fashion-mnist", _mnist_like("FashionMNIST", "fashion_mnist"))
register_vision_set("kmnist", _mnist_like("KMNIST", "kmnist"))
register_vision_set(
    "cifar10", VisionSet("CIFAR10", "cifar10", "cifar-10-batches-py/data_batch_1", (3, 32, 32))
)
register_vision_set(
    "cifar100", VisionSet("CIFAR100", "cifar100", "cifar-100-python/train", (3, 32, 32), 100)
)
