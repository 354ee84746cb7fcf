"""``metabloom pretrain``: a model trained on public records, at which a run starts."""

import copy
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn
from typer.testing import CliRunner, Result

from metabloom.cli import app
from metabloom.config import RunConfig
from metabloom.errors import ConfigError, DataError, MetabloomError
from metabloom.pretraining import Epoch, Pretraining, pretrained
from metabloom.public import held_out_rows
from metabloom.sim import dataset_spec
from metabloom.sim.datasets._torchvision import train_images
from metabloom.sim.datasets.label_skew import VISION_SETS
from metabloom.sim.public_sources import load_labelled, load_public
from metabloom.streams import torch_stream
from metabloom.task import model_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pretrained.md"


# --- the training, in itself ----------------------------------------------------------------------


def blobs(count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Return records of three classes that lie apart."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, count)
    inputs = np.eye(3)[targets] * 4 + rng.normal(size=(count, 3))
    return torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(targets)


def linear() -> nn.Module:
    model = nn.Linear(3, 3)
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    return model


def by_hand(model: nn.Module, how: Pretraining, seed: int) -> list[dict[str, np.ndarray]]:
    """Return the states after each epoch: Adam and the cosine written out in float64."""
    inputs, targets = (part.numpy() for part in blobs())
    inputs = inputs.astype(np.float64)
    stream = torch_stream(seed, "test")
    order = torch.randperm(len(inputs), generator=stream).numpy()
    rows = order[round(0.1 * len(inputs)) :]
    w, b = np.zeros((3, 3)), np.zeros(3)
    moments = [[np.zeros_like(one), np.zeros_like(one)] for one in (w, b)]
    states, step = [{"weight": w.copy(), "bias": b.copy()}], 0
    total = how.epochs * -(-len(rows) // how.batch_size)
    for _ in range(how.epochs):
        mixed = rows[torch.randperm(len(rows), generator=stream).numpy()]
        for begin in range(0, len(mixed), how.batch_size):
            part = mixed[begin : begin + how.batch_size]
            z = inputs[part] @ w.T + b
            p = np.exp(z - z.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            slope = (p - np.eye(3)[targets[part]]) / len(part)
            lr = how.lr * (1 + np.cos(np.pi * step / total)) / 2
            step += 1
            for value, own, grad in zip(
                (w, b), moments, (slope.T @ inputs[part], slope.sum(0)), strict=True
            ):
                own[0] = 0.9 * own[0] + 0.1 * grad
                own[1] = 0.999 * own[1] + 0.001 * grad**2
                top = own[0] / (1 - 0.9**step)
                value -= lr * top / (np.sqrt(own[1] / (1 - 0.999**step)) + 1e-8)
        states.append({"weight": w.copy(), "bias": b.copy()})
    return states


@pytest.mark.parametrize("batch_size", [16, 1000])
def test_a_model_is_trained_as_adam_with_a_cosine_written_out(batch_size: int):
    how = Pretraining(epochs=3, lr=0.05, batch_size=batch_size)
    seen: list[Epoch] = []
    model = linear()
    found, best = pretrained(model, blobs(), how, torch_stream(4, "test"), on_epoch=seen.append)
    states = by_hand(model, how, 4)
    inputs, targets = blobs()
    judges = torch.randperm(200, generator=torch_stream(4, "test"))[:20]
    losses = []
    for state in states:
        z = inputs[judges].double() @ torch.from_numpy(state["weight"].T) + torch.from_numpy(
            state["bias"]
        )
        losses.append(float(nn.functional.cross_entropy(z, targets[judges])))
    assert best.number == int(np.argmin(losses))
    assert [one.number for one in seen] == [1, 2, 3]
    # Three epochs of float32 against float64: each step rounds to 6e-8 of a value of order one.
    assert [one.loss for one in seen] == pytest.approx(losses[1:], abs=1e-5)
    for name, value in found.state_dict().items():
        np.testing.assert_allclose(value.numpy(), states[best.number][name], atol=1e-5)
    assert all(float(value.detach().abs().max()) == 0 for value in model.parameters())  # as it was


def test_the_best_epoch_comes_out_the_start_among_them():
    wild = Pretraining(epochs=2, lr=1000.0, batch_size=50)
    inputs, _ = blobs()
    chance = torch.randint(3, (len(inputs),), generator=torch_stream(0, "labels"))
    found, best = pretrained(linear(), (inputs, chance), wild, torch_stream(0, "test"))
    assert best.number == 0
    assert all(float(value.detach().abs().max()) == 0 for value in found.parameters())


def test_frozen_parameters_stay_and_the_records_that_judge_teach_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for value in model[0].parameters():
        value.requires_grad_(False)
    inputs, targets = blobs()
    judges = torch.randperm(200, generator=torch_stream(1, "test"))[:20]
    how = Pretraining(epochs=1, lr=1e-3, batch_size=50)
    states = []
    for shift in (0, 1):  # other labels of those that judge alone
        other = targets.clone()
        other[judges] = (other[judges] + shift) % 3
        seen: list[nn.Module] = []
        copied = copy.deepcopy(model)
        found, best = pretrained(copied, (inputs, other), how, torch_stream(1, "test"))
        seen.append(found)
        states.append((best.number, found.state_dict()))
    assert states[0][0] == 1
    for name, value in states[0][1].items():
        frozen = torch.equal(value, model.state_dict()[name])
        assert frozen == name.startswith("0.")
    if states[1][0] == 1:
        assert all(torch.equal(v, states[1][1][n]) for n, v in states[0][1].items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs = 0"),
        ({"batch_size": 0}, "batch-size = 0"),
        ({"lr": 0.0}, "lr = 0.0"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"lr": float("inf")}, "lr = inf"),
    ],
)
def test_values_out_of_range_are_named(values: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        Pretraining(**values)


def test_one_record_is_too_few():
    with pytest.raises(DataError, match="1 public records: two are needed"):
        pretrained(
            linear(),
            (torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64)),
            Pretraining(),
            torch_stream(0),
        )


# --- public records with labels -------------------------------------------------------------------


def images_of(name: str, root: Path) -> tuple[np.ndarray, np.ndarray]:
    return train_images(name, VISION_SETS[name], root=root, download=False)


@pytest.mark.parametrize("kind", ["held-out", "dataset:kmnist"])
def test_labelled_records_are_the_public_ones_with_the_labels_of_their_own_set(
    kind: str, small_data: Path
):
    spec = dataset_spec("mnist")
    given = {"size": 30, "seed": 3, "dataset": "mnist", "root": small_data}
    public, (inputs, targets), classes = load_labelled(kind, spec, **given)
    assert public.fingerprint == load_public(kind, spec, **given).fingerprint
    assert torch.equal(inputs, public.inputs)
    assert (classes, targets.dtype, targets.shape) == (10, torch.int64, (30,))
    images, labels = images_of("mnist" if kind == "held-out" else "kmnist", small_data)
    pixels = images.reshape(len(images), -1)
    for record, target in zip(inputs, targets, strict=True):
        same = (pixels == np.rint(record.numpy().reshape(-1) * 255)).all(axis=1)
        assert labels[same].tolist() == [int(target)]
    if kind == "held-out":
        rows, _ = held_out_rows(len(labels), 30, 3)
        assert targets.tolist() == labels[rows].tolist()


@pytest.mark.parametrize(
    ("kind", "dataset", "message"),
    [
        ("noise", "mnist", "no labels to train on"),
        ("smooth-noise", "mnist", "no labels to train on"),
        ("dataset:mnist", "mnist", "are the records of the clients"),
        ("dataset:mnist", "mnist-writers", "are the records of the clients"),
        ("held-out", "digits", "records can be set aside in"),
        ("dataset:mnits", "mnist", "did you mean 'mnist'"),
    ],
)
def test_records_that_cannot_teach_are_refused(kind: str, dataset: str, message: str):
    with pytest.raises(ConfigError) as refused:
        load_labelled(kind, dataset_spec("mnist"), size=5, seed=0, dataset=dataset)
    assert message in str(refused.value)


# --- the command ----------------------------------------------------------------------------------

MODEL = ("model=mlp", "model-args=hidden=16", "device=cpu")
RUN = ("num-clients=6", "clients-per-round=2", "rounds=1", "eval-steps=1", "batch-size=20")


def command(name: str, root: Path, out: Path, *more: str, settings: tuple[str, ...]) -> Result:
    words = [word for one in (*MODEL, *settings, f"data-root={root}") for word in ("--set", one)]
    return CliRunner().invoke(app, [name, *words, *more, "--out", str(out)], catch_exceptions=False)


@pytest.mark.parametrize("kind", ["held-out", "dataset:fashion-mnist"])
def test_a_run_starts_at_what_was_pretrained(kind: str, small_data: Path, tmp_path: Path):
    first, second = tmp_path / "pretrained", tmp_path / "run"
    settings = (f"public-data={kind}", "public-size=60", "dataset=mnist")
    more = ("--epochs", "2", "--batch-size", "16")
    made = command("pretrain", small_data, first, *more, settings=settings)
    assert made.exit_code == 0
    assert f"60 records of {kind}, 10 classes" in made.output
    assert sorted(path.name for path in first.iterdir()) == ["model.safetensors", "results.json"]
    told = json.loads((first / "results.json").read_text())
    assert told["pretraining"]["held_out"] == (60 if kind == "held-out" else 0)
    assert RunConfig.read(told["config"]).model == "mlp"

    still = ("dataset=mnist", "strategy=fedavg", "local-lr=1e-30", "dataset-args=held_out=60")
    options = ("--init", str(first))
    assert command("simulate", small_data, second, *options, settings=(*RUN, *still)).exit_code == 0
    start, left = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert all(np.array_equal(left[name], start[name]) for name in start)
    seeds_own = model_of(
        RunConfig.read({"dataset": "mnist", "model": "mlp", "model-args": "hidden=16"})
    )
    is_untrained = told["pretraining"]["epoch"] == 0  # no epoch was better than the seed's model
    assert is_untrained == all(
        np.array_equal(left[n], v.numpy()) for n, v in seeds_own.state_dict().items()
    )

    contaminated = ("dataset=mnist", "strategy=fedavg", "dataset-args=held_out=59")
    if kind == "held-out":
        with pytest.raises(ConfigError, match="held_out=60"):
            command("simulate", small_data, second, *options, settings=(*RUN, *contaminated))


def test_the_seed_decides_what_is_pretrained(small_data: Path, tmp_path: Path):
    for name, seed in (("first", 4), ("again", 4), ("other", 5)):
        settings = ("public-data=dataset:kmnist", "public-size=40", "dataset=mnist", f"seed={seed}")
        out = tmp_path / name
        assert (
            command("pretrain", small_data, out, "--epochs", "1", settings=settings).exit_code == 0
        )
    first, again, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again", "other")
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        (("dataset=digits",), (), "no labels to train on"),
        (("dataset=mnist", "public-size=700"), (), "hold out"),
        (("dataset=mnist", "public-data=dataset:kmnist", "public-size=700"), (), "the set has 600"),
        (("dataset=mnist",), ("--epochs", "0"), "epochs = 0"),
        (("dataset=mnist",), ("--lr", "nan"), "lr = nan"),
        (("dataset=mnist", "out=x"), (), ""),
    ],
)
def test_what_cannot_be_pretrained_is_refused(
    settings: tuple[str, ...], more: tuple[str, ...], message: str, small_data: Path, tmp_path: Path
):
    if not message:  # --out wins over the key
        settings = (*settings, "public-size=20")
        assert command("pretrain", small_data, tmp_path, *more, settings=settings).exit_code == 0
        return
    with pytest.raises(MetabloomError) as refused:
        command("pretrain", small_data, tmp_path, *more, settings=settings)
    assert message in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_architectures_are_pretrained_one_at_a_time(small_data: Path, tmp_path: Path):
    words = ["pretrain", "--set", "dataset=mnist", "--set", "architectures=mlp; cnn"]
    with pytest.raises(ConfigError, match="one model is pretrained at a time"):
        CliRunner().invoke(app, [*words, "--out", str(tmp_path)], catch_exceptions=False)


def test_the_commands_of_the_page_run(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METABLOOM_DATA", str(small_data))
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line]
    assert len(commands) >= 2
    small = ["--set", "num-clients=6", "--set", "rounds=1", "--set", "public-size=40"]
    for line in commands:
        name, *words = shlex.split(line)
        assert name == "metabloom"
        result = CliRunner().invoke(app, [*words, *small], catch_exceptions=False)
        assert result.exit_code == 0, result.output
