"""The federations of the distillation benchmark: skewed private images, judges of all classes.

A plug-in (``plugins = distillation_data``). In ``bench-mnist`` and ``bench-fashion-mnist`` each
training client holds a part of a few training images, divided by Dirichlet label skew. Validation
clients all hold the same further training images, unseen clients all hold the set's own test
images: with a judge for each architecture, each architecture's model is scored on all classes.
Public records (``public-data = held-out``) are in none of them. Two small nets come along.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import distillation_models  # noqa: F401  registers
import numpy as np
import numpy.typing as npt
from pydantic import Field

from metabloom.errors import DataError, MissingDataError
from metabloom.sim import (
    DataSpec,
    Federation,
    Records,
    Role,
    federate,
    held_out_rows,
    register_dataset,
)
from metabloom.sim.datasets.label_skew import VISION_SETS
from metabloom.streams import numpy_stream

Rows = npt.NDArray[np.int64]
Count = Annotated[int, Field(ge=1)]

NAMES = {"mnist": "bench-mnist", "fashion-mnist": "bench-fashion-mnist"}
RESERVE = 4000  # the largest public set: private images are the same whatever its size
TRIES = 10_000
SUPPORT = 1  # records of a judge that do not judge: a client needs a support set


def _register(source_name: str, name: str) -> None:
    source = VISION_SETS[source_name]
    VISION_SETS.add(name, source)  # so that its records can be held out as public ones
    spec = DataSpec(source.input_shape, source.num_classes, "cnn", {"dense": 128})

    @register_dataset(name, spec, split=None)
    def load(
        *,
        root: Path,
        seed: int,
        num_clients: int,
        alpha: Annotated[float, Field(gt=0)] = 0.3,
        limit: Count = 10_000,
        least: Count = 10,
        proof: Count = 1000,
        judges: Count = 3,
        pooled: Annotated[int, Field(ge=0, le=1)] = 0,
        held_out: Annotated[int, Field(ge=0)] = 0,
        reserve: Count = RESERVE,
    ) -> Federation:
        """Return ``num_clients`` clients (0: 20 and the judges), of whom the judges do not train.

        Args:
            root: folder of data sets.
            seed: of everything.
            num_clients: judges included.
            alpha: Dirichlet's concentration.
            limit: private images, of all training clients together.
            least: images of the smallest training client: drawn again until it has them.
            proof: images of the validation clients.
            judges: validation clients, and unseen clients.
            pooled: 1: each training client holds the private images of all.
            held_out: public images.
            reserve: images that are kept for the public set, whatever its size.
        """
        images, labels = _read(source, root, train=True)
        _, left = held_out_rows(len(labels), max(held_out, reserve), seed)
        order = left[numpy_stream(seed, name, "private").permutation(len(left))]
        private, proving = order[:limit], order[limit : limit + proof]
        count = (num_clients or 20 + 2 * judges) - 2 * judges
        if count < 1 or not len(proving):
            raise DataError(
                f"data set {name!r}: num-clients = {num_clients} with judges = {judges}, limit = "
                f"{limit} of {len(left)} images: at least one client has to train, and images are "
                "needed for validation"
            )
        rng = numpy_stream(seed, name, "partition")
        parts = divided(labels[private], count, alpha, least, rng)
        held: dict[str, Records] = {
            f"train-{number:02d}": Records.of_rows(
                images, labels, np.sort(private if pooled else private[part])
            )
            for number, part in enumerate(parts)
        }
        roles: dict[str, Role] = dict.fromkeys(held, "train")
        tests = _read(source, root, train=False)
        for number in range(judges):
            for role, found in (
                ("validation", (images[proving], labels[proving])),
                ("unseen", tests),
            ):
                key = f"{role}-{number}"
                held[key] = Records(found[1], _given(found[0]), support_rows=SUPPORT)
                roles[key] = role  # type: ignore[assignment]  # the two are roles
        return federate(name, spec, held, seed=seed, roles=roles)


def divided(
    labels: npt.NDArray[np.int64], count: int, alpha: float, least: int, rng: np.random.Generator
) -> list[Rows]:
    """Return the rows of ``count`` clients: their shares of each class are Dirichlet(alpha).

    All is drawn again until the smallest client has ``least`` rows.

    Raises:
        DataError: where it never has.
    """
    for _ in range(TRIES):
        parts: list[list[Rows]] = [[] for _ in range(count)]
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(count, alpha))
            cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
            for part, piece in zip(parts, np.split(rows, cuts), strict=True):
                part.append(piece)
        found = [np.concatenate(part) for part in parts]
        if min(map(len, found)) >= least:
            return found
    raise DataError(
        f"{count} clients of {len(labels)} images by Dirichlet({alpha}): in {TRIES} draws one had "
        f"fewer than least = {least} each time; lower it, or give more images (limit)"
    )


def _read(
    source: Any, root: Path, *, train: bool
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return images (n, 1, H, W) and labels (n,) of the training or the test split."""
    import torchvision.datasets

    folder = root / source.folder
    try:
        found = getattr(torchvision.datasets, source.class_name)(str(folder), train=train)
    except (RuntimeError, OSError) as err:
        raise MissingDataError(
            f"{source.class_name} cannot be read from {str(folder)!r} ({err}): the folder of data "
            "sets is data-root; 'metabloom simulate --dataset ... --set download=true' fetches them"
        ) from err
    return np.asarray(found.data)[:, None], np.asarray(found.targets, dtype=np.int64)


def _given(images: npt.NDArray[np.uint8]) -> Callable[[], npt.NDArray[np.uint8]]:
    return lambda: images


for _source, _name in NAMES.items():
    _register(_source, _name)
