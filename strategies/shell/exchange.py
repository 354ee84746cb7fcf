"""One exchange of messages: what became of each message that was sent."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flwr.app import Message

from ...wire import NamedArrays
from .firewall import Firewall, Judged, sift

Told = list[tuple[int, str]]  # (node id, reason)


@dataclass(frozen=True)
class Exchange:
    """The fate of each message.

    Attributes:
        good: (node id, reply and its arrays), in the order in which the replies came.
        failed: nodes that raised, each with its reason.
        refused: nodes whose reply the firewall refused.
        lost: nodes of which nothing came in time, or which are gone, as the SuperLink says.
    """

    good: list[tuple[int, Judged]]
    failed: Told
    refused: Told
    lost: Told


def sort_replies(
    messages: Sequence[Message],
    replies: Iterable[Message],
    *,
    sent: NamedArrays | None,
    firewall: Firewall,
    weight_key: str,
    timeout_s: float,
    initial: NamedArrays | None = None,
) -> Exchange:
    """Return what became of ``messages``, which have their ids by now; see ``sift``."""
    received = list(replies)
    recipients = {one.metadata.message_id: one.metadata.dst_node_id for one in messages}

    def node_of(reply: Message) -> int:
        # The SuperLink answers in its own name for a node that was lost.
        return recipients.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)

    good, bad = sift(received, sent, firewall, weight_key, initial)
    failed: Told = []
    refused: Told = []
    lost: Told = []
    for one in bad:
        node_id = node_of(one.message)
        if not one.message.has_error():
            refused.append((node_id, one.reason))
        elif node_id == one.message.metadata.src_node_id:
            failed.append((node_id, one.reason))
        else:
            lost.append((node_id, one.reason))
    answered = {node_of(reply) for reply in received}
    silent = [node_id for node_id in recipients.values() if node_id not in answered]
    lost += [(node_id, f"no reply within {timeout_s:g} s") for node_id in silent]
    return Exchange([(node_of(one.message), one) for one in good], failed, refused, lost)
