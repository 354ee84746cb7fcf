"""Sets of the Hugging Face hub that name their clients, through flwr_datasets' FederatedDataset."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import MissingDataError
from ..federation import register_dataset
from ._files import missing
from ._records import Records, Split
from ._spec import DataSpec


@dataclass(frozen=True)
class HubSet:
    """Describe one hub set of images whose rows say whose they are.

    Attributes:
        repository: name on the hub, e.g. "flwrlabs/femnist".
        client: column with the client's identity.
        image: column with the image; converted to 8-bit greyscale.
        label: column with the class.
    """

    repository: str
    client: str
    image: str
    label: str


def register_hub_set(name: str, source: HubSet, spec: DataSpec) -> None:
    """Register a hub set under ``name``; each value of its client column is a client."""

    @register_dataset(name, spec, split=Split(support_fraction=0.2))
    def load(*, root: Path, download: bool) -> dict[str, Records]:
        """Return the records of every client, decoded when asked for."""
        partitioner = _partitioner(name, source, root, download)
        clients = {}
        for number in range(partitioner.num_partitions):
            part = partitioner.load_partition(number)
            key = str(partitioner.partition_id_to_natural_id[number])
            targets = np.asarray(part.select_columns([source.label])[source.label][:])
            clients[key] = Records(targets, partial(_images, part, source))
        return clients


def _partitioner(name: str, source: HubSet, root: Path, download: bool) -> Any:
    cache = root / "huggingface"
    kept = cache / source.repository.replace("/", "___")
    remedy = (
        "pass download=True to load_federation (configuration key download), "
        f"which fetches {source.repository!r} from the Hugging Face hub"
    )
    if not (download or kept.is_dir()):
        raise missing(name, kept, root, remedy)
    from flwr_datasets import FederatedDataset
    from flwr_datasets.partitioner import NaturalIdPartitioner

    federated = FederatedDataset(
        dataset=source.repository,
        partitioners={"train": NaturalIdPartitioner(source.client)},
        shuffle=False,
        cache_dir=str(cache),
    )
    try:
        return federated.partitioners["train"]
    except OSError as err:  # no connection, no such set
        raise MissingDataError(
            f"data set {name!r}: {source.repository!r} could not be read from the Hugging Face "
            f"hub nor from {cache.absolute()}: {err}. Check the connection and try again"
        ) from err


def _images(part: Any, source: HubSet) -> npt.NDArray[np.uint8]:
    decoded = [np.asarray(image.convert("L"), dtype=np.uint8) for image in part[source.image]]
    return np.stack(decoded)[:, None]  # (n, H, W) -> (n, 1, H, W)


register_hub_set(
    "femnist",
    HubSet("flwrlabs/femnist", "writer_id", "image", "character"),
    DataSpec((1, 28, 28), 62, "cnn"),
)
