"""The runs of the distillation benchmark: each once, by the way that a user has, and kept on disk.

A run is a configuration as ``metabloom simulate --set`` takes it, and a seed. What it found lies in
the folder of finished runs under a name that follows from both.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from metabloom.keys import parse_options

Settings = Mapping[str, Any]
Found = dict[str, Any]
Scores = dict[str, float]  # by architecture; of "" where there is one

COMMON: Settings = {
    "plugins": "distillation_data",
    "workers": "0",
    "kernel": "eager",
    "device": "cpu",
    "eval-steps": "1",
    "checkpoint-every": 0,
    "max-share": 1.0,  # under skew an honest client may hold nearly all records of a round
}
QUICK: Settings = {
    "rounds": 2,
    "clients-per-round": 4,
    "local-epochs": 1,
    "public-size": 40,
    "public-subset": 20,
    "distill-steps": 2,
    "teach-steps": 2,
}
QUICK_IMAGES = "limit=120 proof=40 reserve=60 least=1"  # later options win
LAST = 5  # rounds whose mean is what a method is chosen by
TUNING_SEED = 0
BEFORE = "accuracy-before"


def grid_of(method: Settings) -> list[dict[str, Any]]:
    """Return every point of a method's grid as a flat configuration; a tuple is an axis."""
    axes = {key: value if isinstance(value, tuple) else (value,) for key, value in method.items()}
    return [dict(zip(axes, point, strict=True)) for point in product(*axes.values())]


def axes_of(method: Settings) -> dict[str, tuple[Any, ...]]:
    """Return the axes of a method's grid."""
    return {key: value for key, value in method.items() if isinstance(value, tuple)}


def quality(found: Found) -> float:
    """Return what is maximised: accuracy on the validation images, without adaptation.

    The mean over the last rounds and over architectures.
    """
    return fmean(fmean(rounds[-LAST:]) for rounds in found["validation"].values())


def personal_quality(found: Found) -> float:
    """Return what is maximised where models are personal: their accuracy on the same images."""
    return fmean(one["validation"] for one in found["personal"].values())


def sized(settings: Settings, *, quick: bool) -> dict[str, Any]:
    """Return ``settings``; with ``quick`` of a size that means nothing, with one point a grid."""
    if not quick:
        return dict(settings)
    first = {
        key: value[0] if isinstance(value, tuple) else value for key, value in settings.items()
    }
    small = {key: value for key, value in QUICK.items() if key in first}
    small["eval-every"] = min(first.get("eval-every", 0), QUICK["rounds"])
    if str(first["dataset"]).startswith("bench-"):
        judges = parse_options(first["dataset-args"], key="dataset-args").get("judges", 3)
        small["dataset-args"] = f"{first['dataset-args']} {QUICK_IMAGES}"
        small["num-clients"] = 4 + 2 * int(judges)
    elif "num-clients" in first:
        small["num-clients"] = 10
        small["dataset-args"] = f"{first['dataset-args']} query_shots=5"
    return {**first, **small}


class Runs:
    """Runs configurations, each once, some at a time.

    Args:
        work: folder of finished runs; to be emptied after a change of the code.
        data_root: folder of data sets.
        workers: processes; 0: in this one, at once.
    """

    def __init__(self, work: Path, data_root: str, workers: int) -> None:
        self._place = (data_root, str(work))
        self._pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers else None
        self._submitted: dict[str, Future[Found]] = {}

    def submit(self, settings: Settings, seed: int) -> Future[Found]:
        """Return what a run finds, now or later; the same for the same run."""
        name = name_of(settings, seed)
        if name not in self._submitted:
            job = (dict(settings), seed, *self._place)
            if self._pool:
                self._submitted[name] = self._pool.submit(run_job, *job)
            else:
                self._submitted[name] = _done(*job)
        return self._submitted[name]

    def chosen(
        self,
        methods: Mapping[str, Settings],
        better: Callable[[Found], float] | Mapping[str, Callable[[Found], float]] = quality,
    ) -> dict[str, dict[str, Any]]:
        """Return the best point of each method's grid, by validation with the tuning seed.

        A point whose run failed, since it diverged, say, is the worst.

        Args:
            methods: name -> settings; a tuple is an axis.
            better: of a run, what is maximised; of all methods, or of each by its name.
        """
        tried = {
            name: [self.submit(point, TUNING_SEED) for point in grid_of(method)]
            for name, method in methods.items()
        }
        best = {}
        for name, runs in tried.items():
            key = better if callable(better) else better[name]
            whole = [found for run in runs if (found := _whole(run))]
            best[name] = max(whole or [runs[0].result()], key=key)["settings"]
        return best

    def close(self) -> None:
        """End the processes; runs that wait are given up."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


def _whole(run: Future[Found]) -> Found | None:
    """Return what a run found; None where it failed."""
    try:
        return run.result()
    except RuntimeError:
        return None


def _done(*job: Any) -> Future[Found]:
    """Return a run that is over."""
    future: Future[Found] = Future()
    try:
        future.set_result(run_job(*job))
    except RuntimeError as err:
        future.set_exception(err)
    return future


def name_of(settings: Settings, seed: int) -> str:
    """Return the name of a run's folder."""
    text = json.dumps([dict(settings), seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_job(settings: dict[str, Any], seed: int, data_root: str, work: str) -> Found:
    """Run once, unless it is there already, and return what is to be known of it.

    ``teacher`` may be the settings of another run, with this seed, that is there.

    Raises:
        RuntimeError: a client failed, or the teacher is not there: no figure comes of it.
    """
    folder = Path(work) / name_of(settings, seed)
    kept = folder / "found.json"
    if kept.exists():
        known: Found = json.loads(kept.read_text())
        return known
    # Seconds of imports, which a benchmark whose runs are all there does not need.
    import torch

    from metabloom.config import RunConfig
    from metabloom.server_app import run
    from metabloom.simulation import as_carried_out, cohort_grid

    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    keys = {"data-root": data_root, "out": str(folder), "seed": seed}
    told = {**COMMON, **settings, **keys, **_teacher(settings, seed, work)}
    config = as_carried_out(RunConfig.read(told))
    reports: list[Any] = []
    start = time.process_time()  # of one thread: what else the machine does is not in it
    with cohort_grid(config) as grid:
        run(grid, config, on_round=reports.append)
    seconds = time.process_time() - start
    results = json.loads((folder / "results.json").read_text())
    if results["failures"] or results["quarantined"]:
        raise RuntimeError(f"{settings}, seed {seed}: {_complaints(results)}")
    found = {"settings": settings, "seed": seed, "seconds": seconds}
    found |= _scores(config, results, reports)
    found["personal"] = _personal(config, folder) if "trained" in results else {}
    for name in ("checkpoints", "clients"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "report.html").unlink()  # megabytes of each
    kept.write_text(json.dumps(found) + "\n")
    return found


def _teacher(settings: Settings, seed: int, work: str) -> dict[str, str]:
    """Return the key ``teacher`` as a folder, where it is the settings of a run."""
    other = settings.get("teacher")
    if not isinstance(other, Mapping):
        return {}
    folder = Path(work) / name_of(other, seed)
    if not (folder / "found.json").exists():
        raise RuntimeError(f"{dict(settings)}, seed {seed}: its teacher has not been trained")
    return {"teacher": str(folder)}


def _complaints(results: Mapping[str, Any]) -> list[Any]:
    said = [results["unseen"]["failures"], results["unseen"]["quarantined"]]
    said += [one[key] for one in results["history"] for key in ("failures", "quarantined")]
    return [one for one in said if one][:3]


def _scores(config: Any, results: Mapping[str, Any], reports: list[Any]) -> Found:
    """Return accuracies by architecture, other metrics of judges, bytes of each round, sizes."""
    from metabloom.task import models_of

    unseen = results["unseen"]
    by_kind = unseen.get("by_architecture", {"": unseen})
    validation: dict[str, list[float]] = {}
    for report in reports:
        for name, value in _by_architecture(report.validation).items():
            validation.setdefault(name, []).append(value)
    last = [report.validation for report in reports if report.validation][-1:]
    return {
        "validation": validation,
        "unseen": {name: one["accuracy_before"] for name, one in by_kind.items()},
        "metrics": {
            "validation": _means([score.metrics for scores in last for score in scores]),
            "unseen": _means(unseen["per_client"]),
            "trained": _means(results.get("trained", {}).get("per_client", [])),
        },
        "bytes_up": [report.bytes_up for report in reports],
        "bytes_down": [report.bytes_down for report in reports],
        "parameters": {
            name: sum(value.numel() for value in model.parameters())
            for name, model in models_of(config).items()
        },
    }


def _by_architecture(scores: Any) -> Scores:
    names = {one.architecture for one in scores}
    return {
        name: fmean(one.metrics[BEFORE] for one in scores if one.architecture == name)
        for name in sorted(names)
    }


def _means(clients: list[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean over clients of each metric that all of them have."""
    if not clients:
        return {}
    shared = set.intersection(*(set(one) for one in clients))
    numbers = [key for key in shared if isinstance(clients[0][key], int | float)]
    known = [key for key in sorted(numbers) if all(one[key] is not None for one in clients)]
    return {key: fmean(one[key] for one in clients) for key in known}


def _personal(config: Any, folder: Path) -> dict[str, Scores]:
    """Return the accuracy of each training client's own model on the judges' images.

    The model is the newest version that the client's store holds.
    """
    from safetensors.torch import load_file
    from torch.nn.functional import cross_entropy

    from metabloom.clients.evaluation import score
    from metabloom.clients.store import file_name
    from metabloom.task import architectures_of_clients, federation_of, model_of

    federation = federation_of(config)
    owners = architectures_of_clients(config, len(federation)) if config.kinds else {}
    data = {role: federation.indices(role)[0] for role in ("validation", "unseen")}
    found: dict[str, Scores] = {}
    for index in federation.indices("train"):
        client = federation.client_ids[index]
        pattern = f"clients/*/{file_name(client)}/personal/round-*.safetensors"
        versions = sorted(folder.glob(pattern))
        if not versions:
            continue  # it was never sampled, or the strategy keeps no model there
        params = load_file(versions[-1])
        model = model_of(config, owners.get(client, ""))
        found[client] = {
            role: float(score(model, cross_entropy, params, federation.client(judge).query)[1] or 0)
            for role, judge in data.items()
        }
    return found
