"""SCAFFOLD on parabolas: closed forms of each round, and the optimum that FedAvg misses."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from metabloom.architectures import joined, part_of
from metabloom.clients import ScaffoldClient, SGDClient
from metabloom.errors import ConfigError
from metabloom.sim import CohortGrid
from metabloom.strategies import SCAFFOLD, Checkpoints, FedAvg, Reply, UserLevelPrivacy
from metabloom.strategies.scaffold import controlled_average
from metabloom.strategies.shell import roll_call
from metabloom.wire import from_record, to_record
from tests.strategies.parabolas import ANY, Parabola, app_of, run
from tests.strategies.toy import Toy, bits, model, moved, start

# Curvatures and centres differ: with many steps FedAvg does not come to sum(a c) / sum(a).
CLIENTS = (Parabola(1.0, 0.0), Parabola(3.0, 1.0), Parabola(0.5, -2.0))
OPTIMUM = sum(one.a * one.c for one in CLIENTS) / sum(one.a for one in CLIENTS)
STEPS, LR = 5, 0.1
LOCAL = {"local_lr": LR, "local_epochs": STEPS}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "POLL_S", 0.01)
    monkeypatch.setattr(roll_call, "GATHER_S", 0.05)


# --- the oracle -----------------------------------------------------------------------------------


@dataclass
class Oracle:
    """A run of SCAFFOLD in plain numbers; each client's K steps by their closed form.

    Attributes:
        x: the model.
        c: the server's variate.
        own: c_i of each client.
        server_lr: eta_g.
        part: of N, how much of the mean change goes into c; |S| / N is right.
        drift: of (c, c_i); c - c_i is right.
    """

    x: float = 0.0
    c: float = 0.0
    own: list[float] = field(default_factory=lambda: [0.0] * len(CLIENTS))
    server_lr: float = 1.0
    part: Callable[[int, int], float] = lambda chosen, everyone: chosen / everyone
    drift: Callable[[float, float], float] = lambda c, own: c - own

    def round(self, chosen: list[int]) -> None:
        """Play a round of the clients ``chosen``."""
        ys, changes = [], []
        for i in chosen:
            one = CLIENTS[i]
            # grad + drift = a (w - (c_i - drift / a)): a parabola with another centre
            shifted = replace(one, c=one.c - self.drift(self.c, self.own[i]) / one.a)
            y = shifted.after(self.x, LR, STEPS)
            after = self.own[i] - self.c + (self.x - y) / (STEPS * LR)
            ys.append(y)
            changes.append(after - self.own[i])
            self.own[i] = after
        self.x += self.server_lr * (np.mean(ys) - self.x)
        self.c += self.part(len(chosen), len(CLIENTS)) * np.mean(changes)


def played(result, oracle: Oracle) -> float:
    """Return x of the oracle after the very clients of each round of ``result``."""
    for report in result.rounds:
        oracle.round([int(name.removeprefix("partition-")) for name in report.clients])
    return oracle.x


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2, 3, 10])
def test_every_round_of_all_clients_is_that_of_the_closed_form(rounds: int):
    found, result = run(SCAFFOLD(**ANY), ScaffoldClient, CLIENTS, rounds=rounds, w=0.7, **LOCAL)
    assert found == pytest.approx(played(result, Oracle(x=0.7)), rel=1e-11)


@pytest.mark.parametrize("per_round", [1, 2])
@pytest.mark.parametrize("server_lr", [1.0, 0.6])
def test_rounds_of_some_clients_are_those_of_the_closed_form(per_round: int, server_lr: float):
    strategy = SCAFFOLD(lr=server_lr, clients_per_round=per_round, seed=2, **ANY)
    found, result = run(strategy, ScaffoldClient, CLIENTS, rounds=9, **LOCAL)
    assert {len(report.clients) for report in result.rounds} == {per_round}
    wanted = played(result, Oracle(server_lr=server_lr))
    assert found == pytest.approx(wanted, rel=1e-10)


WRONG = {
    "the mean change, not |S| / N of it": {"part": lambda chosen, everyone: 1.0},
    "1 / N of the mean change": {"part": lambda chosen, everyone: 1 / everyone},
    "the drift the other way round": {"drift": lambda c, own: own - c},
    "no correction": {"drift": lambda c, own: 0.0},
    "the server's variate alone": {"drift": lambda c, own: c},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_variants_are_refused_by_the_closed_form(wrong: str):
    strategy = SCAFFOLD(clients_per_round=2, seed=2, **ANY)
    found, result = run(strategy, ScaffoldClient, CLIENTS, rounds=9, **LOCAL)
    assert found == pytest.approx(played(result, Oracle()), rel=1e-10)
    assert found != pytest.approx(played(result, Oracle(**WRONG[wrong])), abs=1e-3)


def test_it_comes_to_rest_at_the_optimum_and_fedavg_beside_it():
    scaffold, _ = run(SCAFFOLD(**ANY), ScaffoldClient, CLIENTS, rounds=150, **LOCAL)
    assert scaffold == pytest.approx(OPTIMUM, abs=1e-5)
    average, _ = run(FedAvg(weighting="uniform", **ANY), SGDClient, CLIENTS, rounds=150, **LOCAL)
    # FedAvg rests where sum_i (1 - (1 - lr a)^K) (w - c) = 0.
    shares = [1 - (1 - LR * one.a) ** STEPS for one in CLIENTS]
    rest = sum(s * one.c for s, one in zip(shares, CLIENTS, strict=True)) / sum(shares)
    assert average == pytest.approx(rest, abs=1e-6)
    assert abs(rest - OPTIMUM) > 0.1


def test_at_the_optimum_the_variates_are_the_gradients_there():
    oracle = Oracle()
    for _ in range(400):
        oracle.round([0, 1, 2])
    gradients = [one.a * (OPTIMUM - one.c) for one in CLIENTS]
    assert oracle.own == pytest.approx(gradients, abs=1e-6)
    assert oracle.c == pytest.approx(0.0, abs=1e-6)


def test_the_invariant_c_is_the_mean_of_all_c_i():
    """Read from the question and the replies of each round: the server never sees a c_i."""
    own = np.zeros(len(CLIENTS))
    seen: list[float] = []

    class Watching(CohortGrid):
        def send_and_receive(self, messages, *, timeout=None):
            asked = list(messages)
            replies = list(super().send_and_receive(asked, timeout=timeout))
            if asked and asked[0].metadata.message_type == "train":
                c = float(from_record(asked[0].content["arrays"])["control/weight"].item())
                seen.append(c - own.mean())
                for reply in replies:
                    i = list(self.partitions).index(reply.metadata.src_node_id)
                    said = float(from_record(reply.content["arrays"])["control/weight"].item())
                    own[i] += said - c
            return replies

    grid = Watching(app_of(ScaffoldClient, CLIENTS, **LOCAL), num_nodes=len(CLIENTS))
    strategy = SCAFFOLD(clients_per_round=2, seed=2, **ANY)
    run(strategy, ScaffoldClient, CLIENTS, rounds=8, grid=grid)
    assert len(seen) == 8
    assert seen == pytest.approx([0.0] * 8, abs=1e-12)


def test_one_client_is_its_local_run():
    found, _ = run(SCAFFOLD(**ANY), ScaffoldClient, CLIENTS[1:2], rounds=4, w=0.2, **LOCAL)
    assert found == pytest.approx(CLIENTS[1].after(0.2, LR, 4 * STEPS), rel=1e-12)


# --- what travels ---------------------------------------------------------------------------------


def test_variates_travel_beside_the_model_in_training_alone():
    class Seen(Toy):
        def _note(self, kind, message, context):
            asked.add((kind, tuple(message.content["arrays"])))
            return super()._note(kind, message, context)

    asked: set = set()
    roles = ("train", "train", "validation", "unseen")
    usual = {**ANY, "eval_every": 1}
    result = start(SCAFFOLD(**usual), Seen(roles=roles), nodes=4, rounds=1)
    floating = [name for name, value in model().items() if value.dtype.kind == "f"]
    controls = tuple(f"control/{name}" for name in floating)
    assert asked == {("train", (*model(), *controls)), ("evaluate", tuple(model()))}
    assert list(result.arrays) == list(model())


def test_clients_that_know_nothing_of_it_take_part_as_those_of_fedavg():
    def learns(arrays, partition, number):
        own = {name: value for name, value in arrays.items() if not name.startswith("control/")}
        return {**arrays, **moved(own, partition, number)}  # gives the variates back

    found = start(SCAFFOLD(**ANY), Toy(learns=learns), nodes=3, rounds=2)
    wanted = start(FedAvg(weighting="uniform", **ANY), Toy(), nodes=3, rounds=2)
    assert bits(found.arrays) == bits(wanted.arrays)


def test_a_resumed_run_goes_on_with_the_variate(tmp_path: Path):
    whole = start(SCAFFOLD(**ANY), Toy(), nodes=3, rounds=4)
    start(SCAFFOLD(checkpoints=Checkpoints(tmp_path), **ANY), Toy(), nodes=3, rounds=2)
    seen = {}

    def learns(arrays, partition, number):
        seen.setdefault(number, arrays["control/weight"].copy())
        return moved(arrays, partition, number)

    again = SCAFFOLD(checkpoints=Checkpoints(tmp_path, resume=True), **ANY)
    resumed = start(again, Toy(learns=learns), nodes=3, rounds=4)
    assert bits(resumed.arrays) == bits(whole.arrays)
    assert min(seen) == 3
    assert np.abs(seen[3]).max() > 0  # c as it was, and not 0 again


def test_each_architecture_counts_its_own_clients():
    """Two of "a" and one of "b" train in each round: c moves by the whole mean change of each."""
    kinds = ("a", "a", "b")
    arrays = joined({"a": {"w": np.zeros(2)}, "b": {"w": np.ones(3)}})
    sent: dict[int, dict] = {}

    def learns(received, partition, number):
        sent.setdefault(number, {})[partition] = received
        return {name: value + partition + 1.0 for name, value in received.items()}

    strategy = SCAFFOLD(architectures=("a", "b"), **ANY)
    toy = Toy(architectures=kinds, learns=learns)
    result = start(strategy, toy, nodes=3, rounds=2, arrays=arrays)
    assert sent[2][0]["control/w"] == pytest.approx(np.full(2, 1.5))
    assert sent[2][2]["control/w"] == pytest.approx(np.full(3, 3.0))
    assert list(result.arrays) == list(arrays)
    assert part_of(from_record(result.arrays), "b")["w"] == pytest.approx(np.full(3, 7.0))


def test_user_level_privacy_moves_c_by_the_public_size_of_a_cohort(tmp_path: Path):
    """Two of four clients are expected: of the noisy mean change of c, half goes into c."""
    privacy = UserLevelPrivacy(
        noise_multiplier=1e-6,
        max_update_norm=1e3,
        expected_clients=2.0,
        target_delta=1e-5,
        ledger=tmp_path / "ledger.jsonl",
        seed=1,
    )
    sent: dict[int, np.ndarray] = {}

    def learns(received, partition, number):
        sent[number] = received["control/w"]
        return {name: value + 1.0 for name, value in received.items()}

    strategy = SCAFFOLD(user_privacy=privacy, clients_per_round=2, **ANY)
    start(strategy, Toy(learns=learns), nodes=4, rounds=2, arrays={"w": np.zeros(2)})
    assert sent[2] == pytest.approx(np.full(2, 0.5), abs=1e-2)


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_the_rule_moves_model_and_variate_by_their_own_steps(weighting: str):
    rule = controlled_average(lambda: 8, lr=0.5, weighting=weighting)
    sent = {"w": np.array([1.0]), "n": np.array(3), "control/w": np.array([10.0])}
    answers = [
        Reply({"w": np.array([w]), "n": np.array(4), "control/w": np.array([c])}, n)
        for w, c, n in ((3.0, 12.0, 1), (5.0, 18.0, 3))
    ]
    p = np.array([0.5, 0.5]) if weighting == "uniform" else np.array([0.25, 0.75])
    _, new = rule.update(rule.init(sent), sent, answers)
    assert new["w"] == pytest.approx(1 + 0.5 * (p @ [3.0, 5.0] - 1))
    assert new["control/w"] == pytest.approx(10 + 2 / 8 * (p @ [12.0, 18.0] - 10))
    assert new["n"] == 3
    assert list(new) == list(sent)
    assert rule.mean_by == weighting


def test_a_mean_of_several_replies_counts_as_all_of_them():
    rule = controlled_average(lambda: 4)
    sent = {"w": np.zeros(1), "control/w": np.zeros(1)}
    two = Reply({"w": np.ones(1), "control/w": np.ones(1)}, 2.0, clients=2)
    _, new = rule.update({}, sent, [two])
    assert new["control/w"] == pytest.approx(0.5)


def test_a_rate_of_the_server_out_of_range_is_refused():
    with pytest.raises(ConfigError, match="epsilon = 0"):
        SCAFFOLD(lr=0.0)


def test_initial_variates_are_zeros_of_the_floating_arrays():
    beside = controlled_average(lambda: 1).beside(model())
    assert set(beside) == {f"control/{n}" for n, v in model().items() if v.dtype.kind == "f"}
    assert not any(value.any() for value in beside.values())
    record = to_record(beside)
    assert {value.dtype for value in record.values()} == {"float32", "float64", "float16"}
