"""The server: plain Flower."""

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from maml_clients.task import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train with FedAvg and print the loss of each round."""
    torch.manual_seed(0)
    strategy = FedAvg(min_available_nodes=10)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        num_rounds=int(context.run_config["rounds"]),
    )
    for number, metrics in result.evaluate_metrics_clientapp.items():
        print(f"round {number}: loss {metrics['loss']:.6f}")
