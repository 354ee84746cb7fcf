"""Public records: one fingerprint, one choice of rows at both ends, and where records come from."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metabloom.config import RunConfig
from metabloom.errors import ConfigError, DataError, MissingDataError, WireError
from metabloom.public import PublicData, check_agrees, fingerprint_of, held_out_rows
from metabloom.sim import DataSpec, dataset_spec, load_federation, public_sources
from metabloom.sim.datasets._torchvision import VisionSet, train_images
from metabloom.sim.datasets.label_skew import VISION_SETS
from metabloom.sim.public_sources import check_kind, fit_images, load_public
from metabloom.task import federation_of, public_of

from .synthetic_data import IMAGES, install_fakes

MNIST = DataSpec((1, 28, 28), 10, "cnn")
CHARACTERS = DataSpec((5,), 60, "char-lstm", input_dtype="int64")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch):
    install_fakes(monkeypatch)


def load(kind, root=None, *, spec=MNIST, size=20, seed=0, dataset="mnist"):
    return load_public(kind, spec, size=size, seed=seed, dataset=dataset, root=root)


def numbered(count=10):
    """Return public records that are their own numbers."""
    return PublicData.of("numbered", torch.arange(float(count))[:, None])


# --- fingerprints ---------------------------------------------------------------------------------


def tells_all_but_the_layout(fingerprint_of):
    base = torch.arange(12.0).reshape(3, 4)
    same = [base.clone(), base.T.contiguous().T, torch.arange(24.0)[::2].div(2).reshape(3, 4)]
    assert [t.stride() for t in same] == [(4, 1), (1, 3), (4, 1)]
    one_bit = base.clone()
    one_bit[2, 3] = np.nextafter(np.float32(11), np.float32(12)).item()
    others = [
        base.reshape(4, 3),
        base.reshape(3, 4, 1),
        base.double(),
        base.view(torch.int32),  # the same bytes
        base.flip(0),
        base[:2],
        one_bit,
    ]
    assert {fingerprint_of(t) for t in same} == {fingerprint_of(base)}
    assert len({fingerprint_of(t) for t in [base, *others]}) == 8


def test_a_fingerprint_tells_all_but_the_layout_in_memory():
    tells_all_but_the_layout(fingerprint_of)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t: t.numpy().tobytes(),  # no shape, no dtype
        lambda t: (t.shape, t.numpy().tobytes()),  # no dtype
        lambda t: (t.dtype, t.shape, t.sum().item()),  # order does not count
        lambda t: (t.dtype, t.shape, t.stride(), t.numpy().tobytes()),
    ],
)
def test_a_fingerprint_of_less_or_more_breaks_the_law(wrong):
    with pytest.raises(AssertionError):
        tells_all_but_the_layout(wrong)


def test_a_fingerprint_stays_the_same_over_versions():
    """Both ends may run different ones: blake2b of "('torch.float32', (1, 2))" and 0.0, 1.0."""
    assert fingerprint_of(torch.tensor([[0.0, 1.0]])) == "ad6acd48a76f61a032885512a4482731"


def test_bfloat16_has_a_fingerprint():
    assert fingerprint_of(torch.ones(2, 2).bfloat16()) != fingerprint_of(torch.ones(2, 2).half())


def test_ends_that_differ_are_told_both_fingerprints():
    check_agrees("abc", "abc")
    with pytest.raises(
        WireError, match=r"'abc' here, 'abd' at the other end.*size, seed and files"
    ):
        check_agrees("abc", "abd")
    with pytest.raises(WireError) as caught:
        check_agrees("abc", "x" * 10_000)  # others wrote it
    assert len(str(caught.value)) < 500


# --- rows -----------------------------------------------------------------------------------------


@given(st.integers(2, 60), st.data())
@settings(deadline=None, max_examples=60)
def test_rows_held_out_and_rows_left_are_all_rows_and_share_none(total, data):
    size = data.draw(st.integers(1, total - 1))
    public, left = held_out_rows(total, size, seed=data.draw(st.integers(0, 5)))
    assert len(public) == size
    assert sorted([*public, *left]) == list(range(total))
    assert all((np.diff(rows) > 0).all() for rows in (public, left))


def test_rows_follow_from_the_seed_and_the_round_alone():
    def rows(seed, server_round):
        return tuple(numbered(100).subset(server_round, 10, seed).tolist())

    assert rows(0, 3) == rows(0, 3)
    assert len({rows(seed, number) for seed in range(3) for number in range(5)}) == 15
    held = [tuple(held_out_rows(100, 10, seed)[0]) for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2]
    # Rounds together reach every record.
    assert {i for number in range(60) for i in rows(0, number)} == set(range(100))


def test_a_subset_has_so_many_different_records_in_order():
    for size in (1, 7, 10):
        rows = numbered(10).subset(1, size, seed=4)
        assert len(set(rows.tolist())) == size
        assert rows.tolist() == sorted(rows)


@pytest.mark.parametrize("size", [0, -1, 11])
def test_more_rows_than_there_are_and_none_are_refused(size):
    with pytest.raises(DataError, match=rf"size = {size}: must be from 1 to 10"):
        numbered(10).subset(1, size, seed=0)
    with pytest.raises(DataError, match=rf"hold out: size = {size}: must be from 1 to 10"):
        held_out_rows(11, size, seed=0)


@pytest.mark.parametrize("form", [list, np.array, torch.tensor, lambda i: np.array(i, np.uint8)])
def test_a_batch_holds_the_records_asked_for_in_their_order(form):
    assert numbered().batch(form([3, 0, 9, 3])).tolist() == [[3], [0], [9], [3]]
    public = PublicData.of("x", torch.arange(4.0)[:, None], torch.tensor([5, 6, 7, 8]))
    inputs, targets = public.labelled_batch(form([2, 1]))
    assert (inputs.tolist(), targets.tolist()) == ([[2], [1]], [7, 6])
    assert numbered().batch([]).shape == (0, 1)


@pytest.mark.parametrize("rows", [[-1], [10], [0.0], [True] + [False] * 9, [[1]], 3])
def test_indices_that_are_none_are_refused(rows):
    with pytest.raises(DataError, match="whole numbers from 0 to 9"):
        numbered().batch(rows)


def test_records_without_targets_give_no_labelled_batch():
    with pytest.raises(DataError, match="'numbered' have no targets"):
        numbered().labelled_batch([0])


@pytest.mark.parametrize(
    ("inputs", "targets", "words"),
    [
        (torch.zeros(0, 3), None, r"shape \(0, 3\)"),
        (torch.zeros(3), None, r"shape \(3,\)"),
        (torch.tensor([[float("nan")]]), None, "NaN or infinity"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), "2 int64 classes"),
        (torch.zeros(2, 3), torch.zeros(2), r"torch\.float32"),
    ],
)
def test_records_that_cannot_be_used_are_refused(inputs, targets, words):
    with pytest.raises(DataError, match=f"public data 'x' .*{words}"):
        PublicData.of("x", inputs, targets)


# --- sources --------------------------------------------------------------------------------------


def test_held_out_records_are_those_that_the_clients_lose(small_data):
    images, labels = train_images("mnist", VISION_SETS["mnist"], root=small_data, download=False)
    public = load("held-out", small_data, size=50, seed=3)
    rows, left = held_out_rows(IMAGES, 50, seed=3)
    assert np.array_equal(public.inputs.numpy(), images[rows].astype(np.float32) / 255)
    assert np.array_equal(public.targets.numpy(), labels[rows])
    # The images are random: no image that is left is one of those held out.
    seen = {images[row].tobytes() for row in rows}
    assert not any(images[row].tobytes() in seen for row in left)


def test_a_federation_gives_none_of_the_held_out_records_to_a_client(small_data):
    """Each record of the whole set is a client's or public, never both."""
    options = {"root": small_data, "seed": 3, "num_clients": 3, "partition": "iid"}

    def records(federation):
        sets = [federation.client(index).all[0] for index in range(len(federation))]
        return Counter(row.numpy().tobytes() for row in torch.cat(sets))

    public = load_public(
        "held-out", dataset_spec("mnist"), size=8, seed=3, dataset="mnist", root=small_data
    )
    whole, left = (
        records(load_federation("mnist", **options, **more)) for more in ({}, {"held_out": 8})
    )
    aside = Counter(row.numpy().tobytes() for row in public.inputs)
    assert whole - aside == left
    assert aside.total() == 8


def test_the_federation_of_a_run_leaves_out_what_its_strategy_holds_out(small_data):
    keys = {"dataset": "mnist", "data-root": str(small_data), "num-clients": 3, "public-size": 8}
    sizes = {}
    for strategy in ("fedavg", "feddf"):
        federation = federation_of(RunConfig.read({**keys, "strategy": strategy}))
        sizes[strategy] = sum(len(federation.client(i).all[1]) for i in range(len(federation)))
    assert sizes["feddf"] == sizes["fedavg"] - 8
    assert len(public_of(RunConfig.read({**keys, "strategy": "feddf"}))) == 8


def test_another_set_is_made_to_fit_and_has_no_targets(small_data):
    public = load("dataset:fashion-mnist", small_data)
    source = VISION_SETS["fashion-mnist"]
    images, _ = train_images("fashion-mnist", source, root=small_data, download=False)
    levels = {image.tobytes() for image in images}
    assert all(image.astype(np.uint8).tobytes() in levels for image in public.inputs.numpy() * 255)
    assert (public.name, public.targets) == ("dataset:fashion-mnist", None)
    small = DataSpec((1, 15, 15), 5, "mlp")
    assert load("dataset:fashion-mnist", small_data, spec=small).inputs.shape == (20, 1, 15, 15)
    colours = DataSpec((3, 32, 32), 10, "cnn")
    assert load("dataset:kmnist", small_data, spec=colours).inputs.shape == (20, 3, 32, 32)
    assert load("dataset:cifar10", small_data).inputs.shape == (20, 1, 28, 28)


def test_images_keep_every_level_where_the_shape_fits():
    images = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    found = fit_images(images, DataSpec((1, 16, 16), 2, "cnn"))
    assert (found.numpy() == images.astype(np.float32) / 255).all()


def test_images_of_one_colour_stay_that_colour():
    grey = fit_images(np.full((1, 1, 20, 20), 51, np.uint8), DataSpec((3, 9, 7), 2, "cnn"))
    assert grey.shape == (1, 3, 9, 7)
    assert grey.unique().tolist() == [pytest.approx(0.2)]
    green = np.zeros((1, 3, 4, 4), np.uint8)
    green[:, 1] = 100
    luminance = fit_images(green, DataSpec((1, 4, 4), 2, "cnn"))
    assert luminance.unique().tolist() == [pytest.approx(59 / 255)]  # .587 * 100, rounded


def test_halving_an_image_averages_its_pixels():
    """A law of the antialiased filter: no pixel is skipped, as the plain bilinear one would."""
    images = np.zeros((1, 1, 8, 8), np.uint8)
    images[..., ::4] = 240  # one column in four: of two columns the plain filter sees one
    found = fit_images(images, DataSpec((1, 8, 2), 2, "cnn"))
    assert found.mean().item() == pytest.approx(60 / 255, abs=6 / 255)
    assert found.min() > 0.1


@pytest.mark.parametrize("kind", ["held-out", "dataset:kmnist", "noise", "smooth-noise"])
def test_one_seed_gives_one_set_at_both_ends_and_another_seed_another(kind, small_data):
    ours, theirs = load(kind, small_data), load(kind, small_data)
    check_agrees(ours.fingerprint, theirs.fingerprint)
    assert ours.fingerprint == fingerprint_of(ours.inputs)
    assert load(kind, small_data, seed=1).fingerprint != ours.fingerprint
    assert (len(ours), ours.name) == (20, kind)
    assert ours.inputs.dtype == torch.float32
    assert ours.inputs.shape[1:] == (1, 28, 28)
    assert ours.inputs.min() >= 0
    assert ours.inputs.max() <= 1


def test_noise_is_uniform_and_of_ids_for_characters():
    values = load("noise", size=50).inputs
    assert values.mean().item() == pytest.approx(0.5, abs=0.01)  # 39,200 of them: sd .0015
    assert values.var().item() == pytest.approx(1 / 12, abs=0.005)
    ids = load("noise", spec=CHARACTERS, size=500).inputs
    assert (ids.dtype, ids.shape) == (torch.int64, (500, 5))
    assert set(ids.unique().tolist()) == set(range(60))


def test_smooth_noise_is_smooth_and_uses_the_range():
    def roughness(images):
        return (images[..., 1:] - images[..., :-1]).abs().mean()

    smooth, rough = (load(kind, size=30).inputs for kind in ("smooth-noise", "noise"))
    assert roughness(smooth) < roughness(rough) / 3
    assert smooth.amin((1, 2, 3)).tolist() == [0] * 30
    assert smooth.amax((1, 2, 3)).tolist() == [1] * 30
    assert torch.equal((smooth * 255).round() / 255, smooth)  # the levels of an image
    tiny = load("smooth-noise", spec=DataSpec((3, 1, 5), 2, "cnn")).inputs
    assert tiny.shape == (20, 3, 1, 5)


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dataset", "words"),
    [
        ("held_out", "mnist", "unknown kind of public data 'held_out': did you mean 'held-out'"),
        ("", "mnist", "unknown kind"),
        ("dataset:NAME", "mnist", "unknown torchvision data set 'NAME'"),
        ("dataset:fashion", "mnist", "did you mean 'fashion-mnist'"),
        ("dataset:mnist", "mnist", "are the records of the clients of 'mnist': use 'held-out'"),
        ("dataset:mnist", "mnist-writers", "are the records of the clients"),
        ("held-out", "shakespeare", "'held-out' of data set 'shakespeare': .*cifar10"),
    ],
)
def test_a_kind_that_cannot_work_is_refused_before_a_file_is_read(kind, dataset, words):
    for function in (check_kind, lambda kind, dataset: load(kind, "/nowhere", dataset=dataset)):
        with pytest.raises(ConfigError, match=words):
            function(kind, dataset)


def test_kinds_that_can_work_are_not_refused():
    for kind in ("held-out", "dataset:mnist", "noise", "smooth-noise"):
        check_kind(kind, "fashion-mnist")


def test_images_for_a_model_of_characters_are_refused(small_data):
    for kind in ("smooth-noise", "dataset:kmnist"):
        with pytest.raises(ConfigError, match=r"takes int64 of shape \(5,\).*use 'noise'"):
            load(kind, small_data, spec=CHARACTERS)


def test_channels_that_cannot_become_each_other_are_refused():
    with pytest.raises(ConfigError, match="images of 1 channels cannot be made images of 4"):
        fit_images(np.zeros((1, 1, 4, 4), np.uint8), DataSpec((4, 4, 4), 2, "cnn"))


def test_more_records_than_the_set_has_are_refused(small_data):
    with pytest.raises(DataError, match=f"size = {IMAGES + 1}, but the set has {IMAGES}"):
        load("dataset:kmnist", small_data, size=IMAGES + 1)
    with pytest.raises(DataError, match=f"must be from 1 to {IMAGES - 1}"):
        load("held-out", small_data, size=IMAGES)


@pytest.mark.parametrize("size", [0, -1, True, 2.5])
def test_a_size_that_is_no_count_is_refused(size):
    with pytest.raises(ConfigError, match="a whole number of at least 1"):
        load("noise", size=size)


def test_files_that_are_missing_are_named(tmp_path):
    with pytest.raises(MissingDataError, match="train-images-idx3-ubyte"):
        load("dataset:kmnist", tmp_path)


def test_every_vision_set_can_be_public():
    assert set(VISION_SETS) == {"mnist", "fashion-mnist", "kmnist", "cifar10", "cifar100"}
    assert all(isinstance(VISION_SETS[name], VisionSet) for name in VISION_SETS)
    assert public_sources.VISION_SETS is VISION_SETS


@pytest.mark.real_data
def test_fashion_images_are_public_for_digits(data_root):
    spec = dataset_spec("mnist")
    public = load("dataset:fashion-mnist", data_root, spec=spec, size=4000)
    assert public.inputs.shape == (4000, 1, 28, 28)
    assert public.inputs.mean().item() == pytest.approx(0.286, abs=0.01)  # of the whole set
