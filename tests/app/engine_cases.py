"""The same strategies and clients for every engine; ``python engine_cases.py OUT`` runs Flower's.

One ClientApp serves all cases: the train config says which. Its clients are made of their partition
alone, so every engine finds the same ones.
"""

import random
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import log
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp import strategy as flowers
from flwr.serverapp.strategy import Strategy
from safetensors.numpy import save_file
from torch import nn

from metabloom.clients import ClientData, MAMLClient, PrivacyConfig, SGDClient, client_app
from metabloom.strategies import FedAvg, FedMeta
from metabloom.wire import from_record

NODES, ROUNDS = 10, 3
FLOWERS = {  # all nodes train, so every engine samples the same
    "fraction_train": 1.0,
    "fraction_evaluate": 0.0,
    "min_train_nodes": NODES,
    "min_available_nodes": NODES,
}

torch.set_num_threads(1)
MODEL = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
with torch.no_grad():
    for number, value in enumerate(MODEL.parameters()):
        fixed = np.random.default_rng(number).normal(scale=0.3, size=tuple(value.shape))
        value.copy_(torch.tensor(fixed))


def data_of(partition: int) -> ClientData:
    """Return a client of 9 to 18 records, ragged on purpose."""
    rng = np.random.default_rng(100 + partition)
    count = 9 + partition
    inputs = torch.tensor(rng.normal(size=(count, 6)), dtype=torch.float32)
    targets = torch.tensor(rng.integers(0, 3, size=count))
    half = count // 2
    return ClientData((inputs[:half], targets[:half]), (inputs[half:], targets[half:]))


def _maml(order: str) -> Callable[..., MAMLClient]:
    return lambda **own: MAMLClient(MODEL, order=order, inner_lr=0.2, split="fixed", **own)


def _private(**own: object) -> SGDClient:
    ledger = Path(tempfile.mkdtemp()) / "ledger.jsonl"  # anew each round: the same noise each time
    privacy = PrivacyConfig(
        noise_multiplier=1.0,
        max_grad_norm=0.5,
        sample_rate=0.5,
        target_epsilon=50.0,
        target_delta=1e-5,
        seed=7,
        ledger=ledger,
    )
    return SGDClient(MODEL, local_lr=0.2, local_steps=3, privacy=privacy, **own)  # type: ignore[arg-type]


CLIENTS: Mapping[str, Callable[..., SGDClient | MAMLClient]] = {
    "fedavg": lambda **own: SGDClient(MODEL, local_lr=0.2, batch_size=4, local_epochs=2, **own),
    "fedmeta-exact": _maml("exact"),
    "fedmeta-first": _maml("first"),
    "private": _private,
}


def _ours(case: str, kernel: str) -> ClientApp:
    def client_fn(context: Context) -> SGDClient | MAMLClient:
        partition = int(context.node_config["partition-id"])
        return CLIENTS[case](
            data=data_of(partition), name=f"client-{partition}", seed=3, kernel=kernel
        )

    return client_app(client_fn)


def _foreign(message: Message, context: Context) -> Message:
    """Answer as a client of somebody else would, in NumPy alone."""
    partition = int(context.node_config["partition-id"])
    rng = np.random.default_rng(partition)
    arrays = {
        name: array - 0.1 * (array - rng.normal(size=array.shape)).astype(array.dtype)
        for name, array in from_record(message.content["arrays"]).items()
    }
    record = ArrayRecord({name: ArrayRecord([v])["0"] for name, v in arrays.items()})
    metrics = MetricRecord({"num-examples": partition + 1, "loss": 0.5 * partition})
    return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)


class Dispatcher:
    """Answer as the case of the message says, with a kernel; alone or for many at once."""

    def __init__(self, kernel: str) -> None:
        self.apps = {case: _ours(case, kernel) for case in CLIENTS}

    def of(self, message: Message) -> Callable[[Message, Context], Message]:
        case = str(message.content.config_records.get("config", {}).get("case", "fedavg"))
        return self.apps.get(case, _foreign)


def app_of(kernel: str = "eager") -> ClientApp:
    """Return the ClientApp of all cases."""
    dispatcher = Dispatcher(kernel)
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        return dispatcher.of(message)(message, context)

    for handler in (app.train(), app.evaluate(), app.query(action="roll_call")):
        handler(answer)
    return app


def cohort_app(case: str, kernel: str) -> ClientApp:
    """Return the ClientApp of one case, which can answer for many nodes at once."""
    return _ours(case, kernel)


class InOrder(Strategy):
    """Give one of Flower's strategies its replies by partition, whatever order they came in."""

    def __init__(self, inner: Strategy) -> None:
        self.inner = inner

    def configure_train(self, *arguments):  # type: ignore[no-untyped-def]
        return self.inner.configure_train(*arguments)

    def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
        by_weight = sorted(replies, key=lambda one: one.content["metrics"]["num-examples"])
        return self.inner.aggregate_train(server_round, by_weight)

    def configure_evaluate(self, *arguments):  # type: ignore[no-untyped-def]
        return self.inner.configure_evaluate(*arguments)

    def aggregate_evaluate(self, *arguments):  # type: ignore[no-untyped-def]
        return self.inner.aggregate_evaluate(*arguments)

    def summary(self) -> None:
        self.inner.summary()


OURS = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": NODES}
STRATEGIES: Mapping[str, Callable[[], Strategy]] = {
    "fedavg": lambda: FedAvg(clients_per_round=6, **OURS),
    "fedmeta-exact": lambda: FedMeta(clients_per_round=6, optimizer="adam", lr=0.05, **OURS),
    "fedmeta-first": lambda: FedMeta(clients_per_round=6, optimizer="sgd", lr=0.5, **OURS),
    "private": lambda: FedAvg(clients_per_round=6, weighting="uniform", **OURS),
    "flowers-fedavg": lambda: flowers.FedAvg(**FLOWERS),
    "flowers-fedadam": lambda: flowers.FedAdam(eta=0.1, **FLOWERS),
    "flowers-krum": lambda: flowers.Krum(num_malicious_nodes=2, **FLOWERS),
}
STRATEGIES = {
    **STRATEGIES,
    **{
        f"{name}-in-order": lambda make=make: InOrder(make())
        for name, make in STRATEGIES.items()
        if name.startswith("flowers")
    },
}


def model_of(case: str, grid: Grid) -> dict[str, np.ndarray]:
    """Return the model of one case after ``ROUNDS`` rounds on ``grid``."""
    random.seed(case)  # Flower's strategies sample by the global generator
    config = ConfigRecord({"case": case.removesuffix("-in-order")})
    initial = ArrayRecord(MODEL.state_dict())
    result = STRATEGIES[case]().start(
        grid, initial, num_rounds=ROUNDS, timeout=120, train_config=config
    )
    return {name: value.copy() for name, value in from_record(result.arrays).items()}


def main(out: Path) -> None:
    """Run every case on Flower's engine and write the models to ``out``."""
    from flwr.simulation import run_simulation

    server = ServerApp()

    @server.main()
    def run(grid: Grid, context: Context) -> None:
        for case in STRATEGIES:
            out.mkdir(exist_ok=True)
            save_file(model_of(case, grid), out / f"{case}.safetensors")
            log(20, "%s is done", case)

    run_simulation(
        server_app=server,
        client_app=app_of(),
        num_supernodes=NODES,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
