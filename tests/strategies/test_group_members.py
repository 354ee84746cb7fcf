"""Members of groups that drop out or lie, and new groups, under MAML over groups."""

import pytest
import torch

from metabloom.clients import GroupMAMLClient, SGDClient
from metabloom.strategies import Ending, median
from metabloom.wire import from_record
from tests.clients.toy_problems import loss_at, small_net
from tests.strategies.groups_of_clients import (
    CROSS_ENTROPY,
    SEVEN,
    SIZES,
    data_of,
    gradient_of,
    losing,
    networks,
    parabolas,
    said,
    sgd,
)
from tests.strategies.points import numbers, of_parabola, run
from tests.strategies.toy import bits

# --- members that drop out -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exchange", "wanted"),
    [
        # Clients (a, c) = (1, 0), (3, 1), (2, 2) of one group; the last is lost. theta_0 = 0.
        ("adapt", -0.96),  # as if it had not been there
        # theta_i = .1 (3 + 4) / 3 = .2333; gbar of the two that are left, by their own Hessians
        ("query", (0.7 / 3 + 3 * (0.7 / 3 - 1)) / 2 * 0.8),
        # gbar of all three, the Hessian of two
        ("curvature", (0.7 / 3 + 3 * (0.7 / 3 - 1) + 2 * (0.7 / 3 - 2)) / 3 * 0.8),
    ],
)
def test_a_member_that_drops_out_is_named_and_the_sums_are_those_of_the_others(exchange, wanted):
    result = run(
        sgd(adapt="group"),
        parabolas(*SEVEN, (2.0, 2.0)),
        said=said("one", "one", "one"),
        grid=losing((2, exchange)),
    )
    assert -numbers(result)["theta"] == pytest.approx(wanted, abs=1e-12)
    (report,) = result.rounds
    ((who, why),) = report.failures
    assert who == "c2"
    assert "no reply within" in why
    assert not report.skipped


def test_a_group_of_which_nobody_is_left_counts_no_more():
    clients = parabolas(*SEVEN, (2.0, 5.0))
    groups = ("one", "one", "two")
    for exchange in ("adapt", "query", "curvature"):
        grid = losing((2, exchange))
        assert gradient_of(sgd(adapt="group"), clients, groups, grid=grid) == pytest.approx(-0.96)


def test_a_round_that_loses_everybody_is_skipped_and_the_model_stays():
    grid = losing((0, "query"), (1, "query"))
    result = run(sgd(adapt="group"), parabolas(*SEVEN), said=said("one", "one"), grid=grid)
    assert numbers(result)["theta"] == 0.0
    (report,) = result.rounds
    assert report.skipped
    assert [who for who, _ in report.failures] == ["c0", "c1"]


def test_a_client_that_does_not_know_exchanges_adapts_nobody_but_is_judged_as_ever():
    """A plain client answers with a model that it trained: it is no gradient of its group."""

    def wild(place):
        return of_parabola(SGDClient, 2.0, 1.0, context=place, local_lr=1e30)

    result = run(sgd(adapt="group"), [*parabolas(*SEVEN), wild], said=said("one", "one", "one"))
    (report,) = result.rounds
    ((who, why),) = report.quarantined
    assert who == "c2"
    assert "above 1e+20" in why
    assert -numbers(result)["theta"] == pytest.approx(-0.96, abs=1e-12)


def test_a_resistant_aggregation_holds_in_every_exchange():
    """One of five members sends what it likes; the group's model is that of the others."""
    good = [(2.0, 1.0)] * 4

    def liar(place):
        return of_parabola(GroupMAMLClient, 2.0, -1e6, context=place, inner_lr=0.1)

    clients = [*parabolas(*good), liar]
    groups = ("one",) * 5
    honest = gradient_of(sgd(adapt="group", aggregate=median()), clients, groups)
    assert honest == pytest.approx(-1.28, abs=1e-9)
    assert abs(gradient_of(sgd(adapt="group"), clients, groups)) > 1e3


class Heavy(GroupMAMLClient):
    """Says that it has far more records than it has."""

    def answered(self, result, parameters, config):
        arrays, _, metrics = super().answered(result, parameters, config)
        return arrays, 10_000, metrics


@pytest.mark.parametrize("adapt", ["client", "group"])
def test_a_share_of_the_weight_counts_over_all_groups_too(adapt: str):
    """Within its group, of which it is the only member, it has all of it, as it must."""

    def heavy(place):
        return of_parabola(Heavy, 2.0, 5.0, context=place, inner_lr=0.1)

    how = {"adapt": adapt, "weighting": "examples", "task_weight": "examples"}
    result = run(sgd(**how), [*parabolas(*SEVEN), heavy], said=said("one", "one", "two"))
    ((who, why),) = result.rounds[0].quarantined
    assert who == "c2"
    assert "of the total, above 90.0%" in why
    wanted = {"client": -0.735, "group": -0.96}[adapt]
    assert -numbers(result)["theta"] == pytest.approx(wanted, abs=1e-12)


# --- new groups ----------------------------------------------------------------------------------

ROLES = ("train", "train", "validation", "unseen", "unseen", "unseen")
NEW = ("x", "x", "v", "n", "n", "")


def evaluated(strategy, **more):
    told = [{**one, "role": role} for one, role in zip(said(*NEW), ROLES, strict=True)]
    return run(strategy, networks(eval_steps=(1, 2)), said=told, **more)


def joined(clients: list[int], steps: int, theta):
    """The group's model after federated gradient steps on its members' support sets."""
    for _ in range(steps):
        found = []
        for c in clients:
            leaves = {n: v.detach().requires_grad_() for n, v in theta.items()}
            loss = loss_at(small_net(), CROSS_ENTROPY, leaves, data_of(c).support)
            found.append(torch.autograd.grad(loss, list(leaves.values())))
        mean = [sum(those) / len(clients) for those in zip(*found, strict=True)]
        theta = {n: v - 0.4 * g for (n, v), g in zip(theta.items(), mean, strict=True)}
    return theta


def test_a_new_group_adapts_together_and_each_member_is_scored_by_what_it_came_to():
    strategy = sgd(adapt="group", eval_steps=(1, 2))
    result = evaluated(strategy)
    theta = {n: torch.from_numpy(v.copy()) for n, v in from_record(result.arrays).items()}
    assert [score.client for score in result.unseen] == ["c3", "c4", "c5"]
    for score in result.unseen:
        client = int(score.client[1:])
        group = [3, 4] if client < 5 else [5]
        wanted = {
            name: loss_at(small_net(), CROSS_ENTROPY, joined(group, steps, theta), data.query)
            for name, steps in (("before", 0), ("after-1", 1), ("after-2", 2))
            for data in [data_of(client)]
        }
        for name, value in wanted.items():
            assert score.metrics[f"loss-{name}"] == pytest.approx(value.item(), abs=1e-9)
        assert score.metrics["loss"] == score.metrics["loss-after-2"]
        assert {"accuracy-before", "accuracy-after-1", "accuracy-after-2"} <= set(score.metrics)
        assert score.num_examples == SIZES[client][1]
    alone = joined([3], 2, theta)
    by_itself = loss_at(small_net(), CROSS_ENTROPY, alone, data_of(3).query).item()
    assert abs(result.unseen[0].metrics["loss"] - by_itself) > 1e-3


def test_validation_is_of_groups_too_and_leaves_the_model():
    with_eval = sgd(adapt="group", eval_steps=(1, 2))
    with_eval.eval_every = 1
    result = evaluated(with_eval)
    (report,) = result.rounds
    assert [score.client for score in report.validation] == ["c2"]
    assert list(result.evaluate_metrics_clientapp) == [1]
    told = result.evaluate_metrics_clientapp[1]
    assert told["loss-after-2"] == pytest.approx(report.validation[0].metrics["loss-after-2"])
    assert bits(result.arrays) == bits(evaluated(sgd(adapt="group")).arrays)


def test_nobody_is_scored_at_the_end_where_the_run_says_so():
    result = evaluated(sgd(adapt="group", eval_steps=(1, 2), ending=Ending(scored=False)))
    assert result.unseen == []
    assert result.rounds


def test_where_clients_adapt_alone_they_are_asked_as_ever():
    result = evaluated(sgd(adapt="client"))
    theta = {n: torch.from_numpy(v.copy()) for n, v in from_record(result.arrays).items()}
    wanted = loss_at(small_net(), CROSS_ENTROPY, joined([3], 2, theta), data_of(3).query).item()
    assert result.unseen[0].metrics["loss-after-2"] == pytest.approx(wanted, abs=1e-9)


def test_a_member_that_drops_out_of_a_new_group_has_no_score_and_is_named():
    strategy = sgd(adapt="group", eval_steps=(1, 2))
    result = evaluated(strategy, grid=losing((4, "join")))
    assert [score.client for score in result.unseen] == ["c3", "c5"]
    assert [who for who, _ in result.final_failures] == ["c4"]
    theta = {n: torch.from_numpy(v.copy()) for n, v in from_record(result.arrays).items()}
    wanted = loss_at(small_net(), CROSS_ENTROPY, joined([3], 2, theta), data_of(3).query).item()
    assert result.unseen[0].metrics["loss-after-2"] == pytest.approx(wanted, abs=1e-9)
