"""A ClientApp whose clients do what their message says: answer, raise, die, hang, remember."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from metabloom.sim import CohortGrid

app = ClientApp()

DEATHS = {
    "exit": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "overflow": lambda: _overflow(),
    "sleep": lambda: time.sleep(1000),
    "busy": lambda: re.match("(a+)+$", "a" * 60 + "b"),  # holds the interpreter's lock
}


def _overflow() -> None:
    sys.setrecursionlimit(10**9)

    def deeper() -> None:
        [None].sort(key=lambda _: deeper())  # on the C stack, which is no exception's matter

    deeper()


@app.train()
def train(message: Message, context: Context) -> Message:
    config = dict(message.content["config"])
    partition = int(context.node_config["partition-id"])
    if partition in config.get("bad", []):
        deed = str(config["deed"])
        flag = Path(str(config.get("flag", "")), f"{partition}") if "flag" in config else None
        if flag is None or not flag.exists():
            if flag:
                flag.touch()
            if deed == "raise":
                raise ValueError(f"client {partition} is unwell")
            DEATHS[deed]()
    state = context.state.config_records.get("count", ConfigRecord({"n": 0}))
    context.state["count"] = ConfigRecord({"n": int(state["n"]) + 1})
    time.sleep(float(config.get("seconds", 0.0)))
    arrays = {
        name: array.numpy() + np.float32(partition + 1)
        for name, array in message.content["arrays"].items()
    }
    metrics = {
        "num-examples": partition + 1,
        "count": int(state["n"]) + 1,
        "partition": partition,
        "pid": os.getpid(),
    }
    records = {
        "arrays": ArrayRecord({name: ArrayRecord([v])["0"] for name, v in arrays.items()}),
        "metrics": MetricRecord(metrics),
    }
    return Message(RecordDict(records), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    return Message(RecordDict({"pid": ConfigRecord({"pid": os.getpid()})}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    count = context.state.config_records.get("count", ConfigRecord({"n": 0}))
    return Message(RecordDict({"metrics": MetricRecord({"n": count["n"]})}), reply_to=message)


def content(size: int = 3, **config: object) -> RecordDict:
    """Return the content of a train message with a model of ``size`` zeros."""
    arrays = ArrayRecord([np.zeros(size, dtype=np.float32)])
    return RecordDict({"arrays": arrays, "config": ConfigRecord(config)})  # type: ignore[arg-type]


def ask(
    grid: CohortGrid, what: RecordDict, count: int = 0, *, timeout: float = 60.0
) -> list[Message]:
    """Send ``what`` to the first ``count`` nodes (0: all) by partition; return the replies."""
    return list(grid.send_and_receive(messages(grid, what, count), timeout=timeout))


def messages(grid: CohortGrid, what: RecordDict, count: int = 0) -> list[Message]:
    nodes = list(grid.get_node_ids())
    return [Message(what, node, "train") for node in nodes[: count or len(nodes)]]


def partitions(replies: list[Message]) -> list[int]:
    """Return the partitions that answered, ascending."""
    return sorted(int(r.content["metrics"]["partition"]) for r in replies if r.has_content())


def pids(replies: list[Message]) -> set[int]:
    """Return the processes that answered."""
    return {int(r.content["metrics"]["pid"]) for r in replies if r.has_content()}
