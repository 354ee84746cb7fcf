r"""What both ends of FedKD agree on: models that travel as compressed updates.

    update = w_new - w_old                 of floating arrays, in their dtype; others stay
    w_new' = w_old + D(C(update))          C and D: ``compression``

A question says in its config what share of the energy the answer shall keep (``ENERGY``) and, where
its arrays are an update and no model, to which round's model it is to be added (``BASE_ROUND``) and
what comes of that (``DIGEST``). An answer that is an update says so (``REPLY``): any other one is a
model, as clients of every strategy send it.

Both ends add the same factors to the same arrays, so they hold the same bits on one machine. Others
may round the product of the factors in another way: then the digest tells.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .compression import decompress_update

ENERGY = "energy"  # in the config of a question: E of the answer's compression, in (0, 1]
BASE_ROUND = "base-round"  # in the same place: the round whose model the arrays are added to
DIGEST = "mentee-digest"  # in the same place: of the model that comes of it
REPLY, UPDATE = "reply", "update"  # key and value in the properties of an answer

Named = Mapping[str, npt.NDArray[Any]]


def update_of(new: Named, old: Named) -> dict[str, npt.NDArray[Any]]:
    """Return w_new - w_old of the floating arrays, in the dtypes of ``old``.

    Args:
        new: arrays of the names and shapes of ``old``, of any floating dtype.
        old: by name.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found by its result
        return {
            name: np.asarray(np.subtract(new[name], value, dtype=np.float64), dtype=value.dtype)
            for name, value in _floating(old).items()
        }


def applied(base: Named, flat: Named) -> dict[str, npt.NDArray[Any]]:
    """Return base + D(flat), in the order and dtypes of ``base``.

    Args:
        base: a model by name; arrays that are not floating stay.
        flat: what ``compress_update`` made of an update of it, or anything that a sender gave.

    Raises:
        WireError: ``flat`` does not fit, see ``decompress_update``.

    >>> applied({"w": np.array([1.0, 2.0])}, {"w": np.array([0.5, 0.0])})["w"].tolist()
    [1.5, 2.0]
    """
    update = decompress_update(flat, _floating(base))
    with np.errstate(over="ignore", invalid="ignore"):
        return {
            name: np.asarray(np.add(value, update[name], dtype=np.float64), dtype=value.dtype)
            if name in update
            else value
            for name, value in base.items()
        }


def digest_of(named: Named) -> str:
    """Return what tells models apart: a hash of names, dtypes, shapes and values, in hex."""
    digest = hashlib.sha256()
    for name, value in sorted(named.items()):
        digest.update(ascii((name, value.dtype.str, value.shape)).encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def _floating(named: Named) -> dict[str, npt.NDArray[Any]]:
    return {n: value for n, value in named.items() if np.issubdtype(value.dtype, np.floating)}
