"""The local trainings of many clients at once, by vmap over clients.

Clients that do the same with the same model form a group, by the sizes of their batches, each up to
a power of two; smaller batches are padded with masked records, which have no share. The clients
with the most steps stand first, so that those still at work are always the first k, and no step is
computed for one that has ended. A client's result is that of the eager loop up to rounding, whoever
else is in the cohort and however it is cut into chunks.
"""

from collections.abc import Hashable, Iterator, Sequence
from itertools import chain
from logging import WARNING
from typing import Any

import torch
from flwr.common import log
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import ModelError
from .batches import Padded, joined, parts
from .data import Batch
from .kernel import Few
from .local_update import LocalResult
from .objective import Params, objective, predict, takes_padding
from .room import Room
from .training import LocalTraining, Rule, has_indices, is_hashable, run_eagerly

Outcome = LocalResult | Exception
PROBE = 64  # clients whose records are mixed to try padding on


class _Row:
    """One client of a cohort: its training, and the batches that are still to come."""

    def __init__(self, place: int, training: LocalTraining) -> None:
        self.place = place
        self.training = training
        self.data = training.records()
        self.steps = training.steps(self.data)
        self.start()

    def start(self) -> None:
        """Begin with the first batch; each call gives the same ones."""
        self._items = self.training.batches(self.data)
        self.first = next(self._items)  # no later one is larger
        self._items = chain([self.first], self._items)

    def next_parts(self) -> tuple[Batch, ...]:
        """Return the batches of the next step."""
        return parts(next(self._items))

    @property
    def group(self) -> tuple[object, ...]:
        """What clients must have in common to be computed at once."""
        batches = parts(self.first)
        shapes = tuple((value.dtype, value.shape[1:]) for part in batches for value in part)
        scale = tuple((len(targets) - 1).bit_length() for _, targets in batches)
        params = self.training.params
        held = tuple((name, value.dtype) for name, value in params.items())
        return self.training.rule, type(self.first), scale, shapes, held, self.training.device


def run_cohort(trainings: Sequence[LocalTraining], *, most: int = 0) -> list[Outcome]:
    """Return what each training came to: its result, or what it raised.

    What cannot be computed at once with others runs eagerly.

    Args:
        trainings: of any clients.
        most: clients that are computed at once; 0: what the memory holds.
    """
    outcomes: dict[int, Outcome] = {}
    groups: dict[tuple[object, ...], list[_Row]] = {}
    for place, training in enumerate(trainings):
        try:
            row = _Row(place, training) if _may_join(training) else None
            if row is None or not _has_usual_targets(row):
                outcomes[place] = _alone(training)
            else:
                groups.setdefault(row.group, []).append(row)
        except Exception as err:  # a client's data may raise anything: the others go on
            outcomes[place] = err
    for group, rows in groups.items():
        rows.sort(key=lambda row: -row.steps)
        outcomes.update(_of_group(group, rows, most))
    return [outcomes[place] for place in range(len(trainings))]


def _may_join(training: LocalTraining) -> bool:
    return training.is_plain and is_hashable(training.rule)


def _alone(training: LocalTraining) -> Outcome:
    try:
        data = training.records().to(str(training.device))
        return run_eagerly(training, data)
    except Exception as err:  # as above
        return err


def _has_usual_targets(row: _Row) -> bool:
    """Return whether its targets cannot fail a whole cohort: a GPU then takes no more questions."""
    batches = parts(row.first)
    if not (all(len(targets) for _, targets in batches) and has_indices(row.data)):
        return False
    inputs, targets = batches[0]
    if targets.ndim != 1 or targets.is_floating_point():
        return True
    training = row.training
    key = (training.rule, inputs.dtype, inputs.shape[1:])
    if key not in _columns:
        record = inputs[:1].to(training.device)
        output = predict(training.rule.model, training.params, record)
        _columns[key] = output.shape[1] if output.ndim == 2 else 0
    held = (targets for _, targets in (row.data.support, row.data.query) if len(targets))
    return max(int(targets.max()) for targets in held) < _columns[key]


def _of_group(
    group: tuple[object, ...], rows: list[_Row], most: int
) -> Iterator[tuple[int, Outcome]]:
    """Yield (place, outcome) of each client of a group, chunk after chunk."""
    device = rows[0].training.device
    try:
        if len(rows) > 1:
            _check_padding(rows)
            room = Room(group, device, most)
            while rows:
                chunk = rows[: room.clients()]
                try:
                    with room.measured(len(chunk)):
                        results = _together(chunk)
                except torch.OutOfMemoryError:
                    room.halve(len(chunk))  # raises where one client is too many
                    for row in chunk:
                        row.start()
                    continue
                yield from results
                rows = rows[len(chunk) :]
    except Exception as err:  # vmap does not know all that a model may do
        log(
            WARNING,
            "kernel = 'vmap': %d clients run one after another (%s: %s)",
            len(rows),
            type(err).__name__,
            str(err).strip().split("\n")[0][:300],
        )
    for row in rows:
        yield row.place, _alone(row.training)


def _together(rows: Sequence[_Row]) -> list[tuple[int, Outcome]]:
    """Return (place, result) of each client; all of them compute at once."""
    training = rows[0].training
    update, kind = training.rule.update(), type(rows[0].first)
    step = torch.func.vmap(
        lambda state, batches: update.step(state, joined(kind, batches)), randomness="error"
    )
    state = update.begin(_stacked([row.training.params for row in rows]))
    ended: list[Any] = []  # states of those that have ended, the last ones first
    losses: list[Tensor] = []  # of each step, (clients at work,)
    at_work = len(rows)
    for number in range(rows[0].steps):
        going_on = sum(row.steps > number for row in rows)
        if going_on < at_work:
            ended.append(_part(state, going_on, at_work))
            state, at_work = _part(state, 0, going_on), going_on
        batches = zip(*(row.next_parts() for row in rows[:at_work]), strict=True)
        state = step(state, tuple(_collated(each, training.device) for each in batches))
        losses.append(state.losses[0].cpu())
        state = state._replace(losses=())
    whole = [tree_map(lambda value: value.cpu(), one) for one in (state, *reversed(ended))]
    of_each = (tree_map(lambda v, i=i: v[i], one) for one in whole for i in range(_size(one)))
    return [
        (
            row.place,
            update.finish(own._replace(losses=tuple(one[i] for one in losses[: row.steps]))),
        )
        for i, (row, own) in enumerate(zip(rows, of_each, strict=True))
    ]


def _stacked(params: Sequence[Params]) -> Params:
    """Return the parameters of N clients, (N, *shape) for each name; the same ones only once."""
    first = params[0]
    if all(one is first for one in params):
        return {name: value.expand(len(params), *value.shape) for name, value in first.items()}
    return {name: torch.stack([one[name] for one in params]) for name in first}


def _collated(batches: Sequence[Batch], device: torch.device) -> Batch | Padded:
    """Return N batches as one on ``device``: inputs (N, B, ...), targets (N, B, ...), mask (N, B).

    B is the size of the largest; there is no mask where all have it. What is added to a smaller one
    is its first record.
    """
    counts = [len(targets) for _, targets in batches]
    size = max(counts)
    inputs, targets = (
        torch.stack([_filled(batch[i], size) for batch in batches]).to(device) for i in (0, 1)
    )
    if min(counts) == size:
        return inputs, targets
    mask = torch.arange(size) < torch.tensor(counts)[:, None]
    return inputs, targets, mask.to(device)


def _filled(value: Tensor, size: int) -> Tensor:
    lack = size - len(value)
    return torch.cat([value, value[:1].expand(lack, *value.shape[1:])]) if lack else value


def _part(state: Any, start: int, end: int) -> Any:
    return tree_map(lambda value: value[start:end], state)


def _size(state: Any) -> int:
    return len(next(iter(state.params.values())))


_columns: Few[Hashable, int] = Few()  # of the model's output, by rule and kind of record
_padded: Few[Rule, bool] = Few()  # rules for which padding leaves what is computed


def _check_padding(rows: Sequence[_Row]) -> None:
    """Raise ModelError where batches must be padded and padding would change what is computed."""
    training = rows[0].training
    rule = training.rule
    sizes = {tuple(len(targets) for _, targets in parts(row.first)) for row in rows}
    records = {row.data.num_examples for row in rows}  # of others, the last batch may be smaller
    if len(sizes) == len(records) == 1 or rule in _padded:
        return
    mixed = _mixed(rows, training)
    if not takes_padding(objective(rule.model, rule.loss_fn), training.params, mixed):
        raise ModelError(
            "their batches differ in size, and padding changes the loss: the model mixes records, "
            "or the loss is no plain mean over them"
        )
    _padded[rule] = True


def _mixed(rows: Sequence[_Row], training: LocalTraining) -> Batch:
    """Return records of several clients; where targets are classes, one of each class."""
    firsts = [parts(row.first)[0] for row in rows[:PROBE]]
    inputs = torch.cat([x[:2] for x, _ in firsts]).to(training.device)
    targets = torch.cat([y[:2] for _, y in firsts]).to(training.device)
    if targets.ndim == 1 and not targets.is_floating_point():
        classes = predict(training.rule.model, training.params, inputs[:1]).shape[1]
        index = torch.arange(max(classes, len(targets)), device=targets.device)
        inputs, targets = inputs[index % len(inputs)], index % classes
    return inputs, targets
