"""Rows on FedDF: several architectures, one architecture, and which public records."""

from collections.abc import Iterator, Sequence
from typing import Any

from distillation_data import NAMES
from distillation_models import CNN, RESNET
from distillation_page import Line, Verdict, minus
from distillation_runs import LAST, Found, Settings, quality
from distillation_setting import Setting, by_architecture, of_one_model

BAR = 10.0  # points that every architecture has to gain at alpha 0.05
THREE = f"mlp hidden=64; cnn: {CNN} width=8; resnet: {RESNET} width=8"
WEIGHTS = "50,890, 26,826 and 18,658 parameters"
SKEWED, MILD = 0.05, 0.3

BASE: Settings = {
    "num-clients": 26,  # 20 train, 3 validate, 3 are unseen
    "clients-per-round": 10,
    "rounds": 20,
    "batch-size": 32,
    "eval-every": 1,
}
STUDENTS: Settings = {
    "public-data": "held-out",
    "public-size": 4000,
    "distill-steps": 200,
    "distill-lr": 1e-3,
    "distill-batch-size": 64,
}
GRID: Settings = {"local-lr": (0.03, 0.1), "local-epochs": (1, 5)}
FEDAVG, FEDDF = "FedAvg within architectures", "FedDF"
KINDS = ("held-out", "dataset:fashion-mnist", "smooth-noise", "noise")

ABOUT = {
    "feddf": (
        "FedDF: three architectures that teach each other",
        f"20 training clients with 10,000 images together, 10 a round, 20 rounds; `{THREE}` "
        f"({WEIGHTS}), "
        "shared out among the clients by the seed. Both methods average within each architecture; "
        "FedDF then lets each learn what all models of the round say of 4,000 images that no "
        "client has, without their labels. Each column is the global model of an architecture "
        f"after the last round; 'last {LAST} rounds' is the mean over them and the architectures, "
        "on 1,000 validation images. Settings are chosen at alpha 0.05 for each data set, and used "
        "at 0.3 too.",
    ),
    "feddf-one": (
        "FedDF where all clients have one architecture",
        "As above at alpha 0.05 on MNIST, with an MLP for all. local-lr is chosen with one local "
        "epoch, one hidden layer and 4,000 public images, and used in all lines but those of "
        "three hidden layers and five epochs: they have 0.1, since FedAvg diverged with one seed.",
    ),
    "public": (
        "FedDF: which public records",
        "The three architectures on MNIST at alpha 0.05 with the settings that row `feddf` chose "
        "with held-out images: 4,000 images of MNIST that no client has, of Fashion-MNIST, of "
        "smooth noise (coarse grids, enlarged), of noise.",
    ),
}


def several(setting: Setting) -> Iterator[Line | Verdict]:
    """Yield the lines of three architectures: on each data set, much and little skewed."""
    chosen = {dataset: _chosen(setting, dataset) for dataset in NAMES}
    started = {
        (dataset, alpha, name): setting.started(_at(chosen[dataset][name], alpha))
        for alpha in (SKEWED, MILD)
        for dataset in NAMES
        for name in (FEDAVG, FEDDF)
    }
    for alpha in (SKEWED, MILD):
        for dataset in NAMES:
            where = f"{dataset}, alpha {alpha}"
            lines = {}
            for name, method in _methods(dataset).items():
                runs = started[dataset, alpha, name]
                lines[name] = runs.line(f"{where}: {name}", method, with_last_rounds)
                yield lines[name]
            yield minus(
                f"{where}: FedDF minus FedAvg",
                lines[FEDDF],
                lines[FEDAVG],
                bar=BAR if alpha == SKEWED else None,
            )


def one(setting: Setting) -> Iterator[Line | Verdict]:
    """Yield the lines of one architecture: epochs, depth and public records in turn."""
    fixed = {**BASE, "dataset": NAMES["mnist"], "dataset-args": f"alpha={SKEWED}", "model": "mlp"}
    rates = {"local-lr": (0.03, 0.1, 0.3)}
    usual = {**fixed, "model-args": "hidden=64", "local-epochs": 1}
    methods: dict[str, Settings] = {
        "FedAvg": {**usual, "strategy": "fedavg", **rates},
        "FedDF": {**usual, "strategy": "feddf", **STUDENTS, **rates},
    }
    chosen = setting.chosen(methods)
    cases: list[dict[str, Any]] = [
        {"model-args": f"hidden={hidden}", "local-epochs": epochs}
        for hidden in ("64", "64,64,64")
        for epochs in (1, 5)
    ]
    cases[-1]["local-lr"] = 0.1  # at 0.3 FedAvg has a seed with NaN
    sizes = (1000, 4000)
    started = []
    for case in cases:
        settings = [{**chosen["FedAvg"], **setting.sized({**fixed, **case})}]
        settings += [
            {**chosen["FedDF"], **setting.sized({**fixed, **case, "public-size": size})}
            for size in sizes
        ]
        started.append([setting.started(one) for one in settings])
    for case, (fedavg, *feddfs) in zip(cases, started, strict=True):
        where = f"{case['model-args']}, {case['local-epochs']} local epochs"
        base = fedavg.line(f"{where}: FedAvg", methods["FedAvg"], of_one_model)
        yield base
        for size, runs in zip(sizes, feddfs, strict=True):
            what = f"{where}: FedDF, {size} public images"
            line = runs.line(what, methods["FedDF"], of_one_model)
            yield line
            yield minus(f"{what} minus FedAvg", line, base)


def public(setting: Setting) -> Iterator[Line | Verdict]:
    """Yield the lines of each kind of public records, and FedAvg's, which needs none."""
    chosen, methods = _chosen(setting, "mnist"), _methods("mnist")
    base = setting.started(_at(chosen[FEDAVG], SKEWED))
    kinds = {
        kind: setting.started({**_at(chosen[FEDDF], SKEWED), "public-data": kind}) for kind in KINDS
    }
    line = base.line(FEDAVG, methods[FEDAVG], with_last_rounds)
    yield line
    for kind, runs in kinds.items():
        own = runs.line(f"FedDF, {kind}", methods[FEDDF], with_last_rounds)
        yield own
        yield minus(f"FedDF, {kind}, minus FedAvg", own, line)


def with_last_rounds(found: Sequence[Found]) -> dict[str, list[float]]:
    """Return the accuracy of each architecture at the end, and that by which it was chosen."""
    return {**by_architecture(found), f"last {LAST} rounds": [quality(one) for one in found]}


def _methods(dataset: str) -> dict[str, Settings]:
    """Return both methods on a data set, as they are chosen: much skewed."""
    fixed = {
        **BASE,
        "dataset": NAMES[dataset],
        "dataset-args": f"alpha={SKEWED}",
        "architectures": THREE,
    }
    return {
        FEDAVG: {**fixed, "strategy": "fedavg", **GRID},
        FEDDF: {**fixed, "strategy": "feddf", **STUDENTS, **GRID},
    }


def _chosen(setting: Setting, dataset: str) -> dict[str, dict[str, Any]]:
    return setting.chosen(_methods(dataset))


def _at(settings: dict[str, Any], alpha: float) -> dict[str, Any]:
    """Return settings at another skew."""
    args = settings["dataset-args"].replace(f"alpha={SKEWED}", f"alpha={alpha}")
    return {**settings, "dataset-args": args}
