"""The benchmark of distillation at tiny scale: its data, its choice, its scores and its page."""

import importlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from metabloom.config import RunConfig
from metabloom.errors import DataError, MissingDataError
from metabloom.models import MODELS, build_model, check_model
from metabloom.sim import DATASETS, load_federation
from metabloom.sim.datasets.label_skew import VISION_SETS
from metabloom.strategies import STRATEGIES
from metabloom.task import public_of

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SIZES = {"limit": 120, "proof": 40, "reserve": 60, "least": 1}
TINY = " ".join(f"{key}={value}" for key, value in SIZES.items())


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)  # as they are when one of them is started


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """Put back what a run sets for its own process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def registries_as_before() -> Iterator[None]:
    """Take what the benchmark's plug-in registers out again: other tests count the names."""
    yield
    for registry in (VISION_SETS, DATASETS, MODELS):
        for name in [name for name in registry if name.startswith("bench-")]:
            del registry._entries[name]
    for module in [name for name in sys.modules if name.startswith("distillation")]:
        del sys.modules[module]


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def skewed(small_data: Path, **options: object) -> object:
    script("distillation_data")
    usual = {**SIZES, "judges": 2, "num_clients": 8}
    return load_federation("bench-mnist", root=small_data, **{**usual, **options})


def rows_of(inputs: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in inputs}


def settings_of(strategy: str, **keys: object) -> dict:
    usual = {
        "dataset": "bench-mnist",
        "dataset-args": TINY,
        "num-clients": 10,
        "clients-per-round": 4,
        "rounds": 2,
        "architectures": "small: mlp hidden=4; large: mlp hidden=8",
        "eval-every": 1,
    }
    return {**usual, "strategy": strategy, **{k.replace("_", "-"): v for k, v in keys.items()}}


def test_private_validation_test_and_public_images_are_apart(small_data: Path) -> None:
    federation = skewed(small_data)
    assert federation.counts() == {"train": 4, "validation": 2, "unseen": 2}
    train = [rows_of(federation.client(i).all[0]) for i in federation.indices("train")]
    private = set.union(*train)
    assert len(private) == sum(map(len, train)) == 120
    first, second = (federation.client(i).all for i in federation.indices("validation"))
    assert torch.equal(first[0], second[0])
    assert len(rows_of(first[0])) == 40
    tests = [federation.client(i) for i in federation.indices("unseen")]
    assert [len(one.query[1]) for one in tests] == [9, 9]  # 10, one of which is the support
    keys = {"dataset": "bench-mnist", "data-root": str(small_data), "public-size": 60}
    public = rows_of(public_of(RunConfig.read({**keys, "strategy": "feddf"})).inputs)
    assert len(public) == 60
    for one, other in (
        (private, public),
        (private, rows_of(first[0])),
        (public, rows_of(first[0])),
        (private | public, rows_of(tests[0].all[0])),
    ):
        assert not one & other


def test_private_images_are_the_same_whatever_is_public_and_pooled_clients_have_all(
    small_data: Path,
) -> None:
    usual = skewed(small_data)
    fewer = skewed(small_data, held_out=20)
    assert torch.equal(usual.client(0).all[0], fewer.client(0).all[0])
    own = [rows_of(usual.client(i).all[0]) for i in usual.indices("train")]
    pooled = skewed(small_data, pooled=1)
    for index in pooled.indices("train"):
        assert rows_of(pooled.client(index).all[0]) == set.union(*own)
    assert torch.equal(usual.client(7).all[0], pooled.client(7).all[0])


def test_a_federation_that_cannot_be_is_refused(small_data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one client has to train"):
        skewed(small_data, judges=4)
    with pytest.raises(DataError, match="images are needed for validation"):
        skewed(small_data, limit=600)
    with pytest.raises(MissingDataError, match="download=true"):
        skewed(tmp_path)


def test_parts_are_a_division_of_the_rows_and_the_skew_is_that_of_alpha(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = script("distillation_data")
    divided = data.divided
    labels = np.repeat(np.arange(10), 100)
    shares = {}
    for alpha in (0.05, 100.0):
        parts = divided(labels, 5, alpha, 10, np.random.default_rng(0))
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
        assert min(map(len, parts)) >= 10
        counts = np.array([np.bincount(labels[part], minlength=10) for part in parts])
        shares[alpha] = counts.max(axis=0) / 100  # of each class, what its largest holder has
    assert shares[100.0].max() < 0.35  # a fifth each, nearly
    assert shares[0.05].mean() > 0.7
    monkeypatch.setattr(data, "TRIES", 10)
    with pytest.raises(DataError, match="fewer than least = 201"):
        divided(labels, 5, 100.0, 201, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "width", "parameters"),
    [("CNN", 4, 6858), ("CNN", 8, 26826), ("RESNET", 4, 4854), ("RESNET", 8, 18658)],
)
def test_the_small_nets_can_be_trained_by_any_client(
    name: str, width: int, parameters: int
) -> None:
    chosen = getattr(script("distillation_models"), name)
    model = build_model(chosen, input_shape=(1, 28, 28), num_classes=10, seed=0, width=width)
    check_model(model, input_shape=(1, 28, 28), num_classes=10)
    assert sum(value.numel() for value in model.parameters()) == parameters


def test_every_method_of_a_comparison_has_as_many_tries() -> None:
    feddf, logits = script("distillation_feddf"), script("distillation_logits")
    teachers, grid_of = script("distillation_teachers"), script("distillation_runs").grid_of
    taught = {"": teachers.taught_by({"strategy": "fedavg"}, teachers.SKEWED, {})}
    for methods in (feddf._methods("mnist"), logits.few_methods(), logits.many_methods(), taught):
        assert {len(grid_of(method)) for method in methods.values()} == {4}


def test_a_point_that_failed_is_the_worst_and_not_the_end() -> None:
    runs = script("distillation_runs")

    class Stub(runs.Runs):
        def submit(self, settings: dict, seed: int) -> Future:
            future: Future = Future()
            if settings["local-lr"] in self.bad:
                future.set_exception(RuntimeError("it diverged"))
            else:
                future.set_result({"settings": settings})
            return future

    stub = Stub.__new__(Stub)
    stub.bad = {0.3}
    method = {"m": {"local-lr": (0.3, 0.1)}}
    assert stub.chosen(method, lambda found: found["settings"]["local-lr"]) == {
        "m": {"local-lr": 0.1}
    }
    stub.bad = {0.3, 0.1}
    with pytest.raises(RuntimeError, match="diverged"):
        stub.chosen(method)


def test_settings_are_chosen_by_validation_alone() -> None:
    runs = script("distillation_runs")

    class Stub(runs.Runs):
        def __init__(self) -> None:
            self.seeds: set[int] = set()

        def submit(self, settings: dict, seed: int) -> Future:
            self.seeds.add(seed)
            level = settings["local-lr"]
            curve = [0.0, *[level] * 5] if settings["kind"] == "global" else [0.0]
            future: Future = Future()
            future.set_result(
                {
                    "settings": settings,
                    "validation": {"a": curve, "b": curve},
                    "unseen": {"a": 1 - level},
                    "personal": {"x": {"validation": 1 - level, "unseen": level}},
                }
            )
            return future

    stub = Stub()
    methods = {kind: {"kind": kind, "local-lr": (0.1, 0.5, 0.2)} for kind in ("global", "own")}
    better = {"global": runs.quality, "own": runs.personal_quality}
    chosen = stub.chosen(methods, better)
    assert chosen["global"]["local-lr"] == 0.5
    assert chosen["own"]["local-lr"] == 0.1
    assert stub.seeds == {runs.TUNING_SEED}
    assert runs.quality({"validation": {"a": [0.9, *[0.5] * 5], "b": [0.7] * 5}}) == pytest.approx(
        0.6
    )


def test_a_run_is_scored_as_its_files_say_and_is_kept(small_data: Path, tmp_path: Path) -> None:
    runs = script("distillation_runs")
    settings = settings_of("fedavg")
    found = runs.run_job(settings, 3, str(small_data), str(tmp_path))
    folder = tmp_path / runs.name_of(settings, 3)
    test = load_federation("bench-mnist", root=small_data, seed=3, num_clients=10, **SIZES)
    inputs, targets = test.client(test.indices("unseen")[0]).query
    for name, hidden in (("small", 4), ("large", 8)):
        model = build_model("mlp", input_shape=(1, 28, 28), num_classes=10, seed=0, hidden=hidden)
        model.load_state_dict(load_file(folder / f"model-{name}.safetensors"))
        right = (model(inputs).argmax(1) == targets).double().mean().item()
        assert found["unseen"][name] == pytest.approx(right, abs=1e-12)
        assert len(found["validation"][name]) == 2
    weights = 4 * (785 * 4 + 50 + 785 * 8 + 90)  # bytes of both models
    assert found["parameters"] == {"small": 785 * 4 + 50, "large": 785 * 8 + 90}
    headers = 4 * 128  # of the .npy form in which each of a model's four arrays travels
    assert found["bytes_up"] == [2 * weights + 4 * headers] * 2  # two clients have either
    kept = folder / "found.json"
    kept.write_text(kept.read_text().replace('"seed": 3', '"seed": 99'))
    assert runs.run_job(settings, 3, str(small_data), str(tmp_path))["seed"] == 99
    assert runs.name_of(settings, 4) != runs.name_of(settings, 3) != runs.name_of({}, 3)


def test_personal_models_are_those_of_each_client_alone(small_data: Path, tmp_path: Path) -> None:
    runs = script("distillation_runs")
    settings = settings_of(
        "ditto",
        ditto_lambda=0.0,
        eval_every=0,
        checkpoint_every=2,
        architectures="",
        model="mlp",
        model_args="hidden=4",
        local_lr=0.5,
    )
    found = runs.run_job(settings, 0, str(small_data), str(tmp_path))
    federation = load_federation("bench-mnist", root=small_data, num_clients=10, **SIZES)
    inputs, targets = federation.client(federation.indices("validation")[0]).query
    assert len(found["personal"]) == 4
    for index in federation.indices("train"):
        model = build_model("mlp", input_shape=(1, 28, 28), num_classes=10, seed=0, hidden=4)
        step = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(2):  # one full batch in each round
            step.zero_grad()
            own = federation.client(index).all
            torch.nn.functional.cross_entropy(model(own[0]), own[1]).backward()
            step.step()
        right = (model(inputs).argmax(1) == targets).double().mean().item()
        # One image of 39: rounding may turn one that is undecided.
        scored = found["personal"][federation.client_ids[index]]["validation"]
        assert scored == pytest.approx(right, abs=1 / 39 + 1e-9)
    assert not (tmp_path / runs.name_of(settings, 0) / "clients").exists()


def test_a_run_with_a_client_that_failed_gives_no_figure(small_data: Path, tmp_path: Path) -> None:
    runs = script("distillation_runs")
    one_model = {"architectures": "", "model": "mlp"}
    settings = settings_of("fedavg", max_share=0.3, **one_model)  # the largest has more
    with pytest.raises(RuntimeError, match=r"seed 0: .*train-\d\d.*of the total, above 30"):
        runs.run_job(settings, 0, str(small_data), str(tmp_path))
    assert not list(tmp_path.glob("*/found.json"))


def test_a_student_waits_for_its_teacher(small_data: Path, tmp_path: Path) -> None:
    runs = script("distillation_runs")
    settings = settings_of("fedavg", teacher=settings_of("fedavg"))
    with pytest.raises(RuntimeError, match="its teacher has not been trained"):
        runs.run_job(settings, 0, str(small_data), str(tmp_path))


def line(what: str, accuracy: list[float], **others: object) -> object:
    page = script("distillation_page")
    return page.Line(what, {"cnn": accuracy}, **others)


def test_the_page_tells_means_spreads_choices_and_verdicts() -> None:
    page = script("distillation_page")
    settings, grid = {"local-lr": 0.1, "rounds": 20}, {"local-lr": (0.03, 0.1)}
    one = line("FedDF", [0.7, 0.72, 0.74], settings=settings, grid=grid, seconds=[60.0, 62.0])
    other = line("FedAvg", [0.5, 0.5, 0.5], figures={"MB up": [1.5, 2.5]})
    verdicts = [
        page.minus("FedDF minus FedAvg", one, other, bar=10.0),
        page.minus("FedAvg minus FedDF", other, one, bar=10.0, note="It loses."),
        page.minus("shown", one, other),
    ]
    machine = importlib.import_module("engine_turns").machine()
    rows = {
        "public": {
            "machine": machine,
            "lines": [one.as_json(), other.as_json()],
            "verdicts": [verdict.as_json() for verdict in verdicts],
        }
    }
    text = page.page_of(rows, {"feddf": ("Not there", ""), "public": ("Which", "About it.")})
    assert "## Which\n\n`--rows public`." in text
    assert "Not there" not in text
    assert "| FedDF | 72.0 ± 2.0 | - | 61 | 3 | local-lr 0.1 of {0.03, 0.1} |" in text
    assert "| FedAvg | 50.0 ± 0.0 | 2.0 ± 0.7 | - | 3 |  |" in text
    assert "- FedDF minus FedAvg: cnn 22.0 ± 2.0 points. At least 10 wanted: reached." in text
    assert "cnn -22.0 ± 2.0 points. At least 10 wanted: MISSED. It loses." in text
    assert "- shown: cnn 22.0 ± 2.0 points.\n" in text


def test_a_verdict_needs_every_column() -> None:
    page = script("distillation_page")
    assert page.Verdict("x", {"a": [12.0, 8.0], "b": [10.0]}, bar=10.0).said == "reached"
    assert page.Verdict("x", {"a": [30.0], "b": [9.9]}, bar=10.0).said == "MISSED"
    assert page.Verdict("x", {"a": [30.0]}).said == ""


def test_bytes_saved_and_bytes_until_as_good_are_counted_both_ways() -> None:
    page, logits = script("distillation_page"), script("distillation_logits")

    def of(what: str, accuracy: float, megabytes: float) -> object:
        figures = {"MB up": [megabytes], "MB down": [3 * megabytes]}
        return page.Line(what, {"accuracy": [accuracy]}, figures)

    few, many = of("DS-FL", 0.8, 1.0), of("FedAvg", 0.9, 25.0)
    verdict = logits.saved(few, many, 95.0)
    assert verdict.figures == {"": [96.0]}
    assert verdict.said == "reached"
    curve = {"validation": {"": [0.1, 0.5, 0.8, 0.85, 0.9]}}
    until = logits.until_as_good(few, many, [curve])
    assert until.figures[""] == [pytest.approx(25 * 3 / 5)]
    assert "takes: 3." in until.note
    assert "never in 5" in logits.until_as_good(of("best", 0.95, 1.0), many, [curve]).note


def test_a_line_is_written_beside_those_that_are_there_and_replaces_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark, page = script("distillation"), script("distillation_page")
    for value in (0.5, 0.6):
        made = [line("one", [value]), page.Verdict("better", {"": [value]}, bar=0.55)]
        monkeypatch.setitem(benchmark.ROWS, "feddf", lambda _, made=made: iter(made))
        benchmark.measure(["feddf"], None, tmp_path)
    monkeypatch.setitem(benchmark.ROWS, "feddf", lambda _: iter([line("two", [0.1])]))
    monkeypatch.setitem(benchmark.ROWS, "public", lambda _: iter([line("three", [0.2])]))
    benchmark.measure(["feddf", "public"], None, tmp_path)
    known = json.loads((tmp_path / "distillation.json").read_text())
    assert [one["what"] for one in known["feddf"]["lines"]] == ["one", "two"]
    assert known["feddf"]["lines"][0]["accuracy"] == {"cnn": [0.6]}
    assert known["feddf"]["verdicts"][0]["verdict"] == "reached"
    assert "| three | 20.0 |" in (tmp_path / "distillation.md").read_text()


NEEDED = {
    "feddf": {"feddf"},
    "feddf-one": {"feddf"},
    "public": {"feddf"},
    "logits": {"fedmd", "ds-fl"},
    "bytes": {"ds-fl", "fedkd"},
    "teacher": {"teacher-student"},
    "meta-teacher": {"meta-teacher"},
}


@pytest.mark.parametrize("row", NEEDED)
def test_every_row_runs_at_tiny_scale(row: str, small_data: Path, tmp_path: Path) -> None:
    assert NEEDED[row] <= set(STRATEGIES)
    script("distillation").main(
        rows=row, data_root=small_data, work=tmp_path / "work", out=tmp_path / "out", quick=True
    )
    known = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert list(known) == [row]
    assert known[row]["lines"]
    assert known[row]["verdicts"]
