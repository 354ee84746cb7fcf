"""A Ray cluster of two machines, on this one: ``python on_a_cluster.py`` prints what it saw.

In a process of its own, since a process can be in one Ray at a time.
"""

import json
import os
import threading
import time
import warnings

os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
os.environ["RAY_health_check_period_ms"] = "500"  # noqa: SIM112  a lost machine shows in seconds
os.environ["RAY_health_check_failure_threshold"] = "3"  # noqa: SIM112

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from ray.cluster_utils import Cluster

from metabloom.errors import ConfigError
from metabloom.sim import CohortGrid
from tests.sim.engine.clients import app, ask, content, partitions

gpus = ClientApp()


@gpus.query()
def visible(message: Message, context: Context) -> Message:
    time.sleep(0.2)
    place = {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES", "none"), "pid": os.getpid()}
    return Message(RecordDict({"place": ConfigRecord(place)}), reply_to=message)


def devices(address: str, **options: object) -> list[str]:
    """Return the GPUs that each worker sees."""
    with CohortGrid(gpus, num_nodes=12, ray_address=address, **options) as grid:  # type: ignore[arg-type]
        found: dict[str, str] = {}
        while len(found) < grid.workers:  # not all start at once
            asked = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
            replies = [one.content["place"] for one in grid.send_and_receive(asked, timeout=120)]
            found |= {str(one["pid"]): str(one["gpus"]) for one in replies}
    return sorted(found.values())


def main() -> None:
    warnings.simplefilter("ignore")
    head = {"num_cpus": 2, "num_gpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    other = cluster.add_node(num_cpus=2, num_gpus=1)
    address = cluster.address
    seen: dict[str, object] = {}
    try:
        seen["shared"] = devices(address, workers=4)
        seen["halves on one"] = devices(address, workers=2, gpus_per_worker=0.5)
        seen["none"] = devices(address, workers=2, run_config={"device": "cpu"})
        for workers, key in ((5, "too many"), (4, "too much")):
            try:
                CohortGrid(
                    app, num_nodes=1, workers=workers, ray_address=address, gpus_per_worker=0.75
                )
            except ConfigError as err:
                seen[key] = str(err)
        with CohortGrid(app, num_nodes=120, workers="auto", ray_address=address) as grid:
            seen["workers"] = grid.workers
            seen["whole"] = len(partitions(ask(grid, content(seconds=0.02), timeout=120)))
            threading.Timer(0.3, lambda: cluster.remove_node(other)).start()
            replies = ask(grid, content(seconds=0.05), timeout=120)
            seen["one lost"] = len(partitions(replies))
            seen["after"] = len(partitions(ask(grid, content(), timeout=120)))
    finally:
        cluster.shutdown()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
