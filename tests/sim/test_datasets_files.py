"""Each data set's own promises, on tiny synthetic files; and the embedded digits."""

import re

import numpy as np
import pytest
import torch

from metabloom.errors import ConfigError, DataError, MissingDataError
from metabloom.sim import dataset_spec, load_federation
from metabloom.sim.datasets import shakespeare
from metabloom.sim.datasets.heart_disease import encode

from .synthetic_data import WRITERS, install_fakes, write_omniglot, write_writers


def everything(federation) -> torch.Tensor:
    return torch.cat([federation.client(i).all[0] for i in range(len(federation))])


# digits


def test_digits_uses_each_of_the_1797_images_once():
    federation = load_federation("digits")
    images = everything(federation)
    assert len(images) == len({image.numpy().tobytes() for image in images}) == 1797
    assert federation.counts() == {"train": 48, "validation": 6, "unseen": 6}
    assert federation.dropped == 0


@pytest.mark.parametrize(("ways", "shots", "num_clients"), [(5, 2, 0), (3, 1, 40), (10, 5, 12)])
def test_digits_has_as_many_classes_and_shots_as_asked_for(ways, shots, num_clients):
    federation = load_federation("digits", ways=ways, shots=shots, num_clients=num_clients)
    for index in range(len(federation)):
        data = federation.client(index)
        assert data.support[1].bincount().tolist() == [shots] * ways
        assert data.query[1].unique().tolist() == list(range(ways))


def test_digits_renames_the_classes_differently_for_each_client():
    from sklearn.datasets import load_digits

    table = load_digits()
    digit_of = {
        (image / 16).astype(np.float32).tobytes(): digit
        for image, digit in zip(table.images, table.target, strict=True)
    }
    federation = load_federation("digits")
    names = set()
    for index in range(len(federation)):
        inputs, targets = federation.client(index).all
        pairs = {
            (int(target), int(digit_of[image.numpy().tobytes()]))
            for image, target in zip(inputs, targets, strict=True)
        }
        assert len(pairs) == len(dict(pairs)) == 5  # each class is one digit throughout
        names.add(tuple(digit for _, digit in sorted(pairs)))
    assert len(names) > 50
    assert any(tuple(sorted(order)) != order for order in names)


def test_digits_drops_and_counts_clients_with_too_few_of_a_class():
    whole = load_federation("digits", shots=4)
    some = load_federation("digits", shots=5)
    assert some.dropped > whole.dropped
    assert len(some) + some.dropped == 60
    with pytest.raises(DataError, match="rarest class"):
        load_federation("digits", shots=100)


@pytest.mark.parametrize("ways", [2, 5])
def test_digits_with_too_many_clients_names_the_number_and_the_largest_that_drops_none(ways):
    with pytest.raises(DataError) as caught:
        load_federation("digits", num_clients=5000, ways=ways)
    message = str(caught.value)
    assert "'digits' with num_clients = 5000" in message
    assert "limit" not in message  # an option that digits does not have
    assert ("lower ways" in message) == (ways > 2)  # 2 is the lowest
    largest = int(re.search(r"largest number that works, .* is (\d+)", message)[1])
    assert load_federation("digits", num_clients=largest, ways=ways).dropped == 0
    assert load_federation("digits", num_clients=largest + 1, ways=ways).dropped > 0


@pytest.mark.parametrize("count", [1, 2])
def test_digits_with_fewer_than_three_clients_names_the_number_and_the_remedy(count):
    with pytest.raises(DataError) as caught:
        load_federation("digits", num_clients=count)
    assert f"number of clients or nodes = {count}: at least 3 clients/nodes" in str(caught.value)
    assert "one each for train, validation, unseen" in str(caught.value)
    assert "Set num_clients to at least 3" in str(caught.value)


def test_digits_with_few_clients_leaves_classes_out_without_a_warning():
    assert len(load_federation("digits", num_clients=3, ways=2)) == 3


# mnist-writers


def test_mnist_writers_makes_each_writer_a_client_and_drops_one_with_a_single_image(small_data):
    federation = load_federation("mnist-writers", root=small_data)
    assert federation.client_ids == tuple(f"writer-{100 + i:04d}" for i in range(1, len(WRITERS)))
    assert federation.dropped == 1
    sizes = [federation.client(i).num_examples for i in range(len(federation))]
    assert sizes == WRITERS[1:]
    assert len(federation.client(0).support[1]) == 10  # a fifth of 49


def test_mnist_writers_refuses_labels_of_other_images(small_data, tmp_path):
    import shutil

    shutil.copytree(small_data / "mnist", tmp_path / "mnist")
    path = tmp_path / "mnist/QMNIST/raw/qmnist-train-labels-idx2-int"
    content = bytearray(path.read_bytes())
    content[12 + 3] ^= 1  # the class of row 0, big-endian, after a header of 12 bytes
    path.write_bytes(content)
    with pytest.raises(DataError, match="are not the 600 training labels"):
        load_federation("mnist-writers", root=tmp_path)


def test_mnist_writers_without_the_writer_file_names_it(small_data, tmp_path):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "MNIST").symlink_to(small_data / "mnist" / "MNIST")
    with pytest.raises(MissingDataError, match="qmnist-train-labels-idx2-int"):
        load_federation("mnist-writers", root=tmp_path)
    write_writers(tmp_path / "mnist" / "QMNIST" / "raw")
    assert len(load_federation("mnist-writers", root=tmp_path)) == len(WRITERS) - 1


# omniglot


def test_omniglot_never_trains_on_an_alphabet_that_validates_or_is_unseen(small_data):
    for seed in range(5):
        federation = load_federation("omniglot", root=small_data, seed=seed)
        alphabets = {
            role: {federation.client_ids[i].split("/")[0] for i in federation.indices(role)}
            for role in ("train", "validation", "unseen")
        }
        assert not alphabets["train"] & (alphabets["validation"] | alphabets["unseen"])
        assert alphabets["unseen"] <= {"Zayin", "Het", "Tet"}
        assert len(alphabets["validation"]) == 1


def test_omniglot_gives_the_same_from_zips_and_whatever_the_order_of_folders(small_data, tmp_path):
    write_omniglot(tmp_path / "backwards/omniglot/omniglot-py", backwards=True)
    write_omniglot(tmp_path / "zipped/omniglot/omniglot-py", zipped=True)
    first = load_federation("omniglot", root=small_data)
    for folder in ("backwards", "zipped"):
        other = load_federation("omniglot", root=tmp_path / folder)
        assert other.client_ids == first.client_ids
        for i in range(len(first)):
            assert torch.equal(other.client(i).all[0], first.client(i).all[0])
            assert torch.equal(other.client(i).all[1], first.client(i).all[1])


def test_omniglot_has_the_ways_shots_and_size_asked_for(small_data):
    federation = load_federation(
        "omniglot", root=small_data, ways=3, shots=2, query_shots=4, image_size=15
    )
    data = federation.client(0)
    assert data.support[0].shape == (6, 1, 15, 15)
    assert data.query[0].shape == (12, 1, 15, 15)
    assert data.support[1].bincount().tolist() == [2, 2, 2]
    assert data.query[1].bincount().tolist() == [4, 4, 4]


def test_omniglot_ink_is_bright_on_a_dark_background(small_data):
    federation = load_federation("omniglot", root=small_data)
    assert everything(federation).mean() < 0.2  # a tenth of the stand-ins' paper is ink


def test_omniglot_names_a_class_differently_in_two_clients_of_the_same_characters(small_data):
    from metabloom.sim.datasets.omniglot import Task, _find_images, _index, _records

    images = _find_images(small_data, download=False)
    files = _index(images.names("images_background"))
    assert list(files) != []
    orders = set()
    for first in range(1, 11):
        task = Task("images_background", "Bet", (1, 2, 3, 4, 5), (first, first + 1))
        decoded = _records(images, files, task, 0, 28).inputs.args[1]
        orders.add(tuple(name.split("/")[2] for name in decoded[::2]))
    assert len(orders) > 5


def test_omniglot_refuses_tasks_that_no_alphabet_can_fill(small_data):
    with pytest.raises(DataError, match="lower ways, shots or query_shots"):
        load_federation("omniglot", root=small_data, ways=7)
    with pytest.raises(DataError, match="needs 80 train clients"):
        load_federation("omniglot", root=small_data, num_clients=100)


# label skew


@pytest.mark.parametrize("partition", ["dirichlet", "pathological", "iid"])
def test_label_skew_gives_each_image_to_one_client(small_data, partition):
    options = {"num_clients": 10, "partition": partition, "classes_per_client": 3, "alpha": 5.0}
    federation = load_federation("fashion-mnist", root=small_data, **options)
    images = everything(federation)
    assert len({image.numpy().tobytes() for image in images}) == len(images) == 600
    if partition == "pathological":
        for i in range(10):
            assert len(federation.client(i).all[1].unique()) == 3


def test_a_smaller_alpha_skews_the_labels_more(small_data):
    def commonest_share(alpha: float) -> float:
        federation = load_federation("mnist", root=small_data, num_clients=10, alpha=alpha)
        counts = [federation.client(i).all[1].bincount() for i in range(len(federation))]
        return float(np.mean([float(count.max() / count.sum()) for count in counts]))

    assert commonest_share(0.1) > commonest_share(100.0) + 0.2


def test_a_limit_bounds_the_images(small_data):
    federation = load_federation(
        "mnist", root=small_data, num_clients=5, limit=100, partition="iid"
    )
    assert len(everything(federation)) == 100


def test_label_skew_drops_clients_that_dirichlet_left_almost_empty(small_data):
    federation = load_federation("mnist", root=small_data, num_clients=60, alpha=0.02)
    assert federation.dropped > 0
    assert len(federation) + federation.dropped == 60


def test_more_clients_than_images_is_a_data_error(small_data):
    told = r"num_clients = 700: its 600 images are too few.*is 300: lower num_clients$"
    with pytest.raises(DataError, match=told):
        load_federation("mnist", root=small_data, num_clients=700)
    assert len(load_federation("mnist", root=small_data, num_clients=300, alpha=100)) >= 3
    with pytest.raises(
        DataError, match=r"its 40 images .*is 20: lower num_clients or use more images \(limit\)"
    ):
        load_federation("mnist", root=small_data, num_clients=700, limit=40)


def test_labels_that_no_number_of_clients_can_divide_say_why(small_data):
    options = {"partition": "pathological", "classes_per_client": 9, "limit": 8}
    with pytest.raises(
        DataError, match=r"No number works \(.*num_classes_per_partition.*\): use more"
    ):
        load_federation("mnist", root=small_data, num_clients=4, **options)


# shakespeare


def test_shakespeare_query_begins_after_the_support_ends(small_data):
    length, fraction = 20, 0.4
    federation = load_federation(
        "shakespeare",
        root=small_data,
        sequence_length=length,
        stride=1,
        max_windows=5000,
        support_fraction=fraction,
    )
    texts = shakespeare.roles_of((small_data / "shakespeare/input.txt").read_text())
    for index, role in enumerate(federation.client_ids):
        ids = shakespeare.encode(texts[role])
        cut = round(len(ids) * fraction)
        data = federation.client(index)
        parts = ((data.support, ids[:cut]), (data.query, ids[cut:]))
        for (inputs, targets), text in parts:
            assert len(targets) == len(text) - length  # every window, and none over the edge
            assert np.array_equal(targets.numpy(), text[length:])
            assert np.array_equal(inputs[0].numpy(), text[:length])
            assert np.array_equal(inputs[-1].numpy(), text[-length - 1 : -1])


def test_shakespeare_drops_roles_with_too_little_text_and_counts_them(small_data):
    federation = load_federation("shakespeare", root=small_data, sequence_length=20)
    assert federation.client_ids == tuple(f"ROLE {i}" for i in range(7))
    assert federation.dropped == 1  # MESSENGER
    with pytest.raises(DataError, match="no role has min_characters = 1000000"):
        load_federation("shakespeare", root=small_data, min_characters=1_000_000)


def test_shakespeare_bounds_the_windows_and_spreads_them_over_the_text(small_data):
    options = {"sequence_length": 20, "max_windows": 10, "support_fraction": 0.5}
    data = load_federation("shakespeare", root=small_data, **options).client(0)
    assert (len(data.support[1]), len(data.query[1])) == (5, 5)
    text = shakespeare.roles_of((small_data / "shakespeare/input.txt").read_text())["ROLE 0"]
    last = "".join(shakespeare.VOCABULARY[i] for i in data.query[0][-1])
    assert text.rindex(last) > len(text) - 30


def test_shakespeare_knows_leafs_80_characters_and_one_id_for_all_others():
    assert len(set(shakespeare.VOCABULARY)) == 80
    assert dataset_spec("shakespeare").num_classes == 81
    assert shakespeare.encode("\n}$é").tolist() == [0, 79, 80, 80]


def test_shakespeare_refuses_a_text_too_short_for_a_window_on_both_sides(small_data):
    with pytest.raises(ConfigError, match="at least"):
        load_federation("shakespeare", root=small_data, sequence_length=600)


# heart-disease


def test_heart_disease_learns_nothing_from_the_query():
    rng = np.random.default_rng(0)
    low, high = np.array([(30, 80), (0, 2), (1, 5), (90, 200), (150, 300), (0, 2), (0, 3),
                          (80, 200), (0, 2), (0, 4), (1, 4), (0, 4), (6, 8), (0, 2)]).T  # fmt: skip
    table = rng.integers(low, high, (30, 14)).astype(float)
    table[3, [3, 12]] = np.nan
    before = encode(table, 20)
    changed = table.copy()
    changed[20:, [0, 3, 4, 7, 9, 11]] += 1000
    changed[25, 6] = np.nan
    assert np.array_equal(encode(changed, 20)[:20], before[:20])
    assert not np.array_equal(encode(changed, 20)[20:], before[20:])
    numeric = before[:20, :6]
    assert np.allclose(numeric.mean(0), 0, atol=1e-6)  # float32 of 20 sums of about 1
    assert np.allclose(numeric.std(0), 1, atol=1e-6)


def test_heart_disease_fills_a_wholly_missing_column_with_0_and_says_so_in_an_indicator(small_data):
    federation = load_federation("heart-disease", root=small_data)
    hungarian = federation.client(federation.client_ids.index("hungarian")).all[0]
    assert (hungarian[:, 5] == 0).all()  # ca, the sixth numeric column
    assert (hungarian[:, -2] == 1).all()  # its indicator: ca is the last but one
    switzerland = federation.client(federation.client_ids.index("switzerland")).all[0]
    assert (switzerland[:, 2] == 0).all()  # chol is 0 throughout, which no patient has
    assert (switzerland[:, -8] == 1).all()
    assert federation.counts() == {"train": 2, "validation": 1, "unseen": 1}


def test_heart_disease_with_another_number_of_columns_is_refused(small_data, tmp_path):
    folder = tmp_path / "heart_disease"
    folder.mkdir()
    (folder / "processed.cleveland.data").write_text("1,2,3\n")
    with pytest.raises(DataError, match="14 columns are needed"):
        load_federation("heart-disease", root=tmp_path)


# hub sets


def test_femnist_gives_each_writer_of_the_hub_set_its_own_images(small_data, monkeypatch):
    install_fakes(monkeypatch)
    federation = load_federation("femnist", root=small_data)
    assert federation.client_ids == tuple(f"f{i:04d}_14" for i in range(6))
    targets = sorted(federation.client(1).all[1].tolist())
    assert targets == sorted(i % 62 for i in range(90) if i % 6 == 1)


def test_a_hub_that_does_not_answer_is_missing_data(small_data, monkeypatch):
    import flwr_datasets.federated_dataset

    def no_network(*args: object, **options: object) -> None:
        raise ConnectionError("no route to the hub")

    hub = flwr_datasets.federated_dataset.datasets
    monkeypatch.setattr(hub, "load_dataset", no_network)
    with pytest.raises(MissingDataError, match="flwrlabs/femnist"):
        load_federation("femnist", root=small_data, download=True)


# downloads


def test_download_asks_torchvision_for_what_is_missing(tmp_path, monkeypatch):
    import torchvision.datasets

    asked = []

    def fetch(root: str, **options: object) -> None:
        asked.append((root, options))
        raise RuntimeError("no network here")

    for name in ("MNIST", "Omniglot", "CIFAR10"):
        monkeypatch.setattr(torchvision.datasets, name, fetch)
    for name in ("mnist-writers", "cifar10", "omniglot"):
        with pytest.raises(MissingDataError, match="no network here"):
            load_federation(name, root=tmp_path, download=True)
    assert [root for root, _ in asked] == [
        str(tmp_path / n) for n in ("mnist", "cifar10", "omniglot")
    ]
    assert all(options["download"] for _, options in asked)
