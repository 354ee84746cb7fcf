"""FedNova: known answer 6 and its fixed points, where FedAvg's are elsewhere; and who lies."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from metabloom.architectures import joined, part_of
from metabloom.clients import NovaClient, SGDClient
from metabloom.errors import ConfigError
from metabloom.strategies import FedAvg, FedNova, Reply, UserLevelPrivacy, interpolate, median
from metabloom.strategies.fednova import MOST_STEPS, normalised_average
from metabloom.strategies.shell import roll_call
from metabloom.wire import NOVA_STEPS, from_record, to_record
from tests.strategies.parabolas import ANY, Parabola, run
from tests.strategies.toy import Arrays, Toy, bits, model, moved, start

CLIENTS = (Parabola(1.0, 0.0, batches=1), Parabola(1.0, 1.0, batches=3))
EVERY_STEP = {"local_lr": 0.1, "batch_size": 1}  # so a client takes as many steps as it has batches


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "POLL_S", 0.01)
    monkeypatch.setattr(roll_call, "GATHER_S", 0.05)


# --- the rule -------------------------------------------------------------------------------------


def reply(w: float, delta: float, steps: int, whole: float, count: int = 1) -> Reply:
    """Return what a client says that moved by ``delta``, of ||a||_1 = ``whole``."""
    return Reply({"w": np.array(w - delta / whole), NOVA_STEPS: np.array(steps)}, count)


def stepped(w: float, replies: list[Reply], **how) -> float:
    rule = normalised_average(**how)
    sent = {"w": np.array(w), NOVA_STEPS: np.array(1)}
    state, new = rule.update(rule.init(sent), sent, replies)
    assert state == {}
    assert new[NOVA_STEPS] == 1  # the next question holds a 1 again
    return float(new["w"])


def test_known_answer_6():
    """tau = (1, 3), p = 1/2: the update is Delta_1 + Delta_2 / 3."""
    for delta in ((0.7, -0.4), (1.0, 1.0), (-2.0, 0.3)):
        replies = [reply(5.0, d, n, n) for d, n in zip(delta, (1, 3), strict=True)]
        wanted = 5.0 - (delta[0] + delta[1] / 3)
        assert stepped(5.0, replies, weighting="uniform") == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("counts", [(1, 1), (1, 4), (10, 3)])
def test_tau_eff_and_updates_have_the_same_weights(counts: tuple[int, int]):
    p = np.array(counts) / sum(counts)
    delta, tau = np.array([0.7, -0.4]), np.array([2, 5])
    replies = [reply(1.0, d, t, t, n) for d, t, n in zip(delta, tau, counts, strict=True)]
    wanted = 1.0 - (p @ tau) * (p @ (delta / tau))
    assert stepped(1.0, replies, weighting="examples") == pytest.approx(wanted, rel=1e-12)
    uniform = 1.0 - tau.mean() * (delta / tau).mean()
    assert stepped(1.0, replies, weighting="uniform") == pytest.approx(uniform, rel=1e-12)


def test_with_momentum_the_divisor_is_not_the_number_of_steps():
    # rho = .9, two steps: ||a||_1 = 2.9 and tau = 2.
    found = stepped(0.0, [reply(0.0, 1.0, 2, 2.9)], weighting="uniform")
    assert found == pytest.approx(-2 / 2.9, rel=1e-12)


def test_where_all_take_as_many_steps_it_is_fedavg():
    rng = np.random.default_rng(0)
    deltas = rng.normal(size=4)
    replies = [reply(0.5, d, 3, 3, n) for n, d in enumerate(deltas, 1)]
    plain = [Reply({"w": np.array(0.5 - d)}, n) for n, d in enumerate(deltas, 1)]
    average = interpolate()
    _, wanted = average.update({}, {"w": np.array(0.5)}, plain)
    assert stepped(0.5, replies) == pytest.approx(float(wanted["w"]), rel=1e-12)


def test_an_unknown_weighting_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'examples'"):
        FedNova(weighting="exmaples")


# --- fixed points ---------------------------------------------------------------------------------

Update = Callable[[float, float], float]  # (w, lr) -> how far a round moves w


def fedavg(w: float, lr: float) -> float:
    return sum(w - one.after(w, lr, one.batches) for one in CLIENTS) / 2


def fednova(w: float, lr: float) -> float:
    replies = [
        reply(w, w - one.after(w, lr, one.batches), one.batches, one.batches) for one in CLIENTS
    ]
    return w - stepped(w, replies, weighting="uniform")


def without_tau_eff(w: float, lr: float) -> float:
    """The wrong variant: normalised, but a step of one. Its fixed point is right, its pace not."""
    return fednova(w, lr) / 2


def divided_by_tau_eff(w: float, lr: float) -> float:
    """The wrong variant: the mean is scaled, clients are not made equal."""
    return fedavg(w, lr) / 2


def rests_at(update: Update, lr: float) -> float:
    """Return where ``update`` is 0; it is affine in w."""
    at_0, at_1 = update(0.0, lr), update(1.0, lr)
    return at_0 / (at_0 - at_1)


def test_the_fixed_points_of_known_answer_6():
    # .1 w + .271 (w - 1) = 0; and with .271 / 3 in the place of .271
    assert rests_at(fedavg, 0.1) == pytest.approx(0.730458, abs=5e-7)
    assert rests_at(fednova, 0.1) == pytest.approx(0.474606, abs=5e-7)
    assert rests_at(fedavg, 1e-7) == pytest.approx(0.75, abs=1e-6)
    assert rests_at(fednova, 1e-7) == pytest.approx(0.5, abs=1e-6)


def test_wrong_variants_are_elsewhere_or_slower():
    assert rests_at(divided_by_tau_eff, 0.1) != pytest.approx(0.474606, abs=1e-3)
    assert without_tau_eff(0.0, 0.1) != pytest.approx(fednova(0.0, 0.1), rel=0.1)
    exact = 0.1 * 0.0 + 0.271 / 3 * (0.0 - 1)  # Delta_1 + Delta_2 / 3 at w = 0
    assert fednova(0.0, 0.1) == pytest.approx(exact, rel=1e-12)


def test_runs_of_our_clients_come_to_rest_there():
    nova, average = (kind(weighting="uniform", **ANY) for kind in (FedNova, FedAvg))
    found, _ = run(nova, NovaClient, CLIENTS, rounds=60, **EVERY_STEP)
    # A round shrinks the distance to the fixed point by 1 - .1 - .271 / 3 = .81.
    assert found == pytest.approx(0.474606, abs=0.5 * 0.81**60 + 1e-6)
    plain, _ = run(average, SGDClient, CLIENTS, rounds=60, **EVERY_STEP)
    assert plain == pytest.approx(0.730458, abs=0.8 * 0.8145**60 + 1e-6)


@pytest.mark.parametrize("options", [{"momentum": 0.5}, {"nova_mu": 2.0}], ids=str)
def test_a_round_with_momentum_or_a_proximal_term_follows_its_recursion(options: dict):
    """By hand: v <- rho v + (w - c) + mu (w - w0), w <- w - lr v; ||a||_1 by the closed forms."""
    rho, mu, lr, w = options.get("momentum", 0.0), options.get("nova_mu", 0.0), 0.1, 0.3
    total, taus = 0.0, []
    for one in CLIENTS:
        at, v, tau = w, 0.0, one.batches
        for _ in range(tau):
            v = rho * v + (at - one.c) + mu * (at - w)
            at -= lr * v
        if rho:
            whole = (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)
        else:
            whole = (1 - (1 - lr * mu) ** tau) / (lr * mu)
        total += (w - at) / whole / 2
        taus.append(tau)
    wanted = w - sum(taus) / 2 * total
    strategy = FedNova(weighting="uniform", **ANY)
    found, _ = run(strategy, NovaClient, CLIENTS, rounds=1, w=w, **EVERY_STEP, **options)
    assert found == pytest.approx(wanted, rel=1e-12)


# --- who knows nothing of it, who lies, who is private --------------------------------------------


def test_clients_that_know_nothing_of_it_count_as_one_step_each():
    found = start(FedNova(**ANY), Toy(), nodes=3, rounds=1)
    wanted = start(FedAvg(**ANY), Toy(), nodes=3, rounds=1)
    for name, value in from_record(wanted.arrays).items():
        eps = np.finfo(value.dtype).eps if value.dtype.kind == "f" else 0
        np.testing.assert_allclose(from_record(found.arrays)[name], value, rtol=4 * eps)
    assert set(from_record(found.arrays)) == set(model())  # nothing of what travelled beside it


class Counting(Toy):
    """Clients that say how many steps they took."""

    def __init__(self, steps: list[object], **more) -> None:
        super().__init__(**more)
        self.steps = steps

    def _train(self, message, context):
        reply = super()._train(message, context)
        said = self.steps[int(context.node_config["partition-id"])]
        arrays = {**from_record(reply.content["arrays"]), NOVA_STEPS: np.asarray(said)}
        reply.content["arrays"] = to_record(arrays)
        return reply


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (0, "it took 0 local steps: 1 to 1000000 can be"),
        (-5, "it took -5 local steps"),
        (MOST_STEPS + 1, "it took 1000001 local steps"),
        (2.5, "'nova/steps' is of float64"),
        ([3, 3], "'nova/steps' has shape"),
    ],
)
def test_a_number_of_steps_that_cannot_be_is_quarantined_by_name(lie: object, reason: str):
    result = start(FedNova(max_offences=1, **ANY), Counting([1, 1, lie]), nodes=3, rounds=2)
    ((who, why),) = result.rounds[0].quarantined
    assert who == "partition-2"
    assert reason in why
    assert not result.rounds[1].quarantined  # it is not asked again
    assert result.rounds[1].clients == ("partition-0", "partition-1")
    alone = start(FedNova(**ANY), Counting([1, 1]), nodes=2, rounds=2)
    assert bits(result.arrays) == bits(alone.arrays)


def test_a_median_is_not_moved_by_one_that_claims_a_million_steps():
    moves = {}
    for aggregate, name in ((median(), "median"), (None, "mean")):
        how = {"aggregate": aggregate} if aggregate else {}
        steps = [3, 3, 3, 3, MOST_STEPS]
        strategy = FedNova(weighting="uniform", **how, **ANY)
        found = from_record(start(strategy, Counting(steps), nodes=5, rounds=1).arrays)
        moves[name] = float(np.abs(found["weight"] - model()["weight"]).max())
    assert moves["median"] < 3 * 0.2  # three times the middle one's normalised move
    assert moves["mean"] > 100


def test_with_user_level_privacy_no_number_of_steps_is_used(tmp_path: Path):
    def after(steps: list[int], file: str) -> Arrays:
        privacy = UserLevelPrivacy(
            noise_multiplier=1.0,
            max_update_norm=0.5,
            expected_clients=3.0,
            target_delta=1e-5,
            ledger=tmp_path / file,
            seed=1,
        )
        strategy = FedNova(user_privacy=privacy, **ANY)
        return from_record(start(strategy, Counting(steps), nodes=3, rounds=1).arrays)

    few, many = after([1, 1, 1], "few"), after([40, 7, 900], "many")
    assert all(few[name].tobytes() == many[name].tobytes() for name in few)


def test_the_score_function_of_the_user_sees_models_alone():
    seen = []
    start(FedNova(**ANY), Toy(), nodes=2, rounds=2, evaluate_fn=lambda n, a: seen.append(set(a)))
    assert seen == [set(model())] * 3


def test_evaluations_are_sent_the_model_alone():
    class Seen(Toy):
        def _note(self, kind, message, context):
            asked.add((kind, tuple(message.content["arrays"])))
            return super()._note(kind, message, context)

    asked: set = set()
    start(FedNova(**ANY), Seen(roles=("train", "validation", "unseen")), nodes=3, rounds=1)
    assert asked == {("train", (*model(), NOVA_STEPS)), ("evaluate", tuple(model()))}


def test_each_architecture_has_its_own_number_of_steps():
    kinds = ("a", "b")
    toy = Counting([2, 6], architectures=kinds)
    arrays = joined({"a": model(), "b": model()})
    strategy = FedNova(architectures=kinds, **ANY)
    found = from_record(start(strategy, toy, nodes=2, rounds=1, arrays=arrays).arrays)
    assert set(found) == set(arrays)
    for partition, (kind, steps) in enumerate(zip(kinds, (2, 6), strict=True)):
        step = moved(model(), partition, 1)["bias"] - model()["bias"]
        wanted = model()["bias"] + steps * step
        np.testing.assert_allclose(part_of(found, kind)["bias"], wanted, rtol=1e-9)
