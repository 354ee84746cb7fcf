"""What a model of a data set takes and gives, and the checks that the records keep to it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from ...clients.data import Batch
from ...errors import ConfigError, DataError
from ._records import Records

RecordsLike = Records | tuple[Any, Any]
InputDtype = Literal["float32", "int64"]


@dataclass(frozen=True)
class DataSpec:
    """Describe what a model of a data set takes and gives; needs no data file.

    Attributes:
        input_shape: shape of one input without the batch, e.g. (1, 28, 28) or (80,).
        num_classes: targets are int64 in [0, num_classes).
        model: registry name of the usual model.
        model_options: options of that model.
        input_dtype: "float32", or "int64" for characters (ids in [0, num_classes)).

    Raises:
        ConfigError: a shape without sizes of at least 1, fewer than 2 classes, another dtype.

    >>> DataSpec(input_shape=[28, 28], num_classes=10, model="mlp").input_shape
    (28, 28)
    """

    input_shape: tuple[int, ...]
    num_classes: int
    model: str
    model_options: Mapping[str, Any] = field(default_factory=dict)
    input_dtype: InputDtype = "float32"

    def __post_init__(self) -> None:
        given: object = self.input_shape
        shape = tuple(given) if isinstance(given, tuple | list) else ()
        if not (shape and all(_is_count(size, low=1) for size in shape)):
            raise ConfigError(
                f"input_shape = {given!r}: must be one input's shape, a tuple of whole numbers of "
                "at least 1 without the batch, e.g. (1, 28, 28)"
            )
        if not _is_count(self.num_classes, low=2):
            raise ConfigError(
                f"num_classes = {self.num_classes!r}: must be a whole number of at least 2, "
                "since targets are classes"
            )
        if self.input_dtype not in get_args(InputDtype):
            raise ConfigError(
                f"input_dtype = {self.input_dtype!r}: must be 'float32', or 'int64' for characters"
            )
        object.__setattr__(self, "input_shape", tuple(int(size) for size in shape))


def _is_count(value: object, *, low: int) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= low


def as_records(name: str, spec: DataSpec, key: str, given: RecordsLike) -> Records:
    who = f"client {key!r} of {name!r}"
    if isinstance(given, Records):
        own = given
    else:
        inputs, targets = (np.asarray(part) for part in given)
        own = Records(targets, lambda: inputs)
        check_inputs(who, spec, inputs, len(targets))
    if own.targets.ndim != 1 or not np.issubdtype(own.targets.dtype, np.integer):
        raise DataError(
            f"{who}: targets have shape {own.targets.shape} and dtype {own.targets.dtype}: "
            "one integer class for each record is needed"
        )
    if len(own.targets) and not 0 <= own.targets.min() <= own.targets.max() < spec.num_classes:
        raise DataError(
            f"{who}: targets lie in [{own.targets.min()}, {own.targets.max()}], outside "
            f"[0, {spec.num_classes}): renumber the classes or set num_classes in the spec"
        )
    return own


def check_inputs(who: str, spec: DataSpec, inputs: npt.NDArray[Any], num_targets: int) -> None:
    if len(inputs) != num_targets:
        raise DataError(f"{who}: {len(inputs)} inputs but {num_targets} targets: one each")
    if inputs.shape[1:] != spec.input_shape:
        raise DataError(
            f"{who}: an input has shape {inputs.shape[1:]}, the spec says {spec.input_shape}: "
            "reshape the inputs or correct the spec"
        )
    if np.issubdtype(inputs.dtype, np.floating) and not np.isfinite(inputs).all():
        raise DataError(f"{who}: inputs hold NaN or infinity: impute or drop those records")


def to_batch(spec: DataSpec, inputs: npt.NDArray[Any], targets: npt.NDArray[Any]) -> Batch:
    is_image = inputs.dtype == np.uint8 and spec.input_dtype == "float32"
    numbers = inputs.astype(spec.input_dtype)
    if is_image:
        numbers /= 255  # 0..255 -> [0, 1]
    return torch.from_numpy(numbers), torch.from_numpy(targets.astype(np.int64))
