"""Groups of clients of ours in closed form and as small networks, and grids that lose replies."""

from collections.abc import Iterable

import torch
from flwr.app import Message

from metabloom.clients import ClientData, GroupMAMLClient
from metabloom.sim import CohortGrid
from metabloom.strategies import GroupMAML
from tests.clients.toy_problems import records, small_net
from tests.strategies.points import USUAL, numbers, of_parabola, run

CROSS_ENTROPY = torch.nn.functional.cross_entropy


def parabolas(*problems: tuple[float, float], **options):
    """Return clients of the losses a/2 (theta - c)^2, alpha = .1."""
    options = {"inner_lr": 0.1, **options}
    return [
        lambda place, a=a, c=c: of_parabola(GroupMAMLClient, a, c, context=place, **options)
        for a, c in problems
    ]


def sgd(**more) -> GroupMAML:
    return GroupMAML(optimizer="sgd", lr=1.0, **USUAL, **more)


def said(*groups: str, role: str = "") -> list[dict[str, str]]:
    """Return what nodes say of themselves: their names, groups and roles."""
    roles = [role] * len(groups) if role else [""] * len(groups)
    return [
        {"client-name": f"c{i}", **({"group": one} if one else {}), **({"role": r} if r else {})}
        for i, (one, r) in enumerate(zip(groups, roles, strict=True))
    ]


SEVEN = ((1.0, 0.0), (3.0, 1.0))  # (a, c) of two clients, w = 1/2, theta_0 = 0


def gradient_of(strategy, clients, groups=("one", "one"), **more) -> float:
    return -numbers(run(strategy, clients, said=said(*groups), **more))["theta"]


# of six networks
GROUPS = ("x", "y", "x", "", "y", "x")
SIZES = ((4, 5), (7, 3), (5, 5), (6, 2), (3, 6), (8, 4))  # support, query of each client


def data_of(client: int) -> ClientData:
    (support, query), seed = SIZES[client], 10 * client
    return ClientData(records(support, seed), records(query, seed + 1))


def networks(**options):
    options = {"inner_lr": 0.4, "split": "fixed", **options}
    return [
        lambda place, i=i: GroupMAMLClient(
            small_net(), data_of(i), name=f"c{i}", context=place, **options
        )
        for i in range(len(SIZES))
    ]


class Losing(CohortGrid):
    """A grid that loses the replies of some clients to some exchanges."""

    losses: frozenset[tuple[int, str]] = frozenset()  # (partition, exchange)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        sent = list(messages)
        replies = list(super().send_and_receive(sent, timeout=timeout))
        asked = {
            one.metadata.message_id: (
                self.partitions[one.metadata.dst_node_id],
                one.content["config"].get("exchange", ""),
            )
            for one in sent
            if one.metadata.message_type == "train"
        }
        return [r for r in replies if asked.get(r.metadata.reply_to_message_id) not in self.losses]


def losing(*losses: tuple[int, str]) -> type[Losing]:
    return type("Grid", (Losing,), {"losses": frozenset(losses)})
