"""The reducer: whatever blocks there are, the mean is that of single replies."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from metabloom.errors import MetabloomError
from metabloom.sim import CohortGrid
from metabloom.strategies import (
    Firewall,
    Reply,
    Rule,
    interpolate,
    mean,
    median,
    multi_krum,
    server_optimizer,
    trimmed_mean,
)
from metabloom.strategies.rules import any_changed, weights_of
from metabloom.strategies.shell.firewall import clipped, judge, sift
from metabloom.strategies.shell.partial_sums import Part, PartialSums, answers_of, fingerprint
from metabloom.wire import size_of, to_record
from tests.strategies.summing_grid import KEY, asked_and_answered, copied
from tests.strategies.toy import Arrays, Toy

OPEN = Firewall(max_share=1.0)  # so that no reply is too heavy
SENT = {
    "w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "half": np.array([1.5], np.float16),
    "frozen": np.array([0.1, 0.7], np.float64),
    "scalar": np.array(0.3, np.float32),
    "counter": np.array(4),
}
pair = partial(asked_and_answered, sent=SENT)


@pytest.fixture(autouse=True, scope="module")
def running_task() -> None:
    """Set the identity of a running task, without which Flower makes no messages."""
    CohortGrid(Toy().app(), num_nodes=1)


def moved(seed: int, frozen: Sequence[str] = ("frozen",), sent: Arrays = SENT) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        name: value
        if name in frozen
        else np.asarray(value + rng.normal(size=value.shape)).astype(value.dtype)
        if value.dtype.kind == "f"
        else np.asarray(value + 1)
        for name, value in sent.items()
    }


def reducer(weighting: str = "examples", firewall: Firewall = OPEN) -> PartialSums:
    return PartialSums(firewall, KEY, "arrays", weighting, fingerprint(to_record(SENT)))


def reduced(pairs: list[tuple], blocks: Sequence[int], reduce) -> tuple[list[Part], list[Message]]:
    """Return the parts, and the replies as they travel; ``blocks`` are where blocks end."""
    parts, replies = [], []
    edges = sorted({0, *blocks, len(pairs)})
    for begin, end in itertools.pairwise(edges):
        block = copied(pairs[begin:end])
        part, contents = copied(copied(reduce)(block))
        if part is not None:
            parts.append(part)
        replies += [Message(c, reply_to=q) for c, (q, _) in zip(contents, block, strict=True)]
    return parts, replies


def answers(pairs: list[tuple], blocks: Sequence[int], reduce, wall: Firewall = OPEN):
    """Return what the rule sees of replies that were reduced."""
    parts, replies = reduced(pairs, blocks, reduce)
    summed = {message_id for part in parts for message_id in part.message_ids}
    good, _ = sift(replies, SENT, wall, KEY, None, summed)
    return answers_of(good, parts, SENT, wall, KEY)


def singles(pairs: list[tuple]) -> list[Reply]:
    good, _ = sift([reply for _, reply in pairs], SENT, OPEN, KEY)
    return answers_of(good, (), SENT, OPEN, KEY)


# --- the mean -------------------------------------------------------------------------------------

weights = st.lists(st.integers(1, 10**9) | st.floats(1e-3, 1e9), min_size=1, max_size=9)
WEIGHTINGS = ("examples", "uniform")


@settings(max_examples=60, deadline=None)
@given(weights, st.lists(st.integers(1, 9)), st.sampled_from(WEIGHTINGS), st.integers(0, 99))
def test_any_partition_into_blocks_gives_the_mean(counts, blocks, weighting, seed):
    pairs = [pair(i, moved(seed + i), count) for i, count in enumerate(counts)]
    found = answers(pairs, [b for b in blocks if b < len(pairs)], reducer(weighting))
    ours, whole = mean(SENT, found, weighting), mean(SENT, singles(pairs), weighting)
    for name in SENT:  # values below 5; nine float64 additions
        np.testing.assert_allclose(ours[name], whole[name], rtol=0, atol=1e-12)
    assert sum(one.clients for one in found) == len(pairs)
    assert sum(one.num_examples for one in found) == pytest.approx(sum(counts), rel=1e-12)
    assert not any_changed("frozen", SENT, found)
    assert any_changed("w", SENT, found)


def test_the_mean_of_a_block_is_the_one_worked_out_by_hand():
    values = [1.0, 2.0, 4.0]
    pairs = [
        pair(i, {**SENT, "w": np.full_like(SENT["w"], v)}, i + 1) for i, v in enumerate(values)
    ]
    for weighting, wanted in (("examples", (1 + 2 * 2 + 3 * 4) / 6), ("uniform", 7 / 3)):
        (part,), replies = reduced(pairs, (), reducer(weighting))
        assert list(part.arrays) == ["w"]  # nobody changed another one
        assert part.arrays["w"].dtype == np.float64
        np.testing.assert_allclose(part.arrays["w"], wanted, rtol=1e-15)
        assert part.message_ids == ("0", "1", "2")
        assert part.num_examples == 6
        assert part.num_bytes == sum(size_of(reply.content["arrays"]) for _, reply in pairs)
        assert part.reply(SENT).clients == 3
        for reply, (_, before) in zip(replies, pairs, strict=True):
            assert list(reply.content) == ["metrics", "config"]
            assert dict(reply.content["metrics"]) == dict(before.content["metrics"])


def test_uniform_weights_of_single_replies_are_what_they_were_to_the_bit():
    for n in range(1, 50):
        found = weights_of([Reply({}, 3.0)] * n, "uniform")
        assert found.tobytes() == np.full(n, 1.0 / n).tobytes()


def test_a_frozen_array_comes_back_as_it_was_sent_to_the_bit():
    pairs = [pair(i, moved(i, frozen=("frozen", "scalar")), 1 + i / 3) for i in range(5)]
    found = answers(pairs, (3,), reducer())
    for name in ("frozen", "scalar", "counter"):
        assert all(one.arrays[name].tobytes() == SENT[name].tobytes() for one in found)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_changes_that_cancel_out_are_changes_to_an_optimiser(kind):
    """An array that stayed on average is trained: weight decay acts on it, in a sum as well."""
    rule = server_optimizer(lambda params: kind(params, lr=0.1, weight_decay=0.5))
    sent = {**SENT, "w": np.ones_like(SENT["w"])}
    pairs = [
        pair(i, {**sent, "w": sent["w"] + step}, 1, sent=sent) for i, step in enumerate((1, -1))
    ]
    reduce = replace(reducer("uniform"), sent=fingerprint(to_record(sent)))
    (part,), _ = reduced(pairs, (), reduce)
    _, ours = rule.update({}, sent, [part.reply(sent)])
    _, whole = rule.update({}, sent, singles(pairs))
    assert {n: v.tobytes() for n, v in ours.items()} == {n: v.tobytes() for n, v in whole.items()}
    assert not np.array_equal(ours["w"], sent["w"])
    assert np.array_equal(ours["frozen"], sent["frozen"])


def test_updates_are_clipped_before_they_are_summed():
    wall = Firewall(max_share=1.0, max_update_norm=0.5, norm_action="clip")
    pairs = [pair(i, moved(i), 1 + i) for i in range(4)]
    (part,), _ = reduced(pairs, (), reducer(firewall=wall))
    bounded = [Reply(clipped(moved(i), SENT, 0.5), 1 + i) for i in range(4)]
    wanted = mean(SENT, bounded, "examples")
    for name, value in part.arrays.items():
        assert value.tobytes() == wanted[name].tobytes()


# --- what is not summed ---------------------------------------------------------------------------


def nan(number: int) -> tuple:
    return pair(number, {**SENT, "w": np.full_like(SENT["w"], np.nan)}, 5)


def test_a_bad_reply_goes_on_whole_and_is_refused_with_the_same_words():
    pairs = [pair(0, moved(0), 1), nan(1), pair(2, moved(2), 2), pair(3, moved(3), 3)]
    (part,), replies = reduced(pairs, (), reducer())
    assert part.message_ids == ("0", "2", "3")
    assert part.num_examples == 6
    assert replies[1].content["arrays"]["w"].data == pairs[1][1].content["arrays"]["w"].data
    _, (bad,) = sift(replies, SENT, OPEN, KEY, None, part.message_ids)
    assert (
        bad.reason
        == judge(pairs[1][1], SENT, OPEN, KEY).reason
        == "array 'w' holds NaN or infinity"
    )


@pytest.mark.parametrize(
    "pairs",
    [
        lambda: [pair(0, moved(0), 1)],
        lambda: [pair(0, moved(0), 1), nan(1)],
        lambda: [nan(0), nan(1)],
        list,
    ],
    ids=["alone", "alone among bad ones", "all bad", "nobody answered"],
)
def test_one_good_reply_of_a_block_goes_on_whole(pairs):
    block = pairs()
    part, contents = reducer()(block)
    assert part is None
    assert contents == [reply.content for _, reply in block]


def test_replies_to_other_arrays_than_the_servers_go_on_whole():
    """A strategy may change its messages after it asked for sums."""
    other = {**SENT, "frozen": SENT["frozen"] + 1}
    mixed = [pair(0, moved(0), 1), pair(1, moved(1), 1), pair(2, moved(2), 1, sent=other)]
    assert reducer()(mixed)[0] is None
    assert reducer()(mixed[:2])[0] is not None
    assert PartialSums(OPEN, KEY, "model", "examples", b"")(mixed)[0] is None


def test_a_fingerprint_tells_names_values_and_types_apart():
    one = {"a": np.zeros(2, np.float32), "b": np.ones(2, np.float32)}
    others = [
        {"a": one["a"], "c": one["b"]},
        {"b": one["b"], "a": one["a"]},
        {"a": one["a"], "b": one["b"] + np.float32(1e-7)},
        {"a": one["a"], "b": one["b"].view(np.int32)},
        {"a": one["a"], "b": one["b"].reshape(1, 2)},
        {"a": one["a"]},
    ]
    prints = {fingerprint(to_record(arrays)) for arrays in [one, dict(one), *others]}
    assert len(prints) == 1 + len(others)


# --- wrong variants -------------------------------------------------------------------------------


def gives_the_mean(reduce) -> bool:
    pairs = [pair(0, moved(0), 1), pair(1, moved(1), 7), nan(2), pair(3, moved(3), 2)]
    whole = [one for i, one in enumerate(pairs) if i != 2]
    ours = mean(SENT, answers(pairs, (3,), reduce), "examples")
    wanted = mean(SENT, singles(whole), "examples")
    return all(np.allclose(ours[n], wanted[n], rtol=0, atol=1e-12) for n in SENT)


class ForgetsTheWeights(PartialSums):
    """Each client of a block counts the same."""

    def __call__(self, pairs):
        return replace(reducer(), weighting="uniform")(pairs)


class CountsTheBlockOnce(PartialSums):
    """A block weighs as much as its first client."""

    def __call__(self, pairs):
        part, contents = reducer()(pairs)
        return part and replace(part, num_examples=1.0), contents


class SumsWhatIsRefused(PartialSums):
    """Nobody judges the replies."""

    def _good(self, pairs, sent):
        good = super()._good([pairs[0]], sent)[0]
        arrays = [moved(9), moved(9), moved(9)]
        return {i: replace(good, message=r, arrays=arrays[i]) for i, (_, r) in enumerate(pairs)}


def test_the_right_reducer_gives_the_mean():
    assert gives_the_mean(reducer())


@pytest.mark.parametrize("wrong", [ForgetsTheWeights, CountsTheBlockOnce, SumsWhatIsRefused])
def test_a_wrong_reducer_is_caught(wrong):
    assert not gives_the_mean(wrong(**vars(reducer())))


# --- what may be summed ---------------------------------------------------------------------------


def adam(params):
    return torch.optim.Adam(params, lr=0.1)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_rules_on_the_mean_say_so_and_no_others(weighting):
    assert interpolate(0.3, weighting=weighting).mean_by == weighting
    assert server_optimizer(adam, weighting=weighting).mean_by == weighting
    for aggregate in (median(), trimmed_mean(0.1), multi_krum(1), lambda *args: mean(*args)):
        assert interpolate(weighting=weighting, aggregate=aggregate).mean_by is None
        assert server_optimizer(adam, weighting=weighting, aggregate=aggregate).mean_by is None
    assert (
        Rule(init=lambda _: {}, update=lambda state, sent, _: (state, dict(sent))).mean_by is None
    )


def test_a_part_without_all_of_its_replies_ends_the_run():
    pairs = [pair(i, moved(i), 1) for i in range(3)]
    (part,), replies = reduced(pairs, (), reducer())
    good, _ = sift(replies[:2], SENT, OPEN, KEY, None, part.message_ids)
    with pytest.raises(MetabloomError, match="partial_sums=False"):
        answers_of(good, [part], SENT, OPEN, KEY)


def test_a_reply_of_a_client_that_only_says_that_it_was_summed_is_refused():
    parts, replies = reduced([pair(i, moved(i), 1) for i in range(3)], (), reducer())
    _, reply = pair(9, SENT, 1)
    reply.content = RecordDict({**replies[0].content})  # as those that are in the part
    good, (bad,) = sift([*replies, reply], SENT, OPEN, KEY, None, parts[0].message_ids)
    assert len(good) == 3
    assert bad.reason == "0 ArrayRecords: exactly one is needed"


def test_nothing_is_written_into_questions_or_replies():
    pairs = [pair(i, moved(i), 1 + i) for i in range(4)]
    before = copied(pairs)
    reducer()(pairs)
    for (question, reply), (q, r) in zip(pairs, before, strict=True):
        assert question.content == q.content
        assert reply.content == r.content
