r"""Means of replies taken where the replies were made, so that fewer arrays travel.

A rule that sees replies by their mean alone (``Rule.mean_by``) needs no single ones. A grid that
answers messages in blocks may have ``reduced(messages, reducer)`` (``SummingGrid``): beside the
clients it calls the reducer on each block, which judges the replies by the firewall's own function
and puts one mean in the place of the good ones:

    x_b = sum_i p_i w_i,    p_i = n_i / N_b  or  1 / k_b

over the k_b clients i that are summed in block b, N_b = sum_i n_i, in float64. The rule's mean over
all, sum_b (N_b / N) x_b or sum_b (k_b / k) x_b, is then that of the single replies, up to the
rounding of float64. Arrays that no client changed do not travel: they are exactly as sent. Blocks
and the order in them follow the messages, so nothing depends on who computes a part, or when.

The contents of these replies go on without arrays; their metrics are aggregated as ever. Whatever
is not summed goes on whole, and the server judges it as ever, with the same words: bad replies,
those too heavy (``light``), and what is alone in its block, where a sum would save nothing.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol, cast

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from ...errors import MetabloomError
from ...wire import NamedArrays, from_record
from ..rules import Arrays, Reply, Weighting, any_changed, is_floating, mean
from .answers import answer_of, bytes_in
from .firewall import Firewall, Judged, judge
from .reply_metrics import weight_of

ROUNDING = 1e-9  # more than float64 loses in the sum of a million weights

Pairs = Sequence[tuple[Message, Message]]  # (question, reply) of clients that answered by content


@dataclass(frozen=True)
class Part:
    """The mean of good replies of one block.

    Attributes:
        message_ids: of the questions that they answer, in the order of the block.
        arrays: the floating arrays that any of them changed, float64.
        num_examples: the sum of their weights.
        num_bytes: of all their arrays, which did not travel.
    """

    message_ids: tuple[str, ...]
    arrays: Arrays
    num_examples: float
    num_bytes: int

    def reply(self, sent: NamedArrays) -> Reply:
        """Return what the rule sees of it."""
        clients, changed = len(self.message_ids), frozenset(self.arrays)
        return Reply({**sent, **self.arrays}, self.num_examples, clients, changed)


class Reduction(Protocol):
    """What a grid gives back for messages whose replies it reduces.

    Attributes:
        parts: (ids of the messages of a block, its part or None), in the order of the blocks;
            complete once the replies were consumed. A part and the contents of its block come
            together or not at all.
    """

    parts: list[tuple[tuple[str, ...], Part | None]]


class SummingGrid(Protocol):
    """A grid that can reduce replies where they are made.

    The metadata of replies are its own: a client cannot answer in the place of another one.
    """

    def reduced(self, messages: Sequence[Message], reducer: "PartialSums") -> Reduction:
        """Reduce the replies to ``messages``, which are sent next."""


@dataclass(frozen=True)
class PartialSums:
    """The reducer of one round: called beside the clients, so it can be pickled.

    Attributes:
        firewall: what is refused.
        weight_key: the metric that holds a reply's weight.
        arrays_key: the record of a question that holds the arrays.
        weighting: of the rule's mean.
        sent: fingerprint of the arrays that replies are judged against.
    """

    firewall: Firewall
    weight_key: str
    arrays_key: str
    weighting: Weighting
    sent: bytes

    def __call__(self, pairs: Pairs) -> tuple[Part | None, list[RecordDict]]:
        """Return the part of a block, None where nothing was summed, and the contents that go on.

        Args:
            pairs: of the clients of the block that answered by content, in its order.
        """
        contents = [reply.content for _, reply in pairs]
        sent = self._sent(pairs) if len(pairs) > 1 else None
        if sent is None:
            return None, contents
        good = self._good(pairs, sent)
        places = list(good)
        weights = [weight_of(contents[place], self.weight_key) for place in places]
        summed = [places[i] for i in light(weights, self.firewall.max_share)]
        if not summed:
            return None, contents
        args = sent, self.firewall, self.weight_key
        answers = [answer_of(good[place], *args) for place in summed]
        changed = {
            name: value
            for name, value in sent.items()
            if is_floating(value) and any_changed(name, sent, answers)
        }
        with np.errstate(over="ignore", invalid="ignore"):  # found by the rule's result
            arrays = mean(changed, answers, self.weighting)
        part = Part(
            message_ids=tuple(pairs[place][0].metadata.message_id for place in summed),
            arrays=arrays,
            num_examples=sum(answer.num_examples for answer in answers),
            num_bytes=sum(bytes_in(contents[place]) for place in summed),
        )
        for place in summed:
            contents[place] = _without_arrays(contents[place])
        return part, contents

    def _sent(self, pairs: Pairs) -> NamedArrays | None:
        """Return the arrays that the block was asked with; None where the server means others.

        A strategy may change the messages after it asked for sums: it gets single replies then.
        """
        records = [question.content.get(self.arrays_key) for question, _ in pairs]
        read: NamedArrays | None = None
        for one in {id(record): record for record in records}.values():  # one, as they share it
            if not isinstance(one, ArrayRecord) or fingerprint(one) != self.sent:
                return None
            read = from_record(one)
        return read

    def _good(self, pairs: Pairs, sent: NamedArrays) -> dict[int, Judged]:
        """Return the good replies by their place in the block."""
        judged = [judge(reply, sent, self.firewall, self.weight_key) for _, reply in pairs]
        return {place: one for place, one in enumerate(judged) if not one.reason}


def light(weights: Sequence[float], max_share: float) -> list[int]:
    """Return the places of the weights of a block that ``sift`` leaves, whatever the others are.

    ``sift`` takes the heaviest reply of all that are left, R, away while it has more than the share
    s of their weight. Say that it takes i, of block B. All that are left weigh at most w_i, so B
    has lost just what is heavier than i (or equal, if it came earlier), and
    w_i / sum(R and B) >= w_i / sum(R) > s. So i goes as well where the same is done to B alone,
    however few are left: whatever is heavier was taken before it, by this argument, and of equal
    ones that go one by one each has a larger share than the one before. What stays in B is never
    taken, and the verdicts of ``sift``, which sees all weights, are those of single replies.

    The same is done here, with a bound that is lower by what rounding could hide; a last one
    always goes, so two or more are summed, or none.
    """
    ascending = sorted(range(len(weights)), key=weights.__getitem__)
    totals = np.cumsum([weights[place] for place in ascending])
    left = len(ascending)
    while left and weights[ascending[left - 1]] > max_share * (1 - ROUNDING) * totals[left - 1]:
        left -= 1
    return sorted(ascending[:left])


def fingerprint(record: Mapping[str, Array]) -> bytes:
    """Return what tells the arrays of a record apart: a hash of their names and bytes."""
    digest = blake2b(digest_size=16)
    for name, array in record.items():
        digest.update(f"{name!r} {array.stype!r} {len(array.data)} ".encode())
        digest.update(array.data)
    return digest.digest()


def summing(grid: Grid) -> SummingGrid | None:
    """Return the grid if it reduces the very replies that it hands out; else None.

    Looked up in classes: a grid that hands on what it does not know to another, or that changes
    replies in a subclass, was not written for contents without arrays.
    """

    def owner(name: str) -> type:
        return next((kind for kind in type(grid).__mro__ if name in vars(kind)), object)

    own = all(issubclass(owner("reduced"), owner(n)) for n in ("send_and_receive", "pull_messages"))
    return cast(SummingGrid, grid) if own else None


def parts_of(reduction: Reduction | None) -> list[Part]:
    """Return the parts of an exchange whose replies were consumed; none where none were asked."""
    return [part for _, part in reduction.parts if part is not None] if reduction else []


def answers_of(
    good: Iterable[Judged],
    parts: Sequence[Part],
    sent: NamedArrays,
    firewall: Firewall,
    weight_key: str,
) -> list[Reply]:
    """Return what the rule sees of the good replies, in their order; a part is where its first is.

    Raises:
        MetabloomError: where the grid lost a reply that is in a part.
    """
    places = {message_id: i for i, part in enumerate(parts) for message_id in part.message_ids}
    answers, seen = [], Counter[int]()
    for one in good:
        place = places.get(one.message.metadata.reply_to_message_id)
        if place is None:
            answers.append(answer_of(one, sent, firewall, weight_key))
        elif not seen[place]:
            answers.append(parts[place].reply(sent))
        if place is not None:
            seen[place] += 1
    if any(seen[place] != len(part.message_ids) for place, part in enumerate(parts)):
        raise MetabloomError(
            "the grid handed over a sum of replies without all of the replies in it, so nobody "
            "knows whose it is: run with partial_sums=False, and report this as a fault of the grid"
        )
    return answers


def _without_arrays(content: RecordDict) -> RecordDict:
    return RecordDict(
        {name: one for name, one in content.items() if not isinstance(one, ArrayRecord)}
    )
