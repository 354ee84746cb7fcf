"""n rounds, a stop, n rounds: the same as 2n rounds, to the bit, however the run was stopped."""

import copy
import logging
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, MetricRecord

from metabloom.errors import CheckpointError, ConfigError
from metabloom.strategies import STRATEGIES, Checkpoints, Reply, RunResult
from metabloom.strategies.fedmeta import OPTIMIZERS
from metabloom.strategies.shell import roll_call
from metabloom.wire import from_record
from tests.strategies.bad_replies import BAD_REPLIES, grid_with
from tests.strategies.toy import Arrays, ShuffledGrid, Toy, bits, model, moved, start, strategy_of

EVERY = pytest.mark.parametrize("name", list(STRATEGIES))
ROLES = ("train", "unseen", "train", "validation", "train")
KILLED = Path(__file__).with_name("killed_runs.py")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "POLL_S", 0.01)
    monkeypatch.setattr(roll_call, "GATHER_S", 0.05)


def saved_in(folder: Path, *, resume: bool = False, **more) -> dict[str, Checkpoints]:
    return {"checkpoints": Checkpoints(folder, resume=resume, **more)}


def told(result: RunResult, name: str = "") -> dict:
    """Return all of a result but the seconds, to compare bit for bit.

    Teachers are sent again after a resume: there the bytes are left out too.
    """
    resent = {"bytes_down": None, "bytes_training": None} if "teacher" in name else {}
    others = {"seconds": None, **resent}
    rounds = [{**asdict(report), **others} for report in result.rounds]
    arrays = {"arrays": bits(result.arrays), "rounds": rounds}
    return {**vars(result), **arrays}


def stops_in(number: int) -> Toy:
    """Return clients at which the user presses Ctrl-C in the midst of a round."""

    def learns(arrays: Arrays, partition: int, server_round: int) -> Arrays:
        if server_round == number and partition == 2:
            raise KeyboardInterrupt
        return moved(arrays, partition, server_round)

    return Toy(roles=ROLES, learns=learns)


# --- to the bit -----------------------------------------------------------------------------------


@EVERY
def test_two_halves_are_the_whole(name: str, tmp_path: Path):
    whole = start(strategy_of(name), Toy(roles=ROLES), rounds=6)
    first = start(strategy_of(name, **saved_in(tmp_path)), Toy(roles=ROLES), rounds=3)
    assert len(first.rounds) == 3
    second = start(strategy_of(name, **saved_in(tmp_path, resume=True)), Toy(roles=ROLES), rounds=6)
    assert told(second, name) == told(whole, name)


@EVERY
def test_a_run_that_is_interrupted_in_a_round_goes_on_as_if_nothing_had_been(
    name: str, tmp_path: Path
):
    with pytest.raises(KeyboardInterrupt):
        start(
            strategy_of(name, **saved_in(tmp_path, every=10)),  # the interrupt itself saves
            stops_in(3),
            rounds=5,
        )
    assert [file.name for file in sorted(tmp_path.iterdir())] == [
        "round-00000002.json",
        "round-00000002.safetensors",
    ]
    whole = start(strategy_of(name), Toy(roles=ROLES), rounds=5)
    toy = Toy(roles=ROLES)
    resumed = start(strategy_of(name, **saved_in(tmp_path, resume=True)), toy, rounds=5)
    assert told(resumed, name) == told(whole, name)
    rounds = [config["server-round"] for config in toy.configs]
    assert min(rounds) == 3  # no round is trained twice


@EVERY
def test_the_nodes_of_the_second_half_may_have_other_ids_and_answer_in_another_order(
    name: str, tmp_path: Path
):
    whole = start(strategy_of(name), Toy(roles=ROLES), rounds=4)
    start(strategy_of(name, **saved_in(tmp_path)), Toy(roles=ROLES), rounds=1)
    second = start(
        strategy_of(name, **saved_in(tmp_path, resume=True)),
        Toy(roles=ROLES),
        rounds=4,
        grid=ShuffledGrid,
        grid_seed=9,
    )
    assert told(second, name) == told(whole, name)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_the_moments_of_the_server_optimiser_go_on(optimizer: str, tmp_path: Path):
    config = {"server-optimizer": optimizer, "outer-lr": 0.1}
    whole = start(strategy_of("fedmeta", config), Toy(), rounds=4)
    start(strategy_of("fedmeta", config, **saved_in(tmp_path)), Toy(), rounds=2)
    resumed = strategy_of("fedmeta", config, **saved_in(tmp_path, resume=True))
    assert bits(start(resumed, Toy(), rounds=4).arrays) == bits(whole.arrays)
    if optimizer != "sgd":  # which has none; the others, as this shows, cannot do without theirs
        half = start(strategy_of("fedmeta", config), Toy(), rounds=2)
        later = Toy(learns=lambda arrays, p, n: moved(arrays, p, n + 2))
        forgetful = strategy_of("fedmeta", config)
        anew = start(forgetful, later, rounds=2, arrays=from_record(half.arrays))
        assert bits(anew.arrays) != bits(whole.arrays)


def test_the_scores_of_evaluate_fn_go_on_and_no_model_is_scored_twice(tmp_path: Path):
    scored: list[int] = []

    def evaluate_fn(number: int, arrays: ArrayRecord) -> MetricRecord:
        scored.append(number)
        return MetricRecord({"norm": float(abs(from_record(arrays)["weight"]).sum())})

    whole = start(strategy_of("fedavg"), Toy(), rounds=4, evaluate_fn=evaluate_fn)
    assert scored == [0, 1, 2, 3, 4]
    scored.clear()
    start(strategy_of("fedavg", **saved_in(tmp_path)), Toy(), evaluate_fn=evaluate_fn)
    resumed = strategy_of("fedavg", **saved_in(tmp_path, resume=True))
    result = start(resumed, Toy(), rounds=4, evaluate_fn=evaluate_fn)
    assert scored == [0, 1, 2, 3, 4]
    assert told(result) == told(whole)
    assert list(result.evaluate_metrics_serverapp) == [0, 1, 2, 3, 4]


def test_offences_are_remembered(tmp_path: Path):
    grid = grid_with(BAD_REPLIES["NaN"].tamper)
    start(strategy_of("fedavg", max_offences=2, **saved_in(tmp_path)), Toy(), rounds=1, grid=grid)
    resumed = strategy_of("fedavg", max_offences=2, **saved_in(tmp_path, resume=True))
    result = start(resumed, Toy(), rounds=4, grid=grid)
    assert [len(report.quarantined) for report in result.rounds] == [1, 1, 0, 0]


def test_what_a_node_said_at_the_roll_call_is_told_once(tmp_path: Path):
    class Broken(Toy):
        def _answer_roll_call(self, message, context):
            answer = super()._answer_roll_call(message, context)
            if context.node_config["partition-id"] == 1:
                answer.content["properties"]["error"] = "no data"
            return answer

    start(strategy_of("fedavg", **saved_in(tmp_path)), Broken(roles=ROLES), rounds=1)
    resumed = strategy_of("fedavg", **saved_in(tmp_path, resume=True))
    result = start(resumed, Broken(roles=ROLES), rounds=3)
    assert [report.failures for report in result.rounds] == [(("c1", "no data"),), (), ()]


def test_a_finished_run_that_is_resumed_gives_its_result_again(tmp_path: Path):
    first = start(strategy_of("fedmeta", **saved_in(tmp_path)), Toy(roles=ROLES), rounds=3)
    toy = Toy(roles=ROLES)
    again = start(strategy_of("fedmeta", **saved_in(tmp_path, resume=True)), toy, rounds=3)
    assert told(again) == told(first)
    assert not toy.partitions("train")


# --- kill -9 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_runs_that_are_killed_at_random_moments_lose_no_more_than_promised(
    tmp_path: Path, every: int
):
    """One hundred times each; the script says what it checks after each kill."""
    done = subprocess.run(
        [sys.executable, str(KILLED), str(tmp_path / "checkpoints"), "100", str(every)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100 kills" in done.stdout
    print(done.stdout)


# --- which checkpoint -----------------------------------------------------------------------------


def test_without_a_checkpoint_a_resumed_run_begins_anew_and_says_so(tmp_path: Path, caplog):
    with caplog.at_level(logging.WARNING):
        result = start(strategy_of("fedavg", **saved_in(tmp_path, resume=True)), Toy(), rounds=2)
    assert told(result) == told(start(strategy_of("fedavg"), Toy(), rounds=2))
    assert "the run begins anew" in caplog.text


def test_a_run_that_begins_anew_sets_the_checkpoints_of_an_earlier_one_aside(
    tmp_path: Path, caplog
):
    """Two starts by mistake do not delete a long run."""
    folder = tmp_path / "checkpoints"
    for rounds in (5, 2, 1):
        with caplog.at_level(logging.WARNING):
            start(strategy_of("fedavg", **saved_in(folder)), Toy(), rounds=rounds)
    names = {"checkpoints": 1, "checkpoints-previous": 3, "checkpoints-previous-2": 1}
    assert {one.name: Checkpoints(one).oldest() for one in tmp_path.iterdir()} == names
    assert "moved to" in caplog.text


def test_a_finished_run_takes_the_place_of_a_finished_one_that_was_no_longer(tmp_path: Path):
    """Running the same thing again and again does not fill the disk."""
    folder = tmp_path / "checkpoints"
    for rounds in (2, 3, 3, 3):
        start(strategy_of("fedavg", **saved_in(folder, keep=1)), Toy(), rounds=rounds)
    assert {one.name for one in tmp_path.iterdir()} == {"checkpoints", "checkpoints-previous"}
    assert Checkpoints(tmp_path / "checkpoints-previous").oldest() == 3


def test_a_run_that_was_stopped_is_never_deleted(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    with pytest.raises(KeyboardInterrupt):
        start(strategy_of("fedavg", **saved_in(folder)), stops_in(2), rounds=3)
    for _ in range(3):
        start(strategy_of("fedavg", **saved_in(folder, keep=1)), Toy(roles=ROLES), rounds=3)
    oldest = {one.name: Checkpoints(one).oldest() for one in tmp_path.iterdir()}
    assert oldest == {"checkpoints": 3, "checkpoints-previous": 1, "checkpoints-previous-2": 3}
    resumed = strategy_of("fedavg", **saved_in(folder, resume=True))
    start(resumed, Toy(roles=ROLES), rounds=4)  # what goes on is finished again at its new end
    assert (folder / "finished").exists()


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog, suffix: str
):
    whole = start(strategy_of("fedmeta"), Toy(), rounds=5)
    start(strategy_of("fedmeta", **saved_in(tmp_path)), Toy(), rounds=3)
    newest = tmp_path / f"round-00000003.{suffix}"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(bytes(content))
    toy = Toy()
    with caplog.at_level(logging.WARNING):
        result = start(strategy_of("fedmeta", **saved_in(tmp_path, resume=True)), toy, rounds=5)
    assert told(result) == told(whole)
    assert "round-00000003" in caplog.text
    assert min(config["server-round"] for config in toy.configs) == 3  # resumed after round 2


def test_where_no_checkpoint_can_be_read_nothing_is_thrown_away(tmp_path: Path):
    start(strategy_of("fedmeta", **saved_in(tmp_path)), Toy(), rounds=2)
    for file in tmp_path.glob("*.json"):
        file.write_bytes(file.read_bytes()[:-9])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"round-00000002\.json"):
        start(strategy_of("fedmeta", **saved_in(tmp_path, resume=True)), Toy(), rounds=4)
    assert sorted(tmp_path.iterdir()) == before


def test_another_seed_or_strategy_is_refused_by_name(tmp_path: Path):
    start(strategy_of("fedavg", **saved_in(tmp_path)), Toy(), rounds=2)
    with pytest.raises(ConfigError, match=r"checkpoint has seed = 0, this run 7"):
        start(strategy_of("fedavg", seed=7, **saved_in(tmp_path, resume=True)), Toy(), rounds=4)
    with pytest.raises(
        ConfigError, match=r"checkpoint has strategy = 'FedAvg', this run 'Reptile'"
    ):
        start(strategy_of("reptile", **saved_in(tmp_path, resume=True)), Toy(), rounds=4)


def test_another_model_is_refused_by_the_name_of_the_array(tmp_path: Path):
    start(strategy_of("fedavg", **saved_in(tmp_path)), Toy(), rounds=1)
    other = {**model(), "weight": model()["weight"].T.copy()}
    resumed = strategy_of("fedavg", **saved_in(tmp_path, resume=True))
    with pytest.raises(
        ConfigError, match=r"'weight' is float32 of shape \(2, 3\).*\(3, 2\).*resume = false"
    ):
        start(resumed, Toy(), rounds=2, arrays=other)


def test_a_checkpoint_of_a_later_round_is_refused(tmp_path: Path):
    start(strategy_of("fedavg", **saved_in(tmp_path)), Toy(), rounds=3)
    with pytest.raises(ConfigError, match=r"rounds = 2: .* is of round 3 already"):
        start(strategy_of("fedavg", **saved_in(tmp_path, resume=True)), Toy(), rounds=2)


def test_without_an_interval_nothing_is_written(tmp_path: Path):
    start(strategy_of("fedavg", **saved_in(tmp_path / "new", every=0)), Toy(), rounds=2)
    assert not (tmp_path / "new").exists()


def test_a_strategy_that_is_used_again_does_not_go_on_with_its_old_state(tmp_path: Path):
    strategy = strategy_of("fedmeta", **saved_in(tmp_path / "a"))
    first = start(strategy, Toy(), rounds=2)
    assert told(start(strategy, Toy(), rounds=2)) == told(first)


def test_clients_learn_the_identity_of_the_run_and_how_far_back_it_may_go(tmp_path: Path):
    one, two = Toy(), Toy()
    start(strategy_of("fedavg", eval_every=0, **saved_in(tmp_path, keep=2)), one, rounds=4, nodes=1)
    resumed = strategy_of("fedavg", eval_every=0, **saved_in(tmp_path, keep=2, resume=True))
    start(resumed, two, rounds=5, nodes=1)
    assert len({config["run-token"] for config in (*one.configs, *two.configs)}) == 1
    assert [config["kept-round"] for config in one.configs] == [0, 1, 1, 2]
    assert [config["kept-round"] for config in two.configs] == [3]
    plain = Toy()
    start(strategy_of("fedavg"), plain, rounds=1)
    assert not any("run-token" in config for config in plain.configs)


def test_a_snapshot_is_not_changed_by_later_rounds():
    """What is saved after an interrupt is the state after the last whole round."""
    strategy = strategy_of("fedmeta")
    start(strategy, Toy(), rounds=1)
    last = strategy._saver._last
    before = copy.deepcopy((last.state, dict(last.arrays), last.reports))
    answers = [Reply(moved(model(), partition, 2), 1.0) for partition in range(3)]
    strategy.rule.update(last.state, last.arrays, answers)
    start(strategy, Toy(), rounds=3)
    assert str((last.state, dict(last.arrays), last.reports)) == str(before)
