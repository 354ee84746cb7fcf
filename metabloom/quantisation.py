r"""Logits in fewer bytes: float32, float16, or int8 with one scale a record.

    int8     scale = max_c |z_c| / 127,  z' = scale * round(z / scale),  |z - z'| <= scale / 2
    float16  z' = the nearest float16, clipped to +-65504

Rounding is to the nearest, not stochastic: logits serve one round, so errors do not add up as those
of a model's updates do, and an answer stays the same when it is asked for again. Clipped logits are
so far from sane ones that their softmax is one class, or a tie among classes beyond the range.

What arrives is held against the expected shape. Values are not judged here: a scale that is not
finite gives logits that are not, which ``strategies.consensus.sound`` names.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from .errors import MetabloomError, WireError, shortened, unknown_name

Encoding = Literal["float32", "float16", "int8"]

LOGITS, SCALE = "logits", "scale"
STEPS = 127  # of int8 on either side of 0; -128 is not used
LARGEST_HALF = 65504.0
# 127 times the scale must not round up to infinity.
LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(STEPS), np.float32(0))


def quantise_logits(logits: npt.NDArray[Any], encoding: str) -> dict[str, npt.NDArray[Any]]:
    """Return "logits" (N, C) in the encoding's dtype, and for int8 "scale" (N,) in float32.

    Args:
        logits: (N, C), floating, finite in float32.
        encoding: "float32", "float16" or "int8".

    Raises:
        ConfigError: the encoding is unknown.
        MetabloomError: the logits are not (N, C) numbers that are finite in float32.

    >>> quantise_logits(np.array([[12.7, -3.04]]), "int8")["logits"].tolist()
    [[127, -30]]
    """
    if encoding not in get_args(Encoding):
        raise unknown_name("encoding of logits", encoding, get_args(Encoding))
    if logits.ndim != 2 or not np.issubdtype(logits.dtype, np.floating):
        raise MetabloomError(
            f"logits have shape {logits.shape} and dtype {logits.dtype}: floating (records, "
            "classes) are needed"
        )
    with np.errstate(over="ignore"):
        values = logits.astype(np.float32)
    if not np.isfinite(values).all():
        row = int((~np.isfinite(values)).any(axis=1).argmax())
        raise MetabloomError(
            f"logits of record {row} are {shortened(logits[row].tolist(), 100)}, not finite in "
            "float32: the model has diverged, leave this client out of the round"
        )
    if encoding == "float32":
        return {LOGITS: values}
    if encoding == "float16":
        return {LOGITS: values.clip(-LARGEST_HALF, LARGEST_HALF).astype(np.float16)}
    greatest = np.abs(values).max(axis=1, initial=0)  # (N,)
    scale = np.minimum(greatest / np.float32(STEPS), LARGEST_SCALE)
    # A row of zeros, or so near to them that its scale is none, is a row of zeros.
    steps = np.rint(values / np.where(scale > 0, scale, np.float32(np.inf))[:, None])
    return {LOGITS: steps.clip(-STEPS, STEPS).astype(np.int8), SCALE: scale}


def dequantise_logits(
    named: Mapping[str, npt.NDArray[Any]], shape: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """Return the logits (N, C) in float32 of what ``quantise_logits`` gave.

    Args:
        named: what a sender gave, which may be anything; the encoding is the dtype of "logits".
        shape: (N, C) that is expected.

    Raises:
        WireError: names, shapes or dtypes are not those of an encoding.
    """
    logits = named.get(LOGITS)
    if logits is None or logits.shape != shape or logits.dtype.name not in get_args(Encoding):
        found = "are missing" if logits is None else f"have {logits.shape}, {logits.dtype}"
        raise WireError(
            f"logits {found}: wanted an array {LOGITS!r} of shape {shape} in one of "
            f"{', '.join(get_args(Encoding))}"
        )
    wanted = {LOGITS, SCALE} if logits.dtype == np.int8 else {LOGITS}
    if named.keys() != wanted:
        raise WireError(
            f"logits in {logits.dtype} came as {shortened(sorted(named))}: wanted {sorted(wanted)}"
        )
    if logits.dtype != np.int8:
        return logits.astype(np.float32)
    scale = named[SCALE]
    if scale.shape != shape[:1] or scale.dtype != np.float32:
        raise WireError(
            f"array {SCALE!r} has shape {scale.shape} and dtype {scale.dtype}: wanted "
            f"{shape[:1]} and float32, one a record"
        )
    with np.errstate(over="ignore", invalid="ignore"):  # values are the caller's to judge
        values: npt.NDArray[np.float32] = logits.astype(np.float32) * scale[:, None]
    return values
