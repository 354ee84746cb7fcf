"""Query loss and accuracy before and after numbers of adaptation steps."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ..errors import DataError
from .data import Batch
from .objective import LossFn, Params, predict

LOSS = "loss"  # after the most steps
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

    ``steps`` are ascending counts of at least 1. Accuracies are left out where targets are not
    classes (one integer for each record).

    ``advance(params, n)`` returns the parameters after n more adaptation steps; it must not see the
    query set.
    """
    metrics: dict[str, float] = {}

    def note(loss_name: str, accuracy_name: str) -> None:
        metrics[loss_name], accuracy = score(model, loss_fn, params, query)
        if accuracy is not None:
            metrics[accuracy_name] = accuracy

    note(LOSS_BEFORE, ACCURACY_BEFORE)
    done = 0
    for count in steps:
        params = advance(params, count - done)
        done = count
        note(loss_after(count), accuracy_after(count))
    return metrics


def score(
    model: nn.Module, loss_fn: LossFn, params: Params, records: Batch
) -> tuple[float, float | None]:
    """Return the mean loss and the accuracy, by the largest output, on ``records``.

    The accuracy is None where targets are not classes.
    """
    inputs, targets = records
    if not len(targets):
        raise DataError("there are no records to score: a client needs a query set")
    classes = targets.ndim == 1 and not targets.is_floating_point()
    total, correct = 0.0, 0
    for start in range(0, len(targets), CHUNK):
        part: Tensor = targets[start : start + CHUNK]
        output = predict(model, params, inputs[start : start + CHUNK])
        total += loss_fn(output, part).item() * len(part)
        correct += int((output.argmax(dim=1) == part).sum()) if classes else 0
    return total / len(targets), correct / len(targets) if classes else None
