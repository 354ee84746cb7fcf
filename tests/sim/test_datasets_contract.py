"""What every registered data set promises, on tiny stand-ins for its files."""

import hashlib
import inspect
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from metabloom.errors import ConfigError, MissingDataError
from metabloom.sim import DATASETS, Federation, dataset_spec, load_federation

from .synthetic_data import SMALL, install_fakes

NAMES = [name for name in DATASETS if name != "two-moons"]  # a test of the docs registers that one
IMAGE_SETS = [name for name in NAMES if name not in ("shakespeare", "heart-disease")]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch):
    install_fakes(monkeypatch)


def load(name: str, root: Path, seed: int = 0) -> Federation:
    return load_federation(name, root=root, seed=seed, **SMALL.get(name, {}))


def digest(federation: Federation) -> str:
    """Return a hash of every tensor, id and role."""
    total = hashlib.sha256(repr((federation.client_ids, federation.roles)).encode())
    for index in range(len(federation)):
        data = federation.client(index)
        for tensor in (*data.support, *data.query):
            total.update(tensor.numpy().tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_the_spec_without_data_equals_the_data_really_produced(name, small_data):
    federation = load(name, small_data)
    options = {k: v for k, v in SMALL.get(name, {}).items() if k != "num_clients"}
    spec = dataset_spec(name, **options)
    assert spec == federation.spec
    for index in range(len(federation)):
        data = federation.client(index)
        for inputs, targets in (data.support, data.query):
            assert inputs.shape[1:] == spec.input_shape
            assert inputs.dtype == getattr(torch, spec.input_dtype)
            assert targets.dtype == torch.int64
            assert targets.shape == inputs.shape[:1]
            assert len(targets) >= 1
            assert 0 <= targets.min() <= targets.max() < spec.num_classes
            assert bool(torch.isfinite(inputs).all())
            if spec.input_dtype == "int64":
                assert 0 <= inputs.min() <= inputs.max() < spec.num_classes


@pytest.mark.parametrize("name", IMAGE_SETS)
def test_images_lie_between_0_and_1_and_use_the_range(name, small_data):
    federation = load(name, small_data)
    images = torch.cat([federation.client(i).all[0] for i in range(len(federation))])
    assert images.min() == 0
    assert images.max() == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_split_is_fixed_where_the_data_and_not_chance_decide_it(name, small_data):
    data = load(name, small_data).client(0)
    assert data.fixed_split == (name in ("shakespeare", "heart-disease"))
    assert data.to("cpu").fixed_split == data.fixed_split


@pytest.mark.parametrize("name", NAMES)
def test_every_role_has_a_client_and_ids_are_sorted_and_unique(name, small_data):
    federation = load(name, small_data)
    assert list(federation.client_ids) == sorted(set(federation.client_ids))
    counts = federation.counts()
    assert min(counts.values()) >= 1
    assert sum(counts.values()) == len(federation)
    for role, count in counts.items():
        assert len(federation.indices(role)) == count
        assert all(federation.roles[i] == role for i in federation.indices(role))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_federation_and_another_seed_another(name, small_data):
    assert digest(load(name, small_data)) == digest(load(name, small_data))
    assert digest(load(name, small_data)) != digest(load(name, small_data, seed=1))


@pytest.mark.parametrize("name", NAMES)
def test_a_loader_leaves_global_random_state_alone_and_ignores_it(name, small_data):
    def state() -> bytes:
        of_numpy = np.random.get_state()  # noqa: NPY002  what this test is about
        return pickle.dumps((random.getstate(), of_numpy, torch.get_rng_state().tolist()))

    before, first = state(), digest(load(name, small_data))
    assert state() == before
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002  the global state is what this test is about
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        assert digest(load(name, small_data)) == first


@pytest.mark.parametrize("name", IMAGE_SETS)
def test_no_image_is_in_two_clients_nor_in_support_and_query(name, small_data):
    federation = load(name, small_data)  # all images of a stand-in differ, and all of digits
    images = torch.cat([federation.client(i).all[0] for i in range(len(federation))])
    assert len({image.numpy().tobytes() for image in images}) == len(images)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "digits"])
def test_a_missing_file_is_named_with_its_whole_path_and_a_way_to_get_it(name, tmp_path):
    with pytest.raises(MissingDataError) as caught:
        load_federation(name, root=tmp_path)
    message = str(caught.value)
    assert f"is not at {tmp_path}" in message
    assert "METABLOOM_DATA" in message
    assert "download=True" in message or "karpathy" in message or "UCI" in message


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_refused_before_any_file_is_opened(name, tmp_path):
    with pytest.raises(ConfigError, match=f"option of data set '{name}' 'colour'"):
        load_federation(name, root=tmp_path, colour=3)
    with pytest.raises(ConfigError, match=f"option of data set '{name}' 'colour'"):
        dataset_spec(name, colour=3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("digits", {"ways": 1}),
        ("digits", {"ways": 11}),
        ("digits", {"shots": -1}),
        ("digits", {"support_fraction": float("nan")}),
        ("omniglot", {"ways": 1}),
        ("omniglot", {"shots": 0}),
        ("omniglot", {"query_shots": 0}),
        ("omniglot", {"image_size": 0}),
        ("mnist", {"alpha": 0}),
        ("mnist", {"alpha": float("nan")}),
        ("mnist", {"alpha": float("inf")}),
        ("mnist", {"partition": "dirichelt"}),
        ("mnist", {"classes_per_client": 11}),
        ("shakespeare", {"stride": 0}),
        ("shakespeare", {"max_windows": 1}),
        ("shakespeare", {"sequence_length": "long"}),
        ("heart-disease", {"support_fraction": 1}),
    ],
)
def test_an_option_out_of_range_is_refused_by_name_and_value(name, options):
    (option, value), *_ = options.items()
    with pytest.raises(ConfigError) as caught:
        dataset_spec(name, **options)
    assert f"option {option} = {value!r}" in str(caught.value)


def test_an_unknown_data_set_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'omniglot'"):
        load_federation("omnigolt")


@pytest.mark.parametrize("bad", [{"seed": -1}, {"num_clients": -2}, {"num_clients": 2.5}])
def test_a_seed_or_number_of_clients_that_cannot_be_is_refused(bad):
    with pytest.raises(ConfigError, match="whole number of at least 0"):
        load_federation("digits", **bad)


def test_importing_the_federations_loads_no_heavy_library():
    import subprocess
    import sys

    heavy = ("sklearn", "datasets", "flwr_datasets", "pandas", "torchvision", "PIL")
    code = (
        "import sys, metabloom.sim.federation, metabloom.sim.datasets.digits;"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_loader_takes_keywords_only():
    for name in NAMES:
        for parameter in inspect.signature(DATASETS[name].load).parameters.values():
            assert parameter.kind is parameter.KEYWORD_ONLY, (name, parameter)
