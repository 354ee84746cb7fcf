"""MAML over groups: its two readings against closed forms and plain autograd; runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from metabloom.cli import app
from metabloom.config import RunConfig
from metabloom.errors import ConfigError
from metabloom.strategies import STRATEGIES, Checkpoints, GroupMAML, UserLevelPrivacy
from metabloom.strategies.group_rounds import GroupStrategy
from metabloom.wire import from_record
from tests.clients.toy_problems import flat, loss_at, small_net, weights
from tests.strategies.groups_of_clients import (
    CROSS_ENTROPY,
    GROUPS,
    SEVEN,
    SIZES,
    data_of,
    gradient_of,
    networks,
    parabolas,
    said,
    sgd,
)
from tests.strategies.points import USUAL, run
from tests.strategies.toy import bits

MODES = pytest.mark.parametrize("adapt", ["client", "group"])

# --- known answer 7 ------------------------------------------------------------------------------


@pytest.mark.parametrize(("adapt", "wanted"), [("group", -0.96), ("client", -0.735)])
def test_the_gradient_of_a_group_is_known_answer_7(adapt: str, wanted: float):
    # client: mean of (1 - alpha a)^2 a (theta - c) = (0, -1.47).
    # group: theta_i = .15, gbar = (.15 + 3 (.15 - 1)) / 2 = -1.2, times 1 - alpha (1 + 3) / 2.
    found = gradient_of(sgd(adapt=adapt), parabolas(*SEVEN))
    assert found == pytest.approx(wanted, abs=1e-12)


def test_what_leaves_the_third_exchange_out_or_adapts_alone_is_refused():
    assert gradient_of(sgd(adapt="group", order="first"), parabolas(*SEVEN)) == pytest.approx(-1.2)
    # Each member a group by itself: the mean of both clients' own gradients.
    alone = gradient_of(sgd(adapt="group"), parabolas(*SEVEN), groups=("one", "two"))
    assert alone == pytest.approx(-0.735)


class TheWrongHessian(GroupMAML):
    """Pulls gbar back at theta_i, where the group ended, in the place of theta_0."""

    def _ask(self, config, exchange, number=0):
        if exchange == "curvature":
            for task in self._tasks:
                task.aim(task.points[-1], task.judged)
        return super()._ask(config, exchange, number)


@MODES
def test_groups_of_one_client_make_both_readings_the_same(adapt: str):
    problems = ((2.0, 1.0), (3.0, -1.0), (1.0, 4.0))
    found = gradient_of(sgd(adapt=adapt), parabolas(*problems), groups=("", "", ""))
    wanted = np.mean([(1 - 0.1 * a) ** 2 * a * (0 - c) for a, c in problems])
    assert found == pytest.approx(wanted, abs=1e-12)


# --- networks, against autograd through the whole round ------------------------------------------


def members() -> list[list[int]]:
    found: dict[str, list[int]] = {}
    for client, group in enumerate(GROUPS):
        found.setdefault(group or str(client), []).append(client)
    return list(found.values())


def share(values: list[float], weighting: str) -> list[float]:
    if weighting == "uniform":
        return [1 / len(values)] * len(values)
    return [value / sum(values) for value in values]


def by_autograd(adapt: str, steps: int, weighting: str, task_weight: str, *, order="exact"):
    """The gradient of the round's objective as it is written, one graph through everything."""
    theta = {n: v.requires_grad_() for n, v in weights(small_net()).items()}
    count = [sum(sizes) for sizes in SIZES]
    groups = members()
    whole = share([sum(count[c] for c in one) for one in groups], task_weight)

    def descend(point, slopes):
        moved = {n: v - 0.4 * g for (n, v), g in zip(point.items(), slopes, strict=True)}
        if order == "first":  # the steps count as constants
            return {n: theta[n] + (v - theta[n]).detach() for n, v in moved.items()}
        return moved

    def slopes(point, batch):
        loss = loss_at(small_net(), CROSS_ENTROPY, point, batch)
        return torch.autograd.grad(loss, list(point.values()), create_graph=True)

    objective = torch.zeros((), dtype=torch.float64)
    for weight, one in zip(whole, groups, strict=True):
        parts = share([count[c] for c in one], weighting)
        points = {c: dict(theta) for c in one}
        for _ in range(steps):
            found = {c: slopes(points[c], data_of(c).support) for c in one}
            if adapt == "group":
                mean = [
                    sum(w * g for w, g in zip(parts, those, strict=True))
                    for those in zip(*found.values(), strict=True)
                ]
                found = dict.fromkeys(one, mean)
            points = {c: descend(points[c], found[c]) for c in one}
        for w, c in zip(parts, one, strict=True):
            loss = loss_at(small_net(), CROSS_ENTROPY, points[c], data_of(c).query)
            objective = objective + weight * w * loss
    return dict(zip(theta, torch.autograd.grad(objective, list(theta.values())), strict=True))


def round_of(strategy, **options):
    """Return the step of one round of the server, of rate 1."""
    result = run(strategy, networks(**options), said=said(*GROUPS))
    found = {n: torch.from_numpy(v.copy()) for n, v in from_record(result.arrays).items()}
    return flat(weights(small_net())) - flat(found), result


@MODES
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("order", ["exact", "first"])
def test_a_round_is_the_gradient_of_its_objective(adapt: str, steps: int, order: str):
    how = {"weighting": "examples", "task_weight": "uniform"}
    strategy = sgd(adapt=adapt, inner_steps=steps, order=order, **how)
    found, _ = round_of(strategy, inner_steps=steps, order=order)
    wanted = flat(by_autograd(adapt, steps, *how.values(), order=order))
    # float64; w - (w - g) in each exchange loses 1e-16 of w
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    other = flat(by_autograd("client" if adapt == "group" else "group", steps, *how.values()))
    assert (found - other).norm() > 1e-3


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("task_weight", ["uniform", "examples"])
def test_both_levels_of_weights_count(weighting: str, task_weight: str):
    found, _ = round_of(sgd(adapt="group", weighting=weighting, task_weight=task_weight))
    wanted = flat(by_autograd("group", 1, weighting, task_weight))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_a_hessian_at_the_adapted_point_is_refused():
    wrong = TheWrongHessian(optimizer="sgd", lr=1.0, adapt="group", **USUAL)
    found, _ = round_of(wrong)
    assert (found - flat(by_autograd("group", 1, "uniform", "uniform"))).norm() > 1e-3


def test_the_bytes_of_each_exchange_are_counted_and_replies_are_of_one_model():
    size = sum(value.nbytes for value in from_record(round_of(sgd())[1].arrays).values())
    heads = 6 * 4 * 200  # at most 200 bytes before each of four arrays, of six clients
    for options, down, up in (
        ({}, 1, 1),
        ({"adapt": "group", "order": "first"}, 2, 2),
        ({"adapt": "group"}, 4, 3),  # the direction goes down beside the point
        ({"adapt": "group", "inner_steps": 2}, 7, 5),
    ):
        steps = options.get("inner_steps", 1)
        (report,) = round_of(sgd(**options), inner_steps=steps)[1].rounds
        assert 0 < report.bytes_down - 6 * down * size < down * heads
        assert 0 < report.bytes_up - 6 * up * size < up * heads


def test_the_server_optimiser_keeps_its_state_and_a_run_that_stops_goes_on(tmp_path: Path):
    def strategy(**more):
        return GroupMAML(optimizer="adam", lr=0.1, adapt="group", **USUAL, **more)

    whole = run(strategy(), networks(), rounds=4, said=said(*GROUPS))
    run(strategy(checkpoints=Checkpoints(tmp_path)), networks(), rounds=2, said=said(*GROUPS))
    resumed = strategy(checkpoints=Checkpoints(tmp_path, resume=True))
    found = run(resumed, networks(), rounds=4, said=said(*GROUPS))
    assert bits(found.arrays) == bits(whole.arrays)


def test_members_of_two_architectures_are_two_groups(tmp_path: Path):
    """The members of a group exchange models, so they must be of one kind."""
    keys = {"group-adapt": "group", "rounds": 2, "server-optimizer": "sgd", "outer-lr": 0.5}
    kinds = "small: mlp hidden=4; large: mlp hidden=8"
    results = simulate(tmp_path, architectures=kinds, groups="north", **keys)
    assert not results["failures"]
    assert not results["skipped"]


# --- privacy -------------------------------------------------------------------------------------


def test_privacy_of_whole_clients_goes_with_one_exchange_alone(tmp_path: Path):
    privacy = UserLevelPrivacy(
        noise_multiplier=1.0,
        max_update_norm=0.1,
        expected_clients=3.0,
        target_delta=1e-5,
        ledger=tmp_path / "ledger.jsonl",
    )
    assert sgd(adapt="client", user_privacy=privacy)
    with pytest.raises(ConfigError, match="user_privacy with several exchanges of GroupMAML"):
        sgd(adapt="group", user_privacy=privacy)


def test_privacy_of_records_goes_with_clients_that_adapt_alone(tmp_path: Path):
    keys = {"strategy": "group-maml", "privacy.noise-multiplier": 1.0}
    with pytest.raises(ConfigError, match="group-adapt = 'group' with privacy"):
        STRATEGIES["group-maml"](RunConfig.read({**keys, "group-adapt": "group"}))
    results = simulate(tmp_path, **{**keys, "rounds": 1})
    assert results["privacy"]["record_level"]["epsilon_max"] > 0


# --- configuration and runs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"adapt": "clients"}, "did you mean 'client'"),
        ({"order": "hf"}, "order = 'hf' of a group"),
        ({"inner_steps": 0}, "inner_steps = 0"),
        ({"optimizer": "adma"}, "did you mean 'adam'"),
    ],
)
def test_what_cannot_work_is_refused_by_name(wrong, message):
    with pytest.raises(ConfigError, match=message):
        GroupMAML(**wrong)


def simulate(out: Path, *, groups: str = "", **keys: object) -> dict:
    """Run on digits; with ``groups``, the beginning of the names of three."""
    usual = {"strategy": "group-maml", "num-clients": 12, "clients-per-round": 6, "device": "cpu"}
    if groups:
        file = out.with_name(f"{out.name}-groups.json")
        names = [f"client-{i:03d}" for i in range(12)]
        file.write_text(json.dumps({name: f"{groups}-{i % 3}" for i, name in enumerate(names)}))
        usual["groups"] = file
    words = [w for key, value in {**usual, **keys}.items() for w in ("--set", f"{key}={value}")]
    arguments = ["simulate", *words, "--out", str(out)]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


@MODES
def test_a_run_on_digits_with_a_file_of_groups(adapt: str, tmp_path: Path):
    keys = {"group-adapt": adapt, "rounds": 3, "eval-every": 1, "task-weight": "examples"}
    results = simulate(tmp_path / "run", groups="north", **keys)
    assert not results["failures"]
    assert not results["quarantined"]
    assert all(entry["validation"]["accuracy_after"]["5"] for entry in results["history"])
    assert results["unseen"]["accuracy_after"]["1"] is not None
    again = simulate(tmp_path / "again", groups="north", **keys)
    assert [e["train"] for e in again["history"]] == [e["train"] for e in results["history"]]


def test_the_configuration_reaches_both_ends():
    keys = {"strategy": "group-maml", "group-adapt": "group", "inner-steps": 3, "order": "first"}
    more = {"weighting": "examples", "task-weight": "uniform", "group-size": 4}
    recipe = STRATEGIES["group-maml"](RunConfig.read({**keys, **more}))
    strategy = recipe.strategy()
    assert isinstance(strategy, GroupStrategy)
    told = (strategy.adapt, strategy.inner_steps, strategy.order, strategy.eval_steps)
    assert told == ("group", 3, "first", (1, 5))
    assert (strategy.weighting, strategy.task_weight, strategy.group_size) == (
        "examples",
        "uniform",
        4,
    )
    assert recipe.client_options["directions"] is False
    usual = STRATEGIES["group-maml"](RunConfig.read({"weighting": "examples"})).strategy()
    assert (usual.adapt, usual.task_weight, usual.eval_steps) == ("client", "examples", ())
