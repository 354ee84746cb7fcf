"""A run that ends early: by patience, which leaves the best model, or by a budget."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict

from metabloom.errors import ConfigError
from metabloom.strategies import STRATEGIES, Checkpoints, ClientScore, Ending, RunResult
from metabloom.strategies.shell import roll_call
from metabloom.strategies.shell.ending import Watch
from metabloom.wire import size_of, to_record
from tests.strategies.snapshots import report, snapshot
from tests.strategies.toy import Toy, bits, model, start, strategy_of

EVERY = pytest.mark.parametrize("name", list(STRATEGIES))
ROLES = ("train", "unseen", "train", "validation", "train")
SCORES = (  # accuracy and loss of each round
    (0.5, 1.0),
    (0.4, 0.5),
    (0.6, 1.0),
    (0.6, 1.0),
    (0.6, 0.9),
    (0.5, 0.1),
    (0.6, 0.95),
    (0.59, 0.2),
    (0.61, 3.0),
    (0.61, 3.0),
    (0.2, 0.2),
    (0.3, 0.2),
)


@dataclass
class Graded(Toy):
    """Clients that give the model of each round the score that ``scores`` has for it."""

    scores: Sequence[tuple[float, float]] = SCORES
    judged: list[int] = field(default_factory=list)  # rounds of evaluations

    def _evaluate(self, message: Message, context) -> Message:
        _, number = self._note("evaluate", message, context)
        self.judged.append(number)
        accuracy, loss = self.scores[number - 1]
        metrics = {"accuracy": accuracy, "loss": loss, "num-examples": 3}
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "POLL_S", 0.01)
    monkeypatch.setattr(roll_call, "GATHER_S", 0.05)


def expected(scores: Sequence[tuple[float, float]], patience: int) -> tuple[int, int]:
    """Return (the last round, the best one), by looking at every beginning of the run anew."""
    for last in range(1, len(scores) + 1):
        keys = [(accuracy, -loss) for accuracy, loss in scores[:last]]
        best = keys.index(max(keys)) + 1
        if last - best >= patience:
            return last, best
    return len(scores), best


def run(toy: Toy, rounds: int = len(SCORES), name: str = "fedavg", **shell) -> RunResult:
    return start(strategy_of(name, **shell), toy, rounds=rounds)


def told(result: RunResult, name: str = "") -> dict:
    """Return all but the seconds, and the bytes where a resumed run sends a teacher again."""
    others = {"seconds": None}
    others |= {"bytes_down": None, "bytes_training": None} if "teacher" in name else {}
    rounds = [{**asdict(report), **others} for report in result.rounds]
    return {**vars(result), "arrays": bits(result.arrays), "rounds": rounds}


# --- patience -------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [1, 2, 3, 5, 20])
def test_a_run_ends_after_so_many_validations_and_leaves_its_best_model(patience: int):
    toy = Graded(roles=ROLES)
    result = run(toy, ending=Ending(patience=patience))
    last, best = expected(SCORES, patience)
    assert (len(result.rounds), result.model_round) == (last, best)
    assert bits(result.arrays) == bits(run(Graded(roles=ROLES), best).arrays)
    ended = f"patience = {patience}: no better validation since that of round {best}"
    assert result.ended == (ended if last < len(SCORES) else "")
    assert [score.role for score in result.unseen] == ["unseen"]
    assert toy.judged[-1] == last  # unseen clients are told the round that was the last


def test_rounds_that_are_not_validated_do_not_wear_patience_out():
    result = run(Graded(roles=ROLES), eval_every=3, ending=Ending(patience=2))
    # Rounds 3, 6, 9 and 12 have accuracies of 0.6, 0.5, 0.61 and 0.3.
    assert (len(result.rounds), result.model_round, result.ended) == (12, 9, "")


def test_without_an_ending_all_rounds_are_played_and_the_last_model_stays():
    result = run(Graded(roles=ROLES))
    assert (len(result.rounds), result.ended, result.model_round) == (12, "", None)


def test_where_nobody_validates_the_run_goes_on_and_leaves_the_last_model():
    roles = ("train", "unseen", "train", "unseen", "train")
    result = run(Graded(roles=roles), ending=Ending(patience=1))
    assert (len(result.rounds), result.ended, result.model_round) == (12, "", None)
    assert bits(result.arrays) == bits(run(Graded(roles=roles)).arrays)


@pytest.mark.parametrize("name", ["accuracy", "loss"])
def test_a_metric_that_a_client_lacks_says_nothing_of_a_model(name: str):
    def score(client: str, **metrics: float) -> ClientScore:
        return ClientScore(client, 0, "validation", 3, metrics)

    ending = Ending(patience=1)
    full, part = score("a", accuracy=0.5, loss=2.0), {"accuracy": 0.9, "loss": 0.1}
    del part[name]
    found = ending.score_of([full, score("b", **part)])
    assert found == {"accuracy": (-np.inf, -1.05), "loss": (0.7, -np.inf)}[name]
    assert ending.score_of([score("a"), full]) is None
    assert ending.score_of([]) is None


def judged(number: int, accuracy: float, loss: float, **parts):
    score = ClientScore("v", 0, "validation", 3, {"accuracy": accuracy, "loss": loss})
    return replace(report(number), validation=(score,), **parts)


def keeps_the_best(watch: type[Watch]) -> None:
    rng = np.random.default_rng(0)
    for patience in (1, 2, 3):
        for _ in range(40):
            scores = [tuple(rng.choice([0.1, 0.2, 0.3, 0.4], 2)) for _ in range(12)]
            own, number = watch(Ending(patience=patience), None), 0
            for number, (accuracy, loss) in enumerate(scores, start=1):
                own.note(judged(2 * number, accuracy, loss), {"round": np.array(number)})
                if own.over:
                    break
            last, best = expected(scores, patience)
            assert (number, int(own.best["round"])) == (last, best), scores


class Lenient(Watch):
    """An equal model counts as better."""

    def _count(self, report) -> bool:
        if self._score and self._ending.score_of(report.validation) == self._score:
            self._score = None
        return super()._count(report)


class Shortsighted(Watch):
    """A model is held against the one before it."""

    def _count(self, report) -> bool:
        better = super()._count(report)
        self._score = self._ending.score_of(report.validation)
        return better


class Forgetful(Watch):
    """The last model stays."""

    def note(self, report, arrays) -> None:
        super().note(report, arrays)
        self.best = arrays


class Worn(Watch):
    """A better model does not make patience new."""

    def _count(self, report) -> bool:
        idle = self._idle
        better = super()._count(report)
        self._idle = max(idle, self._idle)
        return better


def test_patience_keeps_the_law_of_the_best():
    keeps_the_best(Watch)


@pytest.mark.parametrize("wrong", [Lenient, Shortsighted, Forgetful, Worn])
def test_another_patience_breaks_it(wrong: type[Watch]):
    with pytest.raises(AssertionError):
        keeps_the_best(wrong)


# --- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "rounds"), [(-1, 3), (0, 3), (1, 4)])
def test_a_run_ends_with_the_round_in_which_its_bytes_are_spent(more: int, rounds: int):
    of_a_round = 2 * 3 * size_of(to_record(model()))  # three clients, down and up
    toy = Graded(roles=ROLES)
    result = run(
        toy, eval_every=1, clients_per_round=3, ending=Ending(max_bytes=3 * of_a_round + more)
    )
    assert len(result.rounds) == rounds
    assert [one.bytes_training for one in result.rounds] == [of_a_round] * rounds
    assert all(one.bytes_down + one.bytes_up > of_a_round for one in result.rounds)  # validation
    assert result.ended == (
        f"max-bytes = {3 * of_a_round + more}: training has exchanged {rounds * of_a_round}"
    )
    assert result.model_round is None
    assert bits(result.arrays) == bits(run(Graded(roles=ROLES), rounds, clients_per_round=3).arrays)


def test_seconds_of_rounds_add_up_to_a_budget():
    watch = Watch(Ending(max_seconds=3.5), None)
    for number in range(1, 4):
        assert watch.over == ""
        watch.note(replace(report(number), seconds=1.25), {})
    assert watch.over == "max-seconds = 3.5: its rounds took 3.8"
    resumed = Watch(Ending(max_seconds=5.5), snapshot(3))  # 0.125 seconds each
    assert resumed.over == ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patience": -1}, "patience = -1"),
        ({"patience": 1.5}, "patience = 1.5"),
        ({"max_bytes": -5}, "max_bytes = -5"),
        ({"max_seconds": -1.0}, "max_seconds = -1.0"),
        ({"max_seconds": float("nan")}, "max_seconds = nan"),
        ({"max_seconds": float("inf")}, "max_seconds = inf"),
    ],
)
def test_a_value_out_of_range_is_named(values: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        Ending(**values)


# --- resume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped", range(1, 9))
def test_a_run_that_is_resumed_ends_where_it_would_have_and_leaves_the_same_model(
    stopped: int, tmp_path: Path
):
    """Also one that is resumed after its end."""
    ending = Ending(patience=3)
    whole = run(Graded(roles=ROLES), ending=ending)
    assert len(whole.rounds) == 8
    run(Graded(roles=ROLES), stopped, ending=ending, checkpoints=Checkpoints(tmp_path, keep=1))
    toy = Graded(roles=ROLES)
    checkpoints = Checkpoints(tmp_path, keep=1, resume=True)
    assert told(run(toy, ending=ending, checkpoints=checkpoints)) == told(whole)
    assert sorted({c["server-round"] for c in toy.configs}) == list(range(stopped + 1, 9)) or [8]


@EVERY
def test_every_strategy_ends_early_and_resumes(name: str, tmp_path: Path):
    """The toy's loss is the same each round, so that its first model is the best."""
    ending = Ending(patience=2)
    whole = run(Toy(roles=ROLES), 9, name, ending=ending)
    assert (len(whole.rounds), whole.model_round) == (3, 1)
    assert bits(whole.arrays) == bits(run(Toy(roles=ROLES), 1, name).arrays)
    run(Toy(roles=ROLES), 2, name, ending=ending, checkpoints=Checkpoints(tmp_path))
    checkpoints = Checkpoints(tmp_path, resume=True)
    resumed = run(Toy(roles=ROLES), 9, name, ending=ending, checkpoints=checkpoints)
    assert told(resumed, name) == told(whole, name)


@EVERY
def test_nobody_is_asked_for_last_scores_where_they_are_not_wanted(name: str):
    asked, spared = Toy(roles=ROLES), Toy(roles=ROLES)
    whole = run(asked, 2, name)
    short = run(spared, 2, name, ending=Ending(scored=False))
    assert whole.unseen
    assert (short.unseen, short.trained) == ([], [])
    assert len(spared.configs) == len(asked.configs) - len(whole.unseen) - len(whole.trained)
    assert bits(short.arrays) == bits(whole.arrays)


def test_a_larger_budget_lets_a_run_go_on(tmp_path: Path):
    budget = 2 * 3 * size_of(to_record(model()))
    two, five = Ending(max_bytes=2 * budget), Ending(max_bytes=5 * budget)

    def play(ending: Ending, **more) -> RunResult:
        return run(Graded(roles=ROLES), clients_per_round=3, ending=ending, **more)

    assert len(play(two, checkpoints=Checkpoints(tmp_path)).rounds) == 2
    resumed = play(five, checkpoints=Checkpoints(tmp_path, resume=True))
    assert len(resumed.rounds) == 5
    assert told(resumed) == told(play(five))


def test_another_patience_is_refused_by_name(tmp_path: Path):
    run(Graded(roles=ROLES), 2, ending=Ending(patience=3), checkpoints=Checkpoints(tmp_path))
    for other, said in ((Ending(patience=4), "patience = 3, this run 4"), (None, "no patience")):
        with pytest.raises(ConfigError, match=said):
            run(Graded(), ending=other, checkpoints=Checkpoints(tmp_path, resume=True))


def test_a_checkpoint_holds_the_best_model_to_the_bit(tmp_path: Path):
    best = {"z": np.array([np.nan, -0.0], np.float32), "a": np.array(5)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(snapshot(2, best=best))
    found = checkpoints.load().best
    assert list(found) == ["z", "a"]
    assert {name: value.tobytes() for name, value in found.items()} == {
        name: value.tobytes() for name, value in best.items()
    }
    checkpoints.save(snapshot(3))
    assert checkpoints.load().best is None
