"""Aggregation of many large replies: streamed into partial sums, in memory, and Flower's own.

    python benchmarks/engine_aggregation.py JOB.json OUT

is one side, in a process of its own: ``FedAvg.aggregate_train`` of ours and of Flower in turn, on
the same replies, which lie in memory. Partial sums need replies that come from clients: that side
is a round of ``engine_side.py``.
"""

import gc
import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from engine_rows import Setting
from engine_turns import HERE, Line, line_of
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flowers

from metabloom.sim import CohortGrid
from metabloom.strategies import FedAvg
from metabloom.wire import from_record, to_record

PARTS = 4  # arrays of a model


def run_job(job: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Return what one side found, which writes no file of its own."""
    return in_memory(job["clients"], job["megabytes"], job["repeats"])


def in_memory(clients: int, megabytes: float, repeats: int) -> dict[str, Any]:
    """Return the seconds of each strategy's aggregation of the same replies, and its memory."""
    grid = CohortGrid(ClientApp(), num_nodes=clients)
    size = round(megabytes * 250_000 / PARTS)
    arrays = {f"a{i}": np.zeros(size, np.float32) for i in range(PARTS)}
    shell: dict[str, Any] = {"min_train_nodes": 1, "min_available_nodes": 1}
    sides = {"ours": FedAvg(**shell), "Flower": flowers.FedAvg(**shell)}
    messages = list(sides["ours"].configure_train(1, to_record(arrays), ConfigRecord(), grid))
    replies = [_reply(message, i, arrays) for i, message in enumerate(messages)]
    found: dict[str, Any] = {side: [] for side in sides}
    results: dict[str, dict[str, np.ndarray]] = {}
    for turn in range(repeats):
        for side in sides if turn % 2 == 0 else reversed(sides):
            ours = sides["ours"]
            ours._round.messages, ours._arrays = messages, arrays  # each turn is the first round
            took, record = _timed(lambda side=side: sides[side].aggregate_train(1, replies)[0])
            found[side].append(took)
            results[side] = from_record(record)
    one, other = results.values()
    apart = max(float(np.abs(one[name] - other[name]).max()) for name in one)
    if not apart <= 1e-4:  # of values up to 1000: Flower sums in float32
        raise RuntimeError(f"the two means differ by {apart:.2g}")
    found["peak_mb_of_process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return found


def _reply(message: Message, index: int, arrays: dict[str, np.ndarray]) -> Message:
    message.metadata.__dict__["_message_id"] = str(index)
    moved = {name: value + np.float32(index / 1000) for name, value in arrays.items()}
    metrics = MetricRecord({"num-examples": 1 + index % 7})
    content = RecordDict({"arrays": to_record(moved), "metrics": metrics})
    return Message(content, reply_to=message)


def _timed(call: Callable[[], ArrayRecord | None]) -> tuple[float, Any]:
    gc.collect()
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def lines(setting: Setting) -> Iterator[Line]:
    """Yield the lines of each size of a reply."""
    script = (sys.executable, str(HERE / "engine_aggregation.py"))
    for megabytes in (0.01,) if setting.quick else (1.0, 10.0):
        clients = 8 if setting.quick else 1000
        held = clients if setting.quick else fitting(clients, megabytes)
        repeats = 2 if setting.quick else 5
        job = {"clients": held, "megabytes": megabytes, "repeats": repeats, "peak": True}
        memory = setting.turns.run(job, 0, script)
        pairs = zip(memory["Flower"], memory["ours"], strict=True)
        each = {side: 1e3 * median(memory[side]) / held for side in ("ours", "Flower")}
        yield line_of(
            f"aggregation in memory, {held} replies of {megabytes:g} MB, Flower's FedAvg / ours",
            [theirs / own for theirs, own in pairs],
            note=f"milliseconds of a reply: ours {each['ours']:.2f}, Flower {each['Flower']:.2f}; "
            f"most memory {memory['peak_mb']:.0f} MB, replies included",
        )
        rounds = {
            name: {
                "engine": "cohort",
                "workers": setting.workers,
                "rounds": 3,
                "step": 1.0,
                "clients": clients,
                "megabytes": megabytes,
                "summed": summed,
                "keep": [3],
                "peak": True,
            }
            for name, summed in (("streamed", True), ("replies", False))
            if summed or held == clients
        }
        found = setting.turns.take(rounds, setting.turns_of(2))
        theirs = each["Flower"] * clients / 1e3  # as many replies as here
        told = "; ".join(
            f"{name}: {1e3 * median(one['aggregation'][-1] for one in turns):.1f} ms, a round "
            f"{median(median(one['later']) for one in turns):.2f} s, most memory of all processes "
            f"{max(one['peak_mb'] for one in turns):.0f} MB"
            for name, turns in found.items()
        )
        yield line_of(
            f"aggregation streamed, {clients} replies of {megabytes:g} MB, Flower's FedAvg / ours",
            [theirs / median(one["aggregation"][1:]) for one in found["streamed"]],
            note=f"Flower {1e3 * theirs:.0f} ms; ours in the driver, {told}",
        )


def fitting(clients: int, megabytes: float) -> int:
    """Return how many replies lie in a third of the memory that is free, ``clients`` at most."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1e3
    return min(clients, max(8, int(free / 3 / megabytes) // 100 * 100))


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.ERROR)
    given, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    (folder / "found.json").write_text(json.dumps(run_job(given, folder)) + "\n")
