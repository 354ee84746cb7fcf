"""The contract that every strategy keeps, for the tests of whoever writes one.

    import pytest
    from metabloom.testing import CONTRACT

    import my_strategy  # registers "my-strategy"


    @pytest.mark.parametrize("check", CONTRACT)
    def test_my_strategy_keeps(check, tmp_path):
        check("my-strategy", tmp_path)

Each check runs the strategy with its own clients on a small federation of digits, in this process,
in a second or less, and raises AssertionError with what it saw. ``AVERAGING`` are more checks, for
strategies whose new model is an average of the clients' models.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from safetensors.numpy import load_file

from .client_app import app
from .config import RunConfig
from .keys import key_of
from .server_app import run
from .sim import CohortGrid
from .sim.results import MODEL, RESULTS
from .task import federation_of, initial_arrays
from .wire import from_record, to_record

__all__ = ["AVERAGING", "CONTRACT", "Check"]

Arrays = dict[str, np.ndarray]
Spoil = Callable[[Message], Message]

ROUNDS = 4
SMALL: Mapping[str, Any] = {
    "dataset": "digits",
    "num-clients": 10,
    "model": "mlp",
    "model-args": "hidden=8",
    "rounds": ROUNDS,
    "clients-per-round": 4,
    "eval-every": 2,
    "eval-steps": "1",
    "workers": "0",
    "kernel": "eager",
    "device": "cpu",
    "max-share": 1.0,  # of few clients one may be most of a round
}


class Check(Protocol):
    """One clause of the contract."""

    def __call__(self, strategy: str, folder: Path, /, **keys: object) -> None:
        """Raise AssertionError where ``strategy`` breaks the clause.

        Args:
            strategy: its registry name.
            folder: where runs may write; none of its files may be of another check.
            keys: configuration of the runs beyond the usual, ``local_lr=0.5`` say.
        """


class _Grid(CohortGrid):
    """A grid that keeps what it sees of training, and lets a function change the replies.

    Attributes:
        round: number of the last training round, from 1.
        asked: number of training messages to each client, by its name.
        sent: the arrays of the last of them.
        answered: the arrays of the last reply, as its client sent it.
    """

    def __init__(self, config: RunConfig, change: "Change") -> None:
        names = federation_of(config).client_ids
        super().__init__(app, num_nodes=len(names), run_config=config.to_flower(), seed=config.seed)
        self._names = dict(zip(self.partitions, names, strict=True))
        self._change = change
        self.round = 0
        self.asked: Counter[str] = Counter()
        self.sent: Arrays = {}
        self.answered: Arrays = {}

    def send_and_receive(  # type: ignore[override]  # replies need not stream here
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Sequence[Message]:
        """Return the replies, those of training changed."""
        messages = list(messages)
        if not any(one.metadata.message_type == MessageType.TRAIN for one in messages):
            return super().send_and_receive(messages, timeout=timeout)
        self.round += 1
        self.asked.update(self._names[one.metadata.dst_node_id] for one in messages)
        self.sent = _arrays(messages[-1])
        replies = list(super().send_and_receive(messages, timeout=timeout))
        replies.sort(key=lambda reply: self._names[reply.metadata.src_node_id])
        for reply in replies:
            if reply.has_content():
                self.answered = _arrays(reply)
        return self._change(self, replies)


Change = Callable[[_Grid, list[Message]], list[Message]]


@dataclass(frozen=True)
class _Played:
    """What a run has left."""

    model: Arrays
    results: dict[str, Any]
    grid: _Grid


# --- the clauses ----------------------------------------------------------------------------------


def names_shapes_and_dtypes_stay(strategy: str, folder: Path, /, **keys: object) -> None:
    """Demand that the model that a run leaves has the arrays of the one that it began with."""
    before = initial_arrays(_config(strategy, folder, keys))
    after = _play(strategy, folder, keys).model
    assert set(after) == set(before), f"arrays {sorted(after)}, at first {sorted(before)}"
    for name, value in before.items():
        form, first = ((one.shape, one.dtype) for one in (after[name], value))
        assert form == first, f"{name!r} is {form}, at first {first}"
        assert np.isfinite(after[name]).all(), f"{name!r} holds NaN or infinity"


def the_same_seed_gives_the_same_model(strategy: str, folder: Path, /, **keys: object) -> None:
    """Demand bit-equal models of two runs."""
    one, other = (_play(strategy, folder / name, keys).model for name in ("one", "other"))
    _assert_equal(other, one, "a second run with the same seed")


def the_order_of_replies_does_not_matter(strategy: str, folder: Path, /, **keys: object) -> None:
    """Demand the same model, to the bit, where replies come backwards."""
    usual = _play(strategy, folder / "usual", keys).model
    backwards = _play(strategy, folder / "backwards", keys, lambda _, replies: replies[::-1])
    _assert_equal(backwards.model, usual, "a run whose replies come backwards")


def two_halves_are_the_whole(strategy: str, folder: Path, /, **keys: object) -> None:
    """Demand that a run that was stopped and resumed ends as one that was not, to the bit."""
    whole = _play(strategy, folder / "whole", keys)
    _play(strategy, folder / "halves", {**keys, "rounds": ROUNDS // 2})
    second = _play(strategy, folder / "halves", {**keys, "resume": True})
    _assert_equal(second.model, whole.model, "a run that was resumed")
    told, once = ([one["train"] for one in run.results["history"]] for run in (second, whole))
    assert told == once, f"a run that was resumed tells {told}, one that was not {once}"


def a_bad_reply_is_as_none(strategy: str, folder: Path, /, **keys: object) -> None:
    """Demand that a client whose replies are bad is told of, and acts as one that is silent.

    Bad are: NaN, infinity, another shape, an array too few, no weight, no records.
    """
    without = _play(strategy, folder / "no reply", keys, _first(lambda _: None))
    for name, spoil in BAD.items():
        played = _play(strategy, folder / name, keys, _first(spoil))
        counted = played.results["failures"] + played.results["quarantined"]
        assert counted == ROUNDS, f"{counted} of {ROUNDS} replies with {name} were told of"
        _assert_equal(played.model, without.model, f"a run with a client that sends {name}")


def a_round_without_replies_changes_nothing(strategy: str, folder: Path, /, **keys: object) -> None:
    """Demand that a round in which no client answers is skipped, and leaves the model."""

    def silent_in_the_second(grid: _Grid, replies: list[Message]) -> list[Message]:
        return [] if grid.round == 2 else replies

    one = _play(strategy, folder / "one", {**keys, "rounds": 1})
    two = _play(strategy, folder / "two", {**keys, "rounds": 2}, silent_in_the_second)
    skipped = two.results["skipped"]
    assert skipped == 1, f"{skipped} rounds were skipped: only the one without replies is to be"
    _assert_equal(two.model, one.model, "a run whose last round had no replies")


def only_training_clients_train(strategy: str, folder: Path, /, **keys: object) -> None:
    """Demand that validation and unseen clients are never asked to train, nor too many."""
    config = _config(strategy, folder, keys)
    asked = _play(strategy, folder, keys).grid.asked
    federation = federation_of(config)
    training = {federation.client_ids[i] for i in federation.indices("train")}
    others = ", ".join(sorted(set(asked) - training))
    assert not others, f"{others} were asked to train, and are there to judge"
    most = ROUNDS * config.clients_per_round
    assert asked.total() <= most, f"{asked.total()} training messages; {most} are allowed"


def clients_that_learn_nothing_leave_the_model(
    strategy: str, folder: Path, /, **keys: object
) -> None:
    """Demand that the model stays, up to rounding, where clients answer with what they got."""

    def as_sent(grid: _Grid, replies: list[Message]) -> list[Message]:
        return [_with(reply, arrays=to_record(grid.sent)) for reply in replies]

    before = initial_arrays(_config(strategy, folder, keys))
    after = _play(strategy, folder, keys, as_sent).model
    _assert_close(after, before, "of clients that learn nothing")


def one_client_is_its_own_run(strategy: str, folder: Path, /, **keys: object) -> None:
    """Demand that, with one client in one round, the model is what that client answered with.

    What its reply does not hold (a part that stays on clients) is as at first. A server with an
    optimiser is asked this with ``server_optimizer="sgd", outer_lr=1``.
    """
    alone = {**keys, "clients_per_round": 1, "rounds": 1}
    before = initial_arrays(_config(strategy, folder, alone))
    played = _play(strategy, folder, alone)
    answered = {n: value for n, value in played.grid.answered.items() if n in before}
    _assert_close(played.model, {**before, **answered}, "of one client")


CONTRACT: tuple[Check, ...] = (
    names_shapes_and_dtypes_stay,
    the_same_seed_gives_the_same_model,
    the_order_of_replies_does_not_matter,
    two_halves_are_the_whole,
    a_bad_reply_is_as_none,
    a_round_without_replies_changes_nothing,
    only_training_clients_train,
)
AVERAGING: tuple[Check, ...] = (
    clients_that_learn_nothing_leave_the_model,
    one_client_is_its_own_run,
)


# --- replies --------------------------------------------------------------------------------------


def _arrays(message: Message) -> Arrays:
    """Return the arrays of a message; none where it has no records of them."""
    for record in message.content.array_records.values():
        return from_record(record)
    return {}


def _with(reply: Message, **records: ArrayRecord | MetricRecord) -> Message:
    """Return the reply to the same question with other records."""
    usual: dict[str, Any] = {
        "arrays": next(iter(reply.content.array_records.values()), ArrayRecord()),
        "metrics": next(iter(reply.content.metric_records.values()), MetricRecord()),
    }
    reply.content = RecordDict({**usual, **records})
    return reply


def _last_array(change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    """Return what changes the last floating array of a reply."""

    def spoil(reply: Message) -> Message:
        arrays = {name: np.array(value) for name, value in _arrays(reply).items()}
        name = [n for n, value in arrays.items() if np.issubdtype(value.dtype, np.floating)][-1]
        return _with(reply, arrays=to_record({**arrays, name: change(arrays[name])}))

    return spoil


def _without_an_array(reply: Message) -> Message:
    return _with(reply, arrays=to_record(dict(list(_arrays(reply).items())[1:])))


def _without_records(reply: Message) -> Message:
    reply.content = RecordDict()
    return reply


BAD: Mapping[str, Spoil] = {
    "NaN": _last_array(lambda array: np.full_like(array, np.nan)),
    "infinity": _last_array(lambda array: np.full_like(array, np.inf)),
    "another shape": _last_array(lambda array: np.concatenate([array.ravel(), array.ravel()])),
    "an array too few": _without_an_array,
    "no weight": lambda reply: _with(reply, metrics=MetricRecord({"train-loss": 0.1})),
    "no records": _without_records,
}


def _first(spoil: Callable[[Message], Message | None]) -> Change:
    """Return what spoils the reply of one client in each round; None: it does not come."""

    def change(grid: _Grid, replies: list[Message]) -> list[Message]:
        del grid
        first = spoil(replies[0])
        return [*([first] if first is not None else []), *replies[1:]]

    return change


# --- runs -----------------------------------------------------------------------------------------


def _config(strategy: str, folder: Path, keys: Mapping[str, object]) -> RunConfig:
    more = {key_of(name): value for name, value in keys.items()}
    return RunConfig.read({**SMALL, "strategy": strategy, "out": str(folder), **more})


def _play(
    strategy: str,
    folder: Path,
    keys: Mapping[str, object],
    change: Change = lambda _, replies: replies,
) -> _Played:
    """Run, and return what is left."""
    config = _config(strategy, folder, keys)
    with _Grid(config, change) as grid:
        run(grid, config)
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    return _Played(load_file(folder / MODEL), results, grid)


def _assert_equal(found: Arrays, wanted: Arrays, what: str) -> None:
    for name, value in wanted.items():
        same = name in found and found[name].tobytes() == value.tobytes()
        assert same, f"{what} ends with another {name!r}: {_distance(found, wanted)}"


def _assert_close(found: Arrays, wanted: Arrays, what: str) -> None:
    for name, value in wanted.items():
        close = name in found and np.allclose(found[name], value, rtol=1e-5, atol=1e-6)
        assert close, f"the model {what} is another one in {name!r}: {_distance(found, wanted)}"


def _distance(found: Arrays, wanted: Arrays) -> str:
    gaps = [np.abs(found[n].astype(float) - w).max(initial=0) for n, w in wanted.items()]
    return f"values differ by up to {max(gaps):.3g}"
