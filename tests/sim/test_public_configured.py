"""Public records: two parts, marks, and what a configuration says of them."""

import numpy as np
import pytest
import torch

from metabloom.config import RunConfig
from metabloom.errors import ConfigError, DataError
from metabloom.public import PublicData, held_out_rows
from metabloom.task import federation_of, public_kind, public_of, validation_of

from .synthetic_data import IMAGES, install_fakes


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch):
    install_fakes(monkeypatch)


def numbered(count=10):
    """Return public records that are their own numbers."""
    return PublicData.of("numbered", torch.arange(float(count))[:, None])


# --- two parts, and marks -------------------------------------------------------------------------


def test_a_split_is_disjoint_whole_and_the_same_at_both_ends():
    targets = torch.arange(10)
    public = PublicData.of("numbered", torch.arange(10.0)[:, None], targets)
    first, second = public.split(3, seed=1)
    assert (len(first), len(second)) == (7, 3)
    values = torch.cat((first.inputs, second.inputs))[:, 0]
    assert sorted(values.tolist()) == list(range(10))
    assert torch.equal(first.targets, first.inputs[:, 0].long())
    assert torch.equal(public.split(3, seed=1)[1].inputs, second.inputs)
    assert not torch.equal(public.split(3, seed=2)[1].inputs, second.inputs)
    with pytest.raises(DataError, match="size = 10"):
        public.split(10, seed=1)


def test_a_mark_stands_for_records_and_rows():
    rows = np.array([1, 4])
    mark = numbered().mark_of(rows)
    assert (mark.dtype, mark.shape) == (np.uint8, (16,))
    assert np.array_equal(mark, numbered().mark_of(rows.copy()))
    assert not np.array_equal(mark, numbered().mark_of(rows[::-1]))
    assert not np.array_equal(mark, numbered(11).mark_of(rows))


# --- what a configuration says of them ------------------------------------------------------------


@pytest.mark.parametrize(
    "private", [{"privacy.noise-multiplier": 1.0}, {"user-privacy.noise-multiplier": 1.0}]
)
def test_with_privacy_public_data_must_be_declared(private):
    usual = {"strategy": "feddf", "dataset": "mnist", "public-size": 4, **private}
    with pytest.raises(ConfigError, match="'held-out' declares them public"):
        public_kind(RunConfig.read(usual))
    assert public_kind(RunConfig.read({**usual, "public-data": "held-out"})) == "held-out"
    assert public_kind(RunConfig.read({"strategy": "fedavg", **private})) == ""


def test_a_validation_set_is_held_out_beside_the_public_records(small_data):
    config = RunConfig.read(
        {
            "strategy": "feddf",
            "dataset": "mnist",
            "data-root": str(small_data),
            "num-clients": 3,
            "public-size": 6,
            "distill-validation": 4,
        }
    )
    public, validation = public_of(config), validation_of(config)
    assert (len(public), len(validation)) == (6, 4)
    assert validation.targets is not None
    _, spare = held_out_rows(IMAGES, 10, config.seed)
    federation = federation_of(config)
    records = sum(federation.client(index).num_examples for index in range(len(federation)))
    assert records <= len(spare)


def test_records_without_labels_are_no_validation_set():
    config = RunConfig.read(
        {"strategy": "feddf", "dataset": "digits", "public-data": "noise", "distill-validation": 4}
    )
    with pytest.raises(ConfigError, match="have no labels"):
        public_of(config)
