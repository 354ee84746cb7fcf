"""The results of a run as plain data, and the files that hold them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from flwr.app import ArrayRecord
from safetensors.numpy import save

from .. import __version__
from ..architectures import part_of
from ..clients.evaluation import (
    ACCURACY_BEFORE,
    LOSS,
    LOSS_BEFORE,
    accuracy_after,
    loss_after,
)
from ..config import RunConfig
from ..files import write_atomic
from ..strategies import ClientScore, RoundReport, RunResult, UserLevelSpent
from ..wire import from_record
from .report import render_report

RESULTS, MODEL, REPORT = "results.json", "model.safetensors", "report.html"


def results_of(config: RunConfig, result: RunResult) -> dict[str, Any]:
    """Return the results of a run as data that JSON can hold: NaN and infinity become None.

    Accuracies and losses are macro averages, the mean over clients with each client counting once.
    An average is None where no client was evaluated, or where one of them does not report the
    metric.
    """
    steps = config.adaptation_steps
    data: dict[str, Any] = {
        "version": __version__,
        "strategy": config.strategy,
        "dataset": config.dataset,
        "seed": config.seed,
        "rounds": config.rounds,
        "config": config.to_flower(),
        "clients": result.clients,
        "dropped": result.dropped,
        "unseen": {
            **_adaptation(result.unseen, steps),
            **_by_architecture(result.unseen, steps),
            "failures": _failures(result.final_failures),
            "quarantined": _failures(result.final_quarantined),
        },
        "history": [_round(report, steps) for report in result.rounds],
        "bytes_down": sum(report.bytes_down for report in result.rounds),
        "bytes_up": sum(report.bytes_up for report in result.rounds),
        "bytes_training": sum(report.bytes_training for report in result.rounds),
        "seconds": sum(report.seconds for report in result.rounds),
        "failures": sum(len(report.failures) for report in result.rounds)
        + len(result.final_failures),
        "quarantined": sum(len(report.quarantined) for report in result.rounds)
        + len(result.final_quarantined),
        "skipped": sum(report.skipped for report in result.rounds),
    }
    if result.ended or result.model_round is not None:
        told = {"reason": result.ended, "model_round": result.model_round}
        data["ending"] = {"rounds": len(result.rounds), **told}
    privacy = {}
    if config.is_private or any(report.spent for report in result.rounds):
        privacy["record_level"] = _record_level(config, result)
    if result.user_level is not None:
        privacy["user_level"] = _user_level(result.user_level)
    if privacy:
        data["privacy"] = privacy
    if result.trained:
        data["trained"] = _adaptation(result.trained, steps)
    return _finite(data)  # type: ignore[no-any-return]  # a dict comes back as a dict


def write_results(
    folder: Path,
    results: dict[str, Any],
    arrays: ArrayRecord,
    *,
    architectures: Sequence[str] = (),
) -> Path:
    """Write results.json, model.safetensors and report.html into ``folder`` and return it.

    Where there are several ``architectures``, each has a file of its own, model-NAME.safetensors.
    Each file is written whole or not at all; results.json comes last.
    """
    models = from_record(arrays)
    for name in architectures or [""]:
        file = folder / (f"model-{name}.safetensors" if name else MODEL)
        write_atomic(file, save(part_of(models, name)))
    write_atomic(folder / REPORT, render_report(results).encode())
    text = json.dumps(results, indent=1, allow_nan=False)
    write_atomic(folder / RESULTS, text.encode())
    return folder


def _adaptation(scores: Sequence[ClientScore], steps: Sequence[int]) -> dict[str, Any]:
    """Return accuracy and loss before and after adaptation: means over clients, and each client.

    What else clients report (the scores of a teacher, say) is averaged under "other".
    """
    usual = {LOSS, LOSS_BEFORE, ACCURACY_BEFORE}
    usual |= {name(n) for n in steps for name in (loss_after, accuracy_after)}
    others = sorted({name for one in scores for name in one.metrics} - usual)
    return {
        "average": "macro",
        "accuracy_before": _mean(scores, ACCURACY_BEFORE),
        "accuracy_after": {str(n): _mean(scores, accuracy_after(n)) for n in steps},
        "loss_before": _mean(scores, LOSS_BEFORE),
        "loss_after": {str(n): _mean(scores, loss_after(n)) for n in steps},
        **({"other": {name: _mean(scores, name) for name in others}} if others else {}),
        "per_client": [
            {
                "client": one.client,
                **({"architecture": one.architecture} if one.architecture else {}),
                "num_examples": one.num_examples,
                **one.metrics,
            }
            for one in scores
        ],
    }


def _by_architecture(scores: Sequence[ClientScore], steps: Sequence[int]) -> dict[str, Any]:
    """Return the averages over the clients of each architecture, where there are several."""
    names = sorted({one.architecture for one in scores} - {""})
    found: dict[str, Any] = {}
    for name in names:
        own = [one for one in scores if one.architecture == name]
        averages = _adaptation(own, steps)
        del averages["per_client"], averages["average"]
        found[name] = {"clients": len(own), **averages}
    return {"by_architecture": found} if found else {}


def _round(report: RoundReport, steps: Sequence[int]) -> dict[str, Any]:
    validation = _adaptation(report.validation, steps) if report.validation else None
    if validation:
        del validation["per_client"]
    return {
        "round": report.round,
        "clients": list(report.clients),
        "failures": _failures(report.failures),
        "quarantined": _failures(report.quarantined),
        "skipped": report.skipped,
        "exhausted": list(report.exhausted),
        "train": report.train_metrics,
        "validation": validation,
        "bytes_down": report.bytes_down,
        "bytes_up": report.bytes_up,
        "bytes_training": report.bytes_training,
        "seconds": report.seconds,
    }


def _record_level(config: RunConfig, result: RunResult) -> dict[str, Any]:
    """Return what the clients' ledgers have come to, as they say, over all runs on their data."""
    spent = dict(pair for report in result.rounds for pair in report.spent)  # the last of each
    exhausted = {name for report in result.rounds for name in report.exhausted}
    delta = max((report.privacy_delta for report in result.rounds), default=0.0)
    return {
        "unit": "one record, added or removed",
        "protects_against": "the server, and all who see its models",
        "epsilon_max": max(spent.values(), default=None),
        "epsilon_median": median(spent.values()) if spent else None,
        "delta": delta or config.privacy_target_delta,
        # Nodes that pin privacy have targets, and metrics that they tell, of their own.
        "target_epsilon": config.privacy_target_epsilon if config.is_private else None,
        "clients": len(spent),
        "exhausted": len(exhausted),
        "unprotected_metrics": list(config.unprotected_metrics),
    }


def _user_level(spent: UserLevelSpent) -> dict[str, Any]:
    """Return what the server's ledger has come to, over all runs into its folder."""
    return {
        **vars(spent),
        "protects_against": "those who see the models, not the server: it sees every update",
        "not_covered": "this file: it tells who took part, and what clients reported",
    }


def _failures(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"client": client, "reason": reason} for client, reason in pairs]


def _mean(scores: Sequence[ClientScore], metric: str) -> float | None:
    values = [one.metrics.get(metric) for one in scores]
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None  # of all clients or none


def _finite(value: Any) -> Any:
    """Return ``value`` with every number that JSON cannot hold replaced by None."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
