"""Strategies that share a part of the models: what travels, what is averaged, and with whom."""

from pathlib import Path

import numpy as np
import pytest

from metabloom.architectures import joined, part_of
from metabloom.errors import ConfigError
from metabloom.strategies import (
    Checkpoints,
    FedBABU,
    FedPer,
    FedRep,
    LGFedAvg,
    Reply,
    UserLevelPrivacy,
    interpolate,
    server_optimizer,
)
from metabloom.strategies.by_architecture import by_architecture
from metabloom.strategies.shared_part import groups_of, over_groups, with_equal_parts
from metabloom.strategies.shell import roll_call
from metabloom.wire import from_record, to_record
from tests.strategies.summing_grid import blocks_of
from tests.strategies.toy import Arrays, Toy, bits, moved, start

BODY = ("body.weight", "body.scale", "body.count")
HEAD = ("head.weight", "head.bias")
SHARES_BODY = (FedPer, FedRep, FedBABU)
ALL = pytest.mark.parametrize("kind", [*SHARES_BODY, LGFedAvg])
ANY = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "POLL_S", 0.01)
    monkeypatch.setattr(roll_call, "GATHER_S", 0.05)


def model(classes: int = 2, seed: int = 0) -> Arrays:
    """Return a model: its body is the same for any number of classes, but for its values."""
    rng = np.random.default_rng(seed)
    return {
        "body.weight": rng.normal(size=(3, 4)).astype(np.float32),
        "body.scale": rng.normal(size=()),
        "body.count": np.array(4 + seed),
        "head.weight": rng.normal(size=(classes, 3)).astype(np.float32),
        "head.bias": rng.normal(size=classes).astype(np.float32),
    }


def strategy(kind: type[FedPer], **more) -> FedPer:
    return kind(heads={"": HEAD}, **{**ANY, **more})


def shared(kind: type[FedPer]) -> tuple[str, ...]:
    return BODY if kind in SHARES_BODY else HEAD


class Seen(Toy):
    """Clients that note which arrays each message had, and their values."""

    def __init__(self, **more) -> None:
        super().__init__(**more)
        self.seen: list[tuple[str, int, Arrays]] = []

    def _note(self, kind, message, context):
        partition, number = super()._note(kind, message, context)
        self.seen.append((kind, partition, from_record(message.content["arrays"])))
        return partition, number


# --- one architecture -----------------------------------------------------------------------------


@ALL
def test_training_is_about_the_shared_part_and_evaluation_about_the_whole_model(kind):
    toy = Seen(roles=("train", "train", "validation", "unseen"))
    result = start(strategy(kind), toy, nodes=4, arrays=model())
    names = {(asked, tuple(arrays)) for asked, _, arrays in toy.seen}
    assert names == {("train", shared(kind)), ("evaluate", tuple(model()))}
    size = sum(len(to_record(model())[name].data) for name in shared(kind))
    assert [report.bytes_up for report in result.rounds] == [2 * size] * 2


@ALL
def test_the_shared_part_is_the_weighted_mean_and_the_rest_stays_to_the_bit(kind):
    toy = Seen()
    found = from_record(start(strategy(kind), toy, nodes=3, rounds=1, arrays=model()).arrays)
    assert list(found) == list(model())
    sent = {name: model()[name] for name in shared(kind)}
    answers = [moved(sent, partition, 1) for partition in range(3)]
    for name, value in model().items():
        if name not in sent or not np.issubdtype(value.dtype, np.floating):
            assert found[name].tobytes() == value.tobytes(), name
            continue
        wanted = sum(n * one[name].astype(np.float64) for n, one in enumerate(answers, 1)) / 6
        np.testing.assert_allclose(found[name], wanted, rtol=1e-6)  # one rounding to float32
        assert not np.array_equal(found[name], value)


@ALL
def test_training_clients_are_scored_at_the_end_with_the_whole_model(kind):
    toy = Seen(roles=("train", "train", "unseen"))
    result = start(strategy(kind), toy, nodes=3, rounds=2, arrays=model())
    assert [score.client for score in result.trained] == ["c0", "c1"]
    last = [arrays for asked, _, arrays in toy.seen if asked == "evaluate"][-1]
    assert {name: value.tobytes() for name, value in last.items()} == bits(result.arrays)


@pytest.mark.parametrize("wrong", ["all", "none", "another"])
def test_a_reply_with_other_arrays_than_the_shared_part_is_quarantined(wrong: str):
    def learns(arrays: Arrays, partition: int, number: int) -> Arrays:
        good = moved(arrays, partition, number)
        if partition != 1:
            return good
        sent = {"all": {**good, **{name: model()[name] for name in HEAD}}, "none": {}}
        return sent.get(wrong, {name.replace("body", "head"): one for name, one in good.items()})

    result = start(strategy(FedPer), Toy(learns=learns), nodes=3, rounds=1, arrays=model())
    assert [client for client, _ in result.rounds[0].quarantined] == ["partition-1"]
    without = Toy(fails=lambda partition, number: "away" if partition == 1 else "")
    reference = start(strategy(FedPer), without, nodes=3, rounds=1, arrays=model())
    assert bits(result.arrays) == bits(reference.arrays)


@ALL
def test_sums_beside_the_clients_give_the_same(kind):
    grid = blocks_of()
    summed = start(strategy(kind), Toy(), nodes=9, rounds=2, arrays=model(), grid=grid)
    assert grid.last.summed == 2 * 8  # the ninth is alone in its block
    single = start(strategy(kind, partial_sums=False), Toy(), nodes=9, rounds=2, arrays=model())
    for name, value in from_record(single.arrays).items():
        # sums in another order: a rounding of float64, which may turn one of float32
        np.testing.assert_allclose(from_record(summed.arrays)[name], value, rtol=2e-7)


def test_user_level_noise_is_of_the_shared_part_alone(tmp_path: Path):
    privacy = UserLevelPrivacy(
        noise_multiplier=1.0,
        max_update_norm=0.1,
        expected_clients=3.0,
        target_delta=1e-5,
        ledger=tmp_path / "ledger.jsonl",
    )
    chosen = strategy(FedPer, user_privacy=privacy)
    result = start(chosen, Toy(), nodes=3, rounds=2, arrays=model())
    found = from_record(result.arrays)
    for name in HEAD:
        assert found[name].tobytes() == model()[name].tobytes()
    assert not np.array_equal(found["body.weight"], model()["body.weight"])
    assert result.user_level.rounds == 2


def test_a_checkpoint_of_another_head_is_refused(tmp_path: Path):
    start(strategy(FedPer, checkpoints=Checkpoints(tmp_path)), Toy(), rounds=1, arrays=model())
    other = FedPer(heads={"": ["head.bias"]}, checkpoints=Checkpoints(tmp_path, resume=True), **ANY)
    with pytest.raises(ConfigError, match=r"checkpoint has heads = 'head.bias, head.weight'"):
        start(other, Toy(), rounds=2, arrays=model())


# --- several architectures ------------------------------------------------------------------------

KINDS = ("two", "five", "odd")
OF_NODES = ("two", "five", "two", "odd", "five")


def odd() -> Arrays:
    """Return a model whose body is of another width."""
    return {**model(3), "body.weight": np.ones((3, 7), np.float32), "body.count": np.array(1)}


MODELS = {"two": model(2), "five": model(5, seed=1), "odd": odd()}
HEADS = {"two": HEAD, "five": HEAD, "odd": HEAD}


def heterogeneous(kind: type[FedPer] = FedPer, toy: Toy | None = None, **more):
    chosen = kind(heads=HEADS, architectures=KINDS, **{**ANY, **more})
    toy = toy or Toy(architectures=OF_NODES)
    return start(chosen, toy, nodes=5, rounds=1, arrays=joined(MODELS)), chosen


def body_of(arrays) -> np.ndarray:
    return np.append(arrays["body.weight"].astype(np.float64).ravel(), arrays["body.scale"])


def test_the_body_is_averaged_over_all_clients_that_share_it_whatever_heads_they_have():
    result, _ = heterogeneous()
    found = from_record(result.arrays)
    assert list(found) == list(joined(MODELS))
    first = {name: MODELS["two"][name] for name in BODY}  # those of one form begin alike
    together = [0, 1, 2, 4]
    answers = [(i + 1, body_of(moved(first, i, 1))) for i in together]  # Toy has i + 1 records
    wanted = sum(n * one for n, one in answers) / sum(n for n, _ in answers)
    for kind in ("two", "five"):
        np.testing.assert_allclose(body_of(part_of(found, kind)), wanted, rtol=1e-6)
    alone = moved({name: odd()[name] for name in BODY}, 3, 1)
    np.testing.assert_allclose(body_of(part_of(found, "odd")), body_of(alone), rtol=1e-6)
    for kind, arrays in MODELS.items():
        for name in HEAD:
            assert found[f"{kind}/{name}"].tobytes() == arrays[name].tobytes()
    # Averaging within each architecture, as other strategies do, gives another body.
    apart = [(i + 1, body_of(moved(first, i, 1))) for i in (0, 2)]
    assert not np.allclose(wanted, sum(n * one for n, one in apart) / 4, rtol=1e-3)


def test_clients_of_one_body_are_sent_the_same_bytes_and_are_evaluated_with_their_own_head():
    toy = Seen(architectures=(*OF_NODES[:3], "five", "two"), roles=("train",) * 3 + ("unseen",) * 2)
    result, _ = heterogeneous(toy=toy)
    trained = [arrays for asked, _, arrays in toy.seen if asked == "train"]
    assert all(tuple(arrays) == BODY for arrays in trained)
    assert len({arrays["body.weight"].tobytes() for arrays in trained}) == 1
    evaluated = {who: arrays for asked, who, arrays in toy.seen if asked == "evaluate" and who > 2}
    assert evaluated[3]["head.weight"].shape == (5, 3)
    assert evaluated[4]["head.weight"].shape == (2, 3)
    assert evaluated[3]["body.weight"].tobytes() == evaluated[4]["body.weight"].tobytes()
    assert bits(result.arrays)["two/body.weight"] == evaluated[4]["body.weight"].tobytes()


def test_lg_fedavg_shares_tops_of_one_form_under_bodies_of_any():
    """Here "two" and "odd" could have heads of one form: it is heads that make the groups."""
    arrays = {**MODELS, "odd": {**odd(), **{name: MODELS["two"][name] for name in HEAD}}}
    toy = Toy(architectures=OF_NODES)
    chosen = LGFedAvg(heads=HEADS, architectures=KINDS, **ANY)
    found = from_record(start(chosen, toy, nodes=5, rounds=1, arrays=joined(arrays)).arrays)
    assert (
        bits(to_record(part_of(found, "two")))["head.weight"]
        == (bits(to_record(part_of(found, "odd")))["head.weight"])
    )
    for kind, own in arrays.items():
        assert part_of(found, kind)["body.weight"].tobytes() == own["body.weight"].tobytes()
    shared_top = {name: arrays["two"][name] for name in HEAD}
    answers = [(i + 1, moved(shared_top, i, 1)["head.bias"]) for i in (0, 2, 3)]
    wanted = sum(n * one.astype(np.float64) for n, one in answers) / 8
    np.testing.assert_allclose(part_of(found, "two")["head.bias"], wanted, rtol=1e-6)


def test_an_architecture_without_an_answer_has_the_body_that_the_others_trained():
    toy = Toy(architectures=OF_NODES, fails=lambda i, number: "no" if OF_NODES[i] == "five" else "")
    result, _ = heterogeneous(toy=toy)
    found = from_record(result.arrays)
    assert np.array_equal(found["five/body.weight"], found["two/body.weight"])
    assert not np.array_equal(found["five/body.weight"], MODELS["five"]["body.weight"])


def test_two_halves_are_the_whole_with_a_shared_body(tmp_path: Path):
    def run(rounds: int, **more):
        chosen = FedPer(heads=HEADS, architectures=KINDS, **ANY, **more)
        toy = Toy(architectures=OF_NODES)
        return start(chosen, toy, nodes=5, rounds=rounds, arrays=joined(MODELS))

    whole = run(4)
    run(2, checkpoints=Checkpoints(tmp_path))
    resumed = run(4, checkpoints=Checkpoints(tmp_path, resume=True))
    assert bits(resumed.arrays) == bits(whole.arrays)


# --- the rule -------------------------------------------------------------------------------------


def bodies() -> Arrays:
    return {
        f"{kind}/{name}": MODELS["two" if kind == "five" else kind][name]
        for kind in KINDS
        for name in BODY
    }


def replies() -> list[Reply]:
    answers = []
    for i, kind in enumerate(OF_NODES):
        arrays = moved(part_of(bodies(), kind), i, 1)
        answers.append(Reply(joined({kind: arrays}), i + 1))
    return answers


def test_groups_are_of_one_form_and_keep_the_order_of_the_architectures():
    assert groups_of(bodies(), KINDS) == [["two", "five"], ["odd"]]
    other = {**bodies(), "five/body.scale": np.array(1.0, np.float32)}  # another dtype
    assert groups_of(other, KINDS) == [["two"], ["five"], ["odd"]]
    renamed = {name.replace("two/body", "two/trunk"): value for name, value in bodies().items()}
    assert groups_of(renamed, KINDS) == [["two"], ["five"], ["odd"]]


def test_the_shared_rule_is_that_of_one_architecture_where_only_one_shares():
    sent, answers = bodies(), replies()
    kinds = ("odd",)
    own = {name: value for name, value in sent.items() if name.startswith("odd/")}
    mine = [reply for reply in answers if any(name in own for name in reply.arrays)]
    for make in (over_groups, by_architecture):
        rule = make(interpolate(), kinds)
        _, found = rule.update(rule.init(own), own, mine)
        assert np.array_equal(found["odd/body.weight"], mine[0].arrays["odd/body.weight"])


def test_averaging_each_architecture_by_itself_is_refused_by_the_closed_form():
    """The wrong variant: the rule of other strategies, on the same replies."""
    sent, answers = bodies(), replies()
    wanted = sum(
        reply.num_examples * part_of(reply.arrays, kind)["body.weight"].astype(np.float64)
        for reply, kind in zip(answers, OF_NODES, strict=True)
        if kind != "odd"
    ) / sum(n for n, kind in zip(range(1, 6), OF_NODES, strict=True) if kind != "odd")

    def off(make) -> float:
        rule = make(interpolate(), KINDS)
        _, found = rule.update(rule.init(sent), sent, answers)
        return max(
            float(np.abs(found[f"{kind}/body.weight"] - wanted).max()) for kind in ("two", "five")
        )

    assert off(over_groups) < 1e-6
    assert off(by_architecture) > 1e-2


def test_a_state_is_kept_for_each_group():
    import torch

    rule = over_groups(server_optimizer(lambda p: torch.optim.Adam(p, lr=0.1)), KINDS)
    sent = bodies()
    state = rule.init(sent)
    assert set(state) == {"two", "odd"}
    state, new = rule.update(state, sent, replies()[:2])
    assert set(state["two"]) == {"optimizer", "trained"}
    assert state["odd"] == {}
    assert list(new) == list(sent)
    assert all(np.array_equal(new[f"odd/{name}"], sent[f"odd/{name}"]) for name in BODY)


def test_parts_of_one_form_begin_alike_and_others_as_they_are():
    own = {f"{kind}/{name}": MODELS[kind][name] for kind in KINDS for name in BODY}
    found = with_equal_parts(own, KINDS)
    assert list(found) == list(own)
    assert np.array_equal(found["five/body.weight"], own["two/body.weight"])
    assert np.array_equal(found["odd/body.weight"], own["odd/body.weight"])
    assert not np.array_equal(own["five/body.weight"], own["two/body.weight"])  # left as it was


# --- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "shell"),
    [
        ({"a": HEAD}, {}),
        ({"": HEAD}, {"architectures": ("a",)}),
        ({"a": HEAD, "b": HEAD}, {"architectures": ("a",)}),
        ({"": ()}, {}),
    ],
)
@ALL
def test_heads_that_are_not_those_of_the_architectures_are_refused(kind, heads, shell):
    with pytest.raises(ConfigError, match="the arrays of each one's head are needed"):
        kind(heads=heads, **shell)
