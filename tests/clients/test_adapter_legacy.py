"""client_app: a legacy server gets what a Message-API server gets."""

import numpy as np
import pytest
from flwr.common import (
    Code,
    EvaluateIns,
    FitIns,
    GetParametersIns,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.common.constant import MessageTypeLegacy
from flwr.compat.common import recorddict_compat as compat
from flwr.supercore.task_identity import TaskIdentity

from metabloom.clients import MAMLClient, SGDClient, client_app
from tests.clients.messages import (
    arrays_of,
    as_numpy,
    ask,
    learner,
    message_of,
)


@pytest.fixture(autouse=True)
def _running_task(monkeypatch):
    # Flower keeps the identity of the running task in the process; messages are born with it.
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.mark.parametrize("kind", [SGDClient, MAMLClient])
def test_a_legacy_server_gets_the_same_training_as_a_message_server(kind):
    app = client_app(lambda context: learner(kind))
    sent = arrays_of(learner(kind))
    modern = ask(app, "train", message_of(sent, {"server-round": 2}))
    ins = FitIns(ndarrays_to_parameters(list(sent.values())), {"server-round": 2})
    content = ask(app, "train", compat.fitins_to_recorddict(ins, keep_input=True))
    res = compat.recorddict_to_fitres(content, keep_input=True)
    assert res.status.code == Code.OK
    found = parameters_to_ndarrays(res.parameters)
    for got, right in zip(found, as_numpy(modern["arrays"]).values(), strict=True):
        np.testing.assert_array_equal(got, right)
    own = dict(modern["metrics"])
    assert res.num_examples == own.pop("num-examples")
    assert res.metrics == own


def test_a_legacy_server_gets_the_same_evaluation_as_a_message_server():
    app = client_app(lambda context: learner())
    sent = arrays_of(learner())
    modern = dict(ask(app, "evaluate", message_of(sent))["metrics"])
    ins = EvaluateIns(ndarrays_to_parameters(list(sent.values())), {})
    content = ask(app, "evaluate", compat.evaluateins_to_recorddict(ins, keep_input=True))
    res = compat.recorddict_to_evaluateres(content)
    assert res.loss == modern.pop("loss")
    assert res.num_examples == modern.pop("num-examples")
    assert res.metrics == modern


def test_a_legacy_server_gets_the_first_parameters():
    ins = compat.getparametersins_to_recorddict(GetParametersIns({}))
    app = client_app(lambda context: learner())
    content = ask(app, MessageTypeLegacy.GET_PARAMETERS, ins)
    res = compat.recorddict_to_getparametersres(content, keep_input=True)
    for got, right in zip(
        parameters_to_ndarrays(res.parameters), arrays_of(learner()).values(), strict=True
    ):
        np.testing.assert_array_equal(got, right)
