"""What the reply firewall and a checkpoint cost, for rounds of 1000 replies of 1 MB.

    python benchmarks/reliability.py

Firewall: the whole of ``FedAvg.aggregate_train``, from messages to the next model, with the
firewall and with a stand-in that only tells errors from answers; both sides in turn, on the same
replies, medians of --repeats. Two models of 1 MB: few large arrays (``mlp``, hidden = 320) and many
small ones. Checkpoint: ``save`` and ``load`` after a round of 1000 clients, for models of 1 and of
100 MB, with a history of one round and of 1000; the files are flushed to the disk (fsync).
"""

import gc
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from metabloom.models import build_model
from metabloom.sim import CohortGrid
from metabloom.strategies import Checkpoints, FedAvg
from metabloom.strategies.shell import exchange
from metabloom.strategies.shell.firewall import Judged, sift
from metabloom.strategies.shell.reports import RoundReport
from metabloom.strategies.shell.snapshot import Snapshot
from metabloom.wire import from_record, to_record

Arrays = dict[str, np.ndarray]
MANY = [50_000] * 4 + [2_500] * 18 + [64] * 20


def models() -> dict[str, Arrays]:
    """Return the two models of about 1 MB."""
    mlp = build_model("mlp", input_shape=(1, 28, 28), num_classes=10, seed=0, hidden=320)
    few = {name: value.numpy() for name, value in mlp.state_dict().items()}
    many = {f"a{i}": np.ones(size, np.float32) for i, size in enumerate(MANY)}
    return {"few large arrays": few, "many small arrays": many}


def let_through(
    replies: list[Message], sent: Arrays | None, *bounds: object
) -> tuple[list[Judged], list[Judged]]:
    """Take the place of ``sift``: what aggregation without a firewall does."""
    del bounds
    read = [one for one in replies if not one.has_error()]
    arrays = [from_record(one.content["arrays"]) if sent is not None else {} for one in read]
    return [Judged(one, found, "") for one, found in zip(read, arrays, strict=True)], []


def replies_to(messages: list[Message], arrays: Arrays) -> list[Message]:
    """Return an answer to each message, each with values of its own."""
    answers = []
    for index, message in enumerate(messages):
        message.metadata.__dict__["_message_id"] = str(index)
        moved = {name: value + np.float32(index / 1000) for name, value in arrays.items()}
        metrics = MetricRecord({"num-examples": 1 + index % 7, "train-loss": 1.0})
        content = RecordDict({"arrays": to_record(moved), "metrics": metrics})
        answers.append(Message(content, reply_to=message))
    return answers


def seconds_of(call: Callable[[], object]) -> float:
    """Return how long ``call`` takes."""
    gc.collect()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def firewall_row(name: str, arrays: Arrays, clients: int, repeats: int) -> str:
    """Return the row of one model: both sides in turn."""
    grid = CohortGrid(ClientApp(), num_nodes=clients)
    strategy = FedAvg(min_train_nodes=1, min_available_nodes=1)
    messages = list(strategy.configure_train(1, to_record(arrays), ConfigRecord(), grid))
    replies = replies_to(messages, arrays)
    sides: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * repeats):
        with_firewall = turn % 2 == 0
        strategy._round.messages = messages
        exchange.sift = sift if with_firewall else let_through
        took = seconds_of(lambda: strategy.aggregate_train(1, replies))
        strategy._arrays = arrays  # each turn is the first round
        sides[with_firewall].append(took)
    exchange.sift = sift
    on, off = median(sides[True]), median(sides[False])
    size = sum(value.nbytes for value in arrays.values()) / 1e6
    label = f"{name}: {len(arrays)}, {size:.2f} MB"
    return f"| {label} | {off:.2f} | {on:.2f} | {100 * (on / off - 1):.0f}% |"


def checkpoint_row(megabytes: int, rounds: int, clients: int, repeats: int) -> str:
    """Return the row of one size of model and history."""
    report = RoundReport(
        round=1,
        clients=tuple(f"client-{index}" for index in range(clients)),
        failures=(),
        train_metrics={"train-loss": 0.123456789},
        validation=(),
        bytes_down=10**9,
        bytes_up=10**9,
        seconds=12.3456789,
    )
    size = megabytes * 250_000 // 4
    snapshot = Snapshot(
        round=rounds,
        arrays={f"a{i}": np.full(size, i, np.float32) for i in range(4)},
        state={},
        reports=tuple(replace(report, round=number + 1) for number in range(rounds)),
        train_metrics={number + 1: {"train-loss": 0.123456789} for number in range(rounds)},
        evaluate_metrics={},
        server_metrics={},
        offences={},
        told=(),
        token="t",
    )
    saving, loading = [], []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpoints = Checkpoints(Path(folder))
        for _ in range(repeats):
            saving.append(seconds_of(lambda: checkpoints.save(snapshot)))
            loading.append(seconds_of(checkpoints.load))
        record = max(file.stat().st_size for file in Path(folder).glob("*.json"))
    save, load = median(saving), median(loading)
    return f"| {megabytes} MB | {rounds} | {record / 1e6:.1f} MB | {save:.3f} | {load:.3f} |"


def main(
    out: Annotated[Path, typer.Option(help="Folder for the table.")] = Path("benchmarks/results"),
    clients: Annotated[int, typer.Option(help="Replies of a round.")] = 1000,
    repeats: Annotated[int, typer.Option(help="Of each side.")] = 7,
) -> None:
    """Measure both and write the table."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    lines = [
        "# What the firewall and a checkpoint cost",
        "",
        "`python benchmarks/reliability.py`",
        "",
        f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, "
        f"NumPy {np.__version__}; medians of {repeats}, seconds.",
        "",
        f"## A round of {clients} replies: `FedAvg.aggregate_train`",
        "",
        "| model | without firewall | with | overhead |",
        "|---|---|---|---|",
        *(firewall_row(name, arrays, clients, repeats) for name, arrays in models().items()),
        "",
        LIMITS,
        "",
        f"## A checkpoint, {clients} clients a round",
        "",
        "| model | rounds of history | its JSON | save | load |",
        "|---|---|---|---|---|",
        *(checkpoint_row(mb, n, clients, repeats) for mb in (1, 100) for n in (1, 1000)),
    ]
    page = "\n".join(lines) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / "reliability.md").write_text(page)
    print(page)


LIMITS = (
    "The aim was 15%, and it is missed. The mean of 1000 MB takes 0.4 to 0.5 s; before it used one "
    "buffer for all replies it took 1.4 s for large arrays, and the same firewall was 7 to 15% of "
    "that. What stands in the way is memory: a second read of 1000 MB takes 0.10 to 0.13 s on this "
    "machine, whatever is computed; the rest is 2 us for each array. Tried: (1) one dot product in "
    "the place of abs, max and isfinite: twice as fast, and kept; (2) arrays read as views of the "
    "message's bytes: 7 us for 1 MB instead of 197 with Flower's copy, and kept; (3) two threads: "
    "0.11 s instead of 0.13 for large arrays, slower for small ones; (4) judging each array when "
    "the mean first reads it, while it is in the cache: 16% and 23%, but then a reply is no longer "
    "judged before the aggregation begins. Flower's own FedAvg takes 0.3 s for a single array of "
    "1 MB and 1.7 s for the many small ones."
)


if __name__ == "__main__":
    typer.run(main)
