"""Runs that start at weights of torchvision by name; nothing is fetched here."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from metabloom import init
from metabloom.config import RunConfig
from metabloom.errors import ConfigError, MissingDataError
from metabloom.init import started, torchvision_weights
from tests.app.test_init import arrays_of


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """torchvision's resnet18, with weights of its own making in the place of those on a server."""
    import torchvision.models as zoo
    from torchvision.models import _api

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    state = zoo.resnet18().state_dict()
    asked: list[str] = []

    def load(url: str, **options: object) -> dict[str, torch.Tensor]:
        assert options == {"progress": False, "check_hash": True, "weights_only": True}
        asked.append(url)
        return state

    monkeypatch.setattr(_api, "load_state_dict_from_url", load)
    state.asked = asked  # type: ignore[attr-defined]  # an OrderedDict takes it
    return state


def test_torchvisions_weights_fit_but_for_the_head_and_batch_statistics(weights):
    config = RunConfig.read(
        {
            "dataset": "cifar10",
            "model": "resnet18",
            "init": "torchvision:resnet18",
            "download": True,
        }
    )
    found, fit = started(config, arrays_of(config))
    assert [name for name, _, _ in fit.misshapen] == ["fc.weight", "fc.bias"]
    assert fit.missing == ()
    assert {name.rpartition(".")[2] for name in fit.unused} == {
        *("running_mean", "running_var", "num_batches_tracked")
    }
    for name in fit.loaded:
        np.testing.assert_array_equal(found[name], weights[name].numpy())
    assert len(fit.loaded) == 60
    assert weights.asked[0].startswith("https://download.pytorch.org/models/resnet18-")


def test_weights_may_be_named_in_full_and_hyphens_stand_for_underscores(weights):
    names = ("resnet18", "ResNet18_Weights.IMAGENET1K_V1", "mobilenet-v3-small")
    for name in names:
        torchvision_weights(name, download=True)
    assert weights.asked[0] == weights.asked[1]
    assert "mobilenet_v3_small" in weights.asked[2]


def test_weights_are_fetched_only_where_the_user_says_so(weights, tmp_path: Path):
    with pytest.raises(MissingDataError, match=r"is not there: set download=true, or fetch https"):
        torchvision_weights("resnet18", download=False)
    assert weights.asked == []
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    import torchvision.models as zoo

    name = zoo.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    (folder / name).touch()
    assert len(torchvision_weights("resnet18", download=False)) == len(weights)


def test_a_network_that_fails_is_told(weights, monkeypatch: pytest.MonkeyPatch):
    from torchvision.models import _api

    def fails(url: str, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(_api, "load_state_dict_from_url", fails)
    with pytest.raises(MissingDataError, match="no route to host"):
        torchvision_weights("resnet18", download=True)


@pytest.mark.parametrize(
    "name", ["resnet19", "ResNet18_Weights.V9", "ResNet19_Weights.DEFAULT", ""]
)
def test_names_that_torchvision_does_not_know_are_refused(name: str):
    with pytest.raises(ConfigError, match="torchvision has no weights of that name"):
        torchvision_weights(name, download=False)


def test_torchvision_is_imported_only_where_it_is_asked_for():
    assert "torchvision" not in vars(init)
    assert sys.modules["metabloom.init"] is init
