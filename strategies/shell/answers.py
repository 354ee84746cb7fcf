"""What a good reply is: an answer to the rule, a score in the report."""

from collections.abc import Iterable

from flwr.app import ArrayRecord, RecordDict

from ...wire import NamedArrays, size_of
from ..rules import Reply
from .firewall import Firewall, Judged, clipped
from .reply_metrics import (
    diverged,
    finite_metrics,
    numbers_of,
    records_of,
    weight_of,
    with_metrics,
)
from .reports import ClientScore
from .roll_call import Node


def answer_of(judged: Judged, sent: NamedArrays, firewall: Firewall, weight_key: str) -> Reply:
    """Return what the rule sees of a good reply; its update is clipped where the firewall says so.

    Args:
        judged: the reply.
        sent: the arrays of the round.
        firewall: with the bound of updates.
        weight_key: the metric that holds the reply's weight.
    """
    arrays, bound = judged.arrays, firewall.max_update_norm
    if bound is not None and firewall.norm_action == "clip":
        arrays = clipped(arrays, sent, bound)
    return Reply(arrays, weight_of(judged.message.content, weight_key))


def score_of(
    node: Node, judged: Judged, weight_key: str
) -> tuple[ClientScore, RecordDict, list[str]]:
    """Return the score in a good reply, its content without what diverged, and the names of that.

    Args:
        node: whose reply it is; without a role it trains.
        judged: the reply.
        weight_key: the metric that holds the number of its query records.
    """
    content = judged.message.content
    metrics, wild = finite_metrics(content)
    numbers = numbers_of(metrics)
    count = numbers.pop(weight_key)
    role = node.role or "train"
    score = ClientScore(node.name, node.partition_id, role, count, numbers, node.architecture)
    return score, with_metrics(content, metrics) if wild else content, wild


def scores_of(
    found: Iterable[tuple[Node, Judged]], weight_key: str
) -> tuple[tuple[ClientScore, ...], list[RecordDict], list[tuple[str, str]]]:
    """Return the scores in good replies, their contents, and (client, note) of what diverged.

    Args:
        found: the replies, each with its node.
        weight_key: as for ``score_of``.
    """
    scores, contents, notes = [], [], []
    for node, judged in found:
        score, content, wild = score_of(node, judged, weight_key)
        if wild:
            notes.append((node.name, diverged(wild)))
        scores.append(score)
        contents.append(content)
    return tuple(scores), contents, notes


def bytes_in(content: RecordDict) -> int:
    """Return the bytes of the arrays of a reply."""
    return sum(size_of(record) for record in records_of(content, ArrayRecord))
