"""Runs whose replies are summed beside the clients tell what runs of single replies tell."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from metabloom.sim import CohortGrid
from metabloom.strategies import (
    Checkpoints,
    FedAvg,
    FedMeta,
    Firewall,
    Reptile,
    RuleStrategy,
)
from metabloom.strategies.shell import roll_call
from metabloom.wire import from_record
from tests.strategies.bad_replies import BAD_REPLIES, metrics_of, reply_with
from tests.strategies.summing_grid import Odd, blocks_of, close, told
from tests.strategies.toy import AVERAGING, Toy, bits, start, strategy_of

# These need each reply: its number of steps, or its group.
WITHOUT_SUMS = ("fednova", "group-maml", "group-reptile")
ANY = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "POLL_S", 0.01)
    monkeypatch.setattr(roll_call, "GATHER_S", 0.05)


def both(strategy: Callable[[], RuleStrategy], toy: Callable[[], Toy], grid=None, **more):
    """Return a run whose replies are summed, one of single replies, and the grid of the first."""
    grid = grid or blocks_of()
    summed = start(strategy(), toy(), grid=grid, **more)
    grid_of_sums = grid.last
    alone = strategy()
    alone.partial_sums = False
    single = start(alone, toy(), grid=grid, **more)
    assert grid.last is not grid_of_sums
    assert not grid.last.handles
    return summed, single, grid_of_sums


def alike(summed, single, rounds: int = 1) -> None:
    assert told(summed) == told(single)
    close(summed, single, rounds)


# --- the same run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("name", AVERAGING)
def test_every_strategy_tells_the_same_with_sums_and_without(name: str, weighting: str):
    config = {"weighting": weighting}
    summed, single, grid = both(
        lambda: strategy_of(name, config, clients_per_round=9),
        lambda: Toy(roles=("train",) * 11 + ("unseen", "validation")),
        nodes=13,
        rounds=2,
    )
    # Of each nine; the ninth is alone in its block.
    assert grid.summed == (0 if name in WITHOUT_SUMS else 2 * 8)
    alike(summed, single, rounds=2)


@pytest.mark.parametrize("said", [n for n in BAD_REPLIES if n != "no reply in time"])
def test_whatever_one_client_sends_the_verdicts_are_the_same(said: str):
    summed, single, grid = both(
        lambda: strategy_of("fedavg", eval_every=0, max_offences=1),
        lambda: Odd(tamper={2: BAD_REPLIES[said].tamper}),
        nodes=7,
        rounds=2,
    )
    assert grid.summed >= 2 * (3 + 2)  # but those of one bad client
    alike(summed, single, rounds=2)
    bad = BAD_REPLIES[said].said and "partition-2" in str(summed.rounds[0])
    assert bool(bad) == bool(BAD_REPLIES[said].said)


def test_failures_epsilons_and_metrics_that_differ_are_told_alike():
    def toy() -> Toy:
        spent = metrics_of(privacy_epsilon=1.5, privacy_delta=1e-5)
        return Odd(
            fails=lambda partition, number: "no memory" if partition == 1 else "",
            tamper={3: spent, 4: metrics_of(more=2.0, loss=None), 7: metrics_of(loss=[1.0, 2.0])},
        )

    summed, single, grid = both(lambda: strategy_of("fedmeta"), toy, nodes=9, rounds=1)
    assert grid.summed == 7
    alike(summed, single)
    assert summed.rounds[0].spent == (("partition-3", 1.5),)
    assert summed.rounds[0].failures[0][0] == "partition-1"


@pytest.mark.parametrize("heavy", [{3}, {3, 6}, {0, 1, 2, 3}, {8}])
def test_clients_that_hold_most_of_the_records_are_refused_alike(heavy: set[int]):
    tamper = {i: metrics_of(num_examples=10 ** (4 + position)) for position, i in enumerate(heavy)}
    summed, single, grid = both(
        lambda: strategy_of("fedavg", eval_every=0), lambda: Odd(tamper=tamper), nodes=9, rounds=1
    )
    assert grid.summed
    alike(summed, single)
    assert {name for name, _ in summed.rounds[0].quarantined} == {f"partition-{i}" for i in heavy}


@pytest.mark.parametrize("needed", [6, 7])
def test_a_round_of_too_few_good_replies_is_skipped_alike(needed: int):
    summed, single, grid = both(
        lambda: strategy_of("fedavg", min_fit_replies=needed),
        lambda: Odd(tamper={1: BAD_REPLIES["NaN"].tamper}),
        nodes=7,
        rounds=2,
    )
    assert grid.summed == 2 * 6
    alike(summed, single, rounds=2)
    assert [report.skipped for report in summed.rounds] == [needed == 7] * 2


def test_clipped_updates_are_summed_alike():
    wall = Firewall(max_update_norm=0.1, norm_action="clip")
    summed, single, grid = both(
        lambda: strategy_of("fedavg", firewall=wall), Toy, nodes=8, rounds=1
    )
    assert grid.summed == 8
    alike(summed, single)


def test_counters_and_arrays_that_nobody_changed_are_the_same_to_the_bit():
    def learns(arrays, partition, number):
        frozen = {"bias": arrays["bias"], "half": arrays["half"]}
        return {name: frozen.get(name, value) for name, value in moved(arrays, partition).items()}

    def moved(arrays, partition):
        return {name: np.asarray(v + partition).astype(v.dtype) for name, v in arrays.items()}

    for name in ("fedavg", "reptile", "fedmeta"):
        strategy, toy = (lambda name=name: strategy_of(name)), (lambda: Toy(learns=learns))
        summed, single, _ = both(strategy, toy, nodes=8, rounds=1)
        alike(summed, single)
        ours, theirs = bits(summed.arrays), bits(single.arrays)
        assert [ours[n] for n in ("half", "batches")] == [theirs[n] for n in ("half", "batches")]


# --- known answers --------------------------------------------------------------------------------

VALUES = [1.0, 3.0, 4.0, 8.0, 2.0, 7.0]  # clients answer 10 + this; client i has i + 1 records
EXAMPLES = sum((i + 1) * value for i, value in enumerate(VALUES)) / 21
UNIFORM = sum(VALUES) / 6


@pytest.mark.parametrize(
    ("strategy", "step"),
    [
        (lambda **s: FedAvg(**s), EXAMPLES),
        (lambda **s: FedAvg(weighting="uniform", **s), UNIFORM),
        (lambda **s: Reptile(epsilon=0.25, **s), 0.25 * UNIFORM),
        (lambda **s: Reptile(epsilon=2.0, weighting="examples", **s), 2 * EXAMPLES),
        (lambda **s: FedMeta(optimizer="sgd", lr=0.5, **s), 0.5 * UNIFORM),
        (lambda **s: FedMeta(optimizer="sgd", lr=0.5, weighting="examples", **s), 0.5 * EXAMPLES),
        (lambda **s: FedMeta(optimizer="adam", lr=0.1, **s), 0.1),  # lr * sign, up to eps of 1e-8
    ],
    ids=["fedavg", "uniform", "reptile", "reptile-examples", "sgd", "sgd-examples", "adam"],
)
def test_one_round_gives_what_was_worked_out_by_hand(strategy, step: float):
    sent = {"w": np.full((2, 2), 10.0), "frozen": np.array([0.1]), "n": np.array(3)}

    def learns(arrays, partition, number):
        return {**arrays, "w": arrays["w"] + VALUES[partition], "n": np.array(99)}

    grid = blocks_of(4)
    toy = Toy(learns=learns)
    result = start(strategy(**ANY), toy, nodes=6, rounds=1, grid=grid, arrays=sent)
    assert grid.last.summed == 6
    new = from_record(result.arrays)
    np.testing.assert_allclose(new["w"], 10 + step, rtol=1e-9)
    assert new["n"] == 3
    np.testing.assert_allclose(new["frozen"], 0.1, rtol=1e-15)


# --- the grid's part ------------------------------------------------------------------------------


def test_the_order_in_which_replies_come_does_not_matter_to_the_bit():
    one = start(strategy_of("fedmeta"), Toy(), nodes=11, grid=blocks_of())
    rng = np.random.default_rng(5)
    other = start(strategy_of("fedmeta"), Toy(), nodes=11, grid=blocks_of(order=rng))
    assert bits(one.arrays) == bits(other.arrays)
    assert told(one) == told(other)


def test_a_block_whose_worker_died_comes_client_by_client():
    grid = blocks_of(dies=(1,))
    summed, single, first = both(lambda: strategy_of("fedavg"), Toy, grid, nodes=10)
    (handle, _) = first.handles
    assert [len(ids) for ids, _ in handle.parts] == [4, 1, 1, 1, 1, 2]
    assert [part is None for _, part in handle.parts] == [False, True, True, True, True, False]
    alike(summed, single, rounds=2)


def test_blocks_of_which_nothing_comes_in_time_are_lost_alike():
    grid = blocks_of(late=(1,))
    summed, single, first = both(lambda: strategy_of("fedavg"), Toy, grid, nodes=10)
    assert first.summed == 2 * (4 + 2)
    alike(summed, single, rounds=2)
    assert [name for name, _ in summed.rounds[0].failures] == [
        f"partition-{i}" for i in range(4, 8)
    ]


def test_a_run_that_is_resumed_ends_where_the_whole_one_does(tmp_path: Path):
    whole = start(strategy_of("fedmeta"), Toy(), nodes=9, rounds=3, grid=blocks_of())
    kept = Checkpoints(tmp_path / "run")
    start(strategy_of("fedmeta", checkpoints=kept), Toy(), nodes=9, rounds=2, grid=blocks_of())
    on = Checkpoints(tmp_path / "run", resume=True)
    grid = blocks_of()
    rest = start(strategy_of("fedmeta", checkpoints=on), Toy(), nodes=9, rounds=3, grid=grid)
    assert grid.last.summed == 8
    assert bits(rest.arrays) == bits(whole.arrays)
    assert told(rest)["rounds"] == told(whole)["rounds"]


def test_where_sums_are_made_may_change_when_a_run_is_resumed(tmp_path: Path):
    kept = Checkpoints(tmp_path / "run")
    start(strategy_of("fedavg", checkpoints=kept), Toy(), nodes=9, rounds=1, grid=blocks_of())
    on = Checkpoints(tmp_path / "run", resume=True)
    strategy = strategy_of("fedavg", checkpoints=on, partial_sums=False)
    result = start(strategy, Toy(), nodes=9, rounds=2, grid=blocks_of())
    assert [report.round for report in result.rounds] == [1, 2]


def test_a_client_that_sends_no_arrays_as_if_it_was_summed_is_refused():
    def bare(message: Message) -> Message:
        return reply_with(message, metrics=message.content["metrics"])

    grid = blocks_of()
    result = start(strategy_of("fedavg"), Odd(tamper={1: bare}), nodes=8, rounds=1, grid=grid)
    assert grid.last.summed == 7
    assert result.rounds[0].quarantined == (
        ("partition-1", "0 ArrayRecords: exactly one is needed"),
    )


def test_blocks_of_one_client_sum_nothing_so_small_rounds_are_the_same_to_the_bit():
    one = start(strategy_of("fedmeta"), Toy(), nodes=9, grid=blocks_of(1))
    other = start(strategy_of("fedmeta", partial_sums=False), Toy(), nodes=9, grid=blocks_of(1))
    assert bits(one.arrays) == bits(other.arrays)


def test_the_cohort_grid_sums_rounds_of_many_clients():
    def grid(app, **more):
        grids.append(CohortGrid(app, **more))
        asked = grids[-1].reduced
        grids[-1].reduced = lambda *one: handles.append(asked(*one)) or handles[-1]
        return grids[-1]

    grids: list[CohortGrid] = []
    handles: list = []
    summed = start(strategy_of("fedavg"), Toy(), nodes=70, rounds=1, grid=grid)
    single = start(strategy_of("fedavg", partial_sums=False), Toy(), nodes=70, rounds=1)
    (handle,) = handles
    assert sum(len(part.message_ids) for _, part in handle.parts if part) == 70  # blocks of two
    alike(summed, single)
