"""Tiny stand-ins for the data sets, written in each one's own file formats."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

IMAGES = 600
WRITERS = [1] + [49] * 11 + [60]  # images of each of 13 writers; the first has too few
BACKGROUND = ("Alef", "Bet", "Gimel", "Dalet", "He", "Vav")
EVALUATION = ("Zayin", "Het", "Tet")
CHARACTERS, DRAWERS = 6, 12
SMALL = {  # options that fit the tiny files
    "digits": {"num_clients": 20},
    "omniglot": {"num_clients": 10},
    "shakespeare": {"sequence_length": 20},
    "mnist": {"num_clients": 6},
    "fashion-mnist": {"num_clients": 6},
    "kmnist": {"num_clients": 6},
    "cifar10": {"num_clients": 6},
    "cifar100": {"num_clients": 6},
}


def write_all(root: Path) -> Path:
    write_mnist_like(root / "mnist" / "MNIST" / "raw", 1)
    write_mnist_like(root / "fashion_mnist" / "FashionMNIST" / "raw", 2)
    write_mnist_like(root / "kmnist" / "KMNIST" / "raw", 3)
    write_writers(root / "mnist" / "QMNIST" / "raw")
    write_omniglot(root / "omniglot" / "omniglot-py")
    write_shakespeare(root / "shakespeare")
    write_heart_disease(root / "heart_disease")
    (root / "huggingface" / "flwrlabs___femnist").mkdir(parents=True)
    for present in ("cifar10/cifar-10-batches-py/data_batch_1", "cifar100/cifar-100-python/train"):
        (root / present).parent.mkdir(parents=True)
        (root / present).touch()
    return root


def labels(n: int) -> np.ndarray:
    return (np.arange(n) * 7 % 10).astype(np.uint8)


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write MNIST's format: 0, 0, type code, number of axes, sizes, big-endian values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    code = {"uint8": 8, "int32": 12}[values.dtype.name]
    sizes = np.asarray(values.shape, ">i4").tobytes()
    path.write_bytes(
        bytes([0, 0, code, values.ndim])
        + sizes
        + values.astype(values.dtype.newbyteorder(">")).tobytes()
    )


def write_mnist_like(raw: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for part, n in (("train", IMAGES), ("t10k", 10)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        images[0, 0, 0] = 255
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels(n))


def write_writers(raw: Path) -> None:
    table = np.zeros((IMAGES, 8), np.int32)
    table[:, 0] = labels(IMAGES)
    table[:, 2] = np.repeat(np.arange(len(WRITERS)) + 100, WRITERS)
    write_idx(raw / "qmnist-train-labels-idx2-int", table)


def write_omniglot(folder: Path, *, backwards: bool = False, zipped: bool = False) -> None:
    """Write the tree, or the zips; ``backwards`` creates the folders in the opposite order."""
    parts = (("images_background", BACKGROUND), ("images_evaluation", EVALUATION))
    for part, alphabets in parts:
        names = [
            (alphabet, character, drawer)
            for alphabet in alphabets
            for character in range(1, CHARACTERS + 1)
            for drawer in range(1, DRAWERS + 1)
        ]
        for alphabet, character, drawer in reversed(names) if backwards else names:
            seed = [*alphabet.encode(), character, drawer]
            paper = np.random.default_rng(seed).random((105, 105)) > 0.05  # white paper, black ink
            paper[40:60, 40:60] = False
            path = folder / part / alphabet / f"character{character:02d}"
            path.mkdir(parents=True, exist_ok=True)
            Image.fromarray(paper).save(path / f"{character:04d}_{drawer:02d}.png")
        if zipped:
            with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
                for path in (folder / part).rglob("*.png"):
                    archive.write(path, path.relative_to(folder).as_posix())
                    path.unlink()
            for path in sorted((folder / part).rglob("*"), reverse=True):
                path.rmdir()
            (folder / part).rmdir()


def write_shakespeare(folder: Path) -> None:
    """Write eight roles; each says its own letter over and over, with the position in between."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks = ["A stage direction without a name"]
    for scene in range(30):
        for role in range(7):
            speech = " ".join(f"{'abcdefg'[role]}{scene}.{line}" for line in range(12))
            blocks.append(f"ROLE {role}:\n{speech}")
    blocks.append("MESSENGER:\nMy lord, $1.")
    (folder / "input.txt").write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def write_heart_disease(folder: Path) -> None:
    """Write four hospitals with gaps; one misses a column wholly, one has 0 throughout."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, hospital in enumerate(("cleveland", "hungarian", "switzerland", "va")):
        rng = np.random.default_rng(number)
        lines = []
        for row in range(24):
            cells = [
                rng.integers(30, 80), rng.integers(0, 2), rng.integers(1, 5), rng.integers(90, 200),
                0 if hospital == "switzerland" else rng.integers(150, 400), rng.integers(0, 2),
                rng.integers(0, 3), rng.integers(80, 200), rng.integers(0, 2),
                round(rng.random() * 4, 1), rng.integers(1, 4), rng.integers(0, 4),
                rng.choice([3, 6, 7]), row % 3,
            ]  # fmt: skip
            text = [str(cell) for cell in cells]
            text[11] = "?" if hospital == "hungarian" or row % 5 == 0 else text[11]
            text[12] = "?" if row % 4 == 0 else text[12]
            lines.append(",".join(text))
        (folder / f"processed.{hospital}.data").write_text("\n".join(lines) + "\n")


class FakeCifar:
    """Stand in for torchvision's CIFAR sets, whose files are checked against fixed md5 sums."""

    def __init__(self, root: str, *, train: bool, download: bool) -> None:
        assert train
        self.data = np.random.default_rng(4).integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8)
        self.targets = labels(IMAGES).tolist()


def fake_hub(path: str, name: str | None = None, **options: object) -> object:
    """Stand in for datasets.load_dataset of flwrlabs/femnist: 6 writers, shuffled rows."""
    import datasets

    assert path == "flwrlabs/femnist"
    rng = np.random.default_rng(5)
    rows = 90
    table = {
        "image": [
            Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)) for _ in range(rows)
        ],
        "writer_id": [f"f{i % 6:04d}_14" for i in range(rows)],
        "hsf_id": [0] * rows,
        "character": [i % 62 for i in range(rows)],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "writer_id": datasets.Value("string"),
            "hsf_id": datasets.Value("int64"),
            "character": datasets.ClassLabel(num_classes=62),
        }
    )
    return datasets.DatasetDict({"train": datasets.Dataset.from_dict(table, features=features)})


def install_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what needs a network or a set's original bytes."""
    import flwr_datasets.federated_dataset
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCifar)
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", FakeCifar)
    monkeypatch.setattr(flwr_datasets.federated_dataset.datasets, "load_dataset", fake_hub)
