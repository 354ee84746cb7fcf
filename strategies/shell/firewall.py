"""The reply firewall: each reply is judged alone, against what was sent, before any aggregation.

A bad reply gets a reason, which names what was wrong; the good ones go on as they are, to the bit.
Nothing here raises, whatever a reply holds.
"""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from ...errors import ConfigError, shortened, unknown_name
from ...wire import NamedArrays, from_record
from .reply_metrics import DIVERGED, finite_metrics, records_of, weight_of

NormAction = Literal["refuse", "clip"]
MOST_METRICS = 1000
LONGEST_NAME = 200  # characters of a metric's name
INEXACT = "fc"  # kinds of dtype that hold NaN
FAST = (np.dtype(np.float32), np.dtype(np.float64))  # what BLAS takes


@dataclass(frozen=True)
class Firewall:
    """What is refused; the defaults refuse only what no honest client sends.

    Attributes:
        max_value: largest absolute value of an array, > 0.
        max_weight: largest weight (``num-examples``) of a reply, > 0.
        max_share: largest share of the total weight of three or more training replies, in (0, 1].
        max_update_norm: largest L2 norm of w_i - w over all floating arrays, > 0; None: any.
        required_metrics: names that the metrics of a training reply must have, as one number in
            [0, max_weight] each.
        norm_action: "refuse" a larger update, or "clip" it: w + (w_i - w) * bound / norm.

    Raises:
        ConfigError: where a bound is out of range, naming it.
    """

    max_value: float = 1e20
    max_weight: float = 1e9
    max_share: float = 0.9
    max_update_norm: float | None = None
    norm_action: NormAction = "refuse"
    required_metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_value", "max_weight", "max_update_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} = {value!r}: must be a finite number above 0")
        if not 0 < self.max_share <= 1:
            raise ConfigError(f"max_share = {self.max_share!r}: must lie in (0, 1]")
        if self.norm_action not in get_args(NormAction):
            raise unknown_name("norm_action", self.norm_action, get_args(NormAction))

    def __str__(self) -> str:
        return ", ".join(f"{f.name} {getattr(self, f.name)}" for f in fields(self))


@dataclass(frozen=True)
class Judged:
    """A reply that was judged.

    Attributes:
        message: the reply.
        arrays: its arrays; empty for an evaluation.
        reason: why it is bad; "" where it is good.
        is_offence: whether that is a fault of its own; to hold most of the records is none.
    """

    message: Message
    arrays: NamedArrays
    reason: str
    is_offence: bool = True


@dataclass(frozen=True)
class SentEach:
    """The arrays that each message held, by its id, where nodes are sent different ones."""

    by_message: Mapping[str, NamedArrays]

    def to(self, reply: Message) -> NamedArrays:
        """Return what the message held that ``reply`` answers."""
        return self.by_message[reply.metadata.reply_to_message_id]


Sent = NamedArrays | SentEach | None  # None: an evaluation, whose replies hold metrics alone


def sift(
    replies: Iterable[Message],
    sent: Sent,
    firewall: Firewall,
    weight_key: str,
    initial: NamedArrays | None = None,
    summed: Container[str] = (),
) -> tuple[list[Judged], list[Judged]]:
    """Return the good replies and the bad ones, both in their order.

    Arguments as ``judge``; replies to the messages ``summed`` were found good where they were made.
    """
    judged = [
        Judged(one, {}, "")
        if one.metadata.reply_to_message_id in summed
        else judge(
            one, sent.to(one) if isinstance(sent, SentEach) else sent, firewall, weight_key, initial
        )
        for one in replies
    ]
    good = [one for one in judged if not one.reason]
    bad = [one for one in judged if one.reason]
    if sent is None:
        return good, bad
    good, heavy = without_heavy(good, firewall, weight_key)
    return good, bad + heavy


def without_heavy(
    good: Sequence[Judged], firewall: Firewall, weight_key: str
) -> tuple[list[Judged], list[Judged]]:
    """Return those replies of three or more that are not too heavy, and the others."""
    light, heavy = list(good), []
    while len(light) >= 3:
        weights = [weight_of(one.message.content, weight_key) for one in light]
        share = max(weights) / sum(weights)
        if share <= firewall.max_share:
            break
        reason = f"{weight_key} is {share:.1%} of the total, above {firewall.max_share:.1%}"
        one = light.pop(weights.index(max(weights)))
        heavy.append(replace(one, reason=reason, is_offence=False))
    return light, heavy


def judge(
    message: Message,
    sent: NamedArrays | None,
    firewall: Firewall,
    weight_key: str,
    initial: NamedArrays | None = None,
) -> Judged:
    """Return a reply with its arrays and, where it is bad, the reason.

    A metric of an evaluation may be NaN or infinite (the client's loss diverged): it is left out by
    ``finite_metrics``, the client's other metrics count.

    Args:
        message: a reply; an error is a bad one.
        sent: the arrays of the round; None for an evaluation, whose replies hold metrics alone.
        firewall: what is refused.
        weight_key: the metric that holds a reply's weight.
        initial: the arrays that the run began with, whose dtypes are as good as those sent:
            Flower's FedAdam sends float64 to clients that compute in float32.
    """
    arrays: NamedArrays = {}
    try:
        if message.has_error():
            reason = message.error.reason or "an error without a reason"
        else:
            content = message.content
            reason = _judge_weight(content, firewall, weight_key)
            if sent is not None:
                arrays, fault = _read(content, sent)
                reason = (
                    fault
                    or _judge_arrays(arrays, sent, firewall, initial or sent)
                    or reason
                    or _judge_metrics(content, firewall)
                )
    except Exception as err:  # whatever a reply can hold: it is its sender's fault, not the run's
        reason = f"cannot be read: {type(err).__name__}: {err}"
    return Judged(message, arrays, shortened(reason))


def clipped(arrays: NamedArrays, sent: NamedArrays, max_norm: float) -> NamedArrays:
    """Return w + (w_i - w) * min(1, max_norm / ||w_i - w||), each array in its dtype.

    An update within the bound comes back as it is, to the bit; integer arrays always do.
    """
    norm = _update_norm(arrays, sent)
    if norm <= max_norm:
        return arrays
    return {
        name: np.asarray(
            sent[name] + (value.astype(np.float64) - sent[name]) * (max_norm / norm),
            dtype=value.dtype,
        )
        if np.issubdtype(value.dtype, np.floating)
        else value
        for name, value in arrays.items()
    }


def not_finite(arrays: NamedArrays) -> str:
    """Return the name of the first array that holds NaN or infinity; "" where none does."""
    with np.errstate(all="ignore"):
        for name, value in arrays.items():
            if value.dtype.kind in INEXACT and not math.isfinite(_peak(value)):
                return name
    return ""


def _read(content: RecordDict, sent: NamedArrays) -> tuple[NamedArrays, str]:
    """Return the arrays of a reply, or why they cannot be those that are wanted."""
    records = records_of(content, ArrayRecord)
    if len(records) != 1:
        return {}, f"{len(records)} ArrayRecords: exactly one is needed"
    names = list(records[0])
    if names != list(sent):
        if missing := [name for name in sent if name not in names]:
            return {}, f"array {missing[0]!r} is missing"
        if foreign := [name for name in names if name not in sent]:
            return {}, f"array {foreign[0]!r} was not sent"
    return from_record(records[0]), ""


def _judge_arrays(
    arrays: NamedArrays, sent: NamedArrays, firewall: Firewall, initial: NamedArrays
) -> str:
    with np.errstate(all="ignore"):
        for name, array in arrays.items():
            wanted = sent[name]
            if array.shape != wanted.shape:
                return f"array {name!r} has shape {array.shape}, that sent had {wanted.shape}"
            if array.dtype != wanted.dtype and array.dtype != initial.get(name, wanted).dtype:
                return f"array {name!r} is of {array.dtype}, that sent was of {wanted.dtype}"
            if array.dtype.kind not in INEXACT or _surely_within(array, firewall.max_value):
                continue
            peak = _peak(array)
            if not math.isfinite(peak):
                return f"array {name!r} {DIVERGED}"
            if peak > firewall.max_value:
                return f"array {name!r} holds {peak:.3g}, above {firewall.max_value:.3g}"
    return _judge_update(arrays, sent, firewall)


def _judge_update(arrays: NamedArrays, sent: NamedArrays, firewall: Firewall) -> str:
    if firewall.max_update_norm is None or firewall.norm_action == "clip":
        return ""
    norm = _update_norm(arrays, sent)
    if norm <= firewall.max_update_norm:
        return ""
    return f"its update has norm {norm:.3g}, above {firewall.max_update_norm:.3g}"


def _judge_weight(content: RecordDict, firewall: Firewall, weight_key: str) -> str:
    records = records_of(content, MetricRecord)
    if len(records) != 1:
        return f"{len(records)} MetricRecords: exactly one is needed"
    metrics = records[0]
    if len(metrics) > MOST_METRICS:
        return f"{len(metrics)} metrics: at most {MOST_METRICS} are allowed"
    if any(len(name) > LONGEST_NAME for name in metrics):
        return f"a metric has a name of more than {LONGEST_NAME} characters"
    if weight_key not in metrics:
        return f"metric {weight_key!r} is missing"
    value = metrics[weight_key]
    if isinstance(value, list):
        return f"{weight_key} is a list: one number is needed"
    if not 0 < value <= firewall.max_weight:
        return f"{weight_key} is {value!r}: must be above 0 and at most {firewall.max_weight:.3g}"
    return ""


def _judge_metrics(content: RecordDict, firewall: Firewall) -> str:
    finite, wild = finite_metrics(content)
    if wild:
        return f"metric {wild[0]!r} {DIVERGED}"
    for name in firewall.required_metrics:
        value = finite.get(name, [])
        if isinstance(value, list) or not 0 <= value <= firewall.max_weight:
            return f"metric {name!r} is missing, or not one number from 0 to the largest weight"
    return ""


def _surely_within(array: np.ndarray, bound: float) -> bool:
    """Return True only where no |x| is above ``bound``: one pass, as sum x^2 <= bound^2.

    NaN and infinity make the sum none that compares. False says nothing: the sum may overflow.
    """
    if array.dtype not in FAST:
        return False
    flat = array.ravel(order="K")
    # float(): NumPy would make the bound a float32 too, and infinity of 1e40.
    return float(np.dot(flat, flat)) <= 0.99 * bound * bound


def _peak(array: np.ndarray) -> float:
    """Return the largest absolute value; NaN or infinity where the array holds one."""
    return float(np.abs(array).max(initial=0.0))


def _update_norm(arrays: NamedArrays, sent: NamedArrays) -> float:
    squares = 0.0
    for name, array in arrays.items():
        if np.issubdtype(array.dtype, np.floating):
            difference = (array.astype(np.float64) - sent[name]).ravel()
            squares += float(np.dot(difference, difference))
    return math.sqrt(squares)
