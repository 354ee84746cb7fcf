"""Reptile over groups: rounds of FedAvg within each, members that drop out, new groups."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from metabloom.cli import app
from metabloom.clients import GroupSGDClient
from metabloom.config import RunConfig
from metabloom.errors import ConfigError
from metabloom.strategies import (
    STRATEGIES,
    Checkpoints,
    FedAvg,
    GroupReptile,
    Reptile,
    UserLevelPrivacy,
)
from metabloom.wire import from_record
from tests.strategies.groups_of_clients import losing, said
from tests.strategies.points import USUAL, numbers, of_parabola, run
from tests.strategies.toy import bits

# (a, c) of five clients; one epoch of rate .1 on both of a client's records is one step.
PROBLEMS = ((1.0, 0.0), (3.0, 1.0), (2.0, 2.0), (2.0, -1.0), (1.0, 4.0))
GROUPS = ("x", "x", "y", "y", "")


def clients(**options):
    options = {"local_lr": 0.1, "local_epochs": 2, "inner_lr": 0.3, **options}
    return [
        lambda place, a=a, c=c: of_parabola(GroupSGDClient, a, c, context=place, **options)
        for a, c in PROBLEMS
    ]


def trained(theta: float, client: int, steps: int = 2) -> float:
    """theta after local SGD: its distance from c shrinks by 1 - .1 a a step."""
    a, c = PROBLEMS[client]
    return c + (theta - c) * (1 - 0.1 * a) ** steps


def after(rounds: int, *, inside: int, epsilon: float) -> float:
    theta = 0.0
    for _ in range(rounds):
        ends = []
        for group in ((0, 1), (2, 3), (4,)):
            own = theta
            for _ in range(inside):
                own = float(np.mean([trained(own, client) for client in group]))
            ends.append(own)
        theta += epsilon * (float(np.mean(ends)) - theta)
    return theta


@pytest.mark.parametrize("inside", [1, 2, 4])
@pytest.mark.parametrize("epsilon", [1.0, 0.5])
def test_each_group_runs_fedavg_by_itself_from_the_server_s_model(inside: int, epsilon: float):
    strategy = GroupReptile(epsilon=epsilon, rounds=inside, **USUAL)
    result = run(strategy, clients(), rounds=3, said=said(*GROUPS))
    wanted = after(3, inside=inside, epsilon=epsilon)
    assert numbers(result)["theta"] == pytest.approx(wanted, abs=1e-12)


def test_what_averages_over_all_clients_or_starts_each_exchange_anew_is_refused():
    wanted = after(1, inside=2, epsilon=1.0)
    plain = run(Reptile(**USUAL), clients(), rounds=2, said=said(*GROUPS))
    once = run(GroupReptile(**USUAL), clients(), said=said(*GROUPS))
    for other in (plain, once):
        assert abs(numbers(other)["theta"] - wanted) > 1e-3


@pytest.mark.parametrize("rounds", [1, 3])
def test_without_groups_one_exchange_is_reptile_or_fedavg(rounds: int):
    nobody = said("", "", "", "", "")
    found = numbers(run(GroupReptile(epsilon=0.5, **USUAL), clients(), rounds=rounds, said=nobody))
    wanted = numbers(run(Reptile(epsilon=0.5, **USUAL), clients(), rounds=rounds, said=nobody))
    assert found["theta"] == pytest.approx(wanted["theta"], abs=1e-13)
    how = {"weighting": "examples", "task_weight": "examples"}
    found = numbers(run(GroupReptile(**how, **USUAL), clients(), rounds=rounds, said=said(*GROUPS)))
    wanted = numbers(run(FedAvg(**USUAL), clients(), rounds=rounds, said=nobody))
    assert found["theta"] == pytest.approx(wanted["theta"], abs=1e-13)


def test_a_member_that_drops_out_is_named_and_its_group_goes_on_with_the_others():
    strategy = GroupReptile(rounds=2, **USUAL)
    result = run(strategy, clients(), said=said(*GROUPS), grid=losing((1, "")))
    x = trained(trained(0.0, 0), 0)  # the first client alone
    y = 0.0
    for _ in range(2):
        y = (trained(y, 2) + trained(y, 3)) / 2
    alone = trained(trained(0.0, 4), 4)
    assert numbers(result)["theta"] == pytest.approx((x + y + alone) / 3, abs=1e-12)
    (report,) = result.rounds
    assert [who for who, _ in report.failures] == ["c1"]


def test_a_run_that_stops_goes_on_to_the_bit(tmp_path: Path):
    whole = run(GroupReptile(rounds=3, **USUAL), clients(), rounds=4, said=said(*GROUPS))
    first = GroupReptile(rounds=3, checkpoints=Checkpoints(tmp_path), **USUAL)
    run(first, clients(), rounds=2, said=said(*GROUPS))
    resumed = GroupReptile(rounds=3, checkpoints=Checkpoints(tmp_path, resume=True), **USUAL)
    found = run(resumed, clients(), rounds=4, said=said(*GROUPS))
    assert bits(found.arrays) == bits(whole.arrays)
    other = GroupReptile(rounds=2, checkpoints=Checkpoints(tmp_path, resume=True), **USUAL)
    with pytest.raises(ConfigError, match=r"checkpoint has rounds = 3, this run 2"):
        run(other, clients(), rounds=4, said=said(*GROUPS))


def test_a_new_group_adapts_by_rounds_of_fedavg_over_its_support_sets():
    roles = ("train", "unseen", "unseen", "unseen", "train")
    nodes = said("", "n", "n", "m", "")
    told = [{**one, "role": role} for one, role in zip(nodes, roles, strict=True)]
    strategy = GroupReptile(eval_steps=(1, 3), **USUAL)
    result = run(strategy, clients(eval_steps=(1, 3)), said=told)
    theta = float(from_record(result.arrays)["theta"].item())
    assert [score.client for score in result.unseen] == ["c1", "c2", "c3"]
    for score in result.unseen:
        client = int(score.client[1:])
        group = (1, 2) if client < 3 else (3,)
        points, own = [theta], theta
        for _ in range(3):
            own = float(np.mean([trained(own, one) for one in group]))
            points.append(own)
        a, c = PROBLEMS[client]
        for name, done in (("before", 0), ("after-1", 1), ("after-3", 3)):
            wanted = a / 2 * (points[done] - c) ** 2
            assert score.metrics[f"loss-{name}"] == pytest.approx(wanted, abs=1e-12)


def test_privacy_of_whole_clients_goes_with_one_exchange_alone(tmp_path: Path):
    privacy = UserLevelPrivacy(
        noise_multiplier=1.0,
        max_update_norm=0.1,
        expected_clients=3.0,
        target_delta=1e-5,
        ledger=tmp_path / "ledger.jsonl",
    )
    assert GroupReptile(user_privacy=privacy)
    with pytest.raises(ConfigError, match="user_privacy with several exchanges of GroupReptile"):
        GroupReptile(rounds=2, user_privacy=privacy)


def simulate(out: Path, **keys: object) -> dict:
    usual = {"num-clients": 12, "clients-per-round": 6, "device": "cpu", "rounds": 2}
    usual |= {"strategy": "group-reptile"}
    words = [w for key, value in {**usual, **keys}.items() for w in ("--set", f"{key}={value}")]
    arguments = ["simulate", *words, "--out", str(out)]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_a_run_on_digits_with_a_file_of_groups(tmp_path: Path):
    file = tmp_path / "groups.json"
    file.write_text(json.dumps({f"client-{i:03d}": f"group-{i % 3}" for i in range(12)}))
    keys = {"groups": file, "group-rounds": 3, "reptile-epsilon": 0.5, "eval-every": 1}
    results = simulate(tmp_path / "run", **keys)
    assert not results["failures"]
    assert all(entry["validation"]["accuracy_after"]["5"] for entry in results["history"])
    once = simulate(tmp_path / "once", **{**keys, "group-rounds": 1})
    assert results["bytes_up"] > 2 * once["bytes_up"]


def test_a_new_group_begins_at_what_a_run_left(tmp_path: Path):
    simulate(tmp_path / "run", rounds=1)
    started = simulate(tmp_path / "new", rounds=1, strategy="fedavg", init=tmp_path / "run")
    assert started["init"]["loaded"]
    assert not started["init"]["missing"]
    assert not started["failures"]


def test_private_clients_pay_for_each_round_of_their_group(tmp_path: Path):
    keys = {"privacy.noise-multiplier": 1.0, "privacy.unprotected-metrics": "all", "rounds": 1}
    once = simulate(tmp_path / "once", **keys)["privacy"]["record_level"]["epsilon_max"]
    keys["group-rounds"] = 3
    thrice = simulate(tmp_path / "thrice", **keys)["privacy"]["record_level"]["epsilon_max"]
    assert thrice > once > 0


def test_the_configuration_says_it_in_two_keys():
    keys = {"strategy": "group-reptile", "group-rounds": 4, "reptile-epsilon": 0.2}
    strategy = STRATEGIES["group-reptile"](RunConfig.read(keys)).strategy()
    assert (strategy.rounds, strategy.epsilon, strategy.eval_steps) == (4, 0.2, (1, 5))
