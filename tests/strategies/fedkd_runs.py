"""Small federations under FedKD, and what their runs are asked."""

from collections.abc import Iterable
from dataclasses import asdict

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from metabloom.clients import ClientData, FedKDClient, Learner, client_app
from metabloom.sim import CohortGrid
from metabloom.strategies import FedKD, RuleStrategy, RunResult
from metabloom.strategies.fedkd import HOLDERS
from metabloom.wire import to_record
from tests.clients.toy_problems import generator, initialised
from tests.strategies.toy import bits

ROUNDS = 4
ROLES = ("train", "unseen", "train", "train")
FEATURES, HIDDEN, CLASSES = 24, 80, 4


def net(seed: int, hidden: int = HIDDEN) -> nn.Module:
    layers = nn.Linear(FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES)
    return initialised(nn.Sequential(*layers), seed)


def records(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return records whose classes are four directions, with noise."""
    draw = generator(seed)
    targets = torch.randint(CLASSES, (size,), generator=draw)
    return torch.eye(FEATURES)[targets] * 2 + torch.randn(size, FEATURES, generator=draw), targets


DATA = [ClientData(records(12, seed), records(20, seed + 100)) for seed in range(len(ROLES))]
MENTEE, MENTOR = net(1), net(2, 120)
INITIAL = {name: value.numpy() for name, value in MENTEE.state_dict().items()}


def client_of(
    index: int, context: Context, kind: type[Learner] = FedKDClient, **options
) -> Learner:
    more = {"mentor": MENTOR} if issubclass(kind, FedKDClient) else {}
    options = {"batch_size": 8, "local_lr": 0.05, "inner_lr": 0.05, "eval_steps": (1,), **options}
    return kind(MENTEE, DATA[index], name=f"c{index}", context=context, **more, **options)


def app(kind: type[Learner] = FedKDClient, **options) -> ClientApp:
    def index_in(context: Context) -> int:
        return int(context.node_config["partition-id"])

    return client_app(
        lambda context: client_of(index_in(context), context, kind, **options),
        properties=lambda context: {
            "role": ROLES[index_in(context)],
            "client-name": f"c{index_in(context)}",
        },
    )


def fedkd(kind: type[FedKD] = FedKD, **options) -> FedKD:
    usual = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
    return kind(**{"rounds": ROUNDS, **usual, **options})


def run(
    strategy: RuleStrategy | None = None,
    clients: ClientApp | None = None,
    *,
    rounds: int = ROUNDS,
    grid: type[CohortGrid] = CohortGrid,
    nodes: int = len(ROLES),
) -> RunResult:
    federation = grid(clients or app(), num_nodes=nodes)
    strategy = strategy or fedkd()
    return strategy.start(federation, to_record(INITIAL), num_rounds=rounds, timeout=5)


def told(result: RunResult) -> dict:
    """Return all of a result but the seconds, to compare bit for bit."""
    rounds = [{**asdict(report), "seconds": None} for report in result.rounds]
    return {**vars(result), "arrays": bits(result.arrays), "rounds": rounds}


def has_no_faults(result: RunResult) -> bool:
    return not any(r.failures or r.quarantined or r.skipped for r in result.rounds)


class Listening(CohortGrid):
    """A grid that notes the contents of all messages and replies, as they are serialised."""

    heard: list[tuple[str, RecordDict]]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None):
        messages = list(messages)
        replies = list(super().send_and_receive(messages, timeout=timeout))
        said = [one for one in (*messages, *replies) if one.has_content()]
        self.heard += [(one.metadata.message_type, one.content) for one in said]
        return replies


def listening() -> type[Listening]:
    return type("Grid", (Listening,), {"heard": []})


def bases(grid: type[Listening]) -> dict[int, list[int]]:
    """Return the base rounds that training clients were told of in each round; 0: none."""
    found: dict[int, list[int]] = {}
    for kind, content in grid.heard:
        if kind == "train" and "config" in content:
            config = content["config"]
            found.setdefault(config["server-round"], []).append(config.get("base-round", 0))
    return {number: sorted(told) for number, told in found.items()}


class Whole(FedKD):
    """A server that sends everyone the whole mentee."""

    def _messages(self, *asked):
        self._state = self._state and {**self._state, HOLDERS: []}
        return super()._messages(*asked)
