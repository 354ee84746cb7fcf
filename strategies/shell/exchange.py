"""One exchange of messages: what became of each message that was sent."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from logging import WARNING

from flwr.app import Message
from flwr.common import log

from ...errors import BUDGET_EXHAUSTED
from ...wire import NamedArrays
from .firewall import Firewall, Judged, Sent, sift
from .partial_sums import Part

Told = list[tuple[int, str]]  # (node id, reason)


@dataclass(frozen=True)
class Exchange:
    """The fate of each message.

    Attributes:
        good: (node id, reply and its arrays), in the order in which the replies came.
        failed: nodes that raised, each with its reason.
        refused: nodes whose reply the firewall refused.
        lost: nodes of which nothing came in time, or which are gone, as the SuperLink says.
        exhausted: nodes that refused to train since their privacy budget is spent.
        offenders: those that failed or were refused by a fault of their own.
    """

    good: list[tuple[int, Judged]]
    failed: Told
    refused: Told
    lost: Told
    exhausted: list[int]
    offenders: list[int]


def merged(exchanges: Iterable[Exchange]) -> Exchange:
    """Return several exchanges as one."""
    all_of_them = list(exchanges)
    return Exchange(
        *(
            [one for exchange in all_of_them for one in getattr(exchange, field.name)]
            for field in fields(Exchange)
        )
    )


def sort_replies(
    messages: Sequence[Message],
    replies: Iterable[Message],
    sent: Sent,
    *,
    firewall: Firewall,
    weight_key: str,
    timeout_s: float,
    initial: NamedArrays | None = None,
    parts: Iterable[Part] = (),
) -> Exchange:
    """Return what became of ``messages``, which have their ids by now; see ``judge``.

    Of several replies to one message the first counts; what nobody asked for is left out. Which
    replies are in ``parts`` is known by the messages that were sent, never by what a reply holds.
    """
    summed = {message_id for part in parts for message_id in part.message_ids}
    recipients = {one.metadata.message_id: one.metadata.dst_node_id for one in messages}
    answers: dict[int, Message] = {}
    for reply in replies:
        node_id = _recipient(reply, recipients)
        if node_id is None or node_id in answers:
            log(WARNING, "a reply that was not asked for, or came twice, is left out")
        else:
            answers[node_id] = reply
    good, bad = sift(answers.values(), sent, firewall, weight_key, initial, summed)
    nodes = {id(reply): node_id for node_id, reply in answers.items()}
    fates: dict[str, list[tuple[int, Judged]]] = {
        fate: [] for fate in ("failed", "refused", "lost", "exhausted")
    }
    for one in bad:
        node_id = nodes[id(one.message)]
        fates[_fate(one.message, node_id)].append((node_id, one))
    silent = [node_id for node_id in recipients.values() if node_id not in answers]
    return Exchange(
        good=[(nodes[id(one.message)], one) for one in good],
        failed=_told(fates["failed"]),
        refused=_told(fates["refused"]),
        lost=_told(fates["lost"]) + [(n, f"no reply within {timeout_s:g} s") for n in silent],
        exhausted=[node_id for node_id, _ in fates["exhausted"]],
        offenders=[n for fate in ("failed", "refused") for n, one in fates[fate] if one.is_offence],
    )


def _recipient(reply: object, recipients: Mapping[str, int]) -> int | None:
    """Return the node that a reply is of; None where it answers none of the messages.

    The SuperLink answers in its own name for a node that was lost.
    """
    if not isinstance(reply, Message):
        return None
    return recipients.get(reply.metadata.reply_to_message_id)


def _fate(reply: Message, node_id: int) -> str:
    if not reply.has_error():
        return "refused"
    if reply.metadata.src_node_id != node_id:
        return "lost"
    return "exhausted" if BUDGET_EXHAUSTED in (reply.error.reason or "") else "failed"


def _told(pairs: list[tuple[int, Judged]]) -> Told:
    return [(node_id, one.reason) for node_id, one in pairs]
