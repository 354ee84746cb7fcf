"""FedKD's server: the truncated mean, compressed both ways, with the same bits at both ends."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from metabloom.clients import SGDClient
from metabloom.compression import compress_update
from metabloom.config import RunConfig
from metabloom.errors import ConfigError
from metabloom.sent_updates import applied, update_of
from metabloom.strategies import (
    STRATEGIES,
    FedAvg,
    FedKD,
    Reply,
    Rule,
    UserLevelPrivacy,
)
from metabloom.strategies.fedkd import Energy, compressed_mean
from metabloom.strategies.shell import roll_call
from metabloom.wire import from_record, to_record
from tests.clients.small_clients import context as empty_context
from tests.strategies.fedkd_runs import (
    INITIAL,
    ROUNDS,
    Whole,
    app,
    bases,
    client_of,
    fedkd,
    has_no_faults,
    listening,
    run,
    told,
)
from tests.strategies.toy import ShuffledGrid, Toy, bits, model, start, strategy_of


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(roll_call, "POLL_S", 0.01)
    monkeypatch.setattr(roll_call, "GATHER_S", 0.05)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: a second thread only waits
    yield
    torch.set_num_threads(threads)


# --- the rule -------------------------------------------------------------------------------------


def truncated(matrix: np.ndarray, energy: float) -> np.ndarray:
    """The oracle: U_K U_K^T A by the eigenvectors of A A^T, the fewest that hold the energy."""
    values, vectors = np.linalg.eigh(matrix @ matrix.T)
    values, vectors = values[::-1], vectors[:, ::-1]
    rank = next(k for k in range(1, len(values) + 1) if values[:k].sum() >= energy * values.sum())
    return vectors[:, :rank] @ vectors[:, :rank].T @ matrix


def replies_to(sent: dict[str, np.ndarray]) -> list[Reply]:
    rng = np.random.default_rng(5)
    return [
        Reply({n: (v + rng.normal(size=v.shape) / 9).astype(v.dtype) for n, v in sent.items()}, n)
        for n in (1, 2, 7)
    ]


def keeps_the_truncated_mean(make: Callable[..., Rule]) -> None:
    rule, sent = make(Energy(0.5, 0.8, 3)), INITIAL
    state = rule.init(sent)
    for energy in (0.5, 0.65, 0.8, 0.8):
        answers = replies_to(sent)
        state, new = rule.update(state, sent, answers)
        for name, value in sent.items():
            wide = [answer.arrays[name].astype(np.float64) - value for answer in answers]
            step = sum(wide) / 3
            wanted = value + (truncated(step, energy) if step.ndim == 2 else step)
            # w and w_i in float32, of size 1, and factors that are rounded to float32.
            np.testing.assert_allclose(new[name], wanted, rtol=0, atol=2e-6, err_msg=name)
            assert new[name].dtype == value.dtype
        sent = new


def without_compression(energy: Energy) -> Rule:
    rule = compressed_mean(energy)

    def update(state, sent, replies):
        state, _ = rule.update(state, sent, replies)
        return state, {n: np.mean([r.arrays[n] for r in replies], axis=0) for n in sent}

    return Rule(rule.init, update)


def by_examples(energy: Energy) -> Rule:
    return compressed_mean(energy, weighting="examples")


def always_the_first(energy: Energy) -> Rule:
    return compressed_mean(replace(energy, end=energy.start))


def test_the_next_mentee_is_the_last_one_and_the_truncated_mean_of_the_updates():
    keeps_the_truncated_mean(compressed_mean)


@pytest.mark.parametrize("wrong", [without_compression, by_examples, always_the_first])
def test_a_wrong_rule_comes_to_another_one(wrong):
    with pytest.raises(AssertionError):
        keeps_the_truncated_mean(wrong)


def test_what_is_sent_is_what_the_server_added():
    rule = compressed_mean(Energy(0.5, 0.5, 1))
    state, new = rule.update(rule.init(INITIAL), INITIAL, replies_to(INITIAL))
    assert "0.weight/u" in state["update"]
    assert bits(to_record(applied(INITIAL, state["update"]))) == bits(to_record(new))


# --- runs -----------------------------------------------------------------------------------------


def test_updates_and_whole_mentees_give_the_same_model_to_the_bit_and_fewer_bytes():
    grid = listening()
    sent, whole = run(grid=grid), run(fedkd(Whole))
    assert bits(sent.arrays) == bits(whole.arrays)
    assert sent.trained == whole.trained
    assert has_no_faults(sent)
    assert bases(grid) == {1: [0, 0, 0], 2: [1, 1, 1], 3: [2, 2, 2], 4: [3, 3, 3]}
    averaged = run(FedAvg(weighting="uniform", min_available_nodes=1), app(SGDClient))
    for ours, theirs, whole_one in zip(sent.rounds, averaged.rounds, whole.rounds, strict=True):
        assert ours.bytes_up == whole_one.bytes_up < 0.9 * theirs.bytes_up
        assert theirs.bytes_down == whole_one.bytes_down  # and so it is in the first round
        assert ours.bytes_down < 0.9 * theirs.bytes_down or ours.round == 1


def test_a_server_that_adds_what_it_does_not_send_is_found_out_by_every_client():
    class Another(FedKD):
        def __init__(self, **options):
            super().__init__(**options)
            self.rule = without_compression(self._energy)

    result = run(fedkd(Another), rounds=3)
    reasons = [reason for _, reason in result.rounds[1].failures]
    assert len(reasons) == 3
    assert all("comes to another mentee than the server" in reason for reason in reasons)
    assert [report.skipped for report in result.rounds] == [False, True, False]


def test_mentors_learn_and_are_scored_at_the_end_beside_the_mentee():
    result = run(rounds=8)
    assert [score.client for score in result.trained] == ["c0", "c2", "c3"]
    for score in result.trained:
        assert score.metrics["mentor-accuracy"] > 0.6  # of four classes
        assert score.metrics["accuracy-before"] > 0.6
    (unseen,) = result.unseen
    assert not any("mentor" in name for name in unseen.metrics)


def test_with_one_client_and_all_the_energy_the_model_is_its_local_run():
    result = run(fedkd(energy=(1.0, 1.0)), rounds=1, nodes=1)
    alone, _, _ = client_of(0, empty_context()).fit(list(INITIAL.values()), {"server-round": 1})
    for new, wanted in zip(from_record(result.arrays).values(), alone, strict=True):
        np.testing.assert_allclose(new, wanted, rtol=0, atol=1e-6)
    lossy = from_record(run(fedkd(energy=(0.5, 0.5)), rounds=1, nodes=1).arrays)
    assert np.abs(lossy["0.weight"] - alone[0]).max() > 1e-3


def test_the_order_of_replies_and_the_ids_of_nodes_do_not_matter_to_the_bit():
    plain, shuffled = run(), run(grid=ShuffledGrid)
    assert told(plain) == told(shuffled)


def test_clients_of_other_strategies_are_sent_whole_models_and_answer_by_theirs():
    toy = Toy()
    found = from_record(start(strategy_of("fedkd"), toy, rounds=3).arrays)
    wanted = from_record(
        start(strategy_of("fedavg", {"weighting": "uniform"}), Toy(), rounds=3).arrays
    )
    for name, value in wanted.items():  # w + (x - w): one rounding more of each dtype and round
        eps = 8 * np.finfo(value.dtype).eps if value.dtype.kind == "f" else 0
        np.testing.assert_allclose(found[name], value, rtol=0, atol=eps)
    assert not any("base-round" in config for config in toy.configs)
    assert list(found) == list(model())


def test_user_level_privacy_releases_what_is_compressed(tmp_path: Path):
    privacy = UserLevelPrivacy(
        noise_multiplier=0.5,
        max_update_norm=0.5,
        expected_clients=3.0,
        target_delta=1e-5,
        ledger=tmp_path / "ledger.jsonl",
        seed=1,
    )
    grid = listening()
    result = run(fedkd(energy=(0.5, 0.5), user_privacy=privacy), grid=grid)
    assert has_no_faults(result)
    assert bases(grid)[4] == [3, 3, 3]
    assert result.rounds[3].bytes_down < result.rounds[0].bytes_down


# --- configuration --------------------------------------------------------------------------------


def test_architectures_are_refused_since_it_is_the_mentor_that_differs():
    with pytest.raises(ConfigError, match=r"architectures = 'a, b' with fedkd: .*mentors"):
        fedkd(architectures=("a", "b"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"energy": (0.0, 0.98)}, "start = 0.0"),
        ({"energy": (0.95, 1.5)}, "end = 1.5"),
        ({"rounds": 0}, "rounds = 0"),
        ({"weighting": "exmaples"}, "did you mean 'examples'"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(options: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        fedkd(**options)


def test_a_recipe_is_made_of_the_configured_keys_and_refuses_privacy():
    keys = {"strategy": "fedkd", "energy-start": 0.6, "energy-end": 0.7, "rounds": 11}
    recipe = STRATEGIES["fedkd"](RunConfig.read({**keys, "local-epochs": 3}))
    assert (recipe.client, recipe.client_needs) == ("fedkd", ("mentor",))
    assert recipe.client_options["local_epochs"] == 3
    assert recipe.strategy()._energy == Energy(0.6, 0.7, 11)
    assert [Energy(0.6, 0.7, 11).after(n) for n in (0, 10, 12)] == [0.6, 0.7, 0.7]
    assert Energy(0.6, 0.7, 1).after(0) == 0.6
    with pytest.raises(ConfigError, match="fedkd with privacy"):
        STRATEGIES["fedkd"](RunConfig.read({**keys, "privacy.noise-multiplier": 1.0}))


def test_an_update_that_is_not_smaller_than_the_mentee_is_not_sent_in_its_place():
    flat = compress_update(update_of(INITIAL, INITIAL), 1.0)
    assert "0.weight/u" in flat  # of zeros: rank 1, so that even all the energy is cheap
    grid = listening()
    run(fedkd(energy=(1.0, 1.0)), grid=grid)
    assert bases(grid) == {number: [0, 0, 0] for number in range(1, ROUNDS + 1)}
