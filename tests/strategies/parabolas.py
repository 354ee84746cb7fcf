"""Clients whose loss is a parabola, a / 2 (w - c)^2, to the bit: their rounds have closed forms."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from flwr.app import ConfigRecord, Context
from torch import nn

from metabloom.clients import ClientData, Learner, client_app
from metabloom.sim import CohortGrid
from metabloom.strategies import RuleStrategy, RunResult
from metabloom.wire import from_record, to_record

ANY = {
    "min_train_nodes": 1,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
    "eval_every": 0,  # these clients have nothing to adapt on
}


@dataclass(frozen=True)
class Parabola:
    """One client: curvature, centre, and how many batches of one record each it holds."""

    a: float
    c: float
    batches: int = 1

    def data(self) -> ClientData:
        """Return records whose mean loss is the parabola, each by itself too."""
        root = self.a**0.5
        inputs = torch.full((self.batches, 1), root, dtype=torch.float64)
        targets = torch.full((self.batches, 1), root * self.c, dtype=torch.float64)
        empty = (inputs[:0], targets[:0])
        return ClientData(empty, (inputs, targets))

    def after(self, w: float, lr: float, steps: int) -> float:
        """Return where ``steps`` steps of gradient descent lead from w: the closed form."""
        return self.c + (w - self.c) * (1 - lr * self.a) ** steps


def half_squares(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean of 1/2 (z - t)^2."""
    return ((output - target) ** 2 / 2).mean()


def line() -> nn.Module:
    """Return z = w x, of w = 0."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.zero_()
    return model


LINE = line()


def app_of(kind: Callable[..., Learner], clients: Sequence[Parabola], **options):
    """Return the ClientApp of these clients, by partition."""

    def client_fn(context: Context) -> Learner:
        partition = int(context.node_config["partition-id"])
        return kind(
            LINE,
            clients[partition].data(),
            loss_fn=half_squares,
            context=context,
            eval_steps=(1,),
            inner_lr=0.01,
            **options,
        )

    return client_app(client_fn)


def run(
    strategy: RuleStrategy,
    kind: Callable[..., Learner],
    clients: Sequence[Parabola],
    *,
    rounds: int,
    w: float = 0.0,
    grid: CohortGrid | None = None,
    **options,
) -> tuple[float, RunResult]:
    """Return w after ``rounds`` rounds on all clients, and the result."""
    grid = grid or CohortGrid(app_of(kind, clients, **options), num_nodes=len(clients))
    initial = {"weight": torch.full((1, 1), w, dtype=torch.float64).numpy()}
    result = strategy.start(
        grid, to_record(initial), num_rounds=rounds, timeout=30, train_config=ConfigRecord()
    )
    assert not any(report.failures or report.quarantined for report in result.rounds)
    return float(from_record(result.arrays)["weight"].item()), result
