"""What private training costs in time: a release, a message, a ledger that has grown long.

    python benchmarks/privacy_cost.py

Release: one private gradient by ``Releases.gradient`` against Opacus by hand (GradSampleModule and
DPOptimizer, made once, no ledger) and against one plain SGD step; same model, same records, same
noise, in turn in one run, medians of --repeats. Message: the parts of one private round of a
``MAMLClient``, made anew as for each message, and the round itself. Ledger: files of 1, 100 and
10,000 lines, opened as a new process does, and the round that has to open them.

Times are the processor's, which other work on the machine moves little; what waits for the disk is
by the clock.
"""

import logging
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest import mock

import torch
import typer

from metabloom.accounting import Event
from metabloom.clients import ClientData, ClientStore, MAMLClient, PrivacyConfig, PrivacyLedger
from metabloom.clients.privacy import Releases
from metabloom.clients.privacy.noise import fresh_sources
from metabloom.ledger import Charge
from metabloom.models import build_model
from metabloom.opacus_import import import_opacus

SHAPES = {"mlp": (1, 8, 8), "conv4": (1, 28, 28)}
OPTIONS: dict[str, dict[str, Any]] = {"mlp": {"hidden": 64}, "conv4": {"width": 32}}
BATCHES = (16, 64, 256)
LINES = (1, 100, 10_000)
SIGMA, CLIP, DELTA, MANY = 1.0, 1.0, 1e-5, 10**6
BAR = 0.01  # largest share of a round that reading epsilon may take
RECORDS, RATE = 108, 0.25  # of the round: as in benchmarks/privacy.py

Call = Callable[[], object]


def medians(
    calls: Sequence[Call], repeats: int, clock: Callable[[], float] = time.process_time
) -> list[float]:
    """Return the median seconds of each of ``calls``, which take turns; two turns are warm-up."""
    taken: list[list[float]] = [[] for _ in calls]
    with warnings.catch_warnings():
        # Opacus' own way, by hand, warns that inputs need no gradient; releases do not.
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        for turn in range(repeats + 2):
            for call, own in zip(calls, taken, strict=True):
                began = clock()
                call()
                if turn >= 2:
                    own.append(clock() - began)
    return [median(own) for own in taken]


def records_of(name: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return made-up records: their values cost what any others do."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand((count, *SHAPES[name]), generator=generator)
    return inputs, torch.randint(10, (count,), generator=generator)


def model_of(name: str) -> torch.nn.Module:
    """Return the model, always with the same weights."""
    return build_model(name, input_shape=SHAPES[name], num_classes=10, seed=0, **OPTIONS[name])


def ours(name: str, batch: int) -> Call:
    """Return a call of one release, whose Poisson batch of rate 1 is every record."""
    releases = engine_of(name, batch, 1.0)
    params = dict(model_of(name).named_parameters())
    return lambda: releases.gradient(params, noise_multiplier=SIGMA, max_grad_norm=CLIP)


def engine_of(name: str, records: int, rate: float) -> Releases:
    """Return the engine of one message, with a charge that lasts."""
    return Releases(
        model_of(name),
        torch.nn.functional.cross_entropy,
        records_of(name, records),
        sample_rate=rate,
        expected_batch_size=rate * records,
        charge=Charge.of([Event(SIGMA, rate, MANY)]),
        sources=fresh_sources(),
    )


def by_hand(name: str, batch: int) -> Call:
    """Return a call of the same gradient with Opacus alone."""
    import_opacus()
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    hooked = GradSampleModule(model_of(name), loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(hooked.parameters(), lr=0.0),
        noise_multiplier=SIGMA,
        max_grad_norm=CLIP,
        expected_batch_size=batch,
        generator=fresh_sources().noise,
    )
    return _step(hooked, optimizer, records_of(name, batch), "sum")


def plain(name: str, batch: int) -> Call:
    """Return a call of one SGD step without privacy."""
    model = model_of(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return _step(model, optimizer, records_of(name, batch), "mean")


def _step(model: Any, optimizer: Any, records: Any, reduction: str) -> Call:
    inputs, targets = records

    def step() -> None:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), targets, reduction=reduction)
        loss.backward()
        optimizer.step()

    return step


def release_row(name: str, batch: int, repeats: int) -> str:
    """Return the row of one model and batch."""
    sides = [side(name, batch) for side in (plain, by_hand, ours)]
    bare, hand, own = medians(sides, repeats)
    cells = [f"{1e3 * seconds:.2f}" for seconds in (bare, hand, own)]
    ratios = [f"{own / hand:.2f}", f"{own / bare:.1f}"]
    return "| " + " | ".join([name, str(batch), *cells, *ratios]) + " |"


def round_of(ledger: Path) -> Call:
    """Return a call of one private FOMAML round: a client made anew, as for each message."""
    inputs, targets = records_of("mlp", RECORDS)
    half = RECORDS // 2
    data = ClientData((inputs[:half], targets[:half]), (inputs[half:], targets[half:]))
    model, number = model_of("mlp"), iter(range(1, MANY))
    arrays = [value.numpy() for value in model.state_dict().values()]

    def one_round() -> None:
        privacy = PrivacyConfig(
            noise_multiplier=SIGMA,
            max_grad_norm=CLIP,
            sample_rate=RATE,
            target_epsilon=1e6,
            target_delta=DELTA,
            expected_batch_size=RATE * RECORDS,
            ledger=ledger,
        )
        client = MAMLClient(model, data, order="first", privacy=privacy, name="client")
        client.fit(arrays, {"server-round": next(number)})

    return one_round


def message_rows(folder: Path, repeats: int) -> list[str]:
    """Return the rows of the parts of a round with their shares of the whole, and the verdict."""
    ledger = PrivacyLedger(folder / "parts.jsonl")
    events = [Event(SIGMA, RATE, 2)]
    release = engine_of("mlp", RECORDS, RATE)
    params = dict(model_of("mlp").named_parameters())
    names = (
        "a whole round (FOMAML, one step: two releases)",
        "make the engine",
        "two releases",
        "reserve in the ledger, with fsync",
        "keep the reply, with fsync",
        "read epsilon",
    )
    replies = ClientStore(folder / "replies").versions("run", "client", "reply")
    kept = {name: value.detach().numpy() for name, value in params.items()}
    number = iter(range(1, MANY))

    def keep() -> None:
        one = next(number)
        replies.save(one, kept, kept=one - 1)

    calls: list[Call] = [
        round_of(folder / "round.jsonl"),
        lambda: engine_of("mlp", RECORDS, RATE),
        lambda: [
            release.gradient(params, noise_multiplier=SIGMA, max_grad_norm=CLIP) for _ in range(2)
        ],
        lambda: ledger.reserve(events),
        keep,
        lambda: ledger.epsilon(DELTA),
    ]
    found = medians(calls, repeats, time.perf_counter)
    rows = [
        f"| {name} | {1e3 * seconds:.2f} | {100 * seconds / found[0]:.1f}% |"
        for name, seconds in zip(names, found, strict=True)
    ]
    share = found[-1] / found[0]
    verdict = "kept" if share < BAR else "MISSED"
    bar = f"The bar, to read epsilon in under {100 * BAR:g}% of a round, is {verdict}."
    return [*rows, "", bar]


def ledger_row(folder: Path, lines: int, repeats: int) -> str:
    """Return the row of a ledger of so many lines."""
    path = folder / f"{lines}.jsonl"
    write_lines(path, lines)
    size = path.stat().st_size / 1e3
    calls: list[Call] = [
        lambda: PrivacyLedger(path).head,
        lambda: PrivacyLedger(path).epsilon(DELTA),
        round_of(path),
    ]
    opened, epsilon, whole = medians(calls, repeats, time.perf_counter)
    cells = [f"{1e3 * seconds:.1f}" for seconds in (opened, epsilon, whole)]
    return "| " + " | ".join([f"{lines:,}", f"{size:.1f} kB", *cells]) + " |"


def write_lines(path: Path, lines: int) -> None:
    """Write a ledger of so many lines, without waiting for the disk after each."""
    ledger = PrivacyLedger(path)
    with mock.patch("metabloom.ledger_file.os.fsync"):
        for number in range(max(1, lines - 1)):  # the first line opens the ledger
            ledger.reserve(
                [Event(SIGMA, RATE, 2)], mechanism="fomaml", run="run", server_round=number + 1
            )


def page_of(releases: Iterable[str], message: Iterable[str], ledgers: Iterable[str]) -> str:
    """Return the tables."""
    lines = [
        "# What private training costs in time",
        "",
        "`python benchmarks/privacy_cost.py`",
        "",
        f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, "
        f"torch {torch.__version__}, one thread; medians, milliseconds. The machine did other work "
        "at the same time: read the ratios, which come from turns, rather than the times.",
        "",
        "## One private gradient (processor's time)",
        "",
        "| model | batch | plain SGD step | Opacus by hand | `Releases.gradient` | ours / Opacus | "
        "ours / plain |",
        "|---|---|---|---|---|---|---|",
        *releases,
        "",
        "mlp: 64-64-10; conv4: width 32, 28x28. Opacus by hand has its module and optimiser made "
        "once, takes the batch as it is given, and gives the loss of a batch; ours draws the "
        "batch, takes the loss of each record alone, and drops records whose gradient is not "
        "finite.",
        "",
        "## One message (by the clock)",
        "",
        "| part | ms | share |",
        "|---|---|---|",
        *message,
        "",
        f"mlp, {RECORDS} records, sample rate {RATE}. The client is made anew in each round, as "
        "Flower's apps do, and its ledger grows by a line in each. The first epsilon in a process "
        "takes some seconds more: it imports Opacus and dp-accounting.",
        "",
        "## A ledger that has grown (by the clock)",
        "",
        "| lines | file | open and check | the same, and epsilon | a whole round |",
        "|---|---|---|---|---|",
        *ledgers,
    ]
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path, typer.Option(help="Folder for the table.")] = Path("benchmarks/results"),
    repeats: Annotated[int, typer.Option(help="Of each side.")] = 30,
) -> None:
    """Measure all three and write the table."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    releases = [release_row(name, batch, repeats) for name in SHAPES for batch in BATCHES]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        message = message_rows(Path(folder), repeats)
        ledgers = [ledger_row(Path(folder), lines, repeats) for lines in LINES]
    page = page_of(releases, message, ledgers)
    out.mkdir(parents=True, exist_ok=True)
    (out / "privacy-cost.md").write_text(page)
    print(page)


if __name__ == "__main__":
    typer.run(main)
