"""Snapshots to save, what it means that they come back exactly, and a process to kill.

``python snapshots.py FOLDER KILLS`` kills a process that saves checkpoints, many times. It prints,
as JSON: for each kill the last round whose save had returned and the round that was loaded
afterwards, how often a kill left a part of a save behind, and the files that are there at the end.
"""

import json
import math
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from hypothesis import strategies as st

from metabloom.files import seal_json, temporary_of, unseal_json
from metabloom.strategies import ClientScore, RoundReport
from metabloom.strategies.shell.checkpoint import Checkpoints
from metabloom.strategies.shell.snapshot import Snapshot


def report(number: int, loss: float = 0.25) -> RoundReport:
    return RoundReport(
        round=number,
        clients=("anna", "ben"),
        failures=(("carl", "ran away"),),
        train_metrics={"train-loss": loss},
        validation=(ClientScore("dora", None, "validation", 7.0, {"accuracy": 0.5, "n": 3}),),
        bytes_down=10,
        bytes_up=20,
        seconds=0.125,
        quarantined=(("emil", "NaN"),),
        skipped=number % 2 == 0,
    )


def snapshot(number: int = 1, **parts) -> Snapshot:
    usual = Snapshot(
        round=number,
        arrays={"z": np.full(2, number, np.float32), "a": np.array(number)},
        state={"step": torch.tensor(float(number))},
        reports=tuple(report(n) for n in range(1, number + 1)),
        train_metrics={n: {"loss": 1 / n, "count": n} for n in range(1, number + 1)},
        evaluate_metrics={number: {"each": [0.5, 1.0], "whole": [1, 2], "none": []}},
        server_metrics={0: {"loss": 2.0}},
        offences={"ben": 2},
        told=("12", "7"),
        token="run-a",
    )
    return replace(usual, **parts)


def saved(folder: Path, *numbers: int, **options) -> Checkpoints:
    checkpoints = Checkpoints(folder, **options)
    for number in numbers:
        checkpoints.save(snapshot(number))
    return checkpoints


def exactly(value):
    """``value`` in a form whose == is equality of types, order and bits."""
    kind = type(value).__name__
    if isinstance(value, float) and not isinstance(value, np.generic):
        return kind, struct.pack(">d", value)
    if isinstance(value, torch.Tensor):
        bits = value.detach().clone(memory_format=torch.contiguous_format)
        held = bytes(bits.untyped_storage()[: bits.nbytes])
        return "Tensor", str(value.dtype), tuple(value.shape), held
    if isinstance(value, np.ndarray | np.generic):
        return kind, str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return kind, [(exactly(key), exactly(one)) for key, one in value.items()]
    if isinstance(value, list | tuple):
        return kind, [exactly(one) for one in value]
    if isinstance(value, Snapshot | RoundReport | ClientScore):
        return kind, exactly({one.name: getattr(value, one.name) for one in fields(value)})
    return kind, value


def through_disk(**parts) -> Snapshot:
    with TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints")
        checkpoints.save(snapshot(**parts))
        return checkpoints.load()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rounds(folder: Path) -> list[int]:
    pairs = sorted(path.name for path in folder.glob("round-*"))
    numbers = [int(name[6:14]) for name in pairs]
    assert numbers[::2] == numbers[1::2]  # each has both files
    return numbers[::2]


class Foo:
    pass


ENDLESS: list = []
ENDLESS.append(ENDLESS)


def damaged(content: bytes):
    """Every truncation, and each byte with one bit or its case changed."""
    for position in range(len(content)):
        yield content[:position]
        for flip in {1 << position % 8, 0x20}:
            yield content[:position] + bytes([content[position] ^ flip]) + content[position + 1 :]
    yield content + b"\n"
    yield content + b" "


def rewrite(path: Path, **members) -> None:
    told = unseal_json(path.read_bytes()) | members
    path.write_bytes(seal_json(told))


def failing(real, calls, step, error):
    """``real``, which raises ``error`` in its call number ``step``."""

    def fails(*args, **options):
        if next(calls) == step:
            raise error
        return real(*args, **options)

    return fails


def file_of(handle: int) -> str:
    name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
    target = temporary_of(name)
    return f"for {target}" if target else name


# --- for hypothesis ------------------------------------------------------------------------------

ODD_NAN = struct.unpack(">d", bytes.fromhex("fff8000000000abc"))[0]  # of a sign and a payload
FLOATS = st.floats() | st.sampled_from([-0.0, 1e-320, -math.inf, math.nan, ODD_NAN, 1e308, 1.0])
KEYS = st.integers() | st.text()
DTYPES = ("bool", "float16", "float32", "float64", "int8", "int64", "uint16", "uint64")
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def arrays(draw):
    dtype, shape = np.dtype(draw(st.sampled_from(DTYPES))), draw(SHAPES)
    size = math.prod(shape) * dtype.itemsize
    value = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    if dtype.kind == "b":
        value = value % 2
    value = value.view(dtype).reshape(shape)
    return value.T if draw(st.booleans()) else value


ARRAYS = arrays()
TENSORS = ARRAYS.map(lambda value: torch.from_numpy(value.copy()))
LEAVES = (
    st.none() | st.booleans() | st.integers() | FLOATS | st.text() | ARRAYS | TENSORS
) | ARRAYS.filter(lambda value: value.ndim == 0).map(lambda value: value[()])
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=8,
)


METRICS = st.dictionaries(
    st.text(), FLOATS | st.integers() | st.lists(FLOATS) | st.lists(st.integers()), max_size=3
)


HISTORIES = st.dictionaries(st.integers(0), METRICS, max_size=3)


# --- killing -------------------------------------------------------------------------------------


def telling(number: int) -> Snapshot:
    """Return a snapshot whose every part tells the round."""
    return Snapshot(
        round=number,
        arrays={"weight": np.full(200_000, number, np.float32)},
        state={"step": torch.full((3,), number), "round": number},
        reports=(),
        train_metrics={number: {"loss": float(number)}},
        evaluate_metrics={},
        server_metrics={},
        offences={"anna": number},
        told=(),
        token="run",
    )


def check(found: Snapshot) -> None:
    number = found.round
    told = (found.state["round"], found.train_metrics, found.offences, found.token)
    assert told == (number, {number: {"loss": number}}, {"anna": number}, "run")
    assert (found.arrays["weight"] == number).all()
    assert (found.state["step"] == number).all()


def save_from(save: Callable[[int], object], first: int, pipe: int) -> None:
    for number in range(first, sys.maxsize):
        save(number)
        os.write(pipe, f"{number}\n".encode())


def one_kill(save: Callable[[int], object], first: int, delay_s: float) -> int:
    """Return the last round that a child which saves said to be saved before it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            save_from(save, first, writing)
        finally:
            os._exit(1)
    os.close(writing)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().split()
    return int(said[-1]) if said else first - 1


def main(folder: Path, kills: int) -> None:
    delays = random.Random(0)
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(telling(1))
    rounds, parts = [(1, 1)], 0
    for _ in range(kills):
        delay_s = delays.uniform(0.001, 0.06)
        saved = one_kill(lambda n: checkpoints.save(telling(n)), rounds[-1][1] + 1, delay_s)
        found = checkpoints.load()
        check(found)
        rounds.append((saved, found.round))
        names = {path.name for path in folder.iterdir()}
        records = {name.removesuffix(".json") for name in names if name.endswith(".json")}
        arrays = {name.removesuffix(".safetensors") for name in names}
        parts += any(temporary_of(name) for name in names) or len(arrays - names - records) > 0
    checkpoints.save(telling(rounds[-1][1] + 1))
    left = sorted(path.name for path in folder.iterdir())
    print(json.dumps({"rounds": rounds, "parts": parts, "left": left}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
