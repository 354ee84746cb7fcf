"""Who is in which group, what a member counts, and who takes part in a round."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from metabloom.client_app import properties
from metabloom.config import RunConfig
from metabloom.errors import ConfigError
from metabloom.strategies import GroupReptile, Reply
from metabloom.strategies.groups import gathered, group_of, groups_in, sampled, shares
from tests.strategies.toy import Toy, start

FEW = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1, "eval_every": 0}
reproducible = settings(max_examples=60, deadline=None, derandomize=True, database=None)


# --- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("client", "told", "groups", "wanted"),
    [
        ("Greek/chars-01-05/drawers-07-12", "", {}, "Greek"),
        ("ward-3", "north", {}, "north"),
        ("Greek/a", "north", {}, "north"),  # a node's own word before its name
        ("Greek/a", "north", {"Greek/a": "south"}, "south"),  # the file before all else
        ("ward-3", "", {"ward-4": "south"}, ""),
    ],
)
def test_a_group_is_known_by_file_word_or_name(client, told, groups, wanted):
    assert group_of(client, told, groups) == wanted


def test_a_node_says_the_group_of_its_own_configuration():
    config = RunConfig.read({"num-clients": 10, "device": "cpu"})

    def told(**own):
        place = {"partition-id": 0, "num-partitions": 10, **own}
        return properties(Context(1, 0, place, RecordDict(), config.to_flower()))

    assert told(group="north")["group"] == "north"
    assert "group" not in told()


def test_a_file_says_the_group_of_each_client(tmp_path: Path):
    file = tmp_path / "groups.json"
    file.write_text(json.dumps({"a": "x", "b": "y"}))
    assert groups_in(str(file)) == {"a": "x", "b": "y"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[1, 2]", "by its name is needed"),
        ('{"a": 3}', "by its name is needed"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_remedy(content, said, tmp_path: Path):
    file = tmp_path / "groups.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=rf"groups = '.*groups\.json'.*{said}"):
        GroupReptile(groups=str(file))


def test_what_has_one_key_is_gathered_in_its_order():
    assert gathered("abcde", [1, 2, 1, 3, 2]) == {1: ["a", "c"], 2: ["b", "e"], 3: ["d"]}


# --- shares --------------------------------------------------------------------------------------

COUNTS = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=5), min_size=1, max_size=5)


@reproducible
@given(counts=COUNTS)
@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("task_weight", ["uniform", "examples"])
def test_shares_are_the_product_of_two_levels(weighting, task_weight, counts):
    groups = [[Reply({}, n) for n in members] for members in counts]
    found = shares(groups, weighting=weighting, task_weight=task_weight)
    total = sum(map(sum, counts))
    for own, members in zip(found, counts, strict=True):
        whole = 1 / len(counts) if task_weight == "uniform" else sum(members) / total
        for share, n in zip(own, members, strict=True):
            part = 1 / len(members) if weighting == "uniform" else n / sum(members)
            assert share == pytest.approx(whole * part, rel=1e-12)
    assert sum(map(sum, found)) == pytest.approx(1.0)


def test_by_examples_at_both_levels_the_groups_do_not_matter():
    counts = [[3, 5], [2], [7, 1, 4]]
    groups = [[Reply({}, n) for n in members] for members in counts]
    found = shares(groups, weighting="examples", task_weight="examples")
    assert np.concatenate(found).tolist() == pytest.approx([n / 22 for n in (3, 5, 2, 7, 1, 4)])


# --- samples -------------------------------------------------------------------------------------


@reproducible
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    size=st.integers(1, 20),
    most=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_a_sample_takes_whole_groups_but_for_the_last(sizes, size, most, seed):
    groups = [[(i, j) for j in range(count)] for i, count in enumerate(sizes)]
    found = sampled(groups, size, most, np.random.default_rng(seed))
    room = sum(min(count, most or count) for count in sizes)
    assert len(found) == len(set(found)) == min(size, room)
    per_group = Counter(i for i, _ in found)
    full = {i: min(sizes[i], most or sizes[i]) for i in per_group}
    assert sum(per_group[i] < full[i] for i in per_group) <= 1


def in_groups(groups: str) -> Toy:
    """Return clients whose names begin with their group."""

    class Named(Toy):
        def _answer_roll_call(self, message, context):
            reply = super()._answer_roll_call(message, context)
            place = int(context.node_config["partition-id"])
            said = reply.content["properties"]
            said["client-name"], said["role"] = f"{groups[place]}/c{place}", "train"
            return reply

    return Named(roles=("train",) * len(groups))


def cohorts(groups: str, /, rounds: int = 6, **shell) -> list[Counter]:
    strategy = GroupReptile(**{**FEW, **shell})
    result = start(strategy, in_groups(groups), nodes=len(groups), rounds=rounds)
    return [Counter(name[0] for name in report.clients) for report in result.rounds]


def test_a_round_is_of_whole_groups():
    found = cohorts("aaabbbcccddd", clients_per_round=6)
    assert all(sorted(cohort.values()) == [3, 3] for cohort in found)
    assert len({tuple(sorted(cohort)) for cohort in found}) > 1
    assert found == cohorts("aaabbbcccddd", clients_per_round=6)
    assert found != cohorts("aaabbbcccddd", clients_per_round=6, seed=1)


def test_group_size_lets_more_groups_take_part():
    found = cohorts("aaabbbcccddd", clients_per_round=6, group_size=2)
    assert all(sorted(cohort.values()) == [2, 2, 2] for cohort in found)
    everyone = cohorts("aaabbbcccddd", clients_per_round=100, group_size=2)
    assert all(sorted(cohort.values()) == [2] * 4 for cohort in everyone)


def test_a_file_that_knows_not_all_clients_is_told_once(tmp_path: Path, caplog):
    file = tmp_path / "groups.json"
    file.write_text(json.dumps({"a/c0": "x", "b/c1": "x"}))
    cohorts("abc", groups=str(file))
    assert caplog.text.count("groups name no group of 1 clients: c/c2") == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"group_size": -1}, "group_size = -1"),
        ({"weighting": "exmaples"}, "did you mean 'examples'"),
        ({"task_weight": "uniforn"}, "did you mean 'uniform'"),
        ({"rounds": 0}, "rounds = 0 of a group"),
        ({"eval_steps": (5, 1)}, r"eval_steps = \(5, 1\)"),
        ({"eval_steps": (0, 1)}, r"eval_steps = \(0, 1\)"),
    ],
)
def test_what_cannot_work_is_refused_by_name(wrong, said):
    with pytest.raises(ConfigError, match=said):
        GroupReptile(**wrong)
