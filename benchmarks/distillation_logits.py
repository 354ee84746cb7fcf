"""Rows on exchanged logits and compressed updates: FedMD, DS-FL, FedKD."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from distillation_data import NAMES
from distillation_models import CNN, RESNET
from distillation_page import Line, Verdict, minus
from distillation_runs import Found, Settings, personal_quality, quality
from distillation_setting import Setting, megabytes, of_one_model, of_personal_models

BAR = 8.0  # points above each client alone
SAVED = 95.0  # % of the bytes of FedAvg that DS-FL has to save

FIVE = (
    f"cnn4: {CNN} width=4; cnn8: {CNN} width=8; cnn16: {CNN} width=16; "
    f"resnet4: {RESNET} width=4; resnet8: {RESNET} width=8"
)
FEW: Settings = {
    "dataset": NAMES["mnist"],
    "dataset-args": "alpha=0.3 limit=1000 least=60 judges=5",
    "num-clients": 20,  # 10 train, 5 validate, 5 are unseen
    "architectures": FIVE,
    "clients-per-round": 10,
    "rounds": 20,
    "local-epochs": 2,
    "batch-size": 16,
    "eval-every": 0,
    "checkpoint-every": 20,  # personal models are kept on disk
}
EXCHANGE: Settings = {
    "public-data": "held-out",
    "public-size": 4000,
    "public-subset": 1000,
    "distill-steps": 20,  # the server's own students: nobody needs them here
}
RATES, MORE_RATES = (0.03, 0.1), (0.03, 0.1, 0.2, 0.3)
ALONE, FEDMD, DSFL, POOLED = "each client alone", "FedMD", "DS-FL", "pooled"

LARGE = "hidden=1000,300"  # 1.09 M parameters
SMALL = "hidden=100"
MANY: Settings = {
    "dataset": NAMES["mnist"],
    "dataset-args": "alpha=0.3",
    "num-clients": 26,
    "model": "mlp",
    "model-args": LARGE,
    "clients-per-round": 10,
    "rounds": 20,
    "local-epochs": 2,
    "batch-size": 32,
    "eval-every": 1,
}
FEDAVG, FEDAVG_SMALL, FEDKD = "FedAvg, large", "FedAvg, small", "FedKD, small with a large mentor"

ABOUT = {
    "logits": (
        "FedMD and DS-FL: clients of different architectures, with few images each",
        "10 training clients with 1,000 images of MNIST together (60 at least), by Dirichlet(0.3); "
        f"`{FIVE}`, two clients each; all in each of 20 rounds. Each column is the mean over "
        "clients of their own models on the test images. Alone: the same local epochs, no "
        "exchange (`ditto` with ditto-lambda 0). Pooled: each architecture trained for as many "
        "epochs on all 1,000 images. FedMD and DS-FL exchange logits of 1,000 of 4,000 images a "
        "round, without their labels. FedMD had a grid before this one: local-lr 0.03 and 0.1, "
        "digest-lr 0.3 and 1.0, one epoch; its best point, 0.1 and 0.3, gained 6 points.",
    ),
    "bytes": (
        "Bytes: DS-FL and FedKD against FedAvg",
        f"MNIST, 20 training clients with 10,000 images together, by Dirichlet(0.3), 10 a round, "
        f"20 rounds; large: `mlp {LARGE}` (1.09 million parameters), small: `mlp {SMALL}`. FedAvg "
        "and FedKD: the global model on the test images; DS-FL: the mean of the clients' own "
        "models. MB of arrays that training sends up and down over all rounds.",
    ),
}


def few_methods() -> dict[str, Settings]:
    """Return the methods of row ``logits``, with their grids."""
    pooled = {**FEW, "num-clients": 15, "eval-every": 1, "checkpoint-every": 0}
    pooled["dataset-args"] += " pooled=1"
    exchange = {**FEW, **EXCHANGE, "local-lr": RATES}
    return {
        ALONE: {**FEW, "strategy": "ditto", "ditto-lambda": 0.0, "local-lr": MORE_RATES},
        FEDMD: {
            **exchange,
            "strategy": "fedmd",
            "local-lr": (0.1, 0.2),
            "digest-lr": 0.3,
            "digest-epochs": (1, 3),
        },
        DSFL: {**exchange, "strategy": "ds-fl", "digest-lr": (0.03, 0.1)},
        POOLED: {**pooled, "clients-per-round": 5, "strategy": "fedavg", "local-lr": MORE_RATES},
    }


def many_methods() -> dict[str, Settings]:
    """Return the methods of row ``bytes``, with their grids."""
    exchange = {**EXCHANGE, "local-lr": RATES, "eval-every": 0, "checkpoint-every": 20}
    fedkd = {"strategy": "fedkd", "model-args": SMALL, "mentor": f"mlp {LARGE}"}
    fedavg = {**MANY, "strategy": "fedavg", "local-lr": MORE_RATES}
    return {
        FEDAVG: fedavg,
        DSFL: {**MANY, "strategy": "ds-fl", **exchange, "digest-lr": (0.03, 0.1)},
        FEDAVG_SMALL: {**fedavg, "model-args": SMALL},
        FEDKD: {**fedavg, **fedkd},
    }


def logits(setting: Setting) -> Iterator[Line | Verdict]:
    """Yield the lines of FedMD and DS-FL, of each client alone, and of all data together."""
    methods = few_methods()
    better = {name: quality if name == POOLED else personal_quality for name in methods}
    chosen = setting.chosen(methods, better)
    started = {name: setting.started(chosen[name]) for name in methods}
    lines = {}
    for name, runs in started.items():
        accuracy = of_all_architectures if name == POOLED else of_personal_models
        lines[name] = runs.line(name, methods[name], accuracy)
        yield lines[name]
    for name in (FEDMD, DSFL):
        yield minus(f"{name} minus {ALONE}", lines[name], lines[ALONE], bar=BAR)
        yield minus(f"pooled minus {name}", lines[POOLED], lines[name], bar=0.0)


def volume(setting: Setting) -> Iterator[Line | Verdict]:
    """Yield the lines of bytes and accuracy of FedAvg, DS-FL and FedKD."""
    methods = many_methods()
    better = {name: personal_quality if name == DSFL else quality for name in methods}
    chosen = setting.chosen(methods, better)
    # Without validation, whose bytes are no part of training; it changes nothing else.
    started = {name: setting.started({**chosen[name], "eval-every": 0}) for name in methods}
    validated = setting.started(chosen[FEDAVG])
    lines = {}
    for name, runs in started.items():
        accuracy = of_personal_models if name == DSFL else of_one_model
        lines[name] = runs.line(name, methods[name], accuracy, megabytes)
        yield lines[name]
    for name, bar in ((DSFL, SAVED), (FEDKD, None)):
        yield saved(lines[name], lines[FEDAVG], bar)
        yield minus(f"{name} minus {FEDAVG}", lines[name], lines[FEDAVG])
    yield minus(f"{FEDKD} minus {FEDAVG_SMALL}", lines[FEDKD], lines[FEDAVG_SMALL])
    yield until_as_good(lines[DSFL], lines[FEDAVG], validated.found)


def saved(one: Line, other: Line, bar: float | None = None) -> Verdict:
    """Return how many % fewer bytes ``one`` sends than ``other``."""
    pairs = zip(total(one.figures), total(other.figures), strict=True)
    figures = [100 * (1 - ours / theirs) for ours, theirs in pairs]
    return Verdict(f"{one.what}: fewer bytes than {other.what}", {"": figures}, bar, unit="%")


def until_as_good(one: Line, other: Line, validated: Sequence[Found]) -> Verdict:
    """Return the bytes of ``other`` over those of ``one`` once it is as accurate as ``one``.

    Args:
        one: whose accuracy is to be reached.
        other: sends as much in each round.
        validated: its runs, one for each seed, with validation after each round.
    """
    figures, rounds = [], []
    for index, found in enumerate(validated):
        target = one.accuracy["accuracy"][index]
        (curve,) = found["validation"].values()
        reached = [number for number, value in enumerate(curve, start=1) if value >= target]
        share = min(reached, default=len(curve)) / len(curve)
        figures.append(share * total(other.figures)[index] / total(one.figures)[index])
        rounds.append(str(min(reached)) if reached else f"never in {len(curve)}")
    what = f"{other.what} until its validation accuracy is what {one.what} ends with: its bytes"
    note = f"Rounds that it takes: {', '.join(rounds)}."
    return Verdict(what, {"": figures}, unit="times as many", note=note)


def total(figures: Mapping[str, Sequence[float]]) -> list[float]:
    """Return the MB up and down together, seed by seed."""
    return [up + down for up, down in zip(figures["MB up"], figures["MB down"], strict=True)]


def of_all_architectures(found: Sequence[Found]) -> dict[str, list[float]]:
    """Return the mean over architectures of their global models' accuracy on the test images."""
    return {"accuracy": [fmean(one["unseen"].values()) for one in found]}
