"""Runs that are done once, each in a folder of its own; several of them at once."""

import json
import logging
from pathlib import Path

import pytest

from metabloom import trials
from metabloom.config import RunConfig
from metabloom.errors import ConfigError, MetabloomError
from metabloom.trial_pool import trial_pool
from metabloom.trials import finished, folder_of, run_once


def config_of(**keys: object) -> RunConfig:
    usual = {"num-clients": 5, "clients-per-round": 2, "rounds": 2, "eval-every": 1}
    return RunConfig.read({**usual, "device": "cpu", "eval-steps": "1", **keys})


@pytest.mark.parametrize(
    ("keys", "is_the_same"),
    [
        ({"out": "elsewhere", "workers": "0", "checkpoint-every": 2, "resume": True}, True),
        ({"seed": 1}, False),
        ({"rounds": 3}, False),
        ({"max-bytes": 5}, False),
        ({"max-seconds": 5.0}, False),
        ({"local-lr": 0.2}, False),
        ({"patience": 1}, False),
        ({"init": "x"}, False),
        ({"score-unseen": False}, False),
    ],
)
def test_a_folder_is_named_by_all_that_decides_the_results(keys: dict, is_the_same: bool):
    root = Path("trials")
    assert (folder_of(config_of(**keys), root) == folder_of(config_of(), root)) == is_the_same


def test_a_run_whose_rounds_all_fail_is_finished_and_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_of(**{"max-value": 1e-9})  # every reply is refused
    results = run_once(config, tmp_path)
    assert results["skipped"] == 2
    monkeypatch.setattr(trials, "run", None)  # would raise
    assert run_once(config, tmp_path) == results


def test_a_run_that_cannot_begin_is_told_as_it_is(tmp_path: Path):
    with pytest.raises(MetabloomError, match="no such file or folder"):
        run_once(config_of(init=str(tmp_path / "nowhere")), tmp_path)
    assert finished(config_of(init=str(tmp_path / "nowhere")), tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"config": {"rounds": "x"}}'])
def test_results_that_cannot_be_read_are_named(text: str, tmp_path: Path):
    folder = folder_of(config_of(), tmp_path)
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(text)
    with pytest.raises(ConfigError, match=r"results\.json.*remove its folder"):
        finished(config_of(), tmp_path)


def test_results_of_another_run_are_refused(tmp_path: Path):
    folder = folder_of(config_of(), tmp_path)
    folder.mkdir(parents=True)
    told = {"config": config_of(seed=3).to_flower()}
    (folder / "results.json").write_text(json.dumps(told))
    with pytest.raises(ConfigError, match="another configuration"):
        finished(config_of(), tmp_path)


def test_an_error_in_a_process_of_the_pool_is_told_as_it_is(tmp_path: Path):
    config = config_of(init=str(tmp_path / "nowhere"))
    ended: list[int] = []
    with (
        pytest.raises(MetabloomError, match="no such file or folder"),
        trial_pool(1, tmp_path, logging.WARNING, on_end=lambda: ended.append(1)) as submit,
    ):
        submit(config)()
    assert ended == [1]
