"""Runs that are killed with -9 at random moments and resumed, until one gets to its end.

``python killed_runs.py FOLDER KILLS EVERY``. After each kill: the state can be read, and no round
that was saved is lost; a run that gets to its end has the model and the history of one that was
never stopped, to the bit. Children are forks, so that importing costs once.
"""

import json
import logging
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from metabloom.strategies import Checkpoints, RoundReport, RunResult
from tests.strategies.toy import Toy, bits, start, strategy_of

ROUNDS = 12
SETTINGS = {"strategy": "FedMeta", "seed": 0}
ROLES = ("train", "unseen", "train", "validation", "train")


def run(folder: Path | None, every: int, pipe: int | None = None) -> RunResult:
    """Run, or go on with, a run of FedMeta, whose Adam has a state."""

    def report(done: RoundReport) -> None:
        if pipe is not None:
            os.write(pipe, done.round.to_bytes(1))

    checkpoints = Checkpoints(folder, every, settings=SETTINGS, resume=True) if folder else None
    strategy = strategy_of("fedmeta", checkpoints=checkpoints, on_round=report)
    return start(strategy, Toy(roles=ROLES), rounds=ROUNDS)


def told(result: RunResult) -> str:
    """Return all of a result but the seconds."""
    rounds = [{**asdict(report), "seconds": None} for report in result.rounds]
    arrays = {name: value.hex() for name, value in bits(result.arrays).items()}
    scores = [asdict(score) for score in result.unseen]
    metrics = {n: dict(m) for n, m in result.train_metrics_clientapp.items()}
    return json.dumps([arrays, rounds, scores, metrics])


def killed_after(seconds: float, folder: Path, every: int, expected: str) -> tuple[bool, int]:
    """Return whether the child was killed, and the last round that it called finished."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = 1
        try:
            status = 0 if told(run(folder, every, writer)) == expected else 3
        finally:
            os._exit(status)
    os.close(writer)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    finished = os.read(reader, 1000)
    os.close(reader)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(f"a resumed run ended with status {os.WEXITSTATUS(status)}")
    return os.WIFSIGNALED(status), max(finished, default=0)


def main(folder: Path, kills: int, every: int) -> None:
    """Kill so many runs."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    expected = told(run(None, every))
    began = time.perf_counter()
    run(folder, every)
    usual = time.perf_counter() - began
    shutil.rmtree(folder)
    chance = random.Random(every)
    done = whole = finished = 0
    while done < kills or not whole:
        killed, last = killed_after(chance.uniform(0, usual), folder, every, expected)
        finished = max(finished, last)
        kept = Checkpoints(folder, settings=SETTINGS).load()
        saved = kept.round if kept else 0
        if finished - finished % every > saved:
            sys.exit(f"round {finished} was finished, and the checkpoint is of round {saved}")
        done += killed
        if not killed or saved == ROUNDS:
            whole += not killed
            finished = 0
            shutil.rmtree(folder)
    print(f"{done} kills; {whole} runs got to their end, equal to the bit")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
