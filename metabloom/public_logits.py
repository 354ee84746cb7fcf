"""What is said of public records in one round, as named arrays: FedMD and DS-FL send it both ways.

    logits  (n, C)  logits or probabilities, in an encoding of ``quantisation``
    scale   (n,)    with int8 alone
    round   ()      int64: of which round they are; 0: of none yet
    mark    (16,)   uint8: which records these are (``PublicData.mark_of``)

Both ends compare round and mark with their own, so that nobody learns of other records, or of the
same ones in another order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import WireError
from .public import PublicData
from .quantisation import LOGITS, SCALE, dequantise_logits, quantise_logits

ROUND, MARK = "round", "mark"

Named = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Subsets:
    """The public records of each round: both ends make the same ones.

    Attributes:
        public: all public records.
        size: how many of them a round is about; 0: all.
        seed: of the run.
        encoding: of what travels: "float32", "float16" or "int8".
    """

    public: PublicData
    size: int
    seed: int
    encoding: str = "float32"

    def rows(self, server_round: int) -> npt.NDArray[np.int64]:
        """Return the records of a round, ascending.

        Raises:
            DataError: there are fewer than ``size``.
        """
        return self.public.subset(server_round, self.size or len(self.public), self.seed)

    def packed(self, values: npt.NDArray[Any], server_round: int) -> dict[str, npt.NDArray[Any]]:
        """Return ``values`` (n, C), said of the records of a round, as the arrays that travel.

        Raises:
            MetabloomError: the values are not finite.
        """
        mark = self.public.mark_of(self.rows(server_round))
        number = np.array(server_round, dtype=np.int64)
        return {**quantise_logits(values, self.encoding), ROUND: number, MARK: mark}

    def nothing(self, num_classes: int) -> dict[str, npt.NDArray[Any]]:
        """Return what is there before the first round: zeros of round 0."""
        return self.packed(np.zeros((len(self.rows(0)), num_classes), dtype=np.float32), 0)

    def unpacked(self, named: Named, num_classes: int) -> npt.NDArray[np.float32]:
        """Return the values (n, C) of arrays that travelled, once they are of the right records.

        Raises:
            WireError: names, shapes or dtypes are others, or the records are.
        """
        missing = [name for name in (ROUND, MARK) if name not in named]
        if missing:
            raise WireError(f"what is said of public records comes without {missing[0]!r}")
        rows = self.rows(round_of(named))
        if not np.array_equal(named[MARK], self.public.mark_of(rows)):
            raise WireError(
                f"the public data differ: round {round_of(named)} is about {len(rows)} records of "
                f"{self.public.name!r} here, and about others, or in another order, at the other "
                "end: give both ends the same source, size, seed and files"
            )
        values = {name: named[name] for name in (LOGITS, SCALE) if name in named}
        return dequantise_logits(values, (len(rows), num_classes))


def round_of(named: Named) -> int:
    """Return the round that arrays speak of.

    Raises:
        WireError: it is no whole number of at least 0.
    """
    value = named[ROUND]
    if value.shape != () or value.dtype != np.int64 or value < 0:
        raise WireError(f"array {ROUND!r} is {value!r:.80}: one int64 of at least 0 is needed")
    return int(value)
