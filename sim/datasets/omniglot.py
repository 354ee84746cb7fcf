"""Omniglot (Lake, Salakhutdinov, Tenenbaum 2015): N-way K-shot tasks by alphabet and drawer.

A client is N characters of one alphabet drawn by a few of its drawers; every image belongs to
at most one client. Evaluation alphabets are seen by no training client.
"""

import io
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ...errors import DataError
from ...streams import numpy_stream, stream_seed
from ..federation import Federation, federate, register_dataset
from ._files import DOWNLOAD, missing
from ._records import Records, Split
from ._roles import ROLES, Role, role_sizes
from ._spec import DataSpec
from ._torchvision import build

DEFAULT_CLIENTS = 400
PARTS = ("images_background", "images_evaluation")  # alphabets to train on; unseen alphabets

Ways = Annotated[int, Field(ge=2, le=50)]
Shots = Annotated[int, Field(ge=1, le=19)]
ImageSize = Annotated[int, Field(ge=4, le=105)]


@dataclass(frozen=True)
class Task:
    """Name one client: its alphabet, its characters and its drawers (numbers, ascending)."""

    part: str
    alphabet: str
    characters: tuple[int, ...]
    drawers: tuple[int, ...]

    @property
    def key(self) -> str:
        """Return the client's identity, e.g. "Greek/chars-01-05/drawers-07-12"."""
        characters = f"chars-{self.characters[0]:02d}-{self.characters[-1]:02d}"
        return f"{self.alphabet}/{characters}/drawers-{self.drawers[0]:02d}-{self.drawers[-1]:02d}"


@dataclass(frozen=True)
class _Images:
    """Read images by name from a folder tree, or from the zips where only they are there."""

    folder: Path
    zipped: frozenset[str]

    def read(self, name: str) -> bytes:
        part = name.split("/", 1)[0]
        if part in self.zipped:
            return _open_zip(self.folder / f"{part}.zip").read(name)
        return (self.folder / name).read_bytes()

    def names(self, part: str) -> Iterable[str]:
        if part in self.zipped:
            return _open_zip(self.folder / f"{part}.zip").namelist()
        found = (self.folder / part).glob("*/*/*.png")
        return (path.relative_to(self.folder).as_posix() for path in found)


@lru_cache(maxsize=4)
def _open_zip(path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def omniglot_spec(ways: int, image_size: int) -> DataSpec:
    """Return the spec of ``ways``-way tasks on square images: ink 1, background 0."""
    return DataSpec((1, image_size, image_size), ways, "conv4")


@register_dataset("omniglot", omniglot_spec, split=None)
def omniglot(
    *,
    root: Path,
    seed: int,
    num_clients: int,
    download: bool,
    ways: Ways = 5,
    shots: Shots = 1,
    query_shots: Shots = 5,
    image_size: ImageSize = 28,
) -> Federation:
    """Return the federation of ``num_clients`` tasks (0: 400, or as many as there are)."""
    images = _find_images(root, download)
    files = {part: _index(images.names(part)) for part in PARTS}
    pools = _pools(files, ways, shots + query_shots, seed)
    tasks = {task.key: task for role in ROLES for task in pools[role]}
    roles = {task.key: role for role in ROLES for task in pools[role]}
    records = {
        key: _records(images, files[task.part], task, seed, image_size)
        for key, task in tasks.items()
    }
    return federate(
        "omniglot",
        omniglot_spec(ways, image_size),
        records,
        seed=seed,
        num_clients=num_clients or _default_clients(pools, ways, shots + query_shots),
        split=Split(shots=shots, query_shots=query_shots),
        roles=roles,
    )


Files = dict[tuple[str, int, int], str]  # (alphabet, character, drawer) -> name of its image


def _find_images(root: Path, download: bool) -> _Images:
    folder = root / "omniglot" / "omniglot-py"
    zipped = set()
    for part in PARTS:
        if download and not (folder / part).is_dir():
            is_background = part == PARTS[0]
            build(
                "omniglot", "Omniglot", folder / part, root, background=is_background, download=True
            )
        if (folder / part).is_dir():
            continue
        if not (folder / f"{part}.zip").is_file():
            raise missing("omniglot", folder / part, root, DOWNLOAD)
        zipped.add(part)
    return _Images(folder, frozenset(zipped))


def _index(names: Iterable[str]) -> Files:
    files = {}
    for name in names:
        path = PurePosixPath(name)
        if path.suffix == ".png" and len(path.parts) == 4:  # part/Alphabet/characterNN/NNNN_DD.png
            _, alphabet, character, _ = path.parts
            drawer = int(path.stem.split("_")[1])
            files[alphabet, int(character.removeprefix("character")), drawer] = name
    return files


def _tasks(part: str, files: Files, ways: int, drawers_each: int) -> dict[str, list[Task]]:
    """Return the tasks of each alphabet that has any; what does not fill a task is left out."""
    drawers_of: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for alphabet, character, drawer in files:
        drawers_of[alphabet][character].add(drawer)
    tasks = defaultdict(list)
    for alphabet in sorted(drawers_of):
        for characters in _groups(sorted(drawers_of[alphabet]), ways):
            shared = set.intersection(*(drawers_of[alphabet][c] for c in characters))
            for drawers in _groups(sorted(shared), drawers_each):
                tasks[alphabet].append(Task(part, alphabet, characters, drawers))
    return tasks


def _groups(numbers: list[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(numbers[i : i + size]) for i in range(0, len(numbers) - size + 1, size)]


def _pools(
    files: dict[str, Files], ways: int, drawers_each: int, seed: int
) -> dict[Role, list[Task]]:
    """Return the tasks of each role: a sixth of the background alphabets (5 of 30) validates."""
    background, evaluation = (_tasks(part, files[part], ways, drawers_each) for part in PARTS)
    order = sorted(background, key=lambda name: stream_seed(seed, "alphabet", name))
    held_out = set(order[: max(1, round(len(order) / 6))])
    pools: dict[Role, list[Task]] = {role: [] for role in ROLES}
    for alphabet, tasks in background.items():
        pools["validation" if alphabet in held_out else "train"] += tasks
    pools["unseen"] = [task for tasks in evaluation.values() for task in tasks]
    return pools


def _default_clients(pools: dict[Role, list[Task]], ways: int, drawers_each: int) -> int:
    for number in range(DEFAULT_CLIENTS, 2, -1):
        if all(size <= len(pools[role]) for role, size in role_sizes(number).items()):
            return number
    found = {role: len(tasks) for role, tasks in pools.items()}
    raise DataError(
        f"data set 'omniglot' has too few tasks of {ways} characters (ways) by {drawers_each} "
        f"drawers (shots + query_shots): {found}, at least one each is needed. There are 20 "
        "drawers and 14 to 55 characters in an alphabet: lower ways, shots or query_shots"
    )


def _records(images: _Images, files: Files, task: Task, seed: int, size: int) -> Records:
    order = numpy_stream(seed, "labels", task.key).permutation(len(task.characters))
    names = [
        files[task.alphabet, task.characters[which], drawer]  # class j is characters[order[j]]
        for which in order
        for drawer in task.drawers
    ]
    targets = np.repeat(np.arange(len(order)), len(task.drawers))
    decode: Callable[[], npt.NDArray[np.uint8]] = partial(_decode, images, tuple(names), size)
    return Records(targets, decode)


def _decode(images: _Images, names: tuple[str, ...], size: int) -> npt.NDArray[np.uint8]:
    """Return (n, 1, size, size), 255 for ink; files hold black ink (0) on white."""
    from PIL import Image

    decoded = []
    for name in names:
        with Image.open(io.BytesIO(images.read(name))) as image:
            small = image.convert("L").resize((size, size), Image.Resampling.LANCZOS)
        decoded.append(255 - np.asarray(small, dtype=np.uint8))
    return np.stack(decoded)[:, None]
