"""Images and labels of torchvision's classification sets, as NumPy arrays."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ._files import DOWNLOAD, missing


@dataclass(frozen=True)
class VisionSet:
    """Describe one torchvision classification set, with the layout of its training images.

    Attributes:
        class_name: name in torchvision.datasets; its constructor takes (root, train, download).
        folder: subfolder of the folder of data sets, which torchvision gets as its root.
        file: a file below ``folder`` that is there once the set is downloaded and unpacked.
        input_shape: (channels, height, width).
        num_classes: labels are 0 to num_classes - 1.
    """

    class_name: str
    folder: str
    file: str
    input_shape: tuple[int, int, int] = (1, 28, 28)
    num_classes: int = 10


def build(dataset: str, class_name: str, path: Path, root: Path, **options: Any) -> Any:
    """Return torchvision's ``class_name`` on the subfolder of ``root`` that holds ``path``.

    Raises:
        MissingDataError: files are missing or damaged, or could not be fetched.
    """
    import torchvision.datasets

    folder = root / path.relative_to(root).parts[0]
    try:
        return getattr(torchvision.datasets, class_name)(str(folder), **options)
    except (RuntimeError, OSError) as err:  # a checksum or a file; the network
        remedy = f"{DOWNLOAD}; now torchvision said: {err}".rstrip(".")
        raise missing(dataset, path, root, remedy) from err


def train_images(
    dataset: str, source: VisionSet, *, root: Path, download: bool
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the training images (n, C, H, W) uint8 and their labels (n,).

    Raises:
        MissingDataError: the files are not there and ``download`` is False.
    """
    path = root / source.folder / source.file
    if not (download or path.exists()):
        raise missing(dataset, path, root, DOWNLOAD)
    loaded = build(dataset, source.class_name, path, root, train=True, download=download)
    images = np.asarray(loaded.data)
    if images.ndim == 3:
        images = images[:, None]  # (n, H, W) -> (n, 1, H, W)
    elif images.shape[1:] != source.input_shape:
        images = images.transpose(0, 3, 1, 2)  # (n, H, W, C) -> (n, C, H, W)
    return images, np.asarray(loaded.targets, dtype=np.int64)
