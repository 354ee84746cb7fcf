"""Groups of clients that name the digits each in its own way: the data of the groups benchmark.

A plug-in (``plugins = groups_data``). In ``renamed-digits`` a group has a few of MNIST's digits and
names for them that only its members share: one group's "0" is another's "3". No model fits two
groups at once, and to see which name is which takes records of the group. Each image belongs to at
most one client; images are halved to 14 x 14.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from metabloom.errors import DataError
from metabloom.sim import DataSpec, Federation, Records, Role, Split, federate, register_dataset
from metabloom.sim.datasets._torchvision import train_images
from metabloom.sim.datasets.label_skew import VISION_SETS
from metabloom.streams import numpy_stream

Count = Annotated[int, Field(ge=1)]
Flag = Annotated[int, Field(ge=0, le=1)]
NAME = "renamed-digits"
DIGITS = 10


def _spec(ways: int) -> DataSpec:
    return DataSpec((1, 14, 14), ways, "mlp", {"hidden": 64})


@register_dataset(NAME, _spec, split=None)
def renamed_digits(
    *,
    root: Path,
    seed: int,
    ways: Annotated[int, Field(ge=2, le=DIGITS)] = 5,
    members: Count = 5,
    support: Count = 20,
    query: Count = 20,
    training: Count = 24,
    new: Count = 6,
    proving: Flag = 0,
) -> Federation:
    """Return clients "group-07/client-2": groups that train, and new ones, which are unseen.

    Args:
        root: folder of data sets.
        seed: of everything.
        ways: digits of a group.
        members: clients of a group.
        support: images that a client trains or adapts on.
        query: further images, which judge a client of a new group.
        training: groups that train.
        new: groups that do not.
        proving: 1: the new groups are others, by which settings are chosen.
    """
    images, labels = train_images(NAME, VISION_SETS["mnist"], root=root, download=False)
    order = numpy_stream(seed, NAME, "images").permutation(len(labels))
    left = {digit: list(order[labels[order] == digit]) for digit in range(DIGITS)}
    records: dict[str, Records] = {}
    roles: dict[str, Role] = {}
    for number in range(training + 2 * new):
        rng = numpy_stream(seed, NAME, "group", number)
        digits = rng.permutation(DIGITS)[:ways]  # the digit behind each name
        role = _role(number - training, new, proving=bool(proving))
        for member in range(members):
            names = rng.integers(ways, size=support + query)
            rows = np.array([_next_of(left, int(digits[name])) for name in names])
            key = f"group-{number:02d}/client-{member}"
            if role:
                records[key] = Records(names, _halved(images, rows))
                roles[key] = role
    split = Split(support_size=support, query_size=query)
    return federate(NAME, _spec(ways), records, seed=seed, split=split, roles=roles)


def _next_of(left: dict[int, list[int]], digit: int) -> int:
    if not left[digit]:
        raise DataError(
            f"data set {NAME!r}: no images of {digit} left: lower training, new, members, support "
            "or query"
        )
    return left[digit].pop()


def _role(place: int, new: int, *, proving: bool) -> Role | None:
    """Return the role of a group, by its place after those that train; None: it is left out."""
    if place < 0:
        return "train"
    return "unseen" if (place < new) == proving else None


def _halved(
    images: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64]
) -> Callable[[], npt.NDArray[np.uint8]]:
    """Return what gives the images of ``rows``, each 2 x 2 pixels their mean."""

    def decode() -> npt.NDArray[np.uint8]:
        chosen = images[rows].reshape(len(rows), 1, 14, 2, 14, 2)  # (n, 1, 28, 28)
        return chosen.mean(axis=(3, 5)).astype(np.uint8)  # (n, 1, 14, 14)

    return decode
