"""What is too heavy in the whole round is never in a sum: the verdict can still be carried out."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metabloom.sim import CohortGrid
from metabloom.strategies import Firewall
from metabloom.strategies.shell.firewall import sift
from metabloom.strategies.shell.partial_sums import light
from tests.strategies.summing_grid import KEY, asked_and_answered
from tests.strategies.toy import Toy

SENT = {"w": np.zeros(2, np.float32)}


@pytest.fixture(autouse=True, scope="module")
def running_task() -> None:
    """Set the identity of a running task, without which Flower makes no messages."""
    CohortGrid(Toy().app(), num_nodes=1)


plain = st.sampled_from([1.0, 2.0, 3.0, 5.0, 9.0, 10.0, 30.0, 90.0, 91.0, 1e3, 1e6]) | st.floats(
    1e-6, 1e9
)
cuts = st.lists(st.integers(1, 13))
bounds = st.sampled_from([0.1, 1 / 3, 0.5, 0.9, 1.0]) | st.floats(0.01, 1.0)


def verdicts(found: list[float], summed: Sequence[int], wall: Firewall) -> list[tuple[int, str]]:
    """Return the order of ``sift`` and its reasons; what is in a sum has no arrays."""
    replies = [
        asked_and_answered(i, {} if i in summed else SENT, weight, sent=SENT)[1]
        for i, weight in enumerate(found)
    ]
    good, bad = sift(replies, SENT, wall, KEY, None, {str(i) for i in summed})
    return [(int(one.message.metadata.reply_to_message_id), one.reason) for one in [*good, *bad]]


def left_in(found: list[float], blocks: Sequence[int], share: float, rule=light) -> list[int]:
    edges = sorted({0, *(b for b in blocks if b < len(found)), len(found)})
    return [
        begin + place
        for begin, end in itertools.pairwise(edges)
        for place in rule(found[begin:end], share)
    ]


@settings(max_examples=150, deadline=None)
@given(st.lists(plain, min_size=1, max_size=13), cuts, bounds)
def test_the_firewalls_verdicts_on_shares_are_those_of_single_replies(found, blocks, share):
    wall = Firewall(max_share=share)
    summed = left_in(found, blocks, share)
    whole = verdicts(found, (), wall)
    assert verdicts(found, summed, wall) == whole
    assert not {i for i, reason in whole if reason} & set(summed)


@settings(max_examples=400, deadline=None)
@given(st.lists(plain, min_size=1, max_size=13), st.lists(plain, max_size=13), bounds, st.randoms())
def test_whatever_other_blocks_hold_and_whatever_comes_first_the_light_stay(block, rest, share, r):
    """The loop of ``sift``, on weights alone."""
    kept = set(light(block, share))
    left = [*enumerate(block), *((-1, weight) for weight in rest)]
    r.shuffle(left)
    while len(left) >= 3:
        heaviest = max(weight for _, weight in left)
        if heaviest / sum(weight for _, weight in left) <= share:
            break
        place, _ = left.pop([weight for _, weight in left].index(heaviest))
        assert place not in kept


@pytest.mark.parametrize(
    ("block", "kept"),
    [
        ([1, 2, 3], [0, 1, 2]),
        ([1, 1, 100], [0, 1]),
        ([1, 1, 100, 10**4], [0, 1]),  # the second goes once the first is gone
        ([5, 90, 5], [0, 2]),  # at the bound, where rounding could decide: it goes on whole
        ([5, 89, 5], [0, 1, 2]),
        ([1, 100], []),  # with two others the last one could be too heavy as well
        ([7], []),
        ([], []),
    ],
)
def test_what_can_be_too_heavy_is_left_whole(block, kept):
    assert light(block, 0.9) == kept


def heaviest_once(found, share):
    """Only the heaviest is looked at: what is too heavy once it is gone is summed."""
    if not found or max(found) <= share * sum(found):
        return list(range(len(found)))
    return [i for i, weight in enumerate(found) if weight != max(found)]


def three_or_more(found, share):
    """As in the firewall, two are let be: but there are more in other blocks."""
    ascending = sorted(range(len(found)), key=found.__getitem__)
    while len(ascending) >= 3 and found[ascending[-1]] > share * sum(found[i] for i in ascending):
        ascending.pop()
    return sorted(ascending)


@pytest.mark.parametrize(
    ("wrong", "found", "blocks"),
    [
        (heaviest_once, [1.0, 100.0, 10_000.0, 1.0], [3]),
        (three_or_more, [1.0, 100.0, 1.0, 1.0], [2]),
    ],
)
def test_shares_judged_otherwise_are_caught(wrong, found, blocks):
    refused = {i for i, reason in verdicts(found, (), Firewall()) if reason}
    assert refused & set(left_in(found, blocks, 0.9, wrong))
    assert not refused & set(left_in(found, blocks, 0.9))
