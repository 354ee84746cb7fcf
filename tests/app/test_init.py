"""Runs that start at trained weights: what fits, what does not, and what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from metabloom import init
from metabloom.cli import app
from metabloom.config import RunConfig
from metabloom.errors import ConfigError
from metabloom.init import Fit, fitted
from metabloom.task import model_of, models_of
from metabloom.task import started as started_of
from metabloom.wire import NamedArrays

SMALL = ("num-clients=10", "clients-per-round=3", "rounds=2", "eval-every=1", "device=cpu")


def arrays_of(config: RunConfig) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model_of(config).state_dict().items()}


def simulate(out: Path, *settings: str, options: tuple[str, ...] = ()) -> Result:
    words = [word for setting in (*SMALL, *settings) for word in ("--set", setting)]
    return CliRunner().invoke(
        app,
        ["simulate", *words, *options, "--out", str(out)],
        env={"COLUMNS": "300"},
        catch_exceptions=False,
    )


def write(file: Path, arrays: Mapping[str, np.ndarray], told: dict | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(arrays), file)
    if told is not None:
        file.with_name("results.json").write_text(json.dumps(told))
    return file


# --- what fits ------------------------------------------------------------------------------------


def fits_by_name_and_shape(fitted) -> None:
    initial = {
        "body": np.zeros((2, 3), np.float32),
        "half": np.zeros(2, np.float16),
        "head": np.zeros((5, 2), np.float32),
        "own": np.full(3, 7.0),
        "count": np.array(0),
    }
    weights = {
        "body": np.arange(6.0).reshape(2, 3),  # float64
        "half": np.array([1, 2], np.float32),
        "head": np.ones((10, 2), np.float32),
        "count": np.array(4),
        "other": np.ones(2),
    }
    before = {name: value.copy() for name, value in initial.items()}
    found, fit = fitted("x", initial, {"": weights})
    assert list(found) == list(initial)
    assert all(found[n].dtype == initial[n].dtype for n in initial)
    np.testing.assert_array_equal(found["body"], weights["body"])
    np.testing.assert_array_equal(found["half"], weights["half"])
    assert found["count"] == 4
    for name in ("head", "own"):
        np.testing.assert_array_equal(found[name], before[name])
    for name, value in before.items():  # nothing is written into what came in
        np.testing.assert_array_equal(initial[name], value)
    assert fit.loaded == ("body", "half", "count")
    assert fit.missing == ("own",)
    assert fit.misshapen == (("head", (5, 2), (10, 2)),)
    assert fit.unused == ("other",)
    assert not fit.is_whole


def test_arrays_are_taken_by_name_and_shape_in_the_dtypes_of_the_model():
    fits_by_name_and_shape(fitted)


def _by_size(origin: str, initial: NamedArrays, weights: Mapping[str, NamedArrays]):
    """Take what has as many values, whatever its shape."""
    grown = {
        n: v.reshape(-1)[:10].reshape(5, 2) if v.size == 20 else v for n, v in weights[""].items()
    }
    return fitted(origin, initial, {"": grown})


def _as_they_come(origin: str, initial: NamedArrays, weights: Mapping[str, NamedArrays]):
    found, fit = fitted(origin, initial, weights)
    return {
        name: weights[""].get(name, v) if name in fit.loaded else v for name, v in found.items()
    }, fit


def _in_place(origin: str, initial: NamedArrays, weights: Mapping[str, NamedArrays]):
    found, fit = fitted(origin, initial, weights)
    for name in fit.loaded:
        initial[name][...] = found[name]
    return found, fit


@pytest.mark.parametrize("wrong", [_by_size, _as_they_come, _in_place])
def test_a_wrong_way_to_take_them_is_found(wrong):
    with pytest.raises(AssertionError):
        fits_by_name_and_shape(wrong)


def test_each_architecture_takes_its_own_or_all_the_same():
    initial = {"small/w": np.zeros(2), "large/w": np.zeros(3), "large/v": np.zeros(2)}
    kinds = ("small", "large")
    own = {"small": {"w": np.ones(2)}, "large": {"w": np.full(3, 2.0)}}
    found, fit = fitted("x", initial, own, kinds)
    assert (found["small/w"][0], found["large/w"][0], found["large/v"][0]) == (1.0, 2.0, 0.0)
    assert fit.missing == ("large/v",)
    found, fit = fitted("x", initial, {"": {"w": np.ones(2), "v": np.ones(2)}}, kinds)
    assert fit.loaded == ("small/w", "large/v")
    assert fit.misshapen == (("large/w", (3,), (2,)),)
    assert fit.unused == ("small/v",)


def test_a_line_and_the_data_tell_what_did_not_fit():
    fit = Fit("f", ("a", "b"), ("m",), (("head", (5, 2), (10, 2)),), tuple("uvwxy"))
    assert str(fit) == (
        "init = f: 2 of 4 arrays loaded; another shape: head (5, 2) here, (10, 2) there; not in "
        "these weights: m; not in this model: u, v, w and 2 more"
    )
    assert str(Fit("f", ("a",))) == "init = f: 1 of 1 arrays loaded"
    assert json.loads(json.dumps(fit.data))["misshapen"] == [
        {"array": "head", "model": [5, 2], "weights": [10, 2]}
    ]


def test_weights_that_fit_nothing_or_are_not_finite_are_refused():
    initial = {"w": np.zeros(2, np.float32)}
    with pytest.raises(ConfigError, match=r"0 of 1 arrays loaded.*none fits"):
        fitted("x", initial, {"": {"other": np.ones(2)}})
    with pytest.raises(ConfigError, match="'w' holds NaN or infinity"):
        fitted("x", initial, {"": {"w": np.array([1.0, np.inf])}})


# --- where they come from -------------------------------------------------------------------------


def test_a_run_starts_at_the_model_that_an_earlier_one_left(tmp_path: Path):
    assert simulate(tmp_path / "first", "strategy=fedavg").exit_code == 0
    trained = load_file(tmp_path / "first" / "model.safetensors")
    config = RunConfig.read({"init": str(tmp_path / "first")})
    found, fit = started_of(config, arrays_of(config))
    assert fit.is_whole
    assert {n: v.tobytes() for n, v in found.items()} == {
        n: v.tobytes() for n, v in trained.items()
    }

    # A rate that moves nothing shows where it started.
    still = ("strategy=fedavg", "local-lr=1e-30")
    options = ("--init", str(tmp_path / "first"))
    assert simulate(tmp_path / "second", *still, options=options).exit_code == 0
    left = load_file(tmp_path / "second" / "model.safetensors")
    assert all(np.array_equal(left[name], trained[name]) for name in trained)
    results = json.loads((tmp_path / "second" / "results.json").read_text())
    assert results["init"]["from"] == str(tmp_path / "first")
    assert results["init"]["loaded"] == list(arrays_of(config))
    assert results["config"]["init"] == str(tmp_path / "first")


def test_a_head_of_other_classes_stays_as_the_seed_makes_it_and_the_run_says_so(tmp_path: Path):
    ten = RunConfig.read({"dataset-args": "ways=10"})
    file = write(tmp_path / "w.safetensors", arrays_of(ten))
    result = simulate(tmp_path / "out", "strategy=fedavg", f"init={file}")
    assert result.exit_code == 0
    assert "of 4 arrays loaded; another shape: " in result.output.replace("\n", "")
    five = RunConfig.read({"init": str(file)})
    found, fit = started_of(five, arrays_of(five))
    assert [len(fit.loaded), len(fit.misshapen)] == [2, 2]
    for name, _, _ in fit.misshapen:
        np.testing.assert_array_equal(found[name], arrays_of(five)[name])


def test_architectures_start_at_the_files_of_theirs(tmp_path: Path):
    kinds = "architectures=small: mlp hidden=8; large: mlp hidden=16"
    assert (
        simulate(tmp_path / "first", kinds, "strategy=fedavg", "clients-per-round=8").exit_code == 0
    )
    config = RunConfig.read(
        {"architectures": kinds.partition("=")[2], "init": str(tmp_path / "first")}
    )
    initial = {
        f"{kind}/{name}": value.numpy()
        for kind, model in models_of(config).items()
        for name, value in model.state_dict().items()
    }
    found, fit = started_of(config, initial)
    assert fit.is_whole
    for kind in ("small", "large"):
        own = load_file(tmp_path / "first" / f"model-{kind}.safetensors")
        assert all(np.array_equal(found[f"{kind}/{name}"], own[name]) for name in own)
    one = RunConfig.read({"model-args": "hidden=8", "init": str(tmp_path / "first")})
    with pytest.raises(ConfigError, match=r"several models \(model-large.*model-small"):
        started_of(one, arrays_of(one))
    file = tmp_path / "first" / "model-small.safetensors"
    one = RunConfig.read({"model-args": "hidden=8", "init": str(file)})
    assert started_of(one, arrays_of(one))[1].is_whole


def test_without_init_nothing_is_read_and_nothing_said(tmp_path: Path):
    config = RunConfig.read({})
    initial = arrays_of(config)
    found, fit = started_of(config, initial)
    assert fit is None
    assert all(found[name] is initial[name] for name in initial)


def test_a_resumed_run_goes_on_as_if_nothing_had_been(tmp_path: Path):
    file = write(tmp_path / "w.safetensors", arrays_of(RunConfig.read({"seed": 5})))
    settings = ("strategy=fedavg", f"init={file}")
    assert simulate(tmp_path / "whole", *settings, "rounds=4").exit_code == 0
    assert simulate(tmp_path / "halves", *settings).exit_code == 0
    assert simulate(tmp_path / "halves", *settings, "rounds=4", "resume=true").exit_code == 0
    whole, halves = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "halves")
    )
    assert whole == halves
    with pytest.raises(ConfigError, match=r"checkpoint has init = '.*w\.safetensors', this run ''"):
        simulate(tmp_path / "halves", "strategy=fedavg", "rounds=5", "resume=true")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "there is no such file or folder; name a results folder"),
        (lambda root: root.mkdir(), "holds no model.safetensors"),
        (lambda root: root.write_bytes(b"not safetensors"), "cannot be read as safetensors"),
        (lambda root: write(root / "model.safetensors", {"x": np.ones(2)}), "none fits"),
    ],
)
def test_weights_that_cannot_be_had_are_named(make, message: str, tmp_path: Path):
    make(tmp_path / "there")
    config = RunConfig.read({"init": str(tmp_path / "there")})
    with pytest.raises(ConfigError) as refused:
        started_of(config, arrays_of(config))
    assert message in str(refused.value)
    assert "there" in str(refused.value)


def test_a_record_of_training_that_cannot_be_read_is_named(tmp_path: Path):
    config = RunConfig.read({"init": str(tmp_path)})
    write(tmp_path / "model.safetensors", arrays_of(config))
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ConfigError, match=r"results\.json' does not say how"):
        started_of(config, arrays_of(config))


# --- what must not be learnt from -----------------------------------------------------------------


def public(dataset: str, held_out: int = 0, seed: int = 0) -> dict:
    return {"pretraining": {"dataset": dataset, "held_out": held_out, "seed": seed}}


@pytest.mark.parametrize(
    ("told", "dataset", "held_out", "message"),
    [
        (public("mnist"), "mnist", 0, "which the clients of 'mnist' hold"),
        (public("mnist"), "mnist-writers", 0, "which the clients of 'mnist-writers' hold"),
        (public("mnist", 50), "mnist-writers", 0, "which the clients of 'mnist-writers' hold"),
        (public("mnist", 50), "mnist", 0, "set seed=0 and dataset-args='held_out=50'"),
        (public("mnist", 50), "mnist", 49, "holds out 49"),
        (public("mnist", 50, seed=1), "mnist", 50, "set seed=1"),
        (public("mnist", 50), "mnist", 50, ""),
        (public("mnist", 50), "mnist", 60, ""),
        (public("fashion-mnist"), "mnist", 0, ""),
        ({}, "mnist", 0, ""),
        ({"config": {"dataset": "mnist"}}, "mnist", 0, ""),
    ],
)
def test_clients_whose_records_were_trained_on_in_public_are_refused(
    told: dict, dataset: str, held_out: int, message: str
):
    config = RunConfig.read({"dataset": dataset, "init": "there"})
    if not message:
        init.check_apart(config, told, held_out)
        return
    with pytest.raises(ConfigError) as refused:
        init.check_apart(config, told, held_out)
    assert message in str(refused.value)


PRIVATE = {"privacy.noise-multiplier": 1.0}
USERS = {"user-privacy.noise-multiplier": 1.0}


@pytest.mark.parametrize(
    ("keys", "told", "is_refused"),
    [
        (PRIVATE, None, True),
        (PRIVATE, {"config": {}}, True),
        (PRIVATE, {"config": USERS}, True),
        (USERS, {"config": PRIVATE}, True),
        (PRIVATE, {"config": PRIVATE}, False),
        (USERS, {"config": USERS}, False),
        (PRIVATE | {"init-is-public": True}, None, False),
        (PRIVATE, public("kmnist"), False),
        ({}, None, False),
    ],
)
def test_private_clients_start_at_no_model_that_others_records_taught(
    keys: dict, told: dict | None, is_refused: bool, tmp_path: Path
):
    config = RunConfig.read({**keys, "init": str(tmp_path)})
    write(tmp_path / "model.safetensors", arrays_of(config), told)
    if is_refused:
        with pytest.raises(ConfigError, match=r"privacy\.noise-multiplier.*init-is-public = true"):
            started_of(config, arrays_of(config))
    else:
        assert started_of(config, arrays_of(config))[1].is_whole
