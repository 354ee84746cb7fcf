"""The benchmark of pretrained starts at tiny scale: its images, its choice, what it says."""

import copy
import importlib
import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from metabloom.config import RunConfig
from metabloom.errors import ConfigError
from metabloom.models import MODELS, build_model
from metabloom.sim import DATASETS
from metabloom.sim.datasets.label_skew import VISION_SETS
from metabloom.sim.public_sources import load_labelled
from metabloom.task import _import_plugins, federation_of, spec_of

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
HELD_OUT = "1,000 held-out MNIST images"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script; what it registers and sets is put back."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    importlib.import_module("distillation_data")
    yield importlib.import_module("pretrained")
    torch.set_num_threads(threads)
    for registry in (VISION_SETS, DATASETS, MODELS):
        for name in [name for name in registry if name.startswith("bench-")]:
            del registry._entries[name]
    for name in [name for name in sys.modules if name.startswith("distillation")]:
        del sys.modules[name]
    for name in ("pretrained", "groups"):
        del sys.modules[name]
    _import_plugins.cache_clear()  # another test imports them anew


def names(rows: list[dict]) -> list[str]:
    """Return the starts in their order; one has two rows where two rates were chosen."""
    return list(dict.fromkeys(one["start"] for one in rows))


def row(script: ModuleType, name: str, *curves: list[float]) -> dict:
    own = {"start": name, "chosen by": script.END, "rate": 0.1}
    return {**own, "tries": {}, "curves": curves, "seconds": 1.0}


def test_no_client_holds_an_image_that_a_start_has_seen(script: ModuleType, small_data: Path):
    keys = {**script.FEDERATION, **script.QUICK, "data-root": str(small_data), "seed": 3}
    config = RunConfig.read(keys)
    size, name = script.QUICK_IMAGES, config.dataset
    public, _, _ = load_labelled(
        "held-out", spec_of(config), size=size, seed=3, dataset=name, root=small_data
    )
    seen = {image.numpy().tobytes() for image in public.inputs}
    assert len(seen) == size
    federation = federation_of(config)
    assert {"train", "validation", "unseen"} == set(federation.roles)
    for index in range(len(federation)):
        held = {image.numpy().tobytes() for image in federation.client(index).all[0]}
        assert held
        assert not held & seen


def test_a_start_of_another_seed_is_refused_as_the_clients_hold_its_images(
    script: ModuleType, small_data: Path, tmp_path: Path
):
    bench = script.Bench(small_data, tmp_path, quick=True)
    init = bench.start(script.STARTS[HELD_OUT], 1)
    with pytest.raises(ConfigError, match="its clients have some of them"):
        bench.curve(init, 0.1, 2, "unseen")


def test_a_curve_begins_at_the_start_and_is_that_of_the_role(
    script: ModuleType, small_data: Path, tmp_path: Path
):
    bench = script.Bench(small_data, tmp_path, quick=True)
    init = bench.start(script.STARTS[HELD_OUT], 1)
    told = json.loads((Path(init) / "results.json").read_text())
    assert told["pretraining"]["held_out"] == script.QUICK_IMAGES
    keys = {**script.FEDERATION, **script.QUICK, "data-root": str(small_data), "seed": 1}
    federation = federation_of(RunConfig.read(keys))
    begin = build_model("mlp", input_shape=(1, 28, 28), num_classes=10, seed=1, hidden=64)
    models = {"": begin, init: copy.deepcopy(begin)}
    models[init].load_state_dict(load_file(Path(init) / "model.safetensors"))
    for role, where in product(("validation", "unseen"), models):
        curve = bench.curve(where, 1e-12, 1, role)  # a rate that moves nothing
        inputs, targets = federation.client(federation.indices(role)[0]).query
        right = (models[where](inputs).argmax(1) == targets).double().mean().item()
        assert curve == [pytest.approx(right, abs=1e-9)] * (script.QUICK["rounds"] + 1)


class Told:
    """Stands for a bench: tells what it is asked for."""

    def __init__(self, rates: tuple[float, ...]) -> None:
        self.rates = rates
        self.asked: list[tuple[str, float, int, str]] = []

    def start(self, how, seed):
        return f"start-{seed}"

    def curve(self, init, rate, seed, role):
        self.asked.append((init, rate, seed, role))
        # Best in the last rounds at 0.2, up to half of them at 0.8.
        return [0.0, *[rate] * 20, *[1 - abs(rate - 0.2)] * 20]


def test_every_start_has_as_many_tries_on_validation_with_the_tuning_seed(script: ModuleType):
    bench = Told(script.RATES)
    end, half = script.measured(bench, "x", {"any": 1})
    assert (end["rate"], end["chosen by"]) == (0.2, "the end")
    assert (half["rate"], half["chosen by"]) == (0.8, "half")
    tried, shown = bench.asked[: len(script.RATES)], bench.asked[len(script.RATES) :]
    assert tried == [("start-0", rate, 0, "validation") for rate in script.RATES]
    assert shown == [
        (f"start-{seed}", rate, seed, "unseen") for rate in (0.2, 0.8) for seed in script.SEEDS
    ]
    assert script.TUNING_SEED not in script.SEEDS
    (random,) = script.measured(Told(script.RATES), script.RANDOM, None)
    assert random["rate"] == 0.2


def test_the_bar_is_half_the_rounds_with_each_seed_against_its_own_random_start(
    script: ModuleType,
):
    slow = [n / 40 for n in range(41)]  # ends at 0.95, the mean of 0.9 to 1
    low = [n / 80 for n in range(41)]  # at 0.475
    rows = [
        row(script, script.RANDOM, slow, low),
        row(script, "good", [0.0] * 20 + [0.95] * 21, [0.5] * 41),
        row(script, "late", [0.0] * 21 + [0.95] * 20, [0.5] * 41),
        row(script, "bad", [0.9] * 41, [0.5] * 41),
    ]
    assert script.rounds_of(rows) == [[38, 38], [20, 0], [21, 0], [None, 0]]
    lines = script.page_of(rows).splitlines()
    for said in (
        "| 38, 38 | - | 0.1, the end | - |",
        "| 20, 0 | reached | 0.1, the end | 1.0 |",
        "| 21, 0 | MISSED | 0.1, the end | 1.0 |",
        "| never, 0 | MISSED | 0.1, the end | 1.0 |",
    ):
        assert sum(line.endswith(said) for line in lines) == 1


def test_the_whole_script_runs(script: ModuleType, small_data: Path, tmp_path: Path):
    script.main(small_data, tmp_path, quick=True)
    rows = json.loads((tmp_path / "pretrained.json").read_text())
    assert names(rows) == [script.RANDOM, *script.STARTS]
    for one in rows:
        assert [len(curve) for curve in one["curves"]] == [script.QUICK["rounds"] + 1] * 3
        assert np.isfinite(one["curves"]).all()
    assert (tmp_path / "pretrained.md").read_text() == script.page_of(rows)


def test_the_page_that_is_kept_is_that_of_its_figures(script: ModuleType):
    folder = FOLDER / "results"
    rows = json.loads((folder / "pretrained.json").read_text())
    assert names(rows) == [script.RANDOM, *script.STARTS]
    *page, _ = script.page_of(rows).splitlines()  # but the versions of packages
    assert page == (folder / "pretrained.md").read_text().splitlines()[:-1]
