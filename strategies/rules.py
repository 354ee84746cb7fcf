r"""Aggregation rules: pure functions on named arrays.

A rule is a pair (init, update): ``state = init(arrays)``; ``state, arrays = update(state, arrays,
replies)``. Rules see NumPy arrays and plain numbers, never Flower's messages; the shell around them
does the talking. Sums are accumulated in float64 and given back in the dtype that came in. Integer
arrays (counters) are not averaged: the value that was sent stays.

How the clients' arrays become one is an ``Aggregation``, ``mean`` unless a rule is given another;
``aggregation`` has those that resist bad clients.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from ..errors import ConfigError, MetabloomError, unknown_name
from ..wire import NamedArrays

Arrays = dict[str, np.ndarray]
State = Mapping[str, Any]
Weighting = Literal["uniform", "examples"]
OptimizerFactory = Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]


STATISTICS = ("running_mean", "running_var")  # of BatchNorm, in clients that are not ours


@dataclass(frozen=True)
class Reply:
    """One client's answer, or the mean of several clients' answers.

    Attributes:
        arrays: by name; floating ones of a mean are float64, but those that nobody changed.
        num_examples: training records, of all its clients together.
        clients: how many it stands for, >= 1.
        changed: of a mean, the floating arrays that any of its clients changed; None: those that
            differ from what was sent.
        client: whose answer it is, by name, where the rule has a model for each client; "": where
            it has no need to know.
    """

    arrays: NamedArrays
    num_examples: float
    clients: int = 1
    changed: frozenset[str] | None = None
    client: str = ""


# aggregation(sent, replies, weighting), of one reply or more: float64 for floating arrays, the
# arrays of ``sent`` for others.
Aggregation = Callable[[NamedArrays, Sequence[Reply], Weighting], Arrays]


@dataclass(frozen=True)
class Rule:
    """A pure aggregation rule; see the module's text.

    Attributes:
        init: the state before the first round, of the initial arrays.
        update: the next state and arrays, of the state, the arrays that were sent, and the replies.
        mean_by: the weighting of the ``mean``, where the rule sees no more of the replies than that
            and which arrays anyone changed: the mean of several may then stand in their place.
            None: it needs each reply.
        sees_all_architectures: where clients have several, it takes the arrays of all at once; else
            the shell hands it those of each by themselves.
        exchanged: where training is not about models: the prefix of the arrays that it is about
            (``PREFIX/NAME``). Training nodes are sent these alone, and the rule gets replies that
            hold them, as NAME, whatever architectures there are. "": training is about models.
        trains: where training is about a part of the models: whether an array, by its full name, is
            of that part. Training nodes are sent these alone and answer with these alone, and the
            rule sees no others, which stay as they are. None: all.
        beside: where more travels in training than a model: that, of the initial arrays of one, by
            names with a prefix (``PREFIX/NAME``). It is no part of what nodes evaluate, nor of
            what a run leaves. None: nothing.
    """

    init: Callable[[NamedArrays], State]
    update: Callable[[State, NamedArrays, Sequence[Reply]], tuple[State, Arrays]]
    mean_by: Weighting | None = None
    sees_all_architectures: bool = False
    exchanged: str = ""
    trains: Callable[[str], bool] | None = None
    beside: Callable[[NamedArrays], Arrays] | None = None


def check_weighting(weighting: str) -> None:
    """Raise ConfigError for a weighting that is neither "uniform" nor "examples"."""
    if weighting not in get_args(Weighting):
        raise unknown_name("weighting", weighting, get_args(Weighting))


def weights_of(replies: Sequence[Reply], weighting: Weighting) -> np.ndarray:
    """Return p, of sum 1 over the replies: by their ``clients``, 1/n of each, or ``num_examples``.

    Raises:
        MetabloomError: where ``num_examples`` are no weights, naming them.
    """
    if weighting == "uniform":
        clients = np.array([reply.clients for reply in replies], dtype=np.float64)
        return np.asarray(clients / clients.sum())
    counts = np.array([reply.num_examples for reply in replies], dtype=np.float64)
    if not (np.isfinite(counts).all() and (counts >= 0).all() and counts.sum() > 0):
        raise MetabloomError(
            f"num-examples of the replies are {counts.tolist()}: finite numbers >= 0, not all 0, "
            "are needed; use weighting 'uniform' where clients do not count their records"
        )
    shares: np.ndarray = counts / counts.sum()
    return shares


def is_floating(value: np.ndarray) -> bool:
    """Return whether ``value`` is aggregated: counters and flags are not."""
    return np.issubdtype(value.dtype, np.floating)


def mean(sent: NamedArrays, replies: Sequence[Reply], weighting: Weighting) -> Arrays:
    """Return sum_i p_i w_i in float64 for floating arrays, the arrays of ``sent`` for others."""
    p = weights_of(replies, weighting)
    result: Arrays = {}
    for name, value in sent.items():
        if not is_floating(value):
            result[name] = value
            continue
        total, part = np.zeros(value.shape), np.empty(value.shape)  # float64
        for share, reply in zip(p, replies, strict=True):
            # One buffer for all replies: new memory for each takes three times as long.
            total += np.multiply(reply.arrays[name], share, out=part, dtype=np.float64)
        result[name] = total
    return result


def interpolate(
    epsilon: float = 1.0, *, weighting: Weighting = "examples", aggregate: Aggregation = mean
) -> Rule:
    """Return the rule w <- (1 - epsilon) w + epsilon * x, with x the aggregate of the replies.

    epsilon = 1 is FedAvg, where x = sum_i p_i w_i, the ``mean``; Reptile takes any.

    Raises:
        ConfigError: where epsilon is not a finite number above 0, or the weighting is unknown.
    """
    check_weighting(weighting)
    if not 0 < epsilon < np.inf:
        raise ConfigError(f"epsilon = {epsilon!r}: must be a finite number above 0")

    def update(state: State, sent: NamedArrays, replies: Sequence[Reply]) -> tuple[State, Arrays]:
        goal = aggregate(sent, replies, weighting)
        if epsilon == 1.0:  # exactly the goal, to the bit
            return state, {name: goal[name].astype(sent[name].dtype) for name in sent}
        new = {
            name: np.asarray(
                (1 - epsilon) * value.astype(np.float64) + epsilon * goal[name], dtype=value.dtype
            )
            if is_floating(value)
            else value
            for name, value in sent.items()
        }
        return state, new

    return Rule(lambda _: {}, update, mean_by=weighting if aggregate is mean else None)


def server_optimizer(
    factory: OptimizerFactory, *, weighting: Weighting = "uniform", aggregate: Aggregation = mean
) -> Rule:
    """Return the rule that gives the pseudo-gradient w - x to a torch.optim optimiser.

    x is the aggregate of the replies, usually their mean sum_i p_i w_i.
    The optimiser's state persists over the rounds. It computes in float64 whatever the arrays'
    dtype is: in float16, Adam's epsilon of 1e-8 is 0 and a gradient of 0 makes the model NaN.
    Running statistics of BatchNorm, known by their names, take x itself: a step of Adam could make
    a variance negative. An array that no client ever changed (a frozen layer) stays, whatever
    weight decay the optimiser has.

    Args:
        factory: ``factory(parameters) -> torch.optim.Optimizer``; the parameters are float64.
        weighting: "uniform" or "examples".
        aggregate: ``mean`` or another aggregation.

    Raises:
        ConfigError: where the weighting is unknown.
    """
    check_weighting(weighting)

    def update(state: State, sent: NamedArrays, replies: Sequence[Reply]) -> tuple[State, Arrays]:
        goal = aggregate(sent, replies, weighting)
        floating = [
            name
            for name, value in sent.items()
            if is_floating(value) and not name.endswith(STATISTICS)
        ]
        as_is = {name: goal[name].astype(sent[name].dtype) for name in sent}
        if not floating:
            return state, as_is
        params = [torch.tensor(sent[name], dtype=torch.float64) for name in floating]
        for name, param in zip(floating, params, strict=True):
            param.requires_grad_().grad = param.detach() - torch.from_numpy(goal[name])
        optimizer = factory(params)
        if state:  # load_state_dict keeps tensors: without a copy the old state would change
            optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        optimizer.step()
        trained = {n for n in floating if any_changed(n, sent, replies)} | set(
            state.get("trained", ())
        )
        stepped = {
            name: param.detach().numpy().astype(sent[name].dtype)
            for name, param in zip(floating, params, strict=True)
            if name in trained
        }
        new_state = {"optimizer": optimizer.state_dict(), "trained": sorted(trained)}
        return new_state, {name: stepped.get(name, as_is[name]) for name in sent}

    return Rule(lambda _: {}, update, mean_by=weighting if aggregate is mean else None)


def any_changed(name: str, sent: NamedArrays, replies: Sequence[Reply]) -> bool:
    """Return whether any client of the replies changed the array ``name``."""
    return any(
        not np.array_equal(reply.arrays[name], sent[name])
        if reply.changed is None
        else name in reply.changed
        for reply in replies
    )
