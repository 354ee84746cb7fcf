"""What is tried in a comparison: grids, the user's axes, budgets, and the same number of tries."""

import itertools

import pytest

from metabloom.comparison_plan import keys_that_matter
from metabloom.config import RunConfig
from metabloom.errors import ConfigError
from metabloom.strategies import STRATEGIES
from metabloom.tuning import (
    OWN,
    USUAL,
    Budget,
    Entry,
    entries_of,
    evaluated_every,
    on_edge,
    overridden,
    points,
    tries_of,
    usual_grid,
)

READ = {"fedavg": {"local-lr", "inner-lr", "batch-size"}, "fedmeta": {"outer-lr", "inner-lr"}}
GRIDS = {name: usual_grid(name, read) for name, read in READ.items()}


# --- grids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_every_strategy_has_a_grid_of_rates_that_it_reads(strategy: str):
    config = RunConfig.read({"strategy": strategy})
    grid = usual_grid(strategy, keys_that_matter(config))
    assert "inner-lr" in grid
    assert len(grid) >= 2  # a rate of training too
    assert {"local-lr", "outer-lr"} & set(grid)
    for point in points(grid):
        RunConfig.read({"strategy": strategy, **point})


def test_the_usual_axes_are_keys_and_hold_their_defaults_or_surround_them():
    for key, values in itertools.chain(USUAL.items(), *(own.items() for own in OWN.values())):
        default = RunConfig.defaults()[key]
        assert list(values) == sorted(set(values))
        assert default == 0.0 or min(values) <= default <= max(values), key


def test_own_axes_are_of_strategies_that_there_are():
    assert set(OWN) <= set(STRATEGIES)


def test_points_are_all_combinations_once():
    grid = {"a": (1, 2, 3), "b": ("x", "y")}
    found = [tuple(point.values()) for point in points(grid)]
    assert found == list(itertools.product(*grid.values()))
    assert points({}) == [{}]


# --- the user's axes ------------------------------------------------------------------------------


def test_an_axis_of_the_users_takes_the_place_of_the_usual_one():
    found = overridden(GRIDS, ["local-lr=0.5,0.7 inner-lr=2"], READ)
    assert found["fedavg"] == {"local-lr": (0.5, 0.7), "inner-lr": (2,)}
    assert found["fedmeta"] == {"outer-lr": USUAL["outer-lr"], "inner-lr": (2,)}
    assert GRIDS["fedavg"]["local-lr"] == USUAL["local-lr"]  # what came in is as it was


def test_an_axis_may_be_new_and_of_one_strategy_alone():
    found = overridden(GRIDS, ["fedavg:batch-size=0,16", "fedavg:inner-lr=0.1,0.1"], READ)
    assert found["fedavg"]["batch-size"] == (0, 16)
    assert found["fedavg"]["inner-lr"] == (0.1,)
    assert found["fedmeta"] == GRIDS["fedmeta"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("local-lr", "--grid 'local-lr': write key=value,value"),
        ("local-lr=", "write key=value,value"),
        ("=1", "write key=value,value"),
        (":local-lr=1", "write key=value,value"),
        ("local-rl=1", "unknown configuration key 'local-rl': did you mean 'local-lr'"),
        ("feadvg:local-lr=1", "unknown compared strategy 'feadvg': did you mean 'fedavg'"),
        ("reptile:local-lr=1", "unknown compared strategy 'reptile'"),
        ("fedmeta:local-lr=1", "local-lr has no effect under fedmeta"),
        ("distill-lr=1", "distill-lr has no effect under fedavg and fedmeta"),
        ("seed=1,2", "seed must be the same for all methods"),
        ("rounds=1,2", "rounds must be the same for all methods"),
        ("max-bytes=1", "max-bytes must be the same for all methods"),
        ("strategy=fedavg", "strategy must be the same for all methods"),
        ("dataset-args=ways=2", "dataset-args must be the same for all methods"),
        ("patience=1,2", "patience must be the same for all methods"),
    ],
)
def test_an_axis_that_cannot_be_is_named(text: str, message: str):
    with pytest.raises(ConfigError) as refused:
        overridden(GRIDS, [text], READ)
    assert message in str(refused.value)


# --- methods --------------------------------------------------------------------------------------


def test_a_strategy_may_stand_there_twice_with_keys_of_its_own():
    text = "fedavg, fedmeta:order=first inner-steps=2,fedavg:init=torchvision:resnet18,fedavg"
    assert entries_of(text) == (
        Entry("fedavg", "fedavg"),
        Entry("fedmeta:order=first inner-steps=2", "fedmeta", {"order": "first", "inner-steps": 2}),
        Entry("fedavg:init=torchvision:resnet18", "fedavg", {"init": "torchvision:resnet18"}),
    )
    (quoted,) = entries_of("fedavg:model-args='hidden=9 layers=2'")
    assert quoted.fixed == {"model-args": "hidden=9 layers=2"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" , ", "name one or more"),
        ("fedavg:", "no key stands behind the colon"),
        ("fedavg:order", "write strategy:key=value"),
        ("fedavg:=1", "write strategy:key=value"),
        ("fedavg:model-args='x", "No closing quotation"),
        ("fedavg:ordr=first", "unknown configuration key 'ordr': did you mean 'order'"),
        ("fedavg:seed=1", "seed must be the same for all methods"),
        ("fedavg:rounds=1", "rounds must be the same for all methods"),
        ("fedavg:max-bytes=1", "max-bytes must be the same for all methods"),
        ("fedavg:score-unseen=false", "score-unseen must be the same for all methods"),
    ],
)
def test_a_method_that_cannot_be_is_named(text: str, message: str):
    with pytest.raises(ConfigError) as refused:
        entries_of(text)
    assert message in str(refused.value)


def test_an_axis_of_a_strategy_is_for_all_its_methods_that_have_not_fixed_the_key():
    names = {"fedavg": READ["fedavg"], "fedavg:local-lr=1": READ["fedavg"] - {"local-lr"}}
    grids = {name: usual_grid("fedavg", read) for name, read in names.items()}
    found = overridden(grids, ["fedavg:local-lr=0.5 fedavg:inner-lr=0.2"], names)
    assert found["fedavg"] == {"local-lr": (0.5,), "inner-lr": (0.2,)}
    assert found["fedavg:local-lr=1"] == {"inner-lr": (0.2,)}


# --- tries ----------------------------------------------------------------------------------------


def test_every_method_gets_as_many_tries_as_the_smallest_grid_has():
    grids = {"small": {"a": (1, 2, 3)}, "large": {"a": (1, 2, 3), "b": (1, 2, 3)}}
    found = tries_of(grids, None, seed=0)
    assert found["small"] == points(grids["small"])
    assert len(found["large"]) == 3
    order = [points(grids["large"]).index(point) for point in found["large"]]
    assert order == sorted(set(order))  # different ones, in the grid's order


def test_draws_follow_from_the_seed_and_the_name_alone():
    grids = {"one": {"a": tuple(range(50))}, "two": {"a": tuple(range(50))}}
    first = tries_of(grids, 5, seed=0)
    assert first == tries_of(dict(reversed(grids.items())), 5, seed=0)
    assert first["one"] != first["two"]
    assert first != tries_of(grids, 5, seed=1)


@pytest.mark.parametrize("tries", [0, -1, 4])
def test_tries_that_a_grid_does_not_have_are_refused(tries: int):
    with pytest.raises(ConfigError, match=rf"--tries {tries}: must be from 1 to 3.*small"):
        tries_of({"large": {"a": (1, 2, 3, 4)}, "small": {"a": (1, 2, 3)}}, tries, seed=0)


def test_an_edge_is_told_where_more_values_could_lie_beyond_it():
    grid = {"a": (1, 2, 3), "b": (0.1, 0.2), "c": ("x", "y", "z"), "d": (1, 2, 3)}
    assert on_edge({"a": 3, "b": 0.1, "c": "x", "d": 2}, grid) == ["a"]


# --- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("rounds=50", {"rounds": 50}),
        ("bytes=5e6", {"rounds": 900, "max-bytes": 5_000_000}),
        ("seconds=2.5", {"rounds": 900, "max-seconds": 2.5}),
    ],
)
def test_a_budget_becomes_keys_of_a_run(text: str, keys: dict):
    found = Budget.of(text)
    assert found.keys(900) == keys
    assert Budget.of(str(found)) == found
    RunConfig.read(found.keys(900))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("50", "write rounds=50"),
        ("round=50", "unknown budget 'round': did you mean 'rounds'"),
        ("rounds=many", "a number above 0 is needed"),
        ("rounds=0", "a number above 0 is needed"),
        ("rounds=-1", "a number above 0 is needed"),
        ("rounds=true", "a number above 0 is needed"),
        ("seconds=inf", "a number above 0 is needed"),
        ("seconds=nan", "a number above 0 is needed"),
        ("rounds=1.5", "rounds are whole"),
        ("bytes=1.5", "bytes are whole"),
    ],
)
def test_a_budget_that_is_none_is_refused(text: str, message: str):
    with pytest.raises(ConfigError) as refused:
        Budget.of(text)
    assert message in str(refused.value)
    assert text.partition("=")[0] in str(refused.value)


@pytest.mark.parametrize("rounds", range(1, 60))
def test_the_last_round_is_always_validated(rounds: int):
    every = evaluated_every(rounds)
    assert rounds % every == 0
    assert 1 <= every <= 10
