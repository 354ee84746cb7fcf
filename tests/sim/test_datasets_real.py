"""The real data sets hold what is known about them."""

import numpy as np
import pytest

from metabloom.sim import load_federation

pytestmark = pytest.mark.real_data


def test_mnist_has_539_writers_with_19_to_131_images_each(data_root):
    federation = load_federation("mnist-writers", root=data_root)
    sizes = np.array([len(own.targets) for own in federation._records])
    assert len(federation) == 539
    assert federation.dropped == 0
    assert (sizes.sum(), sizes.min(), sizes.max()) == (60_000, 19, 131)
    assert (sizes >= 100).sum() == 440
    assert sum(len(np.unique(own.targets)) == 10 for own in federation._records) == 536
    assert federation.counts() == {"train": 431, "validation": 54, "unseen": 54}
    data = federation.client(int(sizes.argmin()))
    assert (len(data.support[1]), len(data.query[1])) == (4, 15)


def test_omniglot_holds_400_tasks_whose_unseen_alphabets_are_the_evaluation_ones(data_root):
    federation = load_federation("omniglot", root=data_root)
    assert federation.counts() == {"train": 320, "validation": 40, "unseen": 40}
    folder = data_root / "omniglot" / "omniglot-py"
    evaluation = {path.name for path in (folder / "images_evaluation").iterdir()}
    assert len(evaluation) == 20
    alphabets = {
        role: {federation.client_ids[i].split("/")[0] for i in federation.indices(role)}
        for role in ("train", "validation", "unseen")
    }
    assert alphabets["unseen"] <= evaluation
    assert not (alphabets["train"] | alphabets["validation"]) & evaluation
    assert not alphabets["train"] & alphabets["validation"]
    assert len(alphabets["validation"]) == 5


def test_no_omniglot_file_is_in_two_clients(data_root):
    federation = load_federation("omniglot", root=data_root)
    names = [name for own in federation._records for name in own.inputs.args[1]]
    assert len(names) == len(set(names)) == 400 * 30
    data = federation.client(0)
    assert data.support[0].shape == (5, 1, 28, 28)
    assert 0.01 < data.all[0].mean() < 0.15  # thin strokes of ink


def test_twenty_way_five_shot_omniglot_fits(data_root):
    federation = load_federation("omniglot", root=data_root, ways=20, shots=5, query_shots=5)
    assert min(federation.counts().values()) >= 5
    assert federation.client(0).support[0].shape == (100, 1, 28, 28)


@pytest.mark.parametrize("partition", ["dirichlet", "pathological", "iid"])
def test_fashion_mnist_is_divided_whole_between_100_clients(data_root, partition):
    federation = load_federation("fashion-mnist", root=data_root, partition=partition)
    assert len(federation) + federation.dropped == 100
    rows = sum(len(own.targets) for own in federation._records)
    assert rows == 60_000 or federation.dropped


def test_shakespeare_has_309_roles_and_unknown_characters_are_rare(data_root):
    federation = load_federation("shakespeare", root=data_root)
    assert len(federation) + federation.dropped == 309
    assert len(federation) == 141
    targets = np.concatenate([own.targets for own in federation._records])
    assert (targets == 80).mean() < 1e-3
    for min_characters, count in ((500, 180), (2000, 99)):
        assert len(
            load_federation("shakespeare", root=data_root, min_characters=min_characters)
        ) == pytest.approx(count, abs=4)


def test_heart_disease_has_four_hospitals_with_the_known_rates(data_root):
    federation = load_federation("heart-disease", root=data_root)
    assert federation.client_ids == ("cleveland", "hungarian", "switzerland", "va")
    everyone = [federation.client(i).all for i in range(4)]
    assert [len(targets) for _, targets in everyone] == [303, 294, 123, 200]
    rates = [100 * float(targets.float().mean()) for _, targets in everyone]
    assert rates == pytest.approx([45.9, 36.1, 93.5, 74.5], abs=0.05)  # given to one decimal
    assert not any(inputs.isnan().any() for inputs, _ in everyone)
