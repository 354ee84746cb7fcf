"""A tree of state as JSON and arrays: what a rule's state becomes in a checkpoint.

JSON has no tuple and no int as a key. A mapping is ``{"dict": [[key, value], ...]}``, a tuple
``{"tuple": [...]}``, a tensor, array or NumPy scalar ``{"tensor" | "array" | "scalar": [the name of
its array, its dtype]}``.
"""

from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from ...errors import CheckpointError

_MAPPINGS = (dict, OrderedDict, MappingProxyType)  # they come back as dict
_DTYPES = {"bool", "float16", "float32", "float64"} | {
    f"{sign}int{size}" for sign in ("", "u") for size in (8, 16, 32, 64)
}
_AS_BITS = {torch.bfloat16: torch.int16}  # NumPy has none


def pack(node: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """Return ``node`` as JSON can hold it, and put its arrays into ``arrays``.

    Args:
        node: a tree of dict, list, tuple, None, bool, int, float, str, torch.Tensor, np.ndarray
            and NumPy scalars; keys are str or int.
        path: what errors call it.
        arrays: by name; those of the tree are added as ``rule/N``.

    Raises:
        CheckpointError: where the tree holds anything else, naming it.
        RecursionError: where it is nested too deeply, or holds itself.
    """
    if node is None or type(node) in (bool, int, float, str):
        return node
    if type(node) in (list, tuple):
        items = [pack(one, f"{path}[{i}]", arrays) for i, one in enumerate(node)]
        return items if type(node) is list else {"tuple": items}
    if type(node) in _MAPPINGS:
        for key in node:
            if type(key) not in (str, int):
                raise CheckpointError(f"{path} has the key {key!r}: only str and int can be saved")
        return {"dict": [[k, pack(one, f"{path}[{k!r}]", arrays)] for k, one in node.items()]}
    name = f"rule/{len(arrays)}"
    arrays[name] = storable(node, path)
    kinds = {"tensor": torch.Tensor, "array": np.ndarray, "scalar": np.generic}
    (kind,) = (kind for kind, one in kinds.items() if isinstance(node, one))
    return {kind: [name, str(node.dtype)]}


def unpack(node: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Return the tree that was packed; its tensors and arrays are copies that can be written to."""
    if isinstance(node, list):
        return [unpack(one, arrays) for one in node]
    if not isinstance(node, dict):
        return node
    ((kind, held),) = node.items()
    if kind == "dict":
        return {key: unpack(one, arrays) for key, one in held}
    if kind == "tuple":
        return tuple(unpack(one, arrays) for one in held)
    name, dtype = held
    if kind == "tensor":
        bits = torch.from_numpy(arrays[name].copy())
        return bits.view(getattr(torch, dtype.removeprefix("torch.")))
    return {"array": arrays[name].copy(), "scalar": arrays[name][()]}[kind]


def storable(value: Any, path: str) -> np.ndarray:
    """Return ``value`` as a contiguous array that safetensors holds.

    Raises:
        CheckpointError: where there is none, calling the value ``path``.
    """
    kind = f"{type(value).__name__} of {value.dtype}" if hasattr(value, "dtype") else ""
    if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta:
        dtype = str(value.dtype).removeprefix("torch.")
        if value.dtype in _AS_BITS or dtype in _DTYPES:
            bits = value.detach().view(_AS_BITS.get(value.dtype, value.dtype))
            return np.asarray(bits.numpy(force=True), order="C")
    plain = type(value) is np.ndarray or isinstance(value, np.generic)
    if plain and value.dtype.name in _DTYPES:
        return np.asarray(value, dtype=value.dtype.newbyteorder("="), order="C")
    raise CheckpointError(
        f"{path} is a {kind or type(value).__name__}, which a checkpoint cannot hold: numbers, "
        "texts, None, dict, list, tuple, and dense real tensors and arrays can be saved"
    )
