"""The metrics of replies, which may differ: what is finite, what all have, and their means."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from logging import ERROR
from typing import TypeVar

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from ...wire import ARRAYS, METRICS, PRIVACY_DELTA, PRIVACY_EPSILON

Metric = int | float | list[int] | list[float]
Record = TypeVar("Record", ArrayRecord, MetricRecord)
DIVERGED = "holds NaN or infinity"
LARGEST = 1e300  # of a metric: a mean of larger ones could round to infinity
AggregateMetrics = Callable[[list[RecordDict], str], MetricRecord]


def records_of(content: RecordDict, kind: type[Record]) -> list[Record]:
    """Return the records of one kind: what RecordDict's own views hold, at a tenth of the time."""
    return [record for record in content.values() if isinstance(record, kind)]


def metrics_of(content: RecordDict) -> MetricRecord:
    """Return the one MetricRecord of a reply that was judged good."""
    (metrics,) = records_of(content, MetricRecord)
    return metrics


def weight_of(content: RecordDict, weight_key: str) -> float:
    """Return the weight of a reply that was judged good."""
    return float(metrics_of(content)[weight_key])  # type: ignore[arg-type]  # judged: no list


def privacy_in(content: RecordDict) -> tuple[float, float]:
    """Return what a private client's ledger has come to, as it says: (epsilon, delta); else 0, 0.

    What is no number says nothing.
    """
    metrics = metrics_of(content)
    epsilon, delta = metrics.get(PRIVACY_EPSILON, 0.0), metrics.get(PRIVACY_DELTA, 0.0)
    if isinstance(epsilon, list) or isinstance(delta, list):
        return 0.0, 0.0
    is_told = 0 < epsilon < math.inf and 0 <= delta < 1
    return (float(epsilon), float(delta)) if is_told else (0.0, 0.0)


def finite_metrics(content: RecordDict) -> tuple[dict[str, Metric], list[str]]:
    """Return the metrics of a reply that are finite, and the names of the others."""
    metrics = dict(metrics_of(content))
    wild = [name for name, value in metrics.items() if not _is_finite(value)]
    return {name: value for name, value in metrics.items() if name not in wild}, wild


def numbers_of(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Return the metrics that are single numbers, as floats."""
    return {name: float(value) for name, value in metrics.items() if not isinstance(value, list)}


def with_metrics(content: RecordDict, metrics: Mapping[str, Metric]) -> RecordDict:
    """Return a copy of a reply with other metrics, its records under the names of the wire."""
    copied = RecordDict({**content.config_records, METRICS: MetricRecord(dict(metrics))})
    for record in records_of(content, ArrayRecord):
        copied[ARRAYS] = record
    return copied


def aggregate_metrics(
    contents: Sequence[RecordDict], aggregate: AggregateMetrics, weight_key: str
) -> MetricRecord:
    """Return ``aggregate`` of the replies that have the usual metrics, and the means of the others.

    Replies that agree go to ``aggregate`` as they are. Where they do not, Flower's own mean gets
    the metrics that all have, and a function of the user's the replies that have all the usual
    ones, which it may count on. A metric that it does not return is the weighted mean over those
    that have it in the most common form. Without replies there are no metrics.
    """
    if not contents:
        return MetricRecord()
    shared = in_common(contents if aggregate is aggregate_metricrecords else usual_ones(contents))
    try:
        metrics = aggregate(shared, weight_key)
    except Exception:  # a number that it cannot do with shall not end the run
        log(ERROR, "%r fails: the usual mean takes its place", aggregate, exc_info=True)
        metrics = aggregate_metricrecords(in_common(contents), weight_key)
    return with_others(metrics, contents, weight_key)


def usual_ones(contents: Sequence[RecordDict]) -> list[RecordDict]:
    """Return the replies that have every metric, in its form, which more than half of them have."""
    forms = [set(_forms(metrics_of(one)).items()) for one in contents]
    counts = Counter(form for one in forms for form in one)
    usual = {form for form, count in counts.items() if 2 * count > len(contents)}
    return [one for one, its in zip(contents, forms, strict=True) if usual <= its] or list(contents)


def diverged(names: Sequence[str]) -> str:
    """Return the note on metrics that are left out of a reply."""
    if len(names) == 1:
        return f"metric {names[0]!r} {DIVERGED}: left out"
    return f"{len(names)} metrics, {names[0]!r} the first, hold NaN or infinity: left out"


def in_common(contents: Sequence[RecordDict]) -> list[RecordDict]:
    """Return replies that all have the same metrics in the same form, each under one record name.

    Flower's own strategies end the run where two replies differ. Replies that agree come back as
    they are; else copies do, and the replies stay.
    """
    shapes = [(_record_names(one), _forms(metrics_of(one))) for one in contents]
    if all(shape == shapes[0] for shape in shapes):
        return list(contents)
    shared = set.intersection(*(set(forms.items()) for _, forms in shapes))
    return [_restricted(one, {name for name, _ in shared}) for one in contents]


def with_others(
    metrics: MetricRecord | None, contents: Sequence[RecordDict], weight_key: str
) -> MetricRecord:
    """Return ``metrics`` with the mean of each metric that not all replies have in one form."""
    result = MetricRecord(dict(metrics or {}))
    all_forms = [_forms(metrics_of(one)) for one in contents]
    shared = set.intersection(*(set(forms.items()) for forms in all_forms))
    known = {name for name, _ in shared} | set(result)
    for name in dict.fromkeys(name for forms in all_forms for name in forms):
        if name not in known:
            result[name] = _mean_over_those_that_have(name, contents, all_forms, weight_key)
    return result


def _mean_over_those_that_have(
    name: str,
    contents: Sequence[RecordDict],
    all_forms: Sequence[Mapping[str, int]],
    weight_key: str,
) -> float | list[float]:
    forms = [forms[name] for forms in all_forms if name in forms]
    usual = max(dict.fromkeys(forms), key=forms.count)
    having = [c for c, f in zip(contents, all_forms, strict=True) if f.get(name) == usual]
    weights = np.array([weight_of(content, weight_key) for content in having])
    values = np.array([metrics_of(content)[name] for content in having], dtype=np.float64)
    mean = (weights / weights.sum()) @ values
    return [float(one) for one in mean] if usual >= 0 else float(mean)


def _forms(metrics: MetricRecord) -> dict[str, int]:
    """Return the length of each metric; -1 for a number."""
    return {name: len(v) if isinstance(v, list) else -1 for name, v in metrics.items()}


def _record_names(content: RecordDict) -> tuple[list[str], list[str]]:
    arrays = [name for name, record in content.items() if isinstance(record, ArrayRecord)]
    return arrays, [name for name, record in content.items() if isinstance(record, MetricRecord)]


def _restricted(content: RecordDict, names: set[str]) -> RecordDict:
    return with_metrics(content, {n: v for n, v in metrics_of(content).items() if n in names})


def _is_finite(value: Metric) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(abs(one) <= LARGEST for one in values)  # math.isfinite raises for 10**400
