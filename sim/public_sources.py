r"""Where public records come from, chosen by a text as a configuration has it.

    held-out        training records of the federation's own data set, which no client gets
    dataset:NAME    another set of torchvision's, made to fit the model: dataset:fashion-mnist
    noise           uniform numbers of the input's shape; uniform ids for characters
    smooth-noise    images whose neighbouring pixels are alike: coarse grids of noise, enlarged

The nearer they are to the clients' own records, the more an opinion on them says: noise is a floor
to compare with.

What is computed is rounded to the 256 levels of an image, so that the last bits, which differ
between processors, do not change the fingerprint.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..config import data_folder
from ..errors import ConfigError, DataError, unknown_name
from ..public import Batch, PublicData, held_out_rows
from ..streams import numpy_stream
from .datasets._spec import DataSpec, to_batch
from .datasets._torchvision import train_images
from .datasets.label_skew import VISION_SETS

KINDS = ("held-out", "dataset:NAME", "noise", "smooth-noise")
OTHER = "dataset:"
COARSE = 4  # pixels of an image for each cell of smooth-noise's grid
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


def load_public(
    kind: str,
    spec: DataSpec,
    *,
    size: int,
    seed: int,
    dataset: str = "",
    root: Path | str | None = None,
    download: bool = False,
) -> PublicData:
    """Return ``size`` public records for models of ``spec``.

    Args:
        kind: "held-out", "dataset:NAME", "noise" or "smooth-noise"; see the module's text.
        spec: what the model takes.
        size: at least 1; how many records.
        seed: of every random choice; the same at both ends.
        dataset: the federation's own data set, which "held-out" needs.
        root: folder of data sets; None: METABLOOM_DATA, else ./data.
        download: fetch what is missing.

    Raises:
        ConfigError: the kind is unknown, or does not fit the data set or the spec.
        MissingDataError: a file is not there.
        DataError: the set has fewer records.
    """
    check_kind(kind, dataset)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigError(f"size = {size!r} of public data {kind!r}: a whole number of at least 1")
    if kind == "noise":
        return PublicData.of(kind, noise(spec, size, seed))
    if kind == "smooth-noise":
        return PublicData.of(kind, smooth_noise(spec, size, seed))
    name = source_of(kind, dataset)
    folder = data_folder(str(root or "")).absolute()
    images, labels = train_images(name, VISION_SETS[name], root=folder, download=download)
    if kind == "held-out":
        return held_out(spec, images, labels, size, seed)
    rows = _rows_of(kind, size, len(images), seed)
    return PublicData.of(kind, fit_images(images[rows], spec))


def load_labelled(
    kind: str,
    spec: DataSpec,
    *,
    size: int,
    seed: int,
    dataset: str,
    root: Path | str | None = None,
    download: bool = False,
) -> tuple[PublicData, Batch, int]:
    """Return public records with their own labels, to train on: (records, (x, y), classes).

    The records are those of ``load_public`` with the same arguments. The labels of "held-out" mean
    what those of the federation do; those of another set are that set's own, of so many classes.

    Raises:
        ConfigError, MissingDataError, DataError: as ``load_public``; for noise, which has no
            labels.
    """
    check_kind(kind, dataset)
    name = source_of(kind, dataset)
    if not name:
        raise ConfigError(
            f"public data {kind!r} have no labels to train on: use 'held-out', where the data set "
            "can, or dataset:NAME"
        )
    public = load_public(
        kind, spec, size=size, seed=seed, dataset=dataset, root=root, download=download
    )
    if public.targets is not None:
        return public, (public.inputs, public.targets), spec.num_classes
    folder = data_folder(str(root or "")).absolute()
    _, labels = train_images(name, VISION_SETS[name], root=folder, download=download)
    targets = torch.from_numpy(labels[_rows_of(kind, size, len(labels), seed)])
    return public, (public.inputs, targets), VISION_SETS[name].num_classes


def source_of(kind: str, dataset: str) -> str:
    """Return the data set whose images public records of ``kind`` are; "" where they are made up.

    >>> source_of("dataset:kmnist", "mnist"), source_of("held-out", "mnist")
    ('kmnist', 'mnist')
    """
    if kind == "held-out":
        return dataset
    return kind.removeprefix(OTHER) if kind.startswith(OTHER) else ""


def _rows_of(kind: str, size: int, total: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the rows of another set that are public, ascending."""
    if size > total:
        raise DataError(f"public data {kind!r}: size = {size}, but the set has {total}")
    order = numpy_stream(seed, "public", kind.removeprefix(OTHER)).permutation(total)
    return np.sort(order[:size])


def usual_kind(dataset: str) -> str:
    """Return the kind that is nearest to the records of the clients of ``dataset``."""
    return "held-out" if dataset in VISION_SETS else "noise"


def check_kind(kind: str, dataset: str = "") -> None:
    """Raise ConfigError for a kind that nobody knows, or that ``dataset`` rules out; reads no file.

    Args:
        kind: as ``load_public`` takes it.
        dataset: the federation's own data set.
    """
    if kind == "held-out":
        if dataset not in VISION_SETS:
            raise ConfigError(
                f"public data 'held-out' of data set {dataset!r}: records can be set aside in "
                f"{', '.join(VISION_SETS)}; use another kind: {', '.join(KINDS[1:])}"
            )
    elif kind.startswith(OTHER):
        name = kind.removeprefix(OTHER)
        _ = VISION_SETS[name]  # raises, with the nearest name
        if dataset == name or dataset.startswith(f"{name}-"):  # mnist-writers holds mnist's images
            raise ConfigError(
                f"public data {kind!r} are the records of the clients of {dataset!r}: use "
                "'held-out', or another set"
            )
    elif kind not in KINDS:
        raise unknown_name("kind of public data", kind, KINDS)


def held_out(
    spec: DataSpec,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    size: int,
    seed: int,
) -> PublicData:
    """Return the records of ``held_out_rows`` with their labels, in the form that clients see."""
    public, _ = held_out_rows(len(labels), size, seed)
    return PublicData.of("held-out", *to_batch(spec, images[public], labels[public]))


def noise(spec: DataSpec, size: int, seed: int) -> Tensor:
    """Return (size, *input_shape): uniform in [0, 1), or ids in [0, num_classes) for characters."""
    rng, shape = numpy_stream(seed, "public", "noise"), (size, *spec.input_shape)
    if spec.input_dtype == "int64":
        return torch.from_numpy(rng.integers(0, spec.num_classes, shape))
    return torch.from_numpy(rng.random(shape, dtype=np.float32))


def smooth_noise(spec: DataSpec, size: int, seed: int) -> Tensor:
    """Return images (size, C, H, W) in [0, 1]: a uniform grid a quarter as fine, enlarged.

    Between the points of the grid the values are bilinear; each image uses all of [0, 1].

    Raises:
        ConfigError: the spec's inputs are no images.
    """
    channels, height, width = _image_shape("smooth-noise", spec)
    rows, columns = (max(2, -(-side // COARSE)) for side in (height, width))
    rng = numpy_stream(seed, "public", "smooth-noise")
    grid = torch.from_numpy(rng.random((size, channels, rows, columns), dtype=np.float32))
    images = interpolate(grid, (height, width), mode="bilinear", align_corners=True)
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return ((images - low) / (high - low).clamp(min=1e-6) * 255).round() / 255


def fit_images(images: npt.NDArray[np.uint8], spec: DataSpec) -> Tensor:
    """Return images of another set as the model takes them: (n, *input_shape) float32 in [0, 1].

    Resized by antialiased bilinear interpolation; grey is repeated for three channels, and colours
    become their luminance for one. Images that have the shape already keep every level.

    Args:
        images: (n, C, H, W) with C of 1 or 3.
        spec: what the model takes.

    Raises:
        ConfigError: the spec's inputs are no images, or have other channels.
    """
    channels, height, width = _image_shape("images of another set", spec)
    found = torch.from_numpy(images.astype(np.float32))  # (n, C, H, W), 0 to 255
    if found.shape[1] != channels:
        if {found.shape[1], channels} != {1, 3}:
            raise ConfigError(
                f"images of {found.shape[1]} channels cannot be made images of {channels}: only "
                "grey and colours become each other; choose another public set"
            )
        if channels == 3:
            found = found.expand(-1, 3, -1, -1)
        else:
            weights = torch.tensor(LUMINANCE)[None, :, None, None]
            found = (found * weights).sum(1, keepdim=True)  # (n, 3, H, W) -> (n, 1, H, W)
    if found.shape[2:] != (height, width):
        found = interpolate(found, (height, width), mode="bilinear", antialias=True)
    return found.round().clamp(0, 255) / 255


def _image_shape(what: str, spec: DataSpec) -> tuple[int, int, int]:
    if len(spec.input_shape) != 3 or spec.input_dtype != "float32":
        raise ConfigError(
            f"{what} as public data: the model takes {spec.input_dtype} of shape "
            f"{spec.input_shape}, not images (channels, height, width); use 'noise'"
        )
    channels, height, width = spec.input_shape
    return channels, height, width
