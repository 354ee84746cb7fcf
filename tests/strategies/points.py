"""Federations of parabolas and products: clients of ours whose answers have a closed form."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from flwr.app import Context, RecordDict

from metabloom.clients import ClientData, Learner, client_app
from metabloom.sim import CohortGrid
from metabloom.strategies import RuleStrategy, RunResult
from metabloom.wire import from_record, to_record
from tests.clients.toy_problems import Batch, Point, Product, parabola

USUAL = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1, "eval_every": 0}


def mean_of_parabolas(output, centres):
    """The mean over records of a/2 (theta - c)^2."""
    point, slopes = output
    return (slopes[:, 0] * (point - centres) ** 2 / 2).mean()


def of_parabola(
    kind: Callable[..., Learner], a: float, c: float, theta: float = 0.0, **options
) -> Learner:
    """Return a client whose loss is a/2 (theta - c)^2 on support and query alike."""
    batch = parabola(a, c)
    data = ClientData(batch, batch)
    return kind(Point(theta=[theta]), data, loss_fn=mean_of_parabolas, **options)


def half_squares(output, target):
    """1/2 (h b - 1)^2, for the records ``ONE``."""
    return ((output - target) ** 2 / 2).sum()


ONE: Batch = (torch.zeros(1), torch.ones(1, dtype=torch.float64))


def of_product(kind: Callable[..., Learner], h: float, b: float, **options) -> Learner:
    """Return a client whose loss is 1/2 (h b - 1)^2 on support and query alike."""
    return kind(Product(h, b), ClientData(ONE, ONE), loss_fn=half_squares, **options)


def run(
    strategy: RuleStrategy,
    clients: Sequence[Callable[[Context], Learner]],
    *,
    rounds: int = 1,
    arrays: dict[str, np.ndarray] | None = None,
    said: Sequence[dict[str, str]] | None = None,
    grid: type[CohortGrid] = CohortGrid,
) -> RunResult:
    """Run ``strategy`` on one node for each of ``clients``, from the first one's arrays.

    Args:
        strategy: to run.
        clients: each makes the client of one node from its context.
        rounds: how many.
        arrays: to begin with.
        said: what each node says of itself at the roll call.
        grid: what carries the messages.
    """

    def properties(context: Context) -> dict[str, str]:
        return (said or [{}] * len(clients))[int(context.node_config["partition-id"])]

    def client_fn(context: Context) -> Learner:
        return clients[int(context.node_config["partition-id"])](context)

    if arrays is None:
        place = Context(1, 1, {"partition-id": 0}, RecordDict(), {})
        first = clients[0](place)
        arrays = dict(zip(first.array_names, first.get_parameters({}), strict=True))
    app = client_app(client_fn, properties=properties)
    nodes = grid(app, num_nodes=len(clients))
    return strategy.start(nodes, to_record(arrays), num_rounds=rounds, timeout=30)


def numbers(result: RunResult) -> dict[str, float]:
    """Return the arrays of a result, of one value each."""
    return {name: value.item() for name, value in from_record(result.arrays).items()}
