"""MetaTeacherClient: a large model, adapted to a client, teaches a small one there."""

import math
import struct

import numpy as np
import pytest
import torch
from torch import nn

from metabloom.clients import (
    ClientData,
    ClientStore,
    MAMLClient,
    MetaTeacherClient,
    adapt,
    adaptation_curve,
    teach,
)
from metabloom.clients.evaluation import score
from metabloom.clients.meta_teacher import halves
from metabloom.errors import ConfigError, RefusedError, WireError
from metabloom.streams import torch_stream
from metabloom.wire import TEACHER_LR, TEACHER_PRIVATE
from tests.clients.privacy.private_clients import Loader, private
from tests.clients.small_clients import client, context, fit, net, same
from tests.clients.teachers import arrays_of, large, logits_by, start_of, taught, told
from tests.clients.toy_problems import client_data, weights

CONFIG = told(arrays_of(large()))
CROSS_ENTROPY = nn.functional.cross_entropy
A, T = 0.6, 3.0
TEACHING = {"alpha": A, "temperature": T, "teach_steps": 12, "teach_lr": 0.05}


def own_client(**options):
    usual = {"eval_steps": (1, 3), "order": "first", **TEACHING}
    return taught(MetaTeacherClient, **{**usual, **options})


# --- evaluation -----------------------------------------------------------------------------------


def rows(data=None, name="anna", seed=0):
    data = data or client_data()
    return halves(data.query, torch_stream(seed, "unlabelled", name))


def test_the_halves_are_disjoint_and_depend_on_the_client_alone():
    query = client_data(query=21).query
    hidden, judged = halves(query, torch_stream(0, "unlabelled", "anna"))
    assert sorted([*hidden.tolist(), *judged.tolist()]) == list(range(21))
    assert (len(hidden), len(judged)) == (10, 11)
    again, _ = halves(query, torch_stream(0, "unlabelled", "anna"))
    other, _ = halves(query, torch_stream(0, "unlabelled", "ben"))
    assert torch.equal(hidden, again)
    assert not torch.equal(hidden, other)


def by_hand(data, *, lr=0.4, steps=3):
    """Return all metrics from the public functions: for the teacher, for both students.

    ``lr`` and ``steps`` are those of the teacher.
    """
    hidden, judged = rows(data)
    (xs, ys), (xq, yq) = data.support, data.query
    known = xq[judged], yq[judged]
    options = {"inner_lr": 0.4}
    curve = adaptation_curve(
        net(),
        CROSS_ENTROPY,
        weights(net()),
        known,
        steps=(1, 3),
        advance=lambda p, n: adapt(net(), CROSS_ENTROPY, p, data.support, steps=n, **options),
    )
    module = large().eval()
    adapted = adapt(module, CROSS_ENTROPY, weights(module), data.support, steps=steps, inner_lr=lr)
    module.load_state_dict(adapted)
    student = teach(
        net(),
        weights(net()),
        torch.cat([xs, xq[hidden]]),
        torch.cat([logits_by(module, xs), logits_by(module, xq[hidden])]),
        ys,
        alpha=A,
        temperature=T,
        steps=12,
        lr=0.05,
    )
    taught_loss, taught_accuracy = score(net(), CROSS_ENTROPY, student, known)
    loss, accuracy = score(module, CROSS_ENTROPY, weights(module), known)
    return {
        **curve,
        "taught-loss": taught_loss,
        "taught-accuracy": taught_accuracy,
        "teacher-loss": loss,
        "teacher-accuracy": accuracy,
    }


def test_an_evaluation_tells_the_direct_curve_the_taught_student_and_the_adapted_teacher():
    data = client_data(query=12)
    own = own_client(data=data)
    loss, count, metrics = own.evaluate(start_of(own), CONFIG)
    wanted = by_hand(data)
    assert metrics == pytest.approx(wanted, rel=1e-4)
    assert set(metrics) == set(wanted)
    assert loss == metrics["loss-after-3"]
    assert count == 6
    assert metrics["taught-loss"] != pytest.approx(metrics["loss-after-3"], rel=1e-3)


def test_the_teacher_is_adapted_at_the_rate_of_its_own_run_where_that_is_told():
    data = client_data(query=12)
    own = own_client(data=data)
    _, _, metrics = own.evaluate(start_of(own), CONFIG | {TEACHER_LR: 0.05})
    assert metrics == pytest.approx(by_hand(data, lr=0.05), rel=1e-4)
    assert metrics["teacher-loss"] != pytest.approx(by_hand(data)["teacher-loss"], rel=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_the_teacher_is_adapted_by_as_many_steps_as_are_asked_for(steps: int):
    data = client_data(query=12)
    own = own_client(data=data, teacher_steps=steps)
    _, _, metrics = own.evaluate(start_of(own), CONFIG)
    assert metrics == pytest.approx(by_hand(data, steps=steps), rel=1e-4)
    assert metrics["teacher-loss"] != pytest.approx(by_hand(data)["teacher-loss"], rel=1e-3)


def evaluated(data, **options):
    """Return the metrics, and the student that stays on the client."""
    place = context()
    own = own_client(data=data, context=place, **options)
    _, _, metrics = own.evaluate(start_of(own), CONFIG)
    state = place.state.array_records["metabloom.taught"]
    return metrics, {name: value.numpy() for name, value in state.items()}


def test_no_label_of_an_unlabelled_record_and_no_judged_record_teaches():
    data = client_data(query=12)
    hidden, judged = rows(data)
    (xq, yq) = data.query
    relabelled = yq.clone()
    relabelled[hidden] = (yq[hidden] + 1) % 3
    usual, student = evaluated(data)
    metrics, other = evaluated(ClientData(data.support, (xq, relabelled)))
    assert metrics == usual
    moved = xq.clone()
    moved[judged] += 1
    metrics, third = evaluated(ClientData(data.support, (moved, yq)))
    assert metrics != usual
    for name, value in student.items():
        assert np.array_equal(value, other[name])
        np.testing.assert_allclose(value, third[name], rtol=1e-5)
    shown = xq.clone()
    shown[hidden] += 1
    metrics, fourth = evaluated(ClientData(data.support, (shown, yq)))
    assert metrics["loss-after-3"] == usual["loss-after-3"]
    assert any(np.abs(value - fourth[name]).max() > 1e-3 for name, value in student.items())


def test_the_teacher_is_adapted_once_and_the_student_taught_from_each_new_model():
    place, module = context(), large()
    own = own_client(teacher=module, context=place)
    _, _, first = own.evaluate(start_of(own), CONFIG)
    asked = len(module.calls)
    later = own_client(teacher=module, context=place, sent=False)
    _, _, again = later.evaluate(start_of(later), CONFIG | {"server-round": 2})
    assert again == first
    assert len(module.calls) == asked
    moved = [value + np.float32(0.1) for value in start_of(later)]
    _, _, third = later.evaluate(moved, CONFIG | {"server-round": 3})
    assert len(module.calls) == asked
    assert third["teacher-loss"] == first["teacher-loss"]
    assert third["taught-loss"] != first["taught-loss"]


def test_outputs_outlive_the_context_in_a_store_and_what_is_lost_is_said(tmp_path):
    store = ClientStore(tmp_path)
    own = own_client(store=store)
    _, _, first = own.evaluate(start_of(own), CONFIG)
    later = own_client(store=store, sent=False)
    assert later.evaluate(start_of(later), CONFIG | {"server-round": 2})[2] == first
    lost = own_client(sent=False)
    with pytest.raises(WireError, match="'anna' has no outputs of teacher"):
        lost.evaluate(start_of(lost), CONFIG)
    other = own_client(store=store, sent=False)  # adapted otherwise, it is another teacher
    with pytest.raises(WireError, match="send the teacher again"):
        other.evaluate(start_of(other), CONFIG | {TEACHER_LR: 0.05, "server-round": 3})


def test_a_query_set_of_one_record_is_judged_on_it():
    own = own_client(data=client_data(query=1))
    _, count, metrics = own.evaluate(start_of(own), CONFIG)
    assert count == 1
    assert math.isfinite(metrics["taught-loss"])


def test_a_partial_adaptation_is_taught_as_such():
    own = own_client(adapt=lambda name: name.startswith("head"))
    own.evaluate(start_of(own), CONFIG)
    kept = own.context.state.array_records["metabloom.taught"]
    start = dict(zip(own.array_names, start_of(own), strict=True))
    same_as_sent = [n for n, v in kept.items() if np.array_equal(v.numpy(), start[n])]
    assert same_as_sent == ["body.weight", "body.bias"]


# --- training -------------------------------------------------------------------------------------


def test_training_is_maml_and_never_asks_the_teacher():
    module = large()
    own = own_client(teacher=module)
    module.calls.clear()
    found, count, metrics = own.fit(start_of(own), CONFIG)
    wanted, other, others = fit(MAMLClient, order="first", config=CONFIG)
    assert same(found, wanted)
    assert (count, metrics) == (other, others)
    assert module.calls == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha", -0.1),
        ("temperature", math.inf),
        ("teacher_steps", -1),
        ("teacher_steps", 0.5),
        ("teach_steps", 0),
        ("teach_steps", 1.5),
        ("teach_lr", 0.0),
        ("teach_lr", math.nan),
        ("outer_lr", 0.0),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"{key} = {value!r}"):
        own_client(sent=False, **{key: value})


def test_without_a_context_there_is_no_teacher():
    with pytest.raises(ConfigError, match="a client with a teacher needs context="):
        client(MetaTeacherClient, teacher=large())


# --- private clients ------------------------------------------------------------------------------


def private_client(file, *, sent=True, **options):
    own = private(
        file,
        MetaTeacherClient,
        **{"teacher": large(), "context": context(), "eval_steps": (1, 3), **TEACHING, **options},
    )
    if sent:
        own.take_teacher(arrays_of(large()))
    return own


def test_a_private_client_s_reply_to_training_has_nothing_of_the_teacher(tmp_path):
    """The adapted teacher is not accounted: it must not answer."""
    pins = {"seed": 3}
    one, other = (
        private_client(tmp_path / f"{sent}.jsonl", sent=sent, pins=pins) for sent in (True, False)
    )
    usual = private(tmp_path / "usual.jsonl", MAMLClient, pins=pins)
    found, wanted, maml = (own.fit(start_of(own), CONFIG) for own in (one, other, usual))
    for reply in (found, wanted):
        assert same(reply[0], maml[0])
        assert reply[1:] == maml[1:]
    assert not one.context.state.array_records.keys() & {"metabloom.teacher-logits"}


def test_a_private_client_tells_of_an_evaluation_what_it_was_told_to(tmp_path):
    own = private_client(tmp_path / "all.jsonl", pins={"unprotected_metrics": ("all",)})
    _, _, everything = own.evaluate(start_of(own), CONFIG)
    assert {"taught-accuracy", "teacher-accuracy", "accuracy-after-3"} <= set(everything)
    some = ("taught-accuracy",)
    own = private_client(tmp_path / "one.jsonl", pins={"unprotected_metrics": some})
    loss, count, metrics = own.evaluate(start_of(own), CONFIG)
    assert metrics == {"taught-accuracy": everything["taught-accuracy"]}
    assert math.isnan(loss)
    assert count == 1


def test_a_private_client_that_tells_nothing_asks_no_teacher(tmp_path):
    loader = Loader()
    own = private_client(tmp_path / "anna.jsonl", sent=False, data=loader)
    loss, count, metrics = own.evaluate(start_of(own), CONFIG)
    assert math.isnan(loss)
    assert (count, metrics) == (1, {})
    assert loader.calls == 0


def test_a_private_client_refuses_a_teacher_of_unknown_past(tmp_path):
    loader = Loader()
    pins = {"unprotected_metrics": ("all",)}
    own = private_client(tmp_path / "anna.jsonl", data=loader, pins=pins)
    with pytest.raises(RefusedError, match="private client 'anna' refuses the teacher"):
        own.evaluate(start_of(own), {**CONFIG, TEACHER_PRIVATE: False})
    assert loader.calls == 0


def test_nothing_of_the_taught_student_is_in_a_reply():
    """An evaluation replies with numbers alone: none of them is a weight or an output."""
    own = own_client()
    _, _, metrics = own.evaluate(start_of(own), CONFIG)
    state = own.context.state.array_records
    secret = [
        float(value)
        for kind, name in (("metabloom.taught", None), ("metabloom.teacher-logits", "logits"))
        for key, array in state[kind].items()
        if name in (None, key)
        for value in array.numpy().ravel()
    ]
    said = {struct.pack("<f", value) for value in metrics.values()}
    assert not said & {struct.pack("<f", value) for value in secret}
    assert all(type(value) is float for value in metrics.values())
