"""The clients: plain Flower and torch."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from plain_clients.task import Batch, Net, load_data
from plain_clients.task import test as test_net
from plain_clients.task import train as train_net

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the received model on this client's digits."""
    net, (batch, _) = _begin(msg, context)
    loss = train_net(net, batch, lr=float(context.run_config["local-lr"]))
    metrics = MetricRecord({"train-loss": loss, "num-examples": len(batch[1])})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Test the received model on digits that this client does not train on."""
    net, (_, batch) = _begin(msg, context)
    loss, accuracy = test_net(net, batch)
    metrics = MetricRecord({"loss": loss, "accuracy": accuracy, "num-examples": len(batch[1])})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)


def _begin(msg: Message, context: Context) -> tuple[Net, tuple[Batch, Batch]]:
    torch.set_num_threads(1)  # nodes share the machine
    net = Net()
    net.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    place = context.node_config
    return net, load_data(int(place["partition-id"]), int(place["num-partitions"]))
