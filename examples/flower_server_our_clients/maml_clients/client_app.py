"""The clients: only these imports tell that they are metabloom's."""

import torch
from flwr.app import Context
from flwr.client import NumPyClient

from maml_clients.task import Net, load_data
from metabloom.clients import ClientData, MAMLClient, client_app


def client_fn(context: Context) -> NumPyClient:
    """Return the client of this node."""
    torch.set_num_threads(1)  # nodes share the machine
    place = context.node_config
    partition = int(place["partition-id"])
    images, labels, query_images, query_labels = load_data(partition, int(place["num-partitions"]))
    return MAMLClient(
        Net(),
        ClientData(support=(images, labels), query=(query_images, query_labels)),
        inner_lr=float(context.run_config["inner-lr"]),
        outer_lr=float(context.run_config["outer-lr"]),
        local_steps=5,
        eval_steps=[1],
        name=f"client-{partition}",
    )


app = client_app(client_fn)
