r"""Updates as products of thin matrices: the singular value compression of FedKD (2108.13323).

    A = U diag(s) V,  A' = U_K diag(s_K) V_K,  K = min {k >= 1 : sum_{i<=k} s_i^2 >= E sum_i s_i^2}
    E = E_start + (E_end - E_start) * progress

so that ||A - A'||^2 = sum_{i>K} s_i^2 <= (1 - E) ||A||^2. A matrix (m, n) goes as its factors where
they have fewer bytes, K (m + n + 1) < m n in one dtype, else as it is. A convolution (out, in, k,
k) is the matrix (out, in k k). Vectors, scalars, integers and what is not finite go as they are.

Factors travel beside dense arrays under ``name/u`` (m, K), ``name/s`` (K,) and ``name/v`` (K, n),
in the array's dtype, in float32 where that is narrower. The decomposition and the product are
computed in float64, and in one thread: with another number of threads LAPACK rounds in another way,
and a run shall have the same bits however many processes share its clients.

What arrives is held against what was expected: names, shapes, dtypes. Values are not judged here:
factors that are not finite make an array that is not, which the server's firewall refuses.

Differences: E = 1 keeps the numerical rank, which is the whole matrix or its exact factors; a
public implementation finds rank 0 there.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .errors import ConfigError, WireError, shortened
from .execution import on_one_thread

Named = Mapping[str, npt.NDArray[Any]]

SUFFIXES = ("u", "s", "v")
FACTORED = (np.float16, np.float32, np.float64)  # dtypes of matrices that may be factored


def energy_threshold(progress: float, start: float = 0.95, end: float = 0.98) -> float:
    """Return E = start + (end - start) * progress: late updates are small and need more of it.

    Args:
        progress: share of the rounds that are over, in [0, 1].
        start: E of the first round, in (0, 1].
        end: E of the last round, in (0, 1].

    Raises:
        ConfigError: a number outside its range.

    >>> round(energy_threshold(0.5), 6)
    0.965
    """
    if not 0 <= progress <= 1:
        raise ConfigError(
            f"progress = {progress!r}: must be in [0, 1], the share of the rounds that are over"
        )
    _check_energy("start", start)
    _check_energy("end", end)
    return (1 - progress) * start + progress * end


def rank_for(sigma: npt.ArrayLike, energy: float) -> int:
    """Return the smallest K >= 1 whose first K squares make up the share ``energy`` of all.

    Args:
        sigma: (r,) with r >= 1 singular values: finite, at least 0, descending.
        energy: E in (0, 1]; 1 gives the numerical rank, where noise of float64 does not count.

    Returns:
        K in [1, r]; 1 where all are 0.

    Raises:
        ConfigError: the energy or the values are not as they must be.

    >>> rank_for([3, 1], 0.95), rank_for([3, 1], 0.85), rank_for([10, 1, 1], 0.95)
    (2, 1, 1)
    """
    _check_energy("energy", energy)
    values = np.asarray(sigma, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ConfigError(f"sigma has shape {values.shape}: a row of finite singular values needed")
    if values.min() < 0 or (np.diff(values) > 0).any():
        raise ConfigError(
            f"sigma = {shortened(values.tolist(), 100)}: singular values must be at least 0 and "
            "descending, since the first are kept"
        )
    if energy == 1:
        noise = values[0] * len(values) * np.finfo(np.float64).eps
        return max(1, int((values > noise).sum()))
    _, exponent = np.frexp(values[0])
    squares = np.ldexp(values, -exponent) ** 2  # by a power of 2: exact, and no overflow
    reached = np.cumsum(squares)
    return int(np.searchsorted(reached, energy * reached[-1])) + 1


def compress(
    array: npt.NDArray[Any], energy: float
) -> dict[str, npt.NDArray[Any]] | npt.NDArray[Any]:
    """Return the factors "u" (m, K), "s" (K,), "v" (K, n) of an array, or the array itself.

    Args:
        array: of any shape and dtype; see the module's text for what is factored.
        energy: E in (0, 1].

    Raises:
        ConfigError: the energy is outside its range.
    """
    _check_energy("energy", energy)
    if not _may_factor(array.shape, array.dtype) or not np.isfinite(array).all():
        return array
    m, n = _matrix_shape(array.shape)
    matrix = array.reshape(m, n).astype(np.float64)  # (out, in, k, k) -> (out, in k k)
    try:
        with on_one_thread():
            found = torch.linalg.svd(torch.from_numpy(matrix), full_matrices=False)
    except RuntimeError:  # it did not converge: rare, and no reason to lose the update
        return array
    u, s, v = (part.numpy() for part in found)
    rank = rank_for(s, energy)
    dtype = _factor_dtype(array.dtype)
    if rank * (m + n + 1) * dtype.itemsize >= array.nbytes:
        return array
    with np.errstate(over="ignore"):
        factors = {
            name: np.ascontiguousarray(part, dtype)
            for name, part in zip(SUFFIXES, (u[:, :rank], s[:rank], v[:rank]), strict=True)
        }
    return factors if np.isfinite(factors["s"]).all() else array


def decompress(
    u: npt.NDArray[Any],
    s: npt.NDArray[Any],
    v: npt.NDArray[Any],
    shape: tuple[int, ...],
    dtype: npt.DTypeLike,
) -> npt.NDArray[Any]:
    """Return U diag(s) V in ``shape`` and ``dtype``, of factors that fit: see ``_factors``."""
    with np.errstate(over="ignore", invalid="ignore"):  # values are the firewall's to judge
        left, right = u.astype(np.float64) * s.astype(np.float64), v.astype(np.float64)
        with on_one_thread():
            matrix = (torch.from_numpy(left) @ torch.from_numpy(right)).numpy()
        return matrix.reshape(shape).astype(dtype)


def compress_update(named: Named, energy: float) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of an update under flat names, each dense or as three factors.

    Args:
        named: arrays by name; no name may end in /u, /s or /v.
        energy: E in (0, 1].

    Raises:
        ConfigError: the energy is outside its range, or a name ends in a suffix of the factors.
    """
    flat: dict[str, npt.NDArray[Any]] = {}
    for name, array in named.items():
        _check_name(name)
        parts = compress(array, energy)
        if isinstance(parts, dict):
            flat.update({f"{name}/{suffix}": part for suffix, part in parts.items()})
        else:
            flat[name] = parts
    return flat


def decompress_update(flat: Named, like: Named) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of an update by name, in the order, shapes and dtypes of ``like``.

    Args:
        flat: what a sender gave, which may be anything.
        like: arrays of the names, shapes and dtypes that are expected; values do not count.

    Raises:
        WireError: an array is missing, unknown, there twice, or of another shape or dtype.
        ConfigError: a name of ``like`` ends in a suffix of the factors.
    """
    expected: set[str] = set()
    result: dict[str, npt.NDArray[Any]] = {}
    for name, wanted in like.items():
        _check_name(name)
        keys = [f"{name}/{suffix}" for suffix in SUFFIXES]
        expected |= {name, *keys}
        found = [key for key in keys if key in flat]
        if name in flat and found:
            raise WireError(f"array {name!r} came dense and as {found[0]!r}: one of them is needed")
        if name in flat:
            _check_layout(name, flat[name], wanted.shape, wanted.dtype)
            result[name] = flat[name]
        else:
            factors = _factors(flat, name, wanted)
            result[name] = decompress(*factors, wanted.shape, wanted.dtype)
    if unknown := [name for name in flat if name not in expected]:
        raise WireError(
            f"{len(unknown)} arrays are not expected, {shortened(repr(unknown[0]))} first: names "
            f"are those of the model, or one with a suffix of {', '.join(SUFFIXES)} after '/'"
        )
    return result


def num_bytes(named: Named) -> int:
    """Return the bytes of the arrays' values, without names and headers."""
    return sum(array.nbytes for array in named.values())


def _factors(
    flat: Named, name: str, wanted: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Return u, s and v of one array, of shapes that multiply to the one that is wanted."""
    keys = [f"{name}/{suffix}" for suffix in SUFFIXES]
    if missing := [key for key in keys if key not in flat]:
        raise WireError(
            f"array {name!r} did not come, nor its factor {missing[0]!r}: the sender must give "
            f"{name!r} itself or all of {', '.join(map(repr, keys))}"
        )
    if not _may_factor(wanted.shape, wanted.dtype):
        raise WireError(
            f"array {name!r} came as factors, but has shape {wanted.shape} and dtype "
            f"{wanted.dtype}: only floating matrices and convolutions are factored"
        )
    m, n = _matrix_shape(wanted.shape)
    u, s, v = (flat[key] for key in keys)
    rank = s.size
    if not 1 <= rank <= min(m, n):
        raise WireError(
            f"array {keys[1]!r} holds {rank} singular values of a matrix ({m}, {n}): from 1 to "
            f"{min(m, n)} can be there"
        )
    for key, part, shape in zip(keys, (u, s, v), ((m, rank), (rank,), (rank, n)), strict=True):
        _check_layout(key, part, shape, _factor_dtype(wanted.dtype))
    return u, s, v


def _check_layout(
    name: str, array: npt.NDArray[Any], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise WireError(
            f"array {name!r} has shape {array.shape} and dtype {array.dtype}, wanted {shape} and "
            f"{dtype}: the sender's model or its compression is another one"
        )


def _check_name(name: str) -> None:
    if name.endswith(tuple(f"/{suffix}" for suffix in SUFFIXES)):
        raise ConfigError(
            f"array {name!r} ends like a factor of a compressed array: rename it, since the two "
            "could not be told apart"
        )


def _check_energy(name: str, energy: float) -> None:
    if not 0 < energy <= 1:
        raise ConfigError(
            f"{name} = {energy!r}: must be above 0 and at most 1, the share of the squared "
            "singular values that is kept"
        )


def _may_factor(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Return whether there is a rank at which the factors are smaller than the array."""
    if len(shape) < 2 or 0 in shape or dtype not in FACTORED:
        return False
    m, n = _matrix_shape(shape)
    return m + n + 1 < m * n


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _factor_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.result_type(dtype, np.float32)
