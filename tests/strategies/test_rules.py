"""The pure rules: known answers, torch.optim run by hand, laws, and wrong rules that fail them."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metabloom.errors import ConfigError
from metabloom.strategies import (
    Reply,
    Rule,
    interpolate,
    median,
    multi_krum,
    server_optimizer,
    trimmed_mean,
)
from metabloom.strategies.fedmeta import OPTIMIZERS, FedMeta

LR = 0.01
WEIGHTINGS = ("uniform", "examples")


def every_rule() -> dict[str, Rule]:
    rules = {f"mean-{w}": interpolate(weighting=w) for w in WEIGHTINGS}
    rules |= {f"half-{w}": interpolate(0.5, weighting=w) for w in WEIGHTINGS}
    resistant = {"median": median(), "trimmed-mean": trimmed_mean(0.4), "multi-krum": multi_krum(1)}
    rules |= {name: interpolate(aggregate=aggregate) for name, aggregate in resistant.items()}
    for name, kind in OPTIMIZERS.items():
        rules[name] = server_optimizer(lambda params, kind=kind: kind(params, lr=LR))
    return rules


RULES = every_rule()
EVERY = pytest.mark.parametrize("name", sorted(RULES))


def frozen(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for value in arrays.values():
        value.flags.writeable = False
    return arrays


def sent_model(seed: int = 0) -> dict[str, np.ndarray]:
    """Return read-only arrays of several shapes and dtypes."""
    rng = np.random.default_rng(seed)
    return frozen(
        {
            "matrix": rng.normal(size=(3, 2)).astype(np.float32),
            "double": rng.normal(size=4),
            "scalar": np.array(rng.normal(), dtype=np.float32),
            "half": rng.normal(size=2).astype(np.float16),
            "empty": np.zeros((0, 3), np.float32),
            "counter": np.array(5, dtype=np.int64),
            "flags": np.array([True, False]),
        }
    )


def replies_to(sent: dict[str, np.ndarray], count: int = 3, seed: int = 1) -> list[Reply]:
    """Return read-only replies near ``sent``, of 1, 2, 3, ... examples."""
    rng = np.random.default_rng(seed)
    return [
        Reply(
            frozen(
                {
                    name: np.asarray(value + rng.normal(size=value.shape), dtype=value.dtype)
                    if np.issubdtype(value.dtype, np.floating)
                    else np.ones_like(value)
                    for name, value in sent.items()
                }
            ),
            num_examples=index + 1,
        )
        for index in range(count)
    ]


def one_array(value: float) -> dict[str, np.ndarray]:
    return {"w": np.array([value], dtype=np.float64)}


def floating(arrays: dict[str, np.ndarray]) -> list[str]:
    return [name for name, value in arrays.items() if np.issubdtype(value.dtype, np.floating)]


# --- known answers --------------------------------------------------------------------------------


def displacement(rule: Rule, gradients: Sequence[float]) -> float:
    """Return how far ``rule`` moves one weight that gets ``gradients``, one a round."""
    arrays = one_array(0.0)
    state = rule.init(arrays)
    for gradient in gradients:
        reply = Reply({"w": arrays["w"] - gradient}, 1)
        state, arrays = rule.update(state, arrays, [reply])
    return float(arrays["w"][0])


def adam(params) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=LR)


def rebuilt(factory: Callable) -> Rule:
    """A wrong rule: it builds its optimiser anew each round, as Flower's fedmeta baseline does."""
    right = server_optimizer(factory)
    return Rule(init=right.init, update=lambda _, sent, replies: right.update({}, sent, replies))


def obeys_known_answer_4(rule: Rule) -> bool:
    # Round 1 moves by -lr (m/sqrt(v) = 1 after bias correction). Round 2: m = (.9*.1 + .1*-.1)/.19
    # = .421053, v = (.999*.001 + .001*.01)/.001999 = .504752, m/sqrt(v) = .592649.
    # Adam's eps of 1e-8 shifts each step by 1e-8 of itself.
    return displacement(rule, [1.0, -0.1]) == pytest.approx(-1.592649 * LR, rel=1e-6)


def test_adam_keeps_its_state_over_the_rounds():
    assert obeys_known_answer_4(server_optimizer(adam))


def test_a_rule_that_rebuilds_adam_each_round_is_caught():
    wrong = rebuilt(adam)
    assert not obeys_known_answer_4(wrong)
    # Each of its steps is lr * sign(gradient), up to eps: they cancel.
    assert displacement(wrong, [1.0, -0.1]) == pytest.approx(0.0, abs=1e-6 * LR)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_reptile_with_epsilon_1_is_fedavg_to_the_bit(weighting: str):
    sent = sent_model()
    replies = replies_to(sent)
    _, reptile = interpolate(1.0, weighting=weighting).update({}, sent, replies)
    _, fedavg = interpolate(weighting=weighting).update({}, sent, replies)
    _, short = interpolate(1 - 1e-3, weighting=weighting).update({}, sent, replies)
    for name in sent:
        assert reptile[name].tobytes() == fedavg[name].tobytes()
    assert reptile["matrix"].tobytes() != short["matrix"].tobytes()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_reptile_with_epsilon_one_half_goes_half_the_way(weighting: str):
    sent = sent_model()
    replies = replies_to(sent)
    _, half = interpolate(0.5, weighting=weighting).update({}, sent, replies)
    _, whole = interpolate(1.0, weighting=weighting).update({}, sent, replies)
    for name in floating(sent):
        start = sent[name].astype(np.float64)
        step, full = half[name] - start, whole[name] - start
        eps = np.finfo(sent[name].dtype).eps
        # Two results, each rounded once to the array's dtype; values are below 4.
        np.testing.assert_allclose(step, full / 2, atol=4 * eps, rtol=0, err_msg=name)


def test_weights_are_equal_or_in_proportion_to_the_examples():
    sent = one_array(0.0)
    replies = [Reply(one_array(1.0), 1), Reply(one_array(5.0), 3)]
    _, uniform = interpolate(weighting="uniform").update({}, sent, replies)
    _, examples = interpolate(weighting="examples").update({}, sent, replies)
    assert uniform["w"] == [3.0]
    assert examples["w"] == [4.0]  # 1/4 * 1 + 3/4 * 5


# --- server optimisers against torch.optim by hand ------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_rounds_move_the_model_as_torch_optim_does_by_hand(name: str, weighting: str):
    rng = np.random.default_rng(2)
    sent = {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=2)}
    p = np.array([1, 1, 1]) / 3 if weighting == "uniform" else np.array([1, 2, 3]) / 6
    rule = server_optimizer(lambda params: OPTIMIZERS[name](params, lr=LR), weighting=weighting)
    by_hand = {key: torch.tensor(value, requires_grad=True) for key, value in sent.items()}
    optimizer = OPTIMIZERS[name](by_hand.values(), lr=LR)
    state, arrays = rule.init(sent), sent
    for number in range(4):
        replies = replies_to(arrays, seed=number)
        for key, tensor in by_hand.items():
            mean = sum(share * reply.arrays[key] for share, reply in zip(p, replies, strict=True))
            tensor.grad = torch.tensor(arrays[key] - mean)
        before = {key: tensor.detach().clone() for key, tensor in by_hand.items()}
        optimizer.step()
        state, new = rule.update(state, arrays, replies)
        for key, tensor in by_hand.items():
            delta = (tensor.detach() - before[key]).numpy()
            # float64 throughout: the replies' differences carry 1e-16, and so do the steps.
            np.testing.assert_allclose(new[key] - arrays[key], delta, rtol=1e-9, atol=1e-13)
            assert np.abs(delta).max() > 1e-4  # it is a step that is compared
        arrays = new


def test_sgd_with_rate_1_takes_the_mean():
    sent = sent_model()
    replies = replies_to(sent)
    rule = server_optimizer(lambda params: torch.optim.SGD(params, lr=1.0))
    _, stepped = rule.update(rule.init(sent), sent, replies)
    _, mean = interpolate(weighting="uniform").update({}, sent, replies)
    for name in floating(sent):
        # w - (w - mean) in float64 errs by 1e-16: at most one rounding of the dtype apart.
        eps = np.finfo(sent[name].dtype).eps
        np.testing.assert_allclose(stepped[name], mean[name], rtol=eps, atol=1e-15, err_msg=name)


def test_momentum_is_kept_over_the_rounds():
    rule = server_optimizer(lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.5))
    assert displacement(rule, [1.0, 0.0, 0.0]) == -1.75  # 1 + 1/2 + 1/4
    assert (
        displacement(rebuilt(lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.5)), [1.0, 0.0]) == -1
    )


# --- arithmetic -----------------------------------------------------------------------------------


def test_sums_are_accumulated_in_float64():
    # 1e8 + 1 is 1e8 in float32: adding in turn would lose each of the small values.
    values = [1e8, 1.0, 1.0, 1.0, 1.0, -1e8]
    sent = {"w": np.zeros(1, np.float32)}
    replies = [Reply({"w": np.array([value], np.float32)}, 1) for value in values]
    in_float32 = np.float32(0)
    for value in values:
        in_float32 += np.float32(value / 6)
    _, new = interpolate(weighting="uniform").update({}, sent, replies)
    assert abs(in_float32 - 4 / 6) > 0.1  # the trap is real
    # float64 sums of 1e8/6 carry 1e8 * 1e-16, 1e-8 each.
    assert new["w"][0] == pytest.approx(4 / 6, abs=1e-7)


def test_many_small_steps_are_not_lost_in_half_precision():
    sent = {"w": np.zeros(1, np.float16)}
    replies = [Reply({"w": np.array([1.0], np.float16)}, 1) for _ in range(5000)]
    _, new = interpolate(weighting="uniform").update({}, sent, replies)
    assert new["w"][0] == 1.0  # 5000 float16 additions of 1/5000 stop below 1/2


@pytest.mark.parametrize("kind", sorted(set(OPTIMIZERS) - {"adamw"}))  # that one decays weights
def test_a_zero_gradient_of_a_half_precision_array_moves_nothing(kind: str):
    sent = {"w": np.array([1.5], np.float16)}
    rule = server_optimizer(lambda params: OPTIMIZERS[kind](params, lr=LR))
    state, new = rule.update(rule.init(sent), sent, [Reply(sent, 1)])
    state, new = rule.update(state, new, [Reply(new, 1)])
    assert new["w"][0] == 1.5  # in float16 Adam's eps is 0 and 0 / 0 is NaN


# --- laws of every rule ---------------------------------------------------------------------------


@EVERY
def test_a_rule_keeps_names_order_shapes_and_dtypes(name: str):
    sent = sent_model()
    rule = RULES[name]
    state, new = rule.update(rule.init(sent), sent, replies_to(sent))
    _, again = rule.update(state, new, replies_to(sent, seed=9))
    for arrays in (new, again):
        assert list(arrays) == list(sent)
        for key, value in sent.items():
            assert isinstance(arrays[key], np.ndarray), key
            assert (arrays[key].shape, arrays[key].dtype) == (value.shape, value.dtype), key


@EVERY
def test_a_rule_leaves_integers_and_flags_as_they_were_sent(name: str):
    sent = sent_model()
    rule = RULES[name]
    _, new = rule.update(rule.init(sent), sent, replies_to(sent))
    assert new["counter"] == 5
    assert new["flags"].tolist() == [True, False]
    assert all(np.abs(new[key] - sent[key]).max() > 0 for key in ("matrix", "double", "scalar"))


@EVERY
def test_a_rule_never_writes_into_its_arguments(name: str):
    sent = sent_model()  # read-only, as are the replies: writing in place raises
    replies = replies_to(sent)
    rule = RULES[name]
    before = [
        value.tobytes()
        for arrays in (sent, *(r.arrays for r in replies))
        for value in arrays.values()
    ]
    state = rule.init(sent)
    rule.update(state, sent, replies)
    after = [
        value.tobytes()
        for arrays in (sent, *(r.arrays for r in replies))
        for value in arrays.values()
    ]
    assert before == after


@EVERY
def test_the_result_shares_no_writable_memory_with_replies_or_state(name: str):
    sent = sent_model()
    replies = replies_to(sent)
    rule = RULES[name]
    state, new = rule.update(rule.init(sent), sent, replies)
    kept = copy.deepcopy(dict(state))
    for key in floating(new):
        new[key][...] = 99.0  # what a caller does with the model must not reach the next round
    _, first = rule.update(state, sent, replies)
    _, second = rule.update(kept, sent, replies)
    assert all(first[key].tobytes() == second[key].tobytes() for key in sent)


@EVERY
def test_an_update_from_the_same_state_gives_the_same_result_twice(name: str):
    sent = sent_model()
    rule = RULES[name]
    state, arrays = rule.update(rule.init(sent), sent, replies_to(sent))
    _, first = rule.update(state, arrays, replies_to(sent, seed=5))
    _, second = rule.update(state, arrays, replies_to(sent, seed=5))
    assert all(first[key].tobytes() == second[key].tobytes() for key in sent)


@EVERY
def test_one_reply_counts_fully_whatever_its_weight(name: str):
    sent = sent_model()
    (reply,) = replies_to(sent, count=1)
    rule = RULES[name]
    _, light = rule.update(rule.init(sent), sent, [reply])
    _, heavy = rule.update(rule.init(sent), sent, [Reply(reply.arrays, 1000)])
    assert all(light[key].tobytes() == heavy[key].tobytes() for key in sent)


models = st.lists(
    st.tuples(
        st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), st.integers(1, 10_000)
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@given(answers=models, shuffle=st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_the_order_of_replies_changes_rounding_alone(weighting: str, answers, shuffle):
    sent = {"w": np.zeros(3)}
    replies = [Reply({"w": np.array(values)}, count) for values, count in answers]
    turned = list(replies)
    shuffle.shuffle(turned)
    for rule in (interpolate(weighting=weighting), interpolate(0.5, weighting=weighting)):
        _, one = rule.update({}, sent, replies)
        _, other = rule.update({}, sent, turned)
        # Six float64 additions of values up to 1e3: 6 * 1e3 * 1.1e-16 < 1e-12.
        np.testing.assert_allclose(one["w"], other["w"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@given(answers=models)
@settings(deadline=None, max_examples=60)
def test_a_mean_lies_between_the_least_and_the_greatest_answer(weighting: str, answers):
    sent = {"w": np.zeros(3)}
    replies = [Reply({"w": np.array(values)}, count) for values, count in answers]
    _, mean = interpolate(weighting=weighting).update({}, sent, replies)
    stacked = np.stack([reply.arrays["w"] for reply in replies])  # (clients, 3)
    # The weights sum to 1 up to 6 roundings, of values up to 1e3.
    assert (mean["w"] >= stacked.min(axis=0) - 1e-12).all()
    assert (mean["w"] <= stacked.max(axis=0) + 1e-12).all()


# --- refused --------------------------------------------------------------------------------------

NOT_POSITIVE = [0.0, -1.0, float("nan"), float("inf")]


@pytest.mark.parametrize("epsilon", NOT_POSITIVE)
def test_an_epsilon_that_is_not_finite_and_above_0_is_refused(epsilon: float):
    with pytest.raises(ConfigError, match=f"epsilon = {epsilon}"):
        interpolate(epsilon)


@pytest.mark.parametrize("lr", NOT_POSITIVE)
def test_a_server_learning_rate_that_is_not_finite_and_above_0_is_refused(lr: float):
    with pytest.raises(ConfigError, match=f"lr = {lr}"):
        FedMeta(lr=lr)


def test_an_unknown_server_optimiser_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'adm'.*did you mean 'adam'"):
        FedMeta(optimizer="adm")
