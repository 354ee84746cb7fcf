"""Private rounds that are killed with -9 at random moments, over one ledger that only grows.

``python killed_releases.py FOLDER KILLS [late]``. A child writes a byte to a pipe for each release,
at the moment at which its noise is drawn. After each kill the ledger can be read, holds no less
than before, and at least all releases of all children. ``late`` plants a bug: what a round releases
is booked after it, as training loops do that ask an accountant at the end. Children are forks, so
that importing costs once.
"""

import logging
import os
import random
import signal
import sys
import time
from itertools import count
from pathlib import Path

import torch

from metabloom.clients import MAMLClient, PrivacyConfig, PrivacyLedger
from metabloom.clients.privacy.releases import Releases
from metabloom.clients.privacy.round import PrivateRounds
from metabloom.ledger import Charge
from tests.clients.small_clients import client_data, net

TOKEN = "a run"
STEPS = 2  # meta-steps of a round, of 3 releases each


def client_at(file: Path) -> MAMLClient:
    privacy = PrivacyConfig(
        noise_multiplier=50.0,
        max_grad_norm=1.0,
        sample_rate=0.5,
        expected_batch_size=4,
        target_epsilon=1e9,
        target_delta=1e-5,
        ledger=PrivacyLedger(file, data="killed/anna"),
    )
    options = {"inner_steps": 2, "local_steps": STEPS, "name": "anna", "privacy": privacy}
    return MAMLClient(net(), client_data(), **options)


def train_for_ever(file: Path, first_round: int, pipe: int) -> None:
    """Train round after round; tell each release."""
    release = Releases._release

    def told(self, *arguments, **more):
        os.write(pipe, b"x")  # just before: a release that is cut short counts as one
        return release(self, *arguments, **more)

    Releases._release = told
    own = client_at(file)
    parameters = own.get_parameters({})
    for number in count(first_round):
        config = {"server-round": number, "run-token": TOKEN, "kept-round": number - 1}
        parameters, _, _ = own.fit(parameters, config)


def book_late() -> None:
    """Plant the bug: release first, then book."""
    reserve, keep = PrivateRounds._reserve, PrivateRounds._keep
    unpaid = []

    def reserve_nothing(self, events, *arguments):
        unpaid.append((events, *arguments))
        return Charge.of(events)

    def book_and_keep(self, *arguments):
        reserve(self, *unpaid.pop())
        keep(self, *arguments)

    PrivateRounds._reserve, PrivateRounds._keep = reserve_nothing, book_and_keep


def killed_after(seconds: float, file: Path, first_round: int) -> int:
    """Return how many releases a child made before it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            train_for_ever(file, first_round, writer)
        finally:
            os._exit(1)
    os.close(writer)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        sys.exit(f"a child ended by itself, with status {os.WEXITSTATUS(status)}")
    with os.fdopen(reader, "rb") as told:
        return len(told.read())


def main(folder: Path, kills: int, *, late: bool) -> None:
    """Kill so many children."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    own = client_at(folder / "warm.jsonl")
    times = []
    for number in range(1, 6):
        began = time.perf_counter()
        own.fit(own.get_parameters({}), {"server-round": number})
        times.append(time.perf_counter() - began)
    usual = min(times)
    if late:
        book_late()
    chance = random.Random(5)
    file = folder / "anna.jsonl"
    released = booked = torn = 0
    for kill in range(1, kills + 1):
        seconds = chance.uniform(0, 3 * usual)
        first_round = PrivacyLedger(file).head.lines + 1
        own_releases = killed_after(seconds, file, first_round)
        released += own_releases
        before, booked = booked, sum(number for *_, number in PrivacyLedger(file).events)
        torn += own_releases % (3 * STEPS) > 0
        if booked < before:
            sys.exit(f"kill {kill}: {booked} releases in the ledger, {before} before")
        if booked < released:
            sys.exit(f"kill {kill}: {released} releases were made, {booked} are in the ledger")
    print(f"{kills} kills, {torn} of them within a round; {released} released, {booked} booked")
    if torn < kills / 20:
        sys.exit("hardly any kill fell into a round: the moments are badly chosen")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), late=sys.argv[3:] == ["late"])
