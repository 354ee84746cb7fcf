"""client_app answers many messages at once as it answers each by itself."""

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from metabloom.clients import MAMLClient, SGDClient, client_app, learner
from metabloom.clients.adapter import CohortApp
from metabloom.sim import CohortGrid
from tests.clients.cohorts import data_of
from tests.clients.messages import Echo, as_numpy, place, record_of
from tests.clients.toy_problems import Shifted, initialised, small_net, weights

F32 = {"rtol": 1e-5, "atol": 1e-7}  # some roundings of numbers of size 1
SIZES = (1, 2, 3, 5, 8, 3)


@pytest.fixture(autouse=True)
def _running_task(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def app_of(kind=SGDClient, *, model=None, kernel="vmap", **options):
    """An app whose client i has ``SIZES[i]`` support records; client -1 has lost its data."""
    model = model or small_net().float()

    def client_fn(context):
        index = int(context.node_config["partition-id"])
        known = SIZES[index] if index >= 0 else 0
        data = data_of(known, index, model.head.weight.dtype) if known else missing
        own = {"batch_size": 4, "name": str(index), "context": context, "kernel": kernel} | options
        return kind(model, data, **own)

    return client_app(client_fn)


def missing():
    raise OSError("its disk is gone")


def question(index, model, kind="train", **config):
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    content = {"arrays": record_of(arrays), "config": ConfigRecord({"server-round": 2, **config})}
    message = Message(RecordDict(content), dst_node_id=1, message_type=kind)
    message.metadata.__dict__["_message_id"] = str(index)
    return message, place(partition=index)


def answered(app, questions):
    found = dict(app.answer_all(iter(questions)))
    return [found[position] for position in range(len(questions))]


@pytest.mark.parametrize("kernel", ["vmap", "eager"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(SGDClient, {}), (SGDClient, {"ditto_lambda": 0.5}), (MAMLClient, {})],
    ids=["sgd", "ditto", "maml"],
)
def test_replies_and_contexts_are_those_of_single_questions(kind, options, kernel):
    app, model = app_of(kind, kernel=kernel, **options), small_net().float()
    together = [question(i, model) for i in range(len(SIZES))]
    alone = [question(i, model) for i in range(len(SIZES))]
    replies = answered(app, together)
    for reply, (message, context), (_, other) in zip(replies, alone, together, strict=True):
        wanted = app(message, context)
        assert reply.metadata.reply_to_message_id == wanted.metadata.reply_to_message_id
        assert list(reply.content) == list(wanted.content)
        assert dict(reply.content["metrics"]) == pytest.approx(dict(wanted.content["metrics"]))
        arrays = as_numpy(reply.content["arrays"])
        for name, value in as_numpy(wanted.content["arrays"]).items():
            np.testing.assert_allclose(arrays[name], value, **F32)
            assert not np.array_equal(value, model.state_dict()[name].numpy())
        assert list(other.state) == list(context.state)


def test_a_client_that_raises_is_its_own_answer():
    app, model = app_of(), small_net().float()
    asked = [question(i, model) for i in (0, -1, 2)]
    asked += [question(3, model, **{"proximal-mu": -1.0}), question(4, initialised(Shifted()))]
    first, lost, third, refused, wrong = answered(app, asked)
    assert isinstance(lost, OSError)
    assert "proximal-mu = -1.0" in str(refused)
    assert "differ in" in str(wrong)
    for reply, index in ((first, 0), (third, 2)):
        wanted = as_numpy(app(*question(index, model)).content["arrays"])
        for name, value in as_numpy(reply.content["arrays"]).items():
            np.testing.assert_allclose(value, wanted[name], **F32)


def test_questions_that_wait_for_no_others_are_answered_one_after_another():
    taken = []

    def questions():
        for index in range(3):
            taken.append(index)
            yield question(index, model)

    model = small_net().float()
    answers = app_of(kernel="eager").answer_all(questions())
    assert not taken
    for position in range(3):
        assert next(answers)[0] == position
        assert taken == list(range(position + 1))


def test_evaluations_and_other_people_s_clients_are_answered_as_ever():
    app, model = app_of(), small_net().float()
    asked = [question(1, model, "evaluate"), question(2, model), question(3, model, "evaluate")]
    evaluated, trained, other = answered(app, asked)
    assert "loss" in evaluated.content["metrics"]
    assert "loss" in other.content["metrics"]
    assert "arrays" in trained.content
    echo = client_app(lambda context: Echo())
    (reply,) = answered(echo, [question(1, model)])
    np.testing.assert_array_equal(
        as_numpy(reply.content["arrays"])["head.bias"], 2 * model.head.bias.detach().numpy()
    )


def test_a_client_class_with_its_own_training_keeps_it():
    class Own(SGDClient):
        def fit(self, parameters, config):
            return [a + 1 for a in parameters], 1, {}

    model = small_net().float()
    for reply in answered(app_of(Own), [question(1, model), question(2, model)]):
        for name, value in as_numpy(reply.content["arrays"]).items():
            np.testing.assert_array_equal(value, weights(model)[name].numpy() + 1)


def test_the_arrays_of_a_broadcast_are_read_once(monkeypatch):
    read = []
    load = learner.Learner.load

    def counted(self, parameters):
        read.append(self.name)
        return load(self, parameters)

    monkeypatch.setattr(learner.Learner, "load", counted)
    model = small_net().float()
    (message, _), (other, _) = question(0, model), question(0, model)
    asked = []
    for index in range(4):
        copied, context = question(index, model)
        record = (message if index < 3 else other).content["arrays"]
        copied.content["arrays"] = record.copy()
        asked.append((copied, context))
    answered(app_of(), asked)
    assert read == ["0", "3"]


@pytest.mark.parametrize("kernel", ["vmap", "eager"])
def test_each_question_builds_its_client_once(kernel):
    model, contexts = small_net().float(), []

    def client_fn(context):
        contexts.append(context)
        return SGDClient(model, data_of(3, 0, torch.float32), kernel=kernel)

    asked = [question(1, model), question(2, model, "evaluate"), question(3, model)]
    answered(client_app(client_fn), asked)
    assert [id(one) for one in contexts] == [id(context) for _, context in asked]


def test_a_model_with_buffers_is_received_by_each_client():
    model = initialised(Shifted())
    replies = answered(app_of(model=model), [question(1, model), question(2, model)])
    for index, reply in zip((1, 2), replies, strict=True):
        wanted = as_numpy(app_of(model=model)(*question(index, model)).content["arrays"])
        for name, value in as_numpy(reply.content["arrays"]).items():
            np.testing.assert_array_equal(value, wanted[name])


def test_with_mods_each_message_goes_by_itself():
    def mod(message, context, call_next):
        return call_next(message, context)

    assert isinstance(client_app(lambda context: Echo()), CohortApp)
    app = client_app(lambda context: Echo(), mods=[mod])
    assert not hasattr(app, "answer_all")


def test_the_grid_hands_whole_blocks_over():
    model = small_net().float()
    grid = CohortGrid(app_of(), num_nodes=len(SIZES))
    nodes = list(grid.get_node_ids())
    content = question(0, model)[0].content
    asked = [Message(content, dst_node_id=node, message_type="train") for node in nodes]
    counts = {reply.content["metrics"]["num-examples"] for reply in grid.send_and_receive(asked)}
    assert counts == {size + size % 3 + 1 for size in SIZES}
