"""The benchmark of groups at tiny scale: its data, its choice, what it says."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from metabloom.errors import DataError
from metabloom.sim import DATASETS, load_federation

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = {"training": 2, "new": 1, "members": 2, "support": 6, "query": 5}


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script; what it registers and sets is put back."""
    monkeypatch.syspath_prepend(FOLDER)
    threads = torch.get_num_threads()
    importlib.import_module("groups_data")
    yield importlib.import_module("groups")
    torch.set_num_threads(threads)
    del DATASETS._entries["renamed-digits"]
    for module in ("groups", "groups_data"):
        del sys.modules[module]


def test_members_of_a_group_share_names_and_groups_do_not(groups: ModuleType, small_data: Path):
    federation = load_federation("renamed-digits", root=small_data, **SMALL)
    assert list(federation.roles) == ["train"] * 4 + ["unseen"] * 2
    assert {name.split("/")[0] for name in federation.client_ids} == {
        "group-00",
        "group-01",
        "group-03",
    }
    other = load_federation("renamed-digits", root=small_data, proving=1, **SMALL)
    assert [name for name in other.client_ids if name not in federation.client_ids] == [
        "group-02/client-0",
        "group-02/client-1",
    ]
    records = federation.client(0)
    assert records.support[0].shape == (6, 1, 14, 14)
    assert len(records.query[1]) == 5
    assert set(records.support[1].tolist()) <= set(range(5))


def test_no_image_is_at_two_clients(groups: ModuleType, small_data: Path):
    federation = load_federation("renamed-digits", root=small_data, **SMALL)
    images = [
        image.numpy().tobytes()
        for index in range(len(federation))
        for part in (federation.client(index).support, federation.client(index).query)
        for image in part[0]
    ]
    assert len(images) == len(set(images)) == 6 * 11


def test_more_groups_than_there_are_images_for_are_refused(groups: ModuleType, small_data: Path):
    with pytest.raises(DataError, match=r"no images of \d left: lower training"):
        load_federation("renamed-digits", root=small_data, **{**SMALL, "training": 100})


def test_every_trained_start_has_as_many_exchanges_and_tries(groups: ModuleType):
    exchanges = {
        "fedavg": lambda one: 1,
        "group-reptile": lambda one: one["group-rounds"],
        "group-maml": lambda one: 2 * one["inner-steps"] + 1,
    }
    found = {
        (len(groups.grid_of(one)), one["rounds"] * exchanges[one["strategy"]](one))
        for one in groups.STARTS.values()
    }
    assert found == {(6, 300)}


def test_a_choice_looks_at_the_proving_groups_of_the_tuning_seed_alone(groups: ModuleType):
    class Told:
        rates = groups.NEW_RATES

        def __init__(self) -> None:
            self.asked: list[tuple[int, bool, int]] = []

        def start(self, settings, seed):
            return settings["local-lr"]

        def curve(self, arrays, rate, seed, *, proving, last):
            self.asked.append((seed, proving, last))
            return {"5": 1 - abs(arrays - 0.3) - abs(rate - 1.0)}

    bench = Told()
    best = groups.chosen(bench, "FedAvg", [{"local-lr": 0.1}, {"local-lr": 0.3}])
    assert (best["settings"]["local-lr"], best["rate"]) == (0.3, 1.0)
    assert set(bench.asked) == {(0, True, 5)}


def test_the_verdict_is_by_seed_against_the_fresh_start_of_that_seed(groups: ModuleType):
    def row(name: str, *curves: tuple[float, ...]) -> dict:
        names = ["0", *map(str, groups.ROUNDS)]
        told = [dict(zip(names, one, strict=True)) for one in curves]
        return {"start": name, "settings": {}, "rate": 0.1, "curves": told, "seconds": [1.0, 1.0]}

    slow, slower = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), (0.2, 0.2, 0.2, 0.3, 0.4, 0.5, 0.6)
    good, late = (0.1, 0.7, 0.8, 0.9, 0.9, 0.9, 0.9), (0.1, 0.2, 0.2, 0.2, 0.5, 0.6, 0.7)
    rows = [row(groups.FRESH, slow, slower), row("group Reptile", good, late)]
    assert groups.verdict_of(rows) == {groups.FRESH: [20, 20], "group Reptile": [2, 10]}
    page = groups.page_of(rows)
    assert "- group Reptile: 2, 10; at most 5 wanted: MISSED" in page
    assert "| a fresh start | 20.0 ± 0.0 | 25.0 ± 7.1 |" in page
    assert "5; at most 5 wanted: reached" in groups.page_of(
        [rows[0], row("group MAML", good, (*late[:4], 0.6, 0.6, 0.7))]
    )


def test_the_whole_script_runs(groups: ModuleType, small_data: Path, tmp_path: Path):
    groups.main(small_data, tmp_path, quick=True)
    rows = json.loads((tmp_path / "groups.json").read_text())
    assert [row["start"] for row in rows] == [groups.FRESH, *groups.STARTS]
    for row in rows:
        assert len(row["curves"]) == 3
        assert all(list(curve) == ["0", *map(str, groups.ROUNDS)] for curve in row["curves"])
        assert np.isfinite([value for curve in row["curves"] for value in curve.values()]).all()
    assert (tmp_path / "groups.md").read_text() == groups.page_of(rows)


def test_the_page_that_is_kept_is_that_of_its_figures(groups: ModuleType):
    folder = FOLDER / "results"
    rows = json.loads((folder / "groups.json").read_text())
    *page, _ = groups.page_of(rows).splitlines()  # but the versions of packages
    assert page == (folder / "groups.md").read_text().splitlines()[:-1]
