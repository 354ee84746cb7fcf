"""The local trainings of many clients at once, by vmap over clients.

Clients that do the same with the same model form a group, by the sizes of their batches, each up to
a power of two; smaller batches are padded with masked records, which have no share. Where padding
is not known to leave the loss, the clients of a group have batches of the same sizes. The clients
with the most steps stand first, so that those still at work are always the first k, and no step is
computed for one that has ended. A client's result is that of the eager loop up to rounding, whoever
else is in the cohort and however it is cut into chunks.
"""

from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from itertools import chain
from logging import WARNING
from typing import Any

import torch
from flwr.common import log
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from ..errors import ModelError
from ..streams import torch_seeded, torch_stream
from .batches import Padded, joined, parts
from .data import Batch
from .evaluation import CHUNK
from .kernel import Few, first_line
from .local_update import LocalResult
from .objective import Params, objective, predict, takes_padding
from .room import Room
from .soft_targets import loss_of_packed
from .training import LocalTraining, Rule, has_indices, is_hashable, run_eagerly

Outcome = LocalResult | Exception
Kind = tuple[torch.dtype, torch.Size, torch.dtype, torch.Size]  # of inputs and targets, a record's
PROBE = 7  # made-up records that padding is tried on, where the loss is known
MOST_CLASSES = 1024  # for which each is tried: the outputs are 1.5 times its square
PLAIN_MEANS = (  # for all targets without a negative index
    F.cross_entropy,
    F.nll_loss,
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    loss_of_packed,
)
PLAIN_MODULES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)


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
        items = self.training.batches(self.data)
        self.first = next(items, None)  # no later one is larger; None: there are no records
        self._items = items if self.first is None else chain([self.first], items)

    def next_parts(self) -> tuple[Batch, ...]:
        """Return the batches of the next step."""
        return parts(next(self._items))

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of record of each part of a batch."""
        return tuple(map(_kind, parts(self.first)))

    @property
    def group(self) -> tuple[object, ...]:
        """What clients must have in common to be computed at once, but for sizes."""
        params = self.training.params
        held = tuple((name, value.dtype) for name, value in params.items())
        return self.training.rule, type(self.first), self.kinds, held, self.training.device

    @property
    def sizes(self) -> tuple[int, ...]:
        """What clients must have in common for all their batches to have the same sizes."""
        counts = (len(targets) for _, targets in parts(self.first))
        return (*counts, len(self.data.support[1]), len(self.data.query[1]))

    @property
    def scale(self) -> tuple[int, ...]:
        """What clients must have in common where smaller batches are padded."""
        return tuple((len(targets) - 1).bit_length() for _, targets in parts(self.first))


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
            if row is None or not (_takes_inputs(row) and _has_usual_targets(row)):
                outcomes[place] = _alone(training)
            else:
                groups.setdefault(row.group, []).append(row)
        except Exception as err:  # a client's data may raise anything: the others go on
            outcomes[place] = err
    for group, rows in groups.items():
        for sizes, some in _by_size(rows).items():
            some.sort(key=lambda row: -row.steps)
            outcomes.update(_of_group((*group, sizes), some, most))
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
    batches = () if row.first is None else parts(row.first)
    if not batches or not all(len(targets) for _, targets in batches) or not has_indices(row.data):
        return False
    inputs, targets = batches[0]
    if targets.ndim != 1 or targets.is_floating_point():
        return True
    training = row.training
    key = (training.rule, inputs.dtype, inputs.shape[1:])
    if key not in _columns:
        record = inputs[:1].to(training.device)
        with training.seeded():
            output = predict(training.rule.model, training.params, record)
        _columns[key] = output.shape[1] if output.ndim == 2 else 0
    held = (targets for _, targets in (row.data.support, row.data.query) if len(targets))
    return max(int(targets.max()) for targets in held) < _columns[key]


def _takes_inputs(row: _Row) -> bool:
    """Return whether the model takes its inputs; tried on the CPU, where they may be indices.

    One out of range would be an index into another client's parameters, and stops a GPU.
    """
    model, held = row.training.rule.model, (row.data.support[0], row.data.query[0])
    has_tables = any(isinstance(one, nn.Embedding | nn.EmbeddingBag) for one in model.modules())
    if not has_tables and all(inputs.is_floating_point() for inputs in held):
        return True
    params = {name: value.cpu() for name, value in row.training.params.items()}
    try:
        with row.training.seeded():
            for inputs in held:
                for start in range(0, len(inputs), CHUNK):
                    predict(model, params, inputs[start : start + CHUNK].cpu())
    except Exception:
        if row.training.device.type == "cpu":
            return False  # alone, it raises the same or has its way
        raise
    return True


def _by_size(rows: list[_Row]) -> dict[tuple[int, ...], list[_Row]]:
    """Return those that may be computed at once; their other properties are the same."""
    alike: dict[tuple[int, ...], list[_Row]] = {}
    for row in rows:
        alike.setdefault(row.sizes, []).append(row)
    if len(alike) == 1 or not all(_takes_padding(rows[0].training, one) for one in rows[0].kinds):
        return alike
    near: dict[tuple[int, ...], list[_Row]] = {}
    for row in rows:
        near.setdefault(row.scale, []).append(row)
    return near


def _of_group(
    group: tuple[object, ...], rows: list[_Row], most: int
) -> Iterator[tuple[int, Outcome]]:
    """Yield (place, outcome) of each client of a group, chunk after chunk."""
    device = rows[0].training.device
    try:
        if len(rows) > 1:
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
            "kernel = 'vmap': %d clients run one after another (%s)",
            len(rows),
            first_line(err),
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
        state = step(state, tuple(_collated(each, training) for each in batches))
        losses.append(state.losses[0].cpu())
        state = state._replace(losses=())
    whole = [
        one._replace(params={name: value.cpu() for name, value in one.params.items()})
        for one in (state, *reversed(ended))
    ]
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


def _collated(batches: Sequence[Batch], training: LocalTraining) -> Batch | Padded:
    """Return N batches as one on the device: inputs (N, B, ...), targets (N, B, ...), mask (N, B).

    B is the size of the largest; there is no mask where all have it. What is added to a smaller one
    is its first record.

    Raises:
        ModelError: where some must be padded, and that may change the loss.
    """
    device = training.device
    counts = [len(targets) for _, targets in batches]
    size = max(counts)
    inputs, targets = (
        torch.stack([_filled(batch[i], size) for batch in batches]).to(device) for i in (0, 1)
    )
    if min(counts) == size:
        return inputs, targets
    if not _takes_padding(training, _kind(batches[0])):
        raise ModelError("their batches differ in size, and padding may change the loss")
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
_padded: Few[Hashable, bool] = Few()  # whether padding leaves the loss, by rule and kind of record


def _kind(batch: Batch) -> Kind:
    inputs, targets = batch
    return inputs.dtype, inputs.shape[1:], targets.dtype, targets.shape[1:]


def _takes_padding(training: LocalTraining, kind: Kind) -> bool:
    """Return whether batches of records of ``kind`` may be padded; depends on the rule alone."""
    key = (training.rule, kind)
    if key not in _padded:
        rule, reason = training.rule, "the model mixes records, or the loss is no plain mean"
        device = str(training.device) if kind[0].is_floating_point else "cpu"
        named = rule.model.named_parameters()
        params = {name: value.detach().to(device) for name, value in named}
        try:
            with torch_seeded(0, "padding", device=device):
                batch = tuple(value.to(device) for value in _made_up(rule, params, kind))
                loss = objective(rule.model, rule.loss_fn)
                _padded[key] = takes_padding(loss, params, (batch[0], batch[1]))
        except Exception as err:  # the model may refuse records that are made up
            reason = first_line(err)
            _padded[key] = False
        if not _padded[key]:
            log(
                WARNING,
                "kernel = 'vmap': only clients with equal numbers of records are computed at once, "
                "for padding may change the loss (%s)",
                reason,
            )
    return _padded[key]


def _made_up(rule: Rule, params: Params, kind: Kind) -> Batch:
    """Return records on which it shows what padding does.

    Of a loss that is not known, all classes are tried, some of them twice: what it does may depend
    on the class.

    Raises:
        ModelError: where the targets of such a loss are too many to be tried.
    """
    dtype, shape, target_dtype, target_shape = kind
    draw, device = torch_stream(0, "padding"), next(iter(params.values())).device

    def inputs(count: int) -> Tensor:
        if dtype.is_floating_point:
            return torch.randn(count, *shape, generator=draw).to(dtype)
        return torch.randint(2, (count, *shape), generator=draw).to(dtype)

    loss = rule.loss_fn.func if isinstance(rule.loss_fn, partial) else rule.loss_fn
    is_known = loss in PLAIN_MEANS or type(loss) in PLAIN_MODULES
    if is_known and target_dtype.is_floating_point:
        return inputs(PROBE), torch.rand(PROBE, *target_shape, generator=draw).to(target_dtype)
    columns = predict(rule.model, params, inputs(1).to(device)).shape[1]
    if is_known:
        targets = torch.randint(columns, (PROBE, *target_shape), generator=draw)
        return inputs(PROBE), targets.to(target_dtype)
    if target_dtype.is_floating_point or target_shape or columns > MOST_CLASSES:
        raise ModelError("the loss is not known to be a plain mean over records")
    count = columns + columns // 2 + 1
    return inputs(count), (torch.arange(count) % columns).to(target_dtype)
