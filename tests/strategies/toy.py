"""Virtual nodes for strategy tests.

A client that moves each array by an amount of its own, and grids that misbehave.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from metabloom.config import RunConfig
from metabloom.public import PublicData
from metabloom.sim import CohortGrid
from metabloom.strategies import STRATEGIES, Recipe, RuleStrategy, RunResult
from metabloom.teacher import Teacher
from metabloom.wire import NOVA_STEPS, from_record, to_record

Arrays = dict[str, np.ndarray]


def model() -> Arrays:
    """Return a model with a matrix, a scalar, a counter, double and half precision."""
    return {
        "weight": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
        "bias": np.array([0.1, -0.2], dtype=np.float64),
        "temperature": np.array(0.5, dtype=np.float32),
        "half": np.array([1.5], dtype=np.float16),
        "batches": np.array(7, dtype=np.int64),
    }


def moved(arrays: Arrays, partition: int, server_round: int) -> Arrays:
    """Return what client ``partition`` answers: other values for each client, round and array."""
    step = np.sin(1.7 * partition + server_round) / 7
    return {
        name: np.asarray(value + step * (position + 1)).astype(value.dtype)
        if np.issubdtype(value.dtype, np.floating)
        else np.asarray(
            value + 1
        )  # a client counts its batches: what becomes of that is the server's matter
        for position, (name, value) in enumerate(arrays.items())
    }


@dataclass
class Toy:
    """A client app and what was asked of it.

    Attributes:
        roles: role by partition; None: nodes say nothing of roles.
        architectures: architecture by partition; None: nodes say nothing of it.
        answers_roll_call: whether nodes know the query.
        fails: (partition, round) -> reason to raise, or "" to answer.
        learns: (arrays, partition, round) -> the arrays that a client answers with.
        sizes: bytes of the arrays of each train message.
        asked: (kind, partition) of each train and evaluate message, in order; configs beside it.
    """

    roles: Sequence[str] | None = None
    architectures: Sequence[str] | None = None
    answers_roll_call: bool = True
    fails: Callable[[int, int], str] = lambda partition, number: ""
    learns: Callable[[Arrays, int, int], Arrays] = moved
    asked: list[tuple[str, int]] = field(default_factory=list)
    configs: list[dict] = field(default_factory=list)
    roll_calls: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def app(self) -> ClientApp:
        app = ClientApp()
        app.train()(self._train)
        app.evaluate()(self._evaluate)
        if self.answers_roll_call:
            app.query("roll_call")(self._answer_roll_call)
        return app

    def partitions(self, kind: str) -> list[int]:
        return [partition for asked, partition in self.asked if asked == kind]

    def _answer_roll_call(self, message: Message, context: Context) -> Message:
        place = dict(context.node_config)
        partition = int(place["partition-id"])
        self.roll_calls.append(partition)
        if self.roles is not None:
            place |= {"role": self.roles[partition], "client-name": f"c{partition}"}
        if self.architectures is not None:
            place["architecture"] = self.architectures[partition]
        return Message(RecordDict({"properties": ConfigRecord(place)}), reply_to=message)

    def _train(self, message: Message, context: Context) -> Message:
        partition, number = self._note("train", message, context)
        self.sizes.append(sum(len(array.data) for array in message.content["arrays"].values()))
        received = from_record(message.content["arrays"])
        arrays = self.learns(received, partition, number)
        if "mark" in received:  # it is asked about public records: all of them, each round
            arrays |= {"mark": received["mark"], "round": np.array(number)}
        if NOVA_STEPS in received:  # all take one step
            arrays |= {NOVA_STEPS: received[NOVA_STEPS]}
        metrics = MetricRecord({"loss": 1.0 / (partition + 1), "num-examples": partition + 1})
        content = RecordDict({"arrays": to_record(arrays), "metrics": metrics})
        return Message(content, reply_to=message)

    def _evaluate(self, message: Message, context: Context) -> Message:
        partition, _ = self._note("evaluate", message, context)
        metrics = MetricRecord({"loss": 0.1 * partition, "num-examples": partition + 1})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    def _note(self, kind: str, message: Message, context: Context) -> tuple[int, int]:
        partition = int(context.node_config["partition-id"])
        config = dict(message.content["config"])
        number = int(config["server-round"])
        self.asked.append((kind, partition))
        self.configs.append(config)
        if reason := self.fails(partition, number):
            raise RuntimeError(reason)
        return partition, number


class ShuffledGrid(CohortGrid):
    """A grid whose replies come in another order each time."""

    order = np.random.default_rng(3)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None):
        replies = list(super().send_and_receive(messages, timeout=timeout))
        return [replies[i] for i in self.order.permutation(len(replies))]


class GrowingGrid(CohortGrid):
    """A grid whose last node shows itself only after ``after`` training messages."""

    after = 1
    trained = 0

    def get_node_ids(self) -> Iterable[int]:
        ids = list(self.partitions)  # by partition
        return ids if self.trained >= self.after else ids[:-1]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.trained += sum(message.metadata.message_type == "train" for message in messages)
        return super().push_messages(messages)


def _needs_more(name: str) -> bool:
    recipe = STRATEGIES[name](RunConfig.read({}))
    return bool(recipe.needs or recipe.client_needs)


PERSONAL = ("pfedhn",)  # each client has a model of its own, and the server none that is their mean

# The strategies whose model follows from an average of the clients' models alone.
AVERAGING = [name for name in STRATEGIES if not (_needs_more(name) or name in PERSONAL)]

# The strategies in whose training models travel.
OF_MODELS = [name for name in STRATEGIES if name not in ("ds-fl", "fedmd")]

# With these even fedmeta's step is the mean of the clients' models.
PLAIN = {"server-optimizer": "sgd", "outer-lr": 1.0}


class ToyNet(nn.Module):
    """Linear logits of two classes, (B, 3) -> (B, 2), with the arrays that it is given."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__()
        for name, value in arrays.items():  # "half" is also a method: no attribute can have it
            tensor = torch.from_numpy(np.array(value))
            if tensor.is_floating_point():
                self._parameters[name] = nn.Parameter(tensor)
            else:
                self._buffers[name] = tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = self._parameters
        if "body" in own:
            return x[:, :2] @ own["body"].sum(0)
        return (x @ own["weight"].T) * own["temperature"] + own["bias"] + own["half"]


def larger() -> Arrays:
    """Return a model of other names and shapes than ``model``."""
    return {"body": np.linspace(0, 1, 8, dtype=np.float32).reshape(2, 2, 2), "n": np.array(3)}


# Where training is about a part of the models, this is what stays of ``model`` and of ``larger``.
STAYS = {"model": {"temperature"}, "larger": {"n"}}


def exchanged(name: str) -> set[str]:
    """Return the arrays of ``model`` that training is about."""
    needs = STRATEGIES[name](RunConfig.read({})).needs
    return set(model()) - (STAYS["model"] if "heads" in needs else set())


def heads_of(recipe: Recipe, architectures: Sequence[str] = ()) -> dict[str, set[str]]:
    """Return the head of each of the toy's models, such that ``STAYS`` is what stays."""
    shares = getattr(getattr(recipe.strategy, "func", None), "shares", "body")
    heads = {}
    for name in architectures or ("",):
        arrays, stays = (
            (larger(), STAYS["larger"]) if name == "large" else (model(), STAYS["model"])
        )
        heads[name] = set(stays) if shares == "body" else set(arrays) - stays
    return heads


def server_parts(recipe: Recipe, architectures: Sequence[str] = ()) -> dict[str, object]:
    """Return what the server hands a strategy, for the toy's models; "large" is ``larger``."""
    nets = {
        name: ToyNet(larger() if name == "large" else model()) for name in architectures or ("",)
    }
    inputs = torch.from_numpy(np.random.default_rng(7).normal(size=(32, 3)).astype(np.float32))
    public = PublicData.of("drawn", inputs)
    parts = {
        "models": nets,
        "public": public,
        "validation": None,
        "num_classes": 2,
        "teacher": Teacher(ToyNet(model()), model()),
        "heads": heads_of(recipe, architectures),
    }
    return {name: parts[name] for name in recipe.needs}


def strategy_of(name: str, config: dict | None = None, **shell) -> RuleStrategy:
    """Return a recipe's strategy with bounds that let any number of nodes take part."""
    few = {"strategy": name, "distill-steps": 10}
    recipe = STRATEGIES[name](RunConfig.read({**few, **(config or {})}))
    usual = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
    parts = server_parts(recipe, shell.get("architectures", ()))
    return recipe.strategy(**{**usual, **parts, **shell})


def start(
    strategy: RuleStrategy,
    toy: Toy,
    *,
    nodes: int = 5,
    rounds: int = 2,
    grid: type[CohortGrid] = CohortGrid,
    grid_seed: int = 0,
    arrays: Arrays | None = None,
    **more,
) -> RunResult:
    """Run ``strategy`` on ``nodes`` of ``toy``."""
    federation = grid(toy.app(), num_nodes=nodes, seed=grid_seed)
    record = to_record(model() if arrays is None else arrays)
    return strategy.start(federation, record, num_rounds=rounds, timeout=5, **more)


def bits(record: ArrayRecord) -> dict[str, bytes]:
    """Return the content of each array, to compare runs bit for bit."""
    return {name: value.tobytes() for name, value in from_record(record).items()}
