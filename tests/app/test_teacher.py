"""The key ``teacher``: which files it takes, what it refuses, and two runs, one after the other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from metabloom.config import RunConfig
from metabloom.errors import ConfigError
from metabloom.server_app import run
from metabloom.simulation import as_carried_out, cohort_grid
from metabloom.task import idle_keys, model_of
from metabloom.teacher import Teacher, digest_of, teacher_config, teacher_of

ARRAYS = {
    "0.weight": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "0.bias": np.zeros(3, np.float32),
}
TOLD = {"dataset": "digits", "model": "", "model-args": "", "inner-lr": 0.3, "architectures": ""}


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3))


def written(folder: Path, arrays=ARRAYS, told=TOLD, name: str = "model") -> Path:
    """Write what is looked at of a results folder."""
    folder.mkdir(exist_ok=True)
    save_file(arrays, folder / f"{name}.safetensors")
    if told is not None:
        (folder / "results.json").write_text(json.dumps({"config": told}))
    return folder


def config(place: Path | str, **keys) -> RunConfig:
    hyphenated = {key.replace("_", "-"): value for key, value in keys.items()}
    values = {"strategy": "teacher-student", "teacher": str(place), **hyphenated}
    return RunConfig.read(values)


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["folder", "file"])
def test_a_results_folder_or_a_file_in_it_is_read_with_what_its_run_says(of: str, tmp_path: Path):
    place = written(tmp_path / "large")
    found = teacher_of(config(place if of == "folder" else place / "model.safetensors"), module())
    assert list(found.arrays) == list(ARRAYS)
    assert all(np.array_equal(found.arrays[name], value) for name, value in ARRAYS.items())
    assert (found.was_private, found.is_public, found.inner_lr) == (False, False, 0.3)
    assert not found.may_teach_private_clients


def test_weights_are_those_of_the_model_in_its_order_and_dtypes(tmp_path: Path):
    turned = {name: ARRAYS[name].astype(np.float64) for name in reversed(ARRAYS)}
    found = teacher_of(config(written(tmp_path, turned)), module())
    assert list(found.arrays) == list(ARRAYS)
    assert all(value.dtype == np.float32 for value in found.arrays.values())


def test_the_model_is_the_one_that_its_run_had(tmp_path: Path):
    place = written(tmp_path, told={**TOLD, "model": "mlp", "model-args": "hidden=48"})
    found = teacher_config(config(place, model="cnn", model_args="hidden=5"))
    assert (found.model, found.model_args) == ("mlp", "hidden=48")
    usual = teacher_config(config(written(tmp_path), architectures="mlp; conv4"))
    assert (usual.model, usual.model_args, usual.architectures) == ("", "", "")


def test_teacher_model_says_which_model_it_is_and_needs_no_file_on_this_machine():
    found = teacher_config(config("/nowhere", teacher_model=" mlp hidden=400 "))
    assert (found.model, found.model_args) == ("mlp", "hidden=400")


def test_one_of_several_architectures_is_told_by_the_name_of_its_file(tmp_path: Path):
    told = {**TOLD, "architectures": "small: mlp hidden=4; big: mlp hidden=48 depth=2"}
    place = written(tmp_path, told=told, name="model-big")
    found = teacher_config(config(place / "model-big.safetensors"))
    assert (found.model, found.model_args) == ("mlp", "hidden=48 depth=2")
    assert teacher_of(config(place), module()).arrays.keys() == ARRAYS.keys()  # the only one
    written(tmp_path, told=told, name="model-small")
    with pytest.raises(ConfigError, match=r"several models \(model-big.safetensors, model-small"):
        teacher_of(config(place), module())
    written(tmp_path, told=told, name="other")
    with pytest.raises(ConfigError, match=r"'other.safetensors' is none of .* \(small, big\)"):
        teacher_config(config(place / "other.safetensors"))


def test_a_digest_tells_values_names_shapes_and_dtypes_apart():
    arrays = {"a": np.zeros(4, np.float32), "b": np.ones(1)}
    assert digest_of(arrays) == digest_of(dict(reversed(arrays.items())))
    others = [
        {**arrays, "a": np.zeros((2, 2), np.float32)},
        {**arrays, "a": np.zeros(4, np.int32)},
        {**arrays, "b": np.nextafter(np.ones(1), 2)},
        {"c": arrays["a"], "b": arrays["b"]},
    ]
    assert len({digest_of(one) for one in (arrays, *others)}) == 5
    assert Teacher(module(), arrays).digest == digest_of(arrays)


# --- what is refused ------------------------------------------------------------------------------


def renamed(old: str, new: str) -> dict[str, np.ndarray]:
    return {new if name == old else name: value for name, value in ARRAYS.items()}


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        (renamed("0.bias", "bias"), "differ in 0.bias, bias"),
        ({**ARRAYS, "1.weight": np.zeros(2)}, "differ in 1.weight"),
        (
            {**ARRAYS, "0.weight": np.zeros((4, 3), np.float32)},
            r"'0.weight' has shape \(4, 3\) in .* and \(3, 4\) in Sequential",
        ),
        (
            {**ARRAYS, "0.bias": np.array([0, np.nan, 0], np.float32)},
            "'0.bias' in .* holds NaN or infinity",
        ),
        (
            {**ARRAYS, "0.bias": np.array([0, np.inf, 0], np.float32)},
            "'0.bias' in .* holds NaN or infinity",
        ),
    ],
)
def test_weights_that_are_not_the_model_s_are_refused_by_name(arrays, said, tmp_path: Path):
    with pytest.raises(ConfigError, match=said):
        teacher_of(config(written(tmp_path, arrays)), module())


def test_a_missing_place_says_what_to_name(tmp_path: Path):
    with pytest.raises(ConfigError, match="'teacher-student' needs a teacher: name the results"):
        teacher_of(config(""), module())
    with pytest.raises(ConfigError, match="nowhere': there is no such file or folder"):
        teacher_of(config(tmp_path / "nowhere"), module())
    with pytest.raises(ConfigError, match=r"holds no model\.safetensors"):
        teacher_of(config(tmp_path), module())


def test_files_that_are_not_what_they_seem_are_refused(tmp_path: Path):
    place = written(tmp_path)
    (place / "model.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        teacher_of(config(place), module())
    for text in ("{", "[]", '{"config": 3}', '{"version": "1"}'):
        (place / "results.json").write_text(text)
        with pytest.raises(ConfigError, match="does not say how the teacher beside it was trained"):
            teacher_of(config(place), module())


def test_weights_alone_need_their_model_named(tmp_path: Path):
    place = written(tmp_path, told=None)
    with pytest.raises(ConfigError, match=r"no results.json beside 'model.safetensors'.*set teach"):
        teacher_config(config(place))
    with pytest.raises(ConfigError, match="teacher-model = 'hidden'"):
        teacher_config(config(place, teacher_model="mlp hidden"))
    assert teacher_of(config(place), module()).inner_lr is None


def test_a_teacher_of_another_data_set_is_refused(tmp_path: Path):
    place = written(tmp_path, told={**TOLD, "dataset": "omniglot"})
    with pytest.raises(ConfigError, match="trained on dataset 'omniglot', this run is on 'digits'"):
        teacher_of(config(place), module())
    (place / "results.json").unlink()  # what the advice says
    teacher_of(config(place), module())


PRIVATE = {"privacy.noise-multiplier": 1.5}
USER_LEVEL = {"user-privacy.noise-multiplier": 1.5}


@pytest.mark.parametrize(
    ("run_keys", "told", "table"),
    [
        (PRIVATE, {}, "privacy"),
        (PRIVATE, {"privacy.noise-multiplier": 0.0}, "privacy"),
        (PRIVATE, USER_LEVEL, "privacy"),
        (USER_LEVEL, {}, "user-privacy"),
        (USER_LEVEL, PRIVATE, "user-privacy"),
    ],
)
def test_a_private_run_refuses_a_teacher_that_nobody_counted(run_keys, told, table, tmp_path: Path):
    place = written(tmp_path, told={**TOLD, **told})
    with pytest.raises(ConfigError, match=f"was not trained with {table} .*teacher-is-public"):
        teacher_of(config(place, **run_keys), module())
    found = teacher_of(config(place, teacher_is_public=True, **run_keys), module())
    assert found.may_teach_private_clients


@pytest.mark.parametrize("keys", [PRIVATE, USER_LEVEL, {**PRIVATE, **USER_LEVEL}])
def test_a_private_run_takes_a_teacher_that_was_trained_so(keys, tmp_path: Path):
    found = teacher_of(config(written(tmp_path, told={**TOLD, **keys}), **keys), module())
    assert found.was_private is ("privacy.noise-multiplier" in keys)


# --- two runs -------------------------------------------------------------------------------------

SMALL = {"num-clients": 8, "clients-per-round": 4, "eval-steps": "1,2", "device": "cpu"}


def played(out: Path, **keys) -> dict:
    values = {**SMALL, **{key.replace("_", "-"): value for key, value in keys.items()}}
    made = as_carried_out(RunConfig.read({**values, "out": str(out)}))
    with cohort_grid(made) as grid:
        run(grid, made)
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the results folder of a larger model, meta-trained."""
    out = tmp_path_factory.mktemp("runs") / "large"
    played(out, strategy="fedmeta", model_args="hidden=48", rounds=4, order="first")
    return out


def test_a_student_learns_from_the_model_of_an_earlier_run(large: Path, tmp_path: Path):
    keys = {"model_args": "hidden=8", "rounds": 4, "local_epochs": 2}
    taught = played(tmp_path / "a", strategy="teacher-student", teacher=str(large), **keys)
    plain = played(tmp_path / "b", strategy="fedavg", **keys)
    assert taught["failures"] == taught["quarantined"] == 0
    size = sum(value.nbytes for value in load_file(large / "model.safetensors").values())
    trained = {client for entry in taught["history"] for client in entry["clients"]}
    extra = taught["bytes_down"] - plain["bytes_down"]
    assert len(trained) * size < extra < len(trained) * (size + 1024)  # with headers
    assert taught["bytes_up"] == plain["bytes_up"]
    alone = {**keys, "distill_alpha": 0.0}
    same = played(tmp_path / "c", strategy="teacher-student", teacher=str(large), **alone)
    assert same["unseen"] == plain["unseen"]
    assert taught["unseen"] != plain["unseen"]


def test_a_meta_teacher_s_run_tells_what_became_of_each_unseen_client(large: Path, tmp_path: Path):
    keys = {"model_args": "hidden=8", "rounds": 2, "order": "first", "eval_every": 1}
    found = played(tmp_path, strategy="meta-teacher", teacher=str(large), teach_steps=5, **keys)
    assert found["failures"] == 0
    for one in found["unseen"]["per_client"]:
        told = {"taught-accuracy", "taught-loss", "teacher-accuracy", "accuracy-after-2"}
        assert told <= set(one)


@pytest.mark.parametrize("strategy", ["teacher-student", "meta-teacher"])
def test_two_halves_are_the_whole_with_the_clients_of_the_app(
    strategy: str, large: Path, tmp_path: Path
):
    keys = {"strategy": strategy, "teacher": str(large), "model_args": "hidden=8", "eval_every": 2}
    whole = played(tmp_path / "whole", rounds=4, **keys)
    played(tmp_path / "halves", rounds=2, **keys)
    halves = played(tmp_path / "halves", rounds=4, resume=True, **keys)
    models = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "halves")]
    assert models[0] == models[1]
    assert halves["unseen"] == whole["unseen"]
    assert [entry["validation"] for entry in halves["history"]] == [
        entry["validation"] for entry in whole["history"]
    ]


def test_private_clients_learn_from_a_private_teacher_alone(large: Path, tmp_path: Path):
    keys = {
        "model_args": "hidden=8",
        "rounds": 1,
        "privacy.noise-multiplier": 1.0,
        "privacy.expected-batch-size": 3,
        "privacy.target-epsilon": 50,
    }
    student = {"strategy": "teacher-student", **keys}
    with pytest.raises(ConfigError, match="was not trained with privacy"):
        played(tmp_path / "refused", teacher=str(large), **student)
    played(tmp_path / "teacher", strategy="fedavg", **{**keys, "model_args": "hidden=32"})
    found = played(tmp_path / "taught", teacher=str(tmp_path / "teacher"), **student)
    assert found["failures"] == 0
    assert found["privacy"]["record_level"]["clients"] == 4
    public = {**student, "teacher_is_public": True}
    assert played(tmp_path / "public", teacher=str(large), **public)["failures"] == 0


def test_keys_of_teachers_that_a_strategy_does_not_read_are_told():
    keys = {"distill-alpha": 0.2, "teach-steps": 3, "teacher": "x", "teacher-model": "mlp"}
    idle = idle_keys(RunConfig.read({"strategy": "fedavg", **keys}))
    assert set(idle) == set(keys)
    idle = idle_keys(RunConfig.read({"strategy": "teacher-student", **keys}))
    assert idle == ["teach-steps"]
    assert idle_keys(RunConfig.read({"strategy": "meta-teacher", **keys})) == []


def test_the_model_of_a_teacher_is_built_for_the_data_of_the_run():
    found = model_of(teacher_config(config("", teacher_model="mlp hidden=7")))
    shapes = [tuple(value.shape) for value in found.parameters()]
    assert shapes[0][0] == 7
    assert all(torch.isfinite(value).all() for value in found.parameters())
