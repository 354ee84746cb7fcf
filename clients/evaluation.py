"""Evaluation of a model that adapts.

Loss and accuracy on the query set before and after numbers of adaptation steps.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import DataError
from .objective import Batch, LossFn, Params, predict

LOSS_BEFORE, ACCURACY_BEFORE = "loss-before", "accuracy-before"
CHUNK = 1024  # records scored at once: bounds the memory of a large query set

Advance = Callable[[Params, int], Params]


def loss_after(steps: int) -> str:
    """Return the metric name of the query loss after ``steps`` adaptation steps."""
    return f"loss-after-{steps}"


def accuracy_after(steps: int) -> str:
    """Return the metric name of the query accuracy after ``steps`` adaptation steps."""
    return f"accuracy-after-{steps}"


def adaptation_curve(
    model: nn.Module,
    loss_fn: LossFn,
    params: Params,
    query: Batch,
    *,
    steps: Sequence[int],
    advance: Advance,
) -> dict[str, float]:
    """Return query loss and accuracy before adaptation and after each number of ``steps``.

    ``steps`` are ascending counts of at least 1.

    ``advance(params, n)`` returns the parameters after n more adaptation steps; it must not see the
    query set.
    """
    loss, accuracy = score(model, loss_fn, params, query)
    metrics = {LOSS_BEFORE: loss, ACCURACY_BEFORE: accuracy}
    done = 0
    for count in steps:
        params = advance(params, count - done)
        done = count
        metrics[loss_after(count)], metrics[accuracy_after(count)] = score(
            model, loss_fn, params, query
        )
    return metrics


def score(model: nn.Module, loss_fn: LossFn, params: Params, records: Batch) -> tuple[float, float]:
    """Return (mean loss, accuracy in [0, 1]) on ``records``.

    The accuracy of the largest output against integer targets.
    """
    inputs, targets = records
    if not len(targets):
        raise DataError("there are no records to score: a client needs a query set")
    total, correct = torch.zeros((), dtype=torch.float64), 0
    for start in range(0, len(targets), CHUNK):
        part: Tensor = targets[start : start + CHUNK]
        output = predict(model, params, inputs[start : start + CHUNK])
        total += loss_fn(output, part).double().cpu() * len(part)
        correct += int((output.argmax(dim=1) == part).sum())
    return (total / len(targets)).item(), correct / len(targets)
