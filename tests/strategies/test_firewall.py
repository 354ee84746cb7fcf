"""The firewall lets no bad number through, never raises, and touches no good reply."""

import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from metabloom.errors import ConfigError
from metabloom.sim import CohortGrid
from metabloom.strategies import Firewall, interpolate
from metabloom.strategies.rules import Reply
from metabloom.strategies.shell import roll_call
from metabloom.strategies.shell.firewall import clipped, not_finite, sift
from metabloom.strategies.shell.firewall import judge as judged
from metabloom.strategies.shell.reply_metrics import aggregate_metrics
from metabloom.wire import from_record, to_record
from tests.strategies.bad_replies import BAD_REPLIES, grid_with
from tests.strategies.toy import Toy, bits, start, strategy_of

SENT = {
    "w": np.zeros((2, 2), np.float32),
    "h": np.ones(3, np.float16),
    "n": np.array(4, np.int64),
}
KEY = "num-examples"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "POLL_S", 0.01)
    monkeypatch.setattr(roll_call, "GATHER_S", 0.05)


@pytest.fixture(autouse=True, scope="module")
def running_task() -> None:
    """Set the identity of a running task, without which Flower makes no messages."""
    CohortGrid(Toy().app(), num_nodes=1)


def judge(*arguments) -> str:
    return judged(*arguments).reason


def reply(content: RecordDict) -> Message:
    question = Message(RecordDict(), 7, "train")
    question.metadata.__dict__["_message_id"] = "1"
    return Message(content, reply_to=question)


def good(weight: float = 1, **arrays: np.ndarray) -> Message:
    content = {"arrays": to_record({**SENT, **arrays}), "metrics": MetricRecord({KEY: weight})}
    return reply(RecordDict(content))


# --- whatever comes -------------------------------------------------------------------------------

numbers = st.floats(width=64) | st.integers() | st.just(10**400)
metrics = st.dictionaries(
    st.sampled_from([KEY, "loss", "x"]),
    numbers | st.lists(st.floats(), max_size=3) | st.lists(st.integers(), max_size=3),
)
dtypes = st.sampled_from(
    [np.float16, np.float32, np.float64, np.int64, np.bool_, np.complex64, "U2", ">f4"]
)
shapes = st.sampled_from([(2, 2), (3,), (), (0,), (1,), (4,), (2, 2, 1)])


@st.composite
def plausible_arrays(draw) -> dict[str, Array]:
    """Arrays that are right in most respects, so that each check is reached."""
    record = {}
    for name, value in SENT.items():
        kind = draw(st.sampled_from(["as sent", "other values", "anything", "bytes", "missing"]))
        if kind == "as sent":
            record[name] = Array(value)
        elif kind == "other values":
            record[name] = Array(draw(hnp.arrays(value.dtype, value.shape)))
        elif kind == "anything":
            record[name] = Array(draw(hnp.arrays(draw(dtypes), draw(shapes))))
        elif kind == "bytes":
            data = bytearray(Array(value).data)
            for position in draw(st.lists(st.integers(0, len(data) - 1), max_size=4)):
                data[position] = draw(st.integers(0, 255))
            cut = draw(st.integers(0, len(data)))
            stype = draw(st.sampled_from(["numpy.ndarray", "", "pickle"]))
            record[name] = Array(str(value.dtype), value.shape, stype, bytes(data[:cut]))
    return record


@st.composite
def contents(draw) -> RecordDict:
    records = {}
    for index in range(draw(st.sampled_from([1, 1, 1, 0, 2]))):
        records[f"arrays-{index}"] = ArrayRecord(draw(plausible_arrays()))
    for index in range(draw(st.sampled_from([1, 1, 1, 0, 2]))):
        values = draw(metrics) | draw(st.sampled_from([{}, {KEY: 3}, {KEY: 0.5}]))
        records[f"metrics-{index}"] = MetricRecord(values)
    if draw(st.booleans()):
        records["config"] = ConfigRecord({"text": draw(st.text(max_size=3))})
    return RecordDict(records)


@settings(max_examples=400, deadline=None)
@given(st.lists(contents(), min_size=1, max_size=4))
def test_it_never_raises_and_what_it_lets_through_is_finite_and_fits(found: list[RecordDict]):
    fine, bad = sift([reply(content) for content in found], SENT, Firewall(), KEY)
    assert len(fine) + len(bad) == len(found)
    assert all(0 < len(one.reason) <= 503 for one in bad)
    answers = []
    for one in fine:
        arrays = one.arrays
        assert {n: (v.shape, v.dtype) for n, v in arrays.items()} == {
            n: (v.shape, v.dtype) for n, v in SENT.items()
        }
        assert all(np.isfinite(value).all() for value in arrays.values())
        assert max(float(np.abs(value).max()) for value in arrays.values()) <= 1e20
        (metric,) = one.message.content.metric_records.values()
        assert 0 < metric[KEY] <= 1e9
        answers.append(Reply(arrays, float(metric[KEY])))
    if answers:
        _, new = interpolate().update({}, SENT, answers)
        assert not not_finite(new)
        together = aggregate_metrics([one.message.content for one in fine], _mean_of_flowers(), KEY)
        for value in together.values():
            assert all(math.isfinite(v) for v in (value if isinstance(value, list) else [value]))


@settings(max_examples=200, deadline=None)
@given(contents())
def test_it_never_raises_on_the_replies_of_an_evaluation(content: RecordDict):
    fine, bad = sift([reply(content)], None, Firewall(), KEY)
    assert len(fine) + len(bad) == 1


def _mean_of_flowers():
    from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

    return aggregate_metricrecords


# --- what honest clients send ---------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.float32, (2, 2), elements=st.floats(-(2.0**66), 2.0**66, width=32)),
    hnp.arrays(np.float16, (3,), elements=st.floats(-60_000, 60_000, width=16)),
    st.integers(1, 10**9),
)
def test_every_reply_within_the_bounds_is_good_and_stays_as_it_is(w, h, weight):
    message = good(weight, w=w, h=h)
    before = bits(message.content["arrays"])
    assert judge(message, SENT, Firewall(), KEY) == ""
    fine, bad = sift([message], SENT, Firewall(), KEY)
    assert [one.message for one in fine] == [message]
    assert not bad
    assert bits(message.content["arrays"]) == before


def test_layouts_in_memory_do_not_matter():
    fortran = np.asfortranarray(np.arange(4, dtype=np.float32).reshape(2, 2))
    assert judge(good(w=fortran), SENT, Firewall(), KEY) == ""


def test_a_good_value_at_the_bound_passes_and_the_next_one_does_not():
    edge = np.full((2, 2), 4.0, np.float32)
    above = np.array([[4, 4], [4, np.nextafter(np.float32(4), np.float32(5))]], np.float32)
    firewall = Firewall(max_value=4.0)
    assert judge(good(w=edge), SENT, firewall, KEY) == ""
    assert "'w' holds 4" in judge(good(w=above), SENT, firewall, KEY)


def test_the_weight_at_the_bound_passes():
    assert judge(good(10**9), SENT, Firewall(), KEY) == ""
    assert "1000000001" in judge(good(10**9 + 1), SENT, Firewall(), KEY)


# --- shares ---------------------------------------------------------------------------------------


def shares(weights: list[float], **bounds: float) -> list[float]:
    fine, _ = sift([good(weight) for weight in weights], SENT, Firewall(**bounds), KEY)
    return [one.message.content["metrics"][KEY] for one in fine]


def test_a_weight_that_outvotes_the_others_is_refused_where_there_are_three_or_more():
    assert shares([1, 99]) == [1, 99]
    assert shares([1, 99, 1]) == [1, 1]
    assert shares([5, 90, 5]) == [5, 90, 5]  # 90% is not above 90%
    assert shares([5, 91, 5]) == [5, 5]


def test_what_is_left_is_judged_again():
    assert shares([1, 1, 1000, 10**6]) == [1, 1]
    assert shares([1, 1, 1, 1000, 10**6]) == [1, 1, 1]


def test_the_share_is_an_option():
    assert shares([1, 1, 2], max_share=0.4) == [1, 1]
    assert shares([1, 1, 10**6], max_share=1.0) == [1, 1, 10**6]


# --- the norm of an update ------------------------------------------------------------------------


def test_an_update_above_the_bound_is_refused_and_one_at_it_is_not():
    moved = good(w=np.full((2, 2), 1.5, np.float32))  # of norm 3
    assert judge(moved, SENT, Firewall(max_update_norm=3.0), KEY) == ""
    said = judge(moved, SENT, Firewall(max_update_norm=2.9), KEY)
    assert said == "its update has norm 3, above 2.9"
    assert judge(moved, SENT, Firewall(max_update_norm=2.9, norm_action="clip"), KEY) == ""


def test_a_clipped_update_keeps_its_direction_its_dtypes_and_the_bound():
    sent = {"a": np.array([1.0, 2.0]), "b": np.array(3.0, np.float32), "n": np.array(5)}
    arrays = {"a": np.array([4.0, 2.0]), "b": np.array(7.0, np.float32), "n": np.array(6)}
    new = clipped(arrays, sent, 2.5)  # the update (3, 0), 4 of norm 5: half of it
    assert new["a"].tolist() == [2.5, 2.0]
    assert float(new["b"]) == 5.0
    assert int(new["n"]) == 6
    assert {n: v.dtype for n, v in new.items()} == {n: v.dtype for n, v in arrays.items()}
    assert clipped(arrays, sent, 5.0) is arrays


def test_clipping_in_a_run_bounds_what_one_client_can_do():
    grid = grid_with(BAD_REPLIES["1e30"].tamper)
    strategy = strategy_of(
        "fedavg",
        firewall=Firewall(max_value=1e31, max_update_norm=1.0, norm_action="clip"),
        eval_every=0,
    )
    result = start(strategy, Toy(), rounds=1, grid=grid)
    moved = from_record(result.arrays)["bias"] - np.array([0.1, -0.2])
    assert np.linalg.norm(moved) <= 1.0
    assert not result.rounds[0].quarantined


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_value": 0.0}, "max_value = 0.0"),
        ({"max_value": math.nan}, "max_value = nan"),
        ({"max_weight": -1.0}, "max_weight = -1.0"),
        ({"max_weight": math.inf}, "max_weight = inf"),
        ({"max_share": 0.0}, "max_share = 0.0"),
        ({"max_share": 1.1}, "max_share = 1.1"),
        ({"max_update_norm": 0.0}, "max_update_norm = 0.0"),
        ({"norm_action": "cilp"}, "did you mean 'clip'"),
    ],
)
def test_a_bound_out_of_range_is_refused_by_name(wrong: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        Firewall(**wrong)


# --- in a run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", [4, 5])
def test_a_round_below_the_quorum_is_skipped(needed: int):
    grid = grid_with(BAD_REPLIES["NaN"].tamper)
    result = start(strategy_of("fedmeta", min_fit_replies=needed), Toy(), grid=grid)
    assert [report.skipped for report in result.rounds] == [needed == 5] * 2


def test_a_repeated_offender_is_sampled_no_more():
    grid = grid_with(BAD_REPLIES["extra array"].tamper)
    toy = Toy()
    result = start(strategy_of("fedavg", max_offences=2), toy, rounds=4, grid=grid)
    assert [len(report.quarantined) for report in result.rounds] == [1, 1, 0, 0]
    assert ["partition-2" in report.clients for report in result.rounds] == [True, True] + 2 * [
        False
    ]
    toy = Toy(fails=lambda partition, number: "no memory" if partition == 1 else "")
    result = start(strategy_of("fedavg", max_offences=1, eval_every=0), toy, rounds=3)
    assert [len(report.failures) for report in result.rounds] == [1, 0, 0]


def test_where_all_are_offenders_rounds_are_skipped_and_the_run_ends_normally():
    grid = grid_with(BAD_REPLIES["NaN"].tamper, bad=range(5))
    result = start(strategy_of("fedavg", max_offences=1), Toy(), rounds=3, grid=grid)
    assert [report.skipped for report in result.rounds] == [True] * 3
    assert [len(report.clients) for report in result.rounds] == [5, 0, 0]


def test_a_model_that_overflows_in_aggregation_is_not_taken():
    """Replies of 1e20 are finite, and so is their mean; a server rate of 1e30 is too much."""
    values = {"server-optimizer": "sgd", "outer-lr": 1e38}
    big = Toy(learns=lambda arrays, p, n: {k: v + type(v.flat[0])(100) for k, v in arrays.items()})
    result = start(strategy_of("fedmeta", values, eval_every=0), big)
    assert [report.skipped for report in result.rounds] == [True, True]
    assert all(np.isfinite(value).all() for value in from_record(result.arrays).values())


def test_a_metric_that_diverged_in_an_evaluation_is_left_out_by_name_and_the_others_count():
    class Diverges(Toy):
        def _evaluate(self, message, context):
            answer = super()._evaluate(message, context)
            if context.node_config["partition-id"] == 1:
                record = answer.content["metrics"]
                record["loss"], record["accuracy"] = math.nan, 0.5
            return answer

    result = start(strategy_of("fedavg"), Diverges(), nodes=3, rounds=1)
    (report,) = result.rounds
    assert ("partition-1", "metric 'loss' holds NaN or infinity: left out") in report.quarantined
    assert [score.metrics for score in report.validation] == [
        {"loss": 0.0},
        {"accuracy": 0.5},
        {"loss": pytest.approx(0.2)},
    ]
    mean = result.evaluate_metrics_clientapp[1]
    assert mean["loss"] == pytest.approx((1 * 0.0 + 3 * 0.2) / 4)  # over those that have it
    assert mean["accuracy"] == 0.5


def test_metrics_that_some_lack_are_means_over_those_that_have_them():
    def reply_of(weight: int, **values: float | list[float]) -> RecordDict:
        return RecordDict({"metrics": MetricRecord({KEY: weight, **values})})

    mean = aggregate_metrics(
        [
            reply_of(1, loss=1.0, a=4.0, v=[1.0, 2.0]),
            reply_of(3, loss=3.0, v=[3.0, 4.0]),
            reply_of(4, loss=5.0, a=8.0, v=7.0),
        ],
        _mean_of_flowers(),
        KEY,
    )
    assert dict(mean) == {
        "loss": pytest.approx((1 + 9 + 20) / 8),
        "a": pytest.approx((4 + 32) / 5),
        "v": pytest.approx([(1 + 9) / 4, (2 + 12) / 4]),
    }


# --- wrong variants -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "lets_through"),
    [
        ("compares with > only", np.nan),  # nan > bound is False
        ("looks at the sum", np.inf),  # inf - inf = nan, and nan > bound is False
    ],
)
def test_the_tests_refuse_wrong_finiteness_checks(variant: str, lets_through: float):
    """What a plain comparison lets through, the firewall does not."""
    value = np.array([[lets_through, -lets_through], [0, 0]], np.float32)  # 1e20 ** 2 overflows
    with np.errstate(invalid="ignore"):
        wrong = {
            "compares with > only": not np.abs(value).max() > 1e20,
            "looks at the sum": not abs(value.sum()) > 1e20,
        }
    assert wrong[variant]
    assert judge(good(w=value), SENT, Firewall(), KEY)
