"""A Ray cluster that runs already: joined, shared with other work, and one machine short."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from metabloom.errors import ConfigError
from metabloom.sim.engine.cluster import _check_answers, _share_of_gpus

SCRIPT = Path(__file__).with_name("on_a_cluster.py")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def seen() -> dict[str, object]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_cluster_is_joined_and_all_its_cores_are_used(seen):
    assert seen["workers"] == 4
    assert seen["whole"] == 120


def test_a_machine_that_goes_in_the_middle_of_a_round_costs_no_client(seen):
    assert seen["one lost"] == 120
    assert seen["after"] == 120


def test_gpus_are_shared_out_among_workers(seen):
    assert seen["shared"] == ["0", "0", "0", "0"]  # two machines with one GPU each, halves
    assert seen["halves on one"] == ["0", "0"]
    assert set(seen["none"]) <= {"", "none"}


def test_more_than_the_cluster_has_is_refused(seen):
    assert "has 4 processor cores" in str(seen["too many"])
    assert "gpus-per-worker = 0.75 for 4 workers: Ray has 2 GPUs" in str(seen["too much"])


@pytest.mark.parametrize(
    ("workers", "gpus", "wanted", "share"),
    [
        (4, 2.0, 0.0, 0.5),
        (2, 8.0, 0.0, 1.0),
        (3, 1.0, 0.0, 0.3333),
        (3, 2.0, 0.0, 0.5),
        (8, 3.0, 0.0, 0.3333),
        (2, 0.0, 0.0, 0.0),
        (8, 2.0, 0.25, 0.25),
        (1, 4.0, 2.0, 2.0),
    ],
)
def test_the_share_of_a_worker(workers: int, gpus: float, wanted: float, share: float):
    assert _share_of_gpus(workers, gpus, wanted) == pytest.approx(share)
    # What is less than a GPU lies on one GPU.
    assert workers <= (int(1 / share) * gpus if 0 < share <= 1 else max(gpus, workers))


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:1", "no Ray cluster answers there"),
        ("no.such.host.invalid:6379", "no Ray cluster answers there"),
        ("127.0.0.1", "'auto', or host:port"),
        ("ray://127.0.0.1:10001", "'auto', or host:port"),
    ],
)
def test_an_address_where_nobody_answers_is_refused(address: str, why: str):
    with pytest.raises(ConfigError, match=why):
        _check_answers(address)
