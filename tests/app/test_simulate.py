"""The command line: what it writes, and what it refuses."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from metabloom import __version__
from metabloom.cli import main
from metabloom.config import RunConfig
from metabloom.models import MODELS, register_model
from metabloom.sim import DATASETS
from metabloom.strategies import STRATEGIES
from metabloom.task import initial_arrays
from tests.app.needed import LASTING, needed

SMALL = ("num-clients=10", "rounds=2", "clients-per-round=3", "eval-every=1", "device=cpu")
FILES = ["checkpoints", "model.safetensors", "report.html", "results.json"]
EVERY = pytest.mark.parametrize("strategy", list(STRATEGIES))


class CommandLine:
    """`metabloom` in this process: exit status, standard output, standard error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["metabloom", *arguments])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self._capsys.readouterr()
        return int(ended.value.code or 0), out, err

    def simulate(self, *settings: str, out: Path) -> tuple[int, str, str]:
        chosen = [word for setting in settings for word in ("--set", setting)]
        return self("simulate", *chosen, "--out", str(out))


@pytest.fixture
def metabloom(monkeypatch, capsys, tmp_path) -> Iterator[CommandLine]:
    monkeypatch.chdir(tmp_path)  # nothing may land in the checkout
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("METABLOOM_DATA", raising=False)
    threads = torch.get_num_threads()
    yield CommandLine(monkeypatch, capsys)
    torch.set_num_threads(threads)


# --- a run ----------------------------------------------------------------------------------------


@EVERY
def test_a_strategy_on_digits_writes_checkpoints_and_three_files(
    metabloom, tmp_path: Path, strategy: str
):
    out = tmp_path / "out"
    own = needed(strategy, tmp_path)
    status, said, _ = metabloom.simulate(f"strategy={strategy}", *own, *SMALL, out=out)
    assert status == 0
    assert str(out) in said
    lasting = ["clients"] if strategy in LASTING else []
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, *lasting])

    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["version"] == __version__
    assert (results["strategy"], results["dataset"]) == (strategy, "digits")
    assert (results["seed"], results["rounds"], results["failures"]) == (0, 2, 0)
    assert results["clients"] == {"train": 8, "validation": 1, "unseen": 1}
    assert [len(entry["clients"]) for entry in results["history"]] == [3, 3]
    assert all(entry["validation"]["accuracy_after"] for entry in results["history"])
    assert results["bytes_up"] > 0
    assert results["bytes_down"] > results["bytes_up"]  # the evaluations are only sent down
    assert results["seconds"] > 0
    unseen = results["unseen"]
    assert list(unseen["accuracy_after"]) == ["1", "5"]
    assert 0 <= unseen["accuracy_before"] <= 1
    assert len(unseen["per_client"]) == 1
    assert RunConfig.read(results["config"]).strategy == strategy

    model = load_file(out / "model.safetensors")
    initial = initial_arrays(RunConfig.read(results["config"]))
    assert set(model) == set(initial)
    assert all(model[name].shape == value.shape for name, value in initial.items())
    moved = [np.abs(model[name] - value).max() for name, value in initial.items()]
    assert 1e-4 < max(moved) < 10  # trained, and finite

    page = (out / "report.html").read_text(encoding="utf-8")
    assert strategy in page
    assert not re.search(r"<(?:script|link|img)\b[^>]*\b(?:src|href)\s*=", page)


@EVERY
def test_the_seed_decides_the_model(metabloom, tmp_path: Path, strategy: str):
    models = {}
    for name, seed in (("first", 4), ("again", 4), ("other", 5)):
        own = needed(strategy, tmp_path)
        settings = (f"strategy={strategy}", *own, *SMALL, f"seed={seed}")
        assert metabloom.simulate(*settings, out=tmp_path / name)[0] == 0
        models[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert models["first"] == models["again"]
    assert models["first"] != models["other"]


def test_settings_win_over_the_file_and_options_over_both(metabloom, tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text(
        'strategy = "reptile"\nrounds = 7\nseed = 3\nnum-clients = 10\ndevice = "cpu"\n'
    )
    out = tmp_path / "ö [1] :warning:"
    arguments = ("--set", "rounds=1", "--set", "strategy=fedprox", "--strategy", "fedavg")
    status, said, _ = metabloom("simulate", "--config", str(file), *arguments, "--out", str(out))
    assert status == 0
    assert f"results: {out}/results.json" in said  # brackets and :names: as they are
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert (results["strategy"], results["rounds"], results["seed"]) == ("fedavg", 1, 3)


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def narrow_model() -> Iterator[None]:
    """Register a model whose output does not fit the classes."""

    @register_model("narrow-for-tests")
    def narrow(input_shape: tuple[int, ...], num_classes: int) -> torch.nn.Module:
        size = int(np.prod(input_shape))
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(size, num_classes - 1))

    yield
    del MODELS._entries["narrow-for-tests"]


# settings -> what the message must hold: the value received, and the remedy.
WRONG = {
    "unknown key": (["inner-rl=0.1"], ["inner-rl", "did you mean 'inner-lr'"]),
    "unknown strategy": (["strategy=fedmeat"], ["'fedmeat'", "did you mean 'fedmeta'"]),
    "unknown data set": (["dataset=digit"], ["'digit'", "did you mean 'digits'"]),
    "unknown model": (["model=mpl"], ["'mpl'", "did you mean 'mlp'"]),
    "unknown data set option": (["dataset-args=wyas=3"], ["wyas", "ways"]),
    "unknown model option": (["model-args=hiden=3"], ["hiden", "hidden"]),
    "zero rate": (["inner-lr=0"], ["inner-lr = 0", "greater than 0"]),
    "negative rate": (["inner-lr=-1"], ["inner-lr = -1", "greater than 0"]),
    "rate not a number": (["inner-lr=nan"], ["inner-lr = nan", "finite"]),
    "infinite rate": (["outer-lr=inf"], ["outer-lr = inf", "finite"]),
    "rate in words": (["inner-lr=fast"], ["inner-lr = 'fast'", "number"]),
    "no rounds": (["rounds=0"], ["rounds = 0", "greater than or equal to 1"]),
    "half a round": (["rounds=1.5"], ["rounds = 1.5", "integer"]),
    "unknown order": (["order=second"], ["order = 'second'", "'exact'"]),
    "steps of evaluation": (["eval-steps=0,5"], ["eval-steps = '0,5'", "at least 1"]),
    "missing data file": (
        ["dataset=omniglot", "data-root=/nowhere/data"],
        ["/nowhere/data", "data-root"],
    ),
    "support larger than the client": (["dataset-args=shots=100"], ["shots = 100", "lower shots"]),
    "more clients than data": (["num-clients=100000"], ["'digits'", "lower num_clients"]),
    "too few clients": (["num-clients=2"], ["2", "at least 3"]),
    "model that does not fit": (["model=narrow-for-tests"], ["4", "5"]),
    "malformed data set options": (["dataset-args=ways"], ["dataset-args = 'ways'", "name=value"]),
    "open quotes": (["dataset-args=ways='5"], ['dataset-args = "ways=\'5"', "close the quotes"]),
    "malformed setting": (["rounds"], ["'rounds'", "key=value"]),
    "setting without a key": (["=3"], ["'=3'", "key=value"]),
    "brackets and letters": (["dataset=[bold]größe:warning:"], ["[bold]größe:warning:", "Known:"]),
}


def assert_refused(status: int, err: str, expected: list[str]) -> None:
    assert status == 2, err
    assert err.count("error:") == 1
    assert err.startswith("error:")
    assert "Traceback" not in err
    for part in expected:
        assert part in err


@pytest.mark.usefixtures("narrow_model")
@pytest.mark.parametrize("what", list(WRONG))
def test_a_wrong_setting_ends_with_one_message_and_status_2(metabloom, tmp_path: Path, what: str):
    settings, expected = WRONG[what]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("of an earlier run")
    status, _, err = metabloom.simulate(*settings, out=tmp_path / "out")
    assert_refused(status, err, expected)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]
    assert (tmp_path / "out" / "results.json").read_text() == "of an earlier run"


def test_several_wrong_settings_are_told_in_one_message(metabloom, tmp_path: Path):
    status, _, err = metabloom.simulate("inner-lr=-1", "rounds=0", out=tmp_path / "out")
    assert_refused(status, err, ["inner-lr = -1", "rounds = 0"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused_before_anything_runs(metabloom, tmp_path: Path):
    status, said, err = metabloom.simulate("device=cuda", out=tmp_path / "out")
    assert_refused(status, err, ["device = 'cuda'", "'cpu'"])
    assert not (tmp_path / "out").exists()
    assert "fedmeta on digits" not in said  # no progress bar


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_run(metabloom, tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    status, said, err = metabloom.simulate(*SMALL, out=tmp_path / "file" / "out")
    assert_refused(status, err, ["file/out", "another folder"])
    assert "0/2" in said  # the progress bar stands at no round
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ["does not exist", "check the path"]),
        (b"rounds = = 3\n", ["is not TOML", "line 1"]),
        (b"\xff\xfe", ["is not TOML"]),
        (b"[section]\nrounds = 3\n", ["'section.rounds'"]),
        (b"rounds = [1, 2]\n", ["rounds = [1, 2]"]),
    ],
)
def test_a_configuration_file_that_cannot_be_used_is_named(
    metabloom, tmp_path: Path, content: bytes | None, expected: list[str]
):
    file = tmp_path / "rün [x].toml"
    if content is not None:
        file.write_bytes(content)
    status, _, err = metabloom("simulate", "--config", str(file))
    named = [file.name] if content is None or b"[" not in content else []
    assert_refused(status, err, [*expected, *named])


def test_a_folder_in_the_place_of_the_configuration_file_is_named(metabloom, tmp_path: Path):
    status, _, err = metabloom("simulate", "--config", str(tmp_path))
    assert_refused(status, err, [str(tmp_path), "cannot be read"])


# --- the other commands ---------------------------------------------------------------------------


def test_list_names_every_strategy_data_set_and_model(metabloom):
    status, said, _ = metabloom("list")
    assert status == 0
    for registry in (STRATEGIES, DATASETS, MODELS):
        for name in registry:
            assert name in said


@pytest.mark.parametrize("width", ["60", "200"])
def test_config_names_every_key_in_full_even_where_it_is_narrow(metabloom, monkeypatch, width: str):
    monkeypatch.setenv("COLUMNS", width)
    status, said, _ = metabloom("config")
    assert status == 0
    for key in list(RunConfig.defaults()):
        assert re.search(rf"\s{key}\s", said), key
    assert "…" not in said


def test_the_installed_command_answers_and_refuses_without_a_traceback(tmp_path: Path):
    command = str(Path(sys.executable).parent / "metabloom")
    version = subprocess.run([command, "version"], capture_output=True, text=True, timeout=60)
    assert (version.returncode, version.stdout.strip()) == (0, __version__)
    wrong = [command, "simulate", "--set", "inner-lr=-1", "--out", str(tmp_path)]
    refused = subprocess.run(wrong, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert refused.stdout == ""
    assert_refused(refused.returncode, refused.stderr, ["inner-lr = -1"])
