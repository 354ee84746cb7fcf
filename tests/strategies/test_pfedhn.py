"""pFedHN in runs: whose model and embedding is whose, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from metabloom.architectures import joined, part_of
from metabloom.client_app import app as our_clients
from metabloom.config import RunConfig
from metabloom.errors import ConfigError
from metabloom.sim import CohortGrid
from metabloom.strategies import (
    STRATEGIES,
    Checkpoints,
    Firewall,
    PFedHN,
    Rule,
    UserLevelPrivacy,
)
from metabloom.strategies.pfedhn import (
    middle,
    model_of,
    newcomer,
)
from metabloom.strategies.shell import roll_call
from metabloom.task import idle_keys, server_parts
from metabloom.task import model_of as built_model
from metabloom.wire import from_record, to_record
from tests.strategies.toy import Toy, bits, larger, model, moved, start, strategy_of

SMALL = {"embedding-size": 3, "hypernetwork-width": 5}
ROLES = ("train", "unseen", "train", "validation", "train")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "POLL_S", 0.01)
    monkeypatch.setattr(roll_call, "GATHER_S", 0.05)


# --- who is sent what -----------------------------------------------------------------------------


def seen_by(rounds: int, **more) -> tuple[PFedHN, dict]:
    """Return a strategy after its run, and the arrays that came to each client and round."""
    seen = {}

    def learns(sent, partition, number):
        seen[partition, number] = {name: value.copy() for name, value in sent.items()}
        return moved(sent, partition, number)

    strategy = strategy_of("pfedhn", SMALL, **more)
    start(strategy, Toy(roles=ROLES, learns=learns), rounds=rounds)
    return strategy, seen


def test_every_client_is_sent_a_model_of_its_own():
    _, seen = seen_by(2)
    for partition in (0, 2, 4):
        for name, value in model().items():
            assert np.array_equal(seen[partition, 1][name], value), name  # nothing is added yet
    second = [seen[partition, 2] for partition in (0, 2, 4)]
    for i, one in enumerate(second):
        other = second[i - 1]
        assert np.abs(one["weight"] - other["weight"]).max() > 1e-4
        assert list(one) == list(model())
        assert all(one[name].dtype == value.dtype for name, value in model().items())


def test_what_a_client_is_sent_is_the_model_of_its_embedding():
    strategy, seen = seen_by(3)
    again, _ = seen_by(2)
    state = again._state
    for partition in (0, 2, 4):
        embedding = state["clients"][f"c{partition}"]["embedding"]
        wanted = model_of(state["phi"], model(), embedding, 5)
        for name, value in wanted.items():
            assert seen[partition, 3][name].tobytes() == value.tobytes()
    assert set(strategy._state["clients"]) == {"c0", "c2", "c4"}


class Evaluated(Toy):
    """Clients that note the arrays with which they are evaluated."""

    def _evaluate(self, message, context):
        partition = int(context.node_config["partition-id"])
        self.received = {**getattr(self, "received", {}), partition: message.content["arrays"]}
        return super()._evaluate(message, context)


def test_new_clients_are_sent_the_model_of_the_mean_embedding_and_others_their_own():
    toy, strategy = Evaluated(roles=ROLES), strategy_of("pfedhn", SMALL)
    result = start(strategy, toy, rounds=2)
    state = strategy._state
    mean = np.mean([state["clients"][f"c{i}"]["embedding"] for i in (0, 2, 4)], axis=0)
    wanted = model_of(state["phi"], model(), mean, 5)
    for name, value in from_record(result.arrays).items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-5)
    for partition in (1, 3):
        assert bits(toy.received[partition]) == bits(result.arrays)
    for partition in (0, 2, 4):
        own = model_of(state["phi"], model(), state["clients"][f"c{partition}"]["embedding"], 5)
        assert bits(toy.received[partition]) == bits(to_record(own))
    assert [score.client for score in result.trained] == ["c0", "c2", "c4"]


def test_clients_that_fit_an_embedding_are_sent_phi_and_an_embedding_to_be_evaluated():
    toy = Evaluated(roles=ROLES)
    strategy = strategy_of("pfedhn", {**SMALL, "hypernetwork-adapts": "embedding"})
    start(strategy, toy, rounds=2)
    state = strategy._state
    for partition in range(5):
        held = from_record(toy.received[partition])
        own = state["clients"].get(f"c{partition}", {}).get("embedding")
        wanted = middle(state["clients"], 3) if own is None else own
        assert np.array_equal(held.pop("embedding"), wanted)
        assert list(held) == list(state["phi"])
        assert all(np.array_equal(held[name], value) for name, value in state["phi"].items())


def test_a_reply_is_judged_against_what_its_own_node_was_sent():
    """Models of two clients are 20 apart, and each moves by less than 1: within the bound of 2."""
    rule = strategy_of("pfedhn", SMALL).rule
    initial = {"weight": np.zeros((2, 3), dtype=np.float32)}
    state = rule.init(initial)
    phi = {n: v + 1 if "heads" in n else v for n, v in state["phi"].items()}
    state = {**state, "phi": phi, "clients": {f"c{i}": newcomer(0, f"c{i}", 3) for i in (0, 2, 4)}}
    for i in (0, 2, 4):
        state["clients"][f"c{i}"]["embedding"] = np.full(3, 20.0 * (i - 1), np.float32)

    def learns(sent, partition, number):
        return {name: value + np.float32(0.3) for name, value in sent.items()}

    toy, wall = Toy(roles=ROLES, learns=learns), Firewall(max_update_norm=2.0)
    strategy = strategy_of("pfedhn", SMALL, firewall=wall)
    begin = strategy._begin

    def begun(*arguments):
        begin(*arguments)
        strategy._state = state

    strategy._begin = begun
    result = start(strategy, toy, rounds=1, arrays=initial)
    sent = [strategy._sent_to(initial, roll_call.Node(i, client=f"c{i}"), True) for i in (0, 4)]
    assert np.linalg.norm(sent[0]["weight"] - sent[1]["weight"]) > 2.0
    assert not result.rounds[0].quarantined
    tight = strategy_of("pfedhn", SMALL, firewall=Firewall(max_update_norm=0.5))
    report = start(tight, toy, rounds=1, arrays=initial).rounds[0]
    assert [who for who, _ in report.quarantined] == ["c0", "c2", "c4"]


def test_an_update_that_is_clipped_is_clipped_around_what_the_node_was_sent():
    seen, shown = {}, []

    def learns(sent, partition, number):
        seen[f"c{partition}", number] = {name: value.copy() for name, value in sent.items()}
        return moved(sent, partition, number)

    wall = Firewall(max_update_norm=0.01, norm_action="clip")
    strategy = strategy_of("pfedhn", SMALL, firewall=wall)
    rule = strategy.rule

    def noting(state, sent, replies):
        shown.append(replies)
        return rule.update(state, sent, replies)

    strategy.rule = Rule(rule.init, noting)
    start(strategy, Toy(roles=ROLES, learns=learns), rounds=3)
    assert np.abs(seen["c0", 3]["weight"] - seen["c4", 3]["weight"]).max() > 0.0
    for number, replies in enumerate(shown, 1):
        for reply in replies:
            own = seen[reply.client, number]
            away = [reply.arrays[n] - own[n].astype(float) for n in own if n != "batches"]
            norm = np.sqrt(sum((one**2).sum() for one in away))
            assert norm == pytest.approx(0.01, rel=0.1)  # "half" has three digits


def test_each_architecture_has_a_hypernetwork_of_its_own():
    kinds = ("small", "large", "small", "large", "large")
    strategy = strategy_of("pfedhn", SMALL, architectures=("small", "large"))
    both = joined({"small": model(), "large": larger()})
    result = start(strategy, Toy(architectures=kinds), rounds=2, arrays=both)
    state = strategy._state
    assert list(state["small"]["clients"]) == ["partition-0", "partition-2"]
    assert list(state["large"]["clients"]) == ["partition-1", "partition-3", "partition-4"]
    found = part_of(from_record(result.arrays), "large")
    assert not np.array_equal(found["body"], larger()["body"])


# --- runs -----------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_same_personal_models(tmp_path: Path):
    def sent_after(**more) -> dict:
        return seen_by(5, **more)[1]

    whole = sent_after()
    start(
        strategy_of("pfedhn", SMALL, checkpoints=Checkpoints(tmp_path)), Toy(roles=ROLES), rounds=3
    )
    later = sent_after(checkpoints=Checkpoints(tmp_path, resume=True))
    assert {number for _, number in later} == {4, 5}
    for place, held in later.items():
        assert all(held[name].tobytes() == value.tobytes() for name, value in whole[place].items())


def test_another_size_is_not_resumed(tmp_path: Path):
    start(strategy_of("pfedhn", SMALL, checkpoints=Checkpoints(tmp_path)), Toy(), rounds=1)
    other = {**SMALL, "embedding-size": 4}
    resumed = strategy_of("pfedhn", other, checkpoints=Checkpoints(tmp_path, resume=True))
    with pytest.raises(ConfigError, match="embedding_size = 3, this run 4"):
        start(resumed, Toy(), rounds=2)


DIGITS = {"num-clients": 10, "device": "cpu", "eval-steps": "1,5", "clients-per-round": 8}


def run_digits(rounds: int, **keys):
    config = RunConfig.read({**DIGITS, **keys})
    initial = {name: value.numpy() for name, value in built_model(config).state_dict().items()}
    grid = CohortGrid(our_clients, num_nodes=10, run_config=config.to_flower())
    recipe = STRATEGIES[config.strategy](config)
    bounds = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
    strategy = recipe.strategy(eval_every=0, **bounds, **server_parts(config))
    return strategy.start(grid, to_record(initial), num_rounds=rounds, timeout=60)


def mean_of(scores, metric: str) -> float:
    return float(np.mean([score.metrics[metric] for score in scores]))


def test_clients_whose_labels_mean_other_things_get_models_that_no_common_one_can_be():
    """Chance is a fifth, and what FedAvg's model reaches before it is fine-tuned."""
    result = run_digits(40, strategy="pfedhn", **{"local-epochs": 5})
    assert mean_of(result.trained, "accuracy-before") > 0.6


def test_a_new_client_that_fits_its_embedding_gets_better():
    keys = {"hypernetwork-adapts": "embedding", "local-epochs": 5, "inner-lr": 0.1}
    result = run_digits(40, strategy="pfedhn", **keys)
    before, after = (mean_of(result.unseen, f"loss-{when}") for when in ("before", "after-5"))
    assert after < before
    assert mean_of(result.trained, "accuracy-before") > 0.6


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"embedding_size": 0}, "embedding_size = 0"),
        ({"width": 0}, "width = 0"),
        ({"adapts": "modle"}, "did you mean 'model'"),
        ({"lr": 0.0}, "lr = 0.0"),
        ({"optimizer": "adm"}, "did you mean 'adam'"),
        ({"weighting": "exmaples"}, "did you mean 'examples'"),
    ],
)
def test_an_argument_out_of_range_is_refused_by_name(wrong: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        PFedHN(**wrong)


def test_user_level_privacy_is_refused():
    privacy = UserLevelPrivacy(
        noise_multiplier=1.0, max_update_norm=1.0, expected_clients=2, target_delta=1e-5
    )
    with pytest.raises(ConfigError, match="each embedding is moved by one client alone"):
        strategy_of("pfedhn", user_privacy=privacy)


def test_keys_without_effect_are_told():
    keys = {**SMALL, "hypernetwork-adapts": "embedding", "outer-lr": 0.1, "local-epochs": 2}
    assert idle_keys(RunConfig.read({"strategy": "pfedhn", **keys})) == []
    idle = idle_keys(RunConfig.read({"strategy": "pfedhn", "split": "fixed"}))
    assert idle == ["split"]
