"""A private local step: our kernels against Opacus by hand, with equal results.

    python benchmarks/dp_step.py

One step: per-record gradients of a Poisson batch, clipped, summed, with noise, and w <- w - lr g.
Opacus by hand is its tutorial's loop: GradSampleModule, DPOptimizer over torch.optim.SGD, made
once; ghost: its GradSampleModuleFastGradientClipping, which computes norms first and goes back a
second time. Ours is ``Releases.gradient``, which books each release, with each kernel. All sides
take the same batches and the same noise in turn in one run. Each step begins at the parameters of
Opacus by hand, and must end within 1e-6 of it: left to themselves, float32 runs of Opacus and of
any other order of sums drift apart by more in some tens of steps, and float64 runs do not.

Times are the processor's, medians over turns; what the first step of each size
takes more (compilation) is told apart.
"""

import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, get_args

import torch
import typer
from torch import Tensor, nn

from metabloom.accounting import Event
from metabloom.clients.kernel import Kernel
from metabloom.clients.privacy import Releases
from metabloom.clients.privacy.noise import seeded_sources
from metabloom.clients.privacy.releases import Draw
from metabloom.ledger import Charge
from metabloom.models import build_model
from metabloom.opacus_import import import_opacus
from metabloom.streams import torch_seeded, torch_stream

SHAPE, CLASSES, RECORDS = (1, 28, 28), 10, 1024
BATCHES = (64, 16)
SIGMA, CLIP, RATE = 1.0, 1.0, 0.05
NEAR = 1e-6  # of float32 parameters, one step from equal ones
BAR, AIM = 2.5, 4.0  # compiled, against Opacus
HAND = "Opacus by hand"

Step = Callable[[Tensor], None]
Params = dict[str, Tensor]


@dataclass(frozen=True)
class Side:
    """One way to take a step.

    Attributes:
        step: takes the rows of a batch and moves the parameters.
        params: the parameters, as they are now; what is written into them counts.
    """

    step: Step
    params: Callable[[], Params]

    def begin_at(self, params: Params) -> None:
        """Take ``params`` as they are."""
        for name, value in self.params().items():
            value.copy_(params[name])

    def away_from(self, params: Params) -> float:
        """Return the largest difference of a parameter."""
        return max(float((params[n] - value).abs().max()) for n, value in self.params().items())


@dataclass(frozen=True)
class Row:
    """What was measured of one side.

    Attributes:
        model: name of the model.
        batch: expected records of a batch.
        side: name of the side.
        ms: median of a step, milliseconds of the processor.
        ratio: of Opacus by hand to it: above 1 it is faster.
        first_s: what its first steps took, until it had seen every size, seconds by the clock.
        away: largest difference of a parameter from Opacus by hand, after any step from its own.
    """

    model: str
    batch: int
    side: str
    ms: float
    ratio: float
    first_s: float
    away: float


def small_cnn() -> nn.Module:
    """Return two convolutions 3x3 with max-pooling, of 16 and 32 channels, and a linear layer."""
    with torch_seeded(0, "small cnn"):
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, CLASSES),
        )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "cnn, small": small_cnn,
    "mlp": lambda: build_model("mlp", input_shape=SHAPE, num_classes=CLASSES, seed=0),
}


def records() -> tuple[Tensor, Tensor]:
    """Return made-up records: their values cost what any others do."""
    stream = torch_stream(0, "records")
    inputs = torch.rand((RECORDS, *SHAPE), generator=stream)
    return inputs, torch.randint(CLASSES, (RECORDS,), generator=stream)


def draws(batch: int, count: int) -> list[Tensor]:
    """Return the rows of so many Poisson batches."""
    stream = torch_stream(0, "draws", batch)
    return [
        (torch.rand(RECORDS, generator=stream) < batch / RECORDS).nonzero()[:, 0]
        for _ in range(count)
    ]


def ours(model: nn.Module, batch: int, kernel: Kernel) -> Side:
    """Return the steps of ``Releases`` with a charge that lasts."""
    releases = Releases(
        model,
        nn.functional.cross_entropy,
        records(),
        sample_rate=batch / RECORDS,
        expected_batch_size=batch,
        charge=Charge.of([Event(SIGMA, batch / RECORDS, 10**6)]),
        sources=seeded_sources(0),
        kernel=kernel,
    )
    held = {name: value.detach().clone() for name, value in model.named_parameters()}

    def step(rows: Tensor) -> None:
        found = releases.gradient(held, noise_multiplier=SIGMA, max_grad_norm=CLIP, draw=Draw(rows))
        for name, slope in found.items():
            held[name] = held[name] - RATE * slope

    return Side(step, lambda: held)


def by_hand(model: nn.Module, batch: int) -> Side:
    """Return the steps of Opacus' tutorial."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    hooked = GradSampleModule(model, loss_reduction="mean")
    optimizer = DPOptimizer(**_options(hooked, batch))
    inputs, targets = records()

    def step(rows: Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(hooked(inputs[rows]), targets[rows]).backward()
        optimizer.step()

    return Side(step, lambda: _named(hooked))


def ghost(model: nn.Module, batch: int) -> Side:
    """Return the steps of Opacus' ghost clipping."""
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
        GradSampleModuleFastGradientClipping,
    )
    from opacus.optimizers.optimizer_fast_gradient_clipping import (
        DPOptimizerFastGradientClipping,
    )
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    hooked = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=CLIP, use_ghost_clipping=True, loss_reduction="mean"
    )
    optimizer = DPOptimizerFastGradientClipping(**_options(hooked, batch))
    criterion = DPLossFastGradientClipping(hooked, optimizer, nn.CrossEntropyLoss(), "mean")
    inputs, targets = records()

    def step(rows: Tensor) -> None:
        optimizer.zero_grad()
        criterion(hooked(inputs[rows]), targets[rows]).backward()
        optimizer.step()

    return Side(step, lambda: _named(hooked))


def _options(hooked: nn.Module, batch: int) -> dict[str, Any]:
    return {
        "optimizer": torch.optim.SGD(hooked.parameters(), lr=RATE),
        "noise_multiplier": SIGMA,
        "max_grad_norm": CLIP,
        "expected_batch_size": batch,
        "generator": seeded_sources(0).noise,
    }


def _named(hooked: nn.Module) -> Params:
    return {n.removeprefix("_module."): p.detach() for n, p in hooked.named_parameters()}


def sides(name: str, batch: int) -> dict[str, Side]:
    """Return every side, Opacus by hand first."""
    kernels = {f"ours, {one}": ours(MODELS[name](), batch, one) for one in get_args(Kernel)}
    return {
        HAND: by_hand(MODELS[name](), batch),
        "Opacus, ghost clipping": ghost(MODELS[name](), batch),
        **kernels,
    }


def measured(name: str, batch: int, turns: int) -> Iterator[Row]:
    """Yield the row of each side, after all of them have taken turns.

    Raises:
        RuntimeError: where a step ends elsewhere than that of Opacus by hand.
    """
    found = sides(name, batch)
    taken: dict[str, list[float]] = {one: [] for one in found}
    first, away = dict.fromkeys(found, 0.0), dict.fromkeys(found, 0.0)
    # Every size of a piece is met before the turns that count.
    warm = [torch.arange(count) for count in (batch, batch // 4, batch + 10)]
    for turn, rows in enumerate([*warm, *draws(batch, turns)]):
        start = {n: value.clone() for n, value in found[HAND].params().items()}
        for one, side in found.items():
            side.begin_at(start)
            clock, began = time.perf_counter(), time.process_time()
            side.step(rows)
            if turn < len(warm):
                first[one] += time.perf_counter() - clock
            else:
                taken[one].append(time.process_time() - began)
            away[one] = max(away[one], side.away_from(found[HAND].params()))
            if not away[one] <= NEAR:
                raise RuntimeError(f"{name}, turn {turn}: {one} is {away[one]:.1e} from {HAND}")
    base = median(taken[HAND])
    for one, seconds in taken.items():
        own = median(seconds)
        yield Row(name, batch, one, 1e3 * own, base / own, first[one], away[one])


def page_of(rows: list[Row], machine: str) -> str:
    """Return the table, and whether the bar was reached."""
    lines = [
        "# A private local step: our kernels against Opacus",
        "",
        "`python benchmarks/dp_step.py`",
        "",
        f"{machine}. Medians of the processor's time: read the ratios, which come from turns, "
        "rather than the times. The first steps are by the clock and hold the compilation, or "
        "reading it from the disk.",
        "",
        "| model | batch | side | ms | times as fast as Opacus | first steps, s | away |",
        "|---|---|---|---|---|---|---|",
        *[
            f"| {r.model} | {r.batch} | {r.side} | {r.ms:.2f} | {r.ratio:.2f} | {r.first_s:.1f} | "
            f"{r.away:.0e} |"
            for r in rows
        ],
        "",
        "cnn, small: conv 3x3, 16 - ReLU - max-pool 2 - conv 3x3, 32 - ReLU - max-pool 2 - linear; "
        "mlp: 784-64-10; inputs 28x28. Batches are Poisson draws, so their sizes vary; ours pads "
        "them. away: largest difference of a parameter from Opacus by hand after any one "
        "step from equal parameters.",
        "",
        *[
            f"{r.model}, batch {r.batch}: the bar, compiled {BAR:g} times as fast as Opacus (aim "
            f"{AIM:g}), is {'kept' if r.ratio >= BAR else 'MISSED'}: {r.ratio:.2f}."
            for r in rows
            if r.side == "ours, compiled"
        ],
    ]
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("benchmarks/results"),
    turns: Annotated[int, typer.Option(help="Of each side.")] = 60,
) -> None:
    """Measure every model and batch, and write dp-step.json and dp-step.md."""
    torch.set_num_threads(1)
    import_opacus()
    rows: list[Row] = []
    with warnings.catch_warnings():
        # Opacus' own way warns that inputs need no gradient.
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        for name in MODELS:
            for batch in BATCHES:
                rows += measured(name, batch, turns)
                print(*rows[-5:], sep="\n", file=sys.stderr)
    machine = (
        f"{os.cpu_count()} CPU cores ({platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}), Python {platform.python_version()}, "
        f"torch {torch.__version__}, one thread"
    )
    page = page_of(rows, machine)
    out.mkdir(parents=True, exist_ok=True)
    told = {"machine": machine, "turns": turns, "rows": [asdict(row) for row in rows]}
    (out / "dp-step.json").write_text(json.dumps(told, indent=1) + "\n")
    (out / "dp-step.md").write_text(page)
    print(page)


if __name__ == "__main__":
    typer.run(main)
