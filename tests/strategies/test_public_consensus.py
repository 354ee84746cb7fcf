"""FedMD and DS-FL: what is agreed, in closed form; who is refused; what travels to whom."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from flwr.app import Context, Message

from metabloom.architectures import joined
from metabloom.config import RunConfig
from metabloom.errors import ConfigError, DataError
from metabloom.public import PublicData
from metabloom.public_logits import Subsets
from metabloom.strategies import STRATEGIES, UserLevelPrivacy
from metabloom.strategies.distilled import Distillation, distilled, logits_of
from metabloom.strategies.ds_fl import DSFL
from metabloom.strategies.fedmd import FedMD
from metabloom.streams import torch_stream
from metabloom.wire import from_record
from tests.strategies.toy import (
    Arrays,
    ShuffledGrid,
    Toy,
    ToyNet,
    bits,
    larger,
    model,
    start,
    strategy_of,
)

RECORDS, CLASSES = 24, 2
PUBLIC = PublicData.of(
    "drawn", torch.from_numpy(np.random.default_rng(7).normal(size=(RECORDS, 3)).astype("float32"))
)
HOW = Distillation(steps=20, lr=0.01, batch_size=8)
USER_PRIVACY = UserLevelPrivacy(
    noise_multiplier=1.0, max_update_norm=1.0, expected_clients=2, target_delta=1e-5
)
BOTH = pytest.mark.parametrize("kind", [FedMD, DSFL])

Opinion = Callable[[int, int], np.ndarray]  # (partition, round) -> logits (n, C)


def said(partition: int, number: int, records: int = RECORDS) -> np.ndarray:
    rng = np.random.default_rng([partition, number])
    return rng.normal(size=(records, CLASSES)).astype(np.float32)


@dataclass
class Speaker(Toy):
    """Clients that answer with opinions, and note what they were sent.

    Attributes:
        opinion: of a client in a round.
        subsets: as clients have them.
        spoils: partition -> what it does with its honest reply.
        sent: (kind, partition, round, names of the arrays that came).
    """

    opinion: Opinion = said
    subsets: Subsets = field(default_factory=lambda: Subsets(PUBLIC, 0, 0))
    spoils: dict[int, Callable[[Arrays], Arrays]] = field(default_factory=dict)
    sent: list[tuple[str, int, int, Arrays]] = field(default_factory=list)

    def _note(self, kind: str, message: Message, context: Context) -> tuple[int, int]:
        partition, number = super()._note(kind, message, context)
        self.sent.append((kind, partition, number, from_record(message.content["arrays"])))
        return partition, number

    def _train(self, message: Message, context: Context) -> Message:
        def learns(received: Arrays, partition: int, number: int) -> Arrays:
            reply = self.subsets.packed(self.opinion(partition, number), number)
            return self.spoils.get(partition, lambda arrays: arrays)(reply)

        self.learns = learns
        number = int(message.content["config"]["server-round"])
        reply = super()._train(message, context)
        partition = int(context.node_config["partition-id"])
        reply.content["arrays"] = to_record_of(learns({}, partition, number))
        return reply


def to_record_of(arrays: Arrays):
    from metabloom.wire import to_record

    return to_record(arrays)


def strategy(kind: type, **more):
    usual = {
        "models": {"": ToyNet(model())},
        "public": PUBLIC,
        "num_classes": CLASSES,
        "distillation": HOW,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
        "min_available_nodes": 1,
        "fraction_train": 1.0,
    }
    return kind(**{**usual, **more})


def softmax(z: np.ndarray) -> np.ndarray:
    powers = np.exp(z.astype(np.float64))
    return powers / powers.sum(axis=-1, keepdims=True)


def agreed_in(toy: Speaker, number: int) -> np.ndarray:
    """Return the logits that clients were sent after round ``number``."""
    found = [a for kind, _, n, a in toy.sent if kind == "train" and n == number + 1]
    assert all(int(one["round"]) == number for one in found)
    return found[0]["logits"]


# -- what is agreed --------------------------------------------------------------------------------


def test_fedmd_sends_the_unweighted_mean_of_the_round_before():
    toy = Speaker()
    start(strategy(FedMD), toy, nodes=4, rounds=3)
    for number in (1, 2):
        wanted = np.mean([said(client, number) for client in range(4)], axis=0)
        assert np.allclose(agreed_in(toy, number), wanted, atol=1e-6)
        counts = np.arange(1, 5) / 10  # of Toy: a mean by records would be another
        weighted = np.einsum("k,knc->nc", counts, [said(c, number) for c in range(4)])
        assert not np.allclose(agreed_in(toy, number), weighted, atol=1e-2)


def test_ds_fl_sends_sharpened_mean_probabilities():
    for temperature in (0.1, 0.5):
        toy = Speaker()
        start(strategy(DSFL, temperature=temperature), toy, nodes=3, rounds=2)
        p = np.mean([softmax(said(client, 1)) for client in range(3)], axis=0)
        powers = p**0 * np.exp(p / temperature)
        wanted = powers / powers.sum(axis=1, keepdims=True)
        assert np.allclose(softmax(agreed_in(toy, 1)), wanted, atol=1e-5)


def test_known_answer_14_of_entropy_reduction():
    p = np.log(np.array([[0.5, 0.3, 0.2]], dtype=np.float32))
    public = PublicData.of("one", torch.zeros(1, 3))
    net = torch.nn.Linear(3, 3)
    toy = Speaker(opinion=lambda *_: p, subsets=Subsets(public, 0, 0))
    chosen = strategy(DSFL, public=public, num_classes=3, models={"": net})
    arrays = {name: value.numpy() for name, value in net.state_dict().items()}
    start(chosen, toy, nodes=3, rounds=2, arrays=arrays)
    wanted = [[0.843795, 0.114195, 0.042010]]
    assert np.allclose(softmax(agreed_in(toy, 1)), wanted, atol=1e-5)


def test_the_first_round_has_nothing_to_digest():
    toy = Speaker()
    start(strategy(FedMD), toy, rounds=1)
    first = next(arrays for kind, _, _, arrays in toy.sent if kind == "train")
    assert int(first["round"]) == 0
    assert not first["logits"].any()


@BOTH
def test_a_subset_is_another_each_round_and_its_size_is_what_travels(kind: type):
    subsets = Subsets(PUBLIC, 5, 3)
    toy = Speaker(opinion=lambda client, n: said(client, n, 5), subsets=subsets)
    result = start(strategy(kind, public_subset=5, seed=3), toy, rounds=3)
    assert [report.quarantined for report in result.rounds] == [()] * 3
    assert agreed_in(toy, 1).shape == (5, CLASSES)
    assert not np.array_equal(subsets.rows(1), subsets.rows(2))


@BOTH
def test_the_order_of_replies_does_not_matter(kind: type):
    runs = [
        start(strategy(kind), Speaker(), rounds=2, grid=ShuffledGrid, grid_seed=seed)
        for seed in (0, 0)
    ]
    assert bits(runs[0].arrays) == bits(runs[1].arrays)


@pytest.mark.parametrize("by", ["median", "trimmed-mean"])
@BOTH
def test_a_resistant_consensus_is_not_moved_by_one_liar(kind: type, by: str):
    def opinion(client: int, number: int) -> np.ndarray:
        honest = said(0, number)  # all honest ones agree
        return -50 * honest if client == 4 else honest

    moved = {}
    for how in ("mean", by):
        toy = Speaker(opinion=opinion)
        start(strategy(kind, by=how, trim=0.3), toy, nodes=5, rounds=2)
        moved[how] = softmax(agreed_in(toy, 1)).argmax(1)
    wanted = said(0, 1).argmax(1)
    assert (moved[by] == wanted).all()
    if kind is FedMD:  # one client's probability of DS-FL is a fifth at most
        assert (moved["mean"] != wanted).any()


# -- the server's students -------------------------------------------------------------------------


@BOTH
def test_students_learn_what_was_agreed_and_are_what_the_run_leaves(kind: type):
    toy = Speaker()
    result = start(strategy(kind), toy, nodes=3, rounds=1)
    found = from_record(result.arrays)
    assert set(found) == set(model())  # nothing of what travelled
    z = np.stack([said(client, 1) for client in range(3)])
    agreed = z.mean(0) if kind is FedMD else np.mean([softmax(one) for one in z], axis=0) / 0.1
    targets = torch.from_numpy(softmax(agreed).astype(np.float32))
    stream = torch_stream(0, "student", 1, "")
    wanted = distilled(ToyNet(model()), model(), PUBLIC.inputs, targets, HOW, stream)
    # What they say, not their arrays: softmax does not see "half", so that Adam walks at random.
    net = ToyNet(model())
    ours, theirs = (logits_of(net, one, PUBLIC.inputs).softmax(1) for one in (found, wanted))
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert any(not np.array_equal(found[name], model()[name]) for name in wanted)


@BOTH
def test_training_is_about_logits_and_evaluation_about_students(kind: type):
    toy = Speaker(roles=("train", "train", "validation", "unseen"))
    start(strategy(kind), toy, nodes=4, rounds=2)
    names = {(kind, frozenset(arrays)) for kind, _, _, arrays in toy.sent}
    assert names == {
        ("train", frozenset({"logits", "round", "mark"})),
        ("evaluate", frozenset(model())),
    }


@BOTH
def test_every_architecture_has_a_student_and_says_the_same_names(kind: type):
    kinds = ("small", "large")
    toy = Speaker(
        architectures=("small", "small", "large", "small"),
        roles=("train", "train", "unseen", "unseen"),
    )
    models = {"small": model(), "large": larger()}
    nets = {name: ToyNet(arrays) for name, arrays in models.items()}
    chosen = strategy(kind, models=nets, architectures=kinds)
    result = start(chosen, toy, nodes=4, rounds=1, arrays=joined(models))
    assert set(from_record(result.arrays)) == set(joined(models))
    seen = {p: set(a) for what, p, _, a in toy.sent if what == "evaluate"}
    assert seen[2] == set(larger())
    assert seen[3] == set(model())
    # Nobody of "large" trained: its student learnt all the same.
    assert not np.array_equal(from_record(result.arrays)["large/body"], larger()["body"])


# -- how logits travel -----------------------------------------------------------------------------


@pytest.mark.parametrize(("encoding", "size"), [("float32", 4), ("float16", 2), ("int8", 1)])
def test_encodings_go_both_ways_and_are_counted(encoding: str, size: int):
    subsets = Subsets(PUBLIC, 0, 0, encoding)
    toy = Speaker(subsets=subsets)
    result = start(strategy(FedMD, encoding=encoding), toy, nodes=3, rounds=2)
    assert [report.quarantined for report in result.rounds] == [()] * 2
    wanted = np.mean([said(client, 1) for client in range(3)], axis=0)
    arrays = next(a for what, _, n, a in toy.sent if what == "train" and n == 2)
    assert np.allclose(subsets.unpacked(arrays, CLASSES), wanted, atol=0.05)
    assert arrays["logits"].dtype.itemsize == size
    headers = 128 * len(arrays)
    payload = RECORDS * CLASSES * size + (RECORDS * 4 if encoding == "int8" else 0) + 8 + 16
    assert result.rounds[0].bytes_up == 3 * (payload + headers)


# -- bad replies -----------------------------------------------------------------------------------

SPOILT = {
    "other records": (lambda a: a | {"mark": a["mark"] + np.uint8(1)}, "public data differ"),
    "an old round": (
        lambda a: Subsets(PUBLIC, 0, 0).packed(a["logits"], 7),
        "answers for round 7, this is round",
    ),
    "a round below 0": (lambda a: a | {"round": np.array(-1)}, "at least 0"),
    "NaN": (lambda a: a | {"logits": a["logits"] * np.float32("nan")}, "NaN or infinity"),
    "another shape": (lambda a: a | {"logits": a["logits"][:, :1].copy()}, "shape"),
    "another dtype": (lambda a: a | {"logits": a["logits"].astype(np.int32)}, "is of int32"),
    "no mark": (lambda a: {k: v for k, v in a.items() if k != "mark"}, "'mark' is missing"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
@BOTH
def test_a_bad_reply_is_quarantined_by_name_and_the_run_goes_on(kind: type, spoilt: str):
    spoil, reason = SPOILT[spoilt]
    toy = Speaker(roles=("train",) * 3, spoils={1: spoil})
    result = start(strategy(kind), toy, nodes=3, rounds=2)
    for report in result.rounds:
        ((name, why),) = report.quarantined
        assert name == "c1"
        assert reason in why
        assert not report.skipped
    honest = Speaker(roles=("train",) * 3, fails=lambda p, _: "away" if p == 1 else "")
    without = start(strategy(kind), honest, nodes=3, rounds=2)
    assert bits(result.arrays) == bits(without.arrays)


@BOTH
def test_who_spoils_every_round_is_left_out(kind: type):
    toy = Speaker(spoils={1: SPOILT["other records"][0]})
    result = start(strategy(kind, max_offences=2), toy, nodes=3, rounds=4)
    assert [len(report.quarantined) for report in result.rounds] == [1, 1, 0, 0]


@BOTH
def test_int8_whose_scale_is_not_finite_is_named(kind: type):
    def spoil(arrays: Arrays) -> Arrays:
        return arrays | {"scale": np.full_like(arrays["scale"], 3e38)}

    toy = Speaker(subsets=Subsets(PUBLIC, 0, 0, "int8"), spoils={0: spoil})
    result = start(strategy(kind, encoding="int8"), toy, nodes=3, rounds=1)
    ((_, why),) = result.rounds[0].quarantined
    assert "scale" in why or "NaN or infinity" in why


# -- what cannot be -------------------------------------------------------------------------------


@BOTH
def test_what_does_not_fit_is_refused_by_name(kind: type):
    with pytest.raises(ConfigError, match="the server teaches the module of each"):
        strategy(kind, architectures=("small",))
    with pytest.raises(ConfigError, match="choose another name"):
        strategy(kind, models={"public": ToyNet(model())}, architectures=("public",))
    with pytest.raises(ConfigError, match="user_privacy with"):
        strategy(kind, user_privacy=USER_PRIVACY)
    with pytest.raises(DataError, match="size = 25"):
        strategy(kind, public_subset=25)
    with pytest.raises(ConfigError, match="encoding of logits"):
        strategy(kind, encoding="int4")


def test_the_temperature_of_ds_fl_is_checked():
    with pytest.raises(ConfigError, match="temperature = 0"):
        strategy(DSFL, temperature=0)


@pytest.mark.parametrize("name", ["fedmd", "ds-fl"])
def test_multi_krum_is_refused_and_the_others_are_taken(name: str):
    with pytest.raises(ConfigError, match="multi-krum"):
        STRATEGIES[name](RunConfig.read({"aggregation": "multi-krum"}))
    assert "median" in strategy_of(name, {"aggregation": "median"}).settings["consensus"]
