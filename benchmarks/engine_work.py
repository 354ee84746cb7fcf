"""What the engine's benchmarks compute: a plug-in with data and a model, and an app that echoes.

Loaded by name (``plugins = engine_work``) on the server and on the clients of both engines.
"""

from functools import partial
from typing import Annotated, Any

import numpy as np
from engine_model import SmallCNN
from flwr.app import Context
from flwr.client import NumPyClient
from pydantic import Field

from metabloom.clients import client_app
from metabloom.config import RunConfig
from metabloom.models import register_model
from metabloom.sim import DataSpec, Federation, Records, Split, federate, register_dataset
from metabloom.streams import numpy_stream

DATASET, MODEL = "bench-images", "bench-cnn"
SPARE = 2  # one client to validate on, one that stays unseen; all others train
Count = Annotated[int, Field(ge=0)]

WORKS: dict[str, dict[str, Any]] = {
    # 50 records: five SGD steps of batch 10.
    "FedAvg": {"strategy": "fedavg", "batch-size": 10, "local-epochs": 1, "local-lr": 0.05},
    # 25 records to adapt to, 25 to be judged on; SGD, since Adam makes signs of rounding.
    "MAML": {
        "strategy": "fedmeta",
        "order": "exact",
        "inner-steps": 1,
        "inner-lr": 0.1,
        "split": "fixed",
        "batch-size": 25,  # all of either: the compiler must know it for second derivatives
        "server-optimizer": "sgd",
        "outer-lr": 0.1,
    },
    "Ditto": {"strategy": "ditto", "batch-size": 10, "local-epochs": 1, "local-lr": 0.05},
}

register_model(MODEL)(SmallCNN)


def spec(size: int) -> DataSpec:
    """Return the spec of square images."""
    return DataSpec((1, size, size), 10, MODEL)


@register_dataset(DATASET, spec, split=None)
def bench_images(
    *, seed: int, num_clients: int, records: Count = 50, total: Count = 0, size: Count = 28
) -> Federation:
    """Return clients of made-up images, made when they are first asked for.

    Args:
        seed: of everything.
        num_clients: nodes, the two that do not train included; 0: 12.
        records: of each client.
        total: where above 0, one table of so many records is cut evenly among the clients instead.
        size: height and width of an image.
    """
    count = num_clients or 10 + SPARE
    keys = [f"client-{index:05d}" for index in range(count)]
    held: dict[str, Records]
    if total:
        images = numpy_stream(seed, "table").integers(0, 256, (total, 1, size, size), np.uint8)
        targets = numpy_stream(seed, "table targets").integers(0, 10, total)
        cuts = np.array_split(np.arange(total), count)
        held = {
            key: Records.of_rows(images, targets, rows)
            for key, rows in zip(keys, cuts, strict=True)
        }
    else:
        held = {
            key: Records(
                numpy_stream(seed, "targets", key).integers(0, 10, records),
                partial(_images, seed, key, (records, 1, size, size)),
            )
            for key in keys
        }
    role = ["train"] * (count - SPARE) + ["validation", "unseen"]
    return federate(
        DATASET,
        spec(size),
        held,
        seed=seed,
        split=Split(),
        roles=dict(zip(keys, role, strict=True)),
    )


def _images(seed: int, key: str, shape: tuple[int, ...]) -> np.ndarray:
    return numpy_stream(seed, "images", key).integers(0, 256, shape, np.uint8)


def config_of(work: str, clients: int, **keys: Any) -> dict[str, Any]:
    """Return the configuration of ``clients`` that all train in each round, hyphenated."""
    return {
        "plugins": __name__,
        "dataset": DATASET,
        "num-clients": clients + SPARE,
        "clients-per-round": clients,
        "eval-every": 0,
        "checkpoint-every": 0,
        **WORKS[work],
        **{key.replace("_", "-"): value for key, value in keys.items()},
    }


class Echo(NumPyClient):
    """Give back what came, or what came and one more: a client without work of its own."""

    def __init__(self, step: float) -> None:
        self.step = np.float32(step)

    def get_properties(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return nothing: every node trains."""
        return {}

    def fit(self, parameters: list[np.ndarray], config: dict[str, Any]) -> Any:
        """Return the arrays, one record and no metric."""
        moved = [value + self.step for value in parameters] if self.step else parameters
        return moved, 1, {}


def echo(context: Context) -> Echo:
    """Return the client of a node; ``step`` of the run config is what it adds."""
    return Echo(float(context.run_config.get("step", 0.0)))


echo_app = client_app(echo)


def read(config: dict[str, Any]) -> RunConfig:
    """Return a run's configuration, checked."""
    return RunConfig.read(config)
