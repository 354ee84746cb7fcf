"""TaughtClient: SGD on labels and a teacher at once, whose outputs stay on the client."""

import struct

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from torch import nn

from metabloom.clients import (
    ClientData,
    SGDClient,
    TaughtClient,
    client_app,
    training,
)
from metabloom.clients.cohort import run_cohort
from metabloom.clients.soft_targets import loss_of_packed, pack, taught_loss
from metabloom.errors import WireError
from metabloom.models import distillation_loss
from metabloom.sim import CohortGrid
from metabloom.wire import TEACHER, to_record
from tests.clients.privacy.private_clients import bytes_of
from tests.clients.small_clients import client, fit, net, same
from tests.clients.teachers import (
    all_logits,
    arrays_of,
    large,
    start_of,
    taught,
    told,
)
from tests.clients.toy_problems import client_data, records

CONFIG = told(arrays_of(large()))
F32 = {"rtol": 1e-5, "atol": 1e-6}  # some roundings of numbers of size 1
A, T = 0.3, 2.5


class Linear(nn.Module):
    """z = x W, in float64."""

    def __init__(self, W=None):
        super().__init__()
        start = torch.zeros(3, 3, dtype=torch.float64) if W is None else W.detach().clone()
        self.W = nn.Parameter(start)

    def forward(self, x):
        return x @ self.W


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 3, generator=generator, dtype=torch.float64)


# --- the loss -------------------------------------------------------------------------------------


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def keeps_the_closed_form(kind):
    """Three steps of dJ/dW = X^T [(1 - a)(p - y) + a T (p_T - q_T)] / N, in NumPy."""
    student, teacher = Linear(drawn(1)), Linear(2 * drawn(2))
    data = client_data(dtype=torch.float64)
    own = taught(
        kind,
        model=student,
        teacher=teacher,
        data=data,
        alpha=A,
        temperature=T,
        local_lr=0.2,
        local_epochs=3,
    )
    found, count, metrics = own.fit(start_of(own), told(arrays_of(teacher)))
    X, y = (value.numpy() for value in data.all)
    W, losses = student.W.detach().numpy().copy(), []
    q = softmax(X @ teacher.W.detach().numpy() / T)
    for _ in range(3):
        p, soft = softmax(X @ W), softmax(X @ W / T)
        hard = -np.log(p[np.arange(len(y)), y]).mean()
        losses.append((1 - A) * hard + A * T**2 * -(q * np.log(soft)).sum(1).mean())
        W = W - 0.2 * X.T @ ((1 - A) * (p - np.eye(3)[y]) + A * T * (soft - q)) / len(y)
    np.testing.assert_allclose(found[0], W, rtol=1e-11)
    assert count == 11
    assert metrics == {"train-loss": pytest.approx(np.mean(losses), rel=1e-11)}


class Misaligned(TaughtClient):
    """Has the teacher's outputs in another order than the records."""

    def _taught(self, data, config):
        found = super()._taught(data, config)
        turned = [
            torch.cat([t[:, :1], t[:, 1:].flip(0)], 1) for _, t in (found.support, found.query)
        ]
        return ClientData((found.support[0], turned[0]), (found.query[0], turned[1]))


class TeachesAtTemperatureOne(TaughtClient):
    """Softens the teacher alone."""

    def _taught(self, data, config):
        found = super()._taught(data, config)
        cooled = [torch.cat([t[:, :1], t[:, 1:] / T], 1) for _, t in (found.support, found.query)]
        return ClientData((found.support[0], cooled[0]), (found.query[0], cooled[1]))


def test_a_step_is_the_closed_form_gradient_of_labels_and_teacher():
    keeps_the_closed_form(TaughtClient)


@pytest.mark.parametrize("kind", [Misaligned, TeachesAtTemperatureOne])
def test_a_wrong_client_breaks_the_closed_form(kind):
    with pytest.raises(AssertionError):
        keeps_the_closed_form(kind)


def test_the_packed_loss_is_the_distillation_loss_and_keeps_classes_exactly():
    classes, logits = torch.tensor([2, 0, 1]), records(3, 5)[0]
    outputs = records(3, 6)[0]
    wanted = distillation_loss(outputs, logits, classes, alpha=A, temperature=T)
    packed = pack(classes, logits, name="anna")
    assert torch.equal(loss_of_packed(outputs, packed, alpha=A, temperature=T), wanted)
    last = pack(torch.tensor([9999]), torch.zeros(1, 10_000), name="anna")
    assert int(last[0, 0]) == 9999
    assert taught_loss(A, T) is taught_loss(A, T)  # one cohort, one compilation


@pytest.mark.parametrize("options", [{}, {"batch_size": 4, "local_epochs": 3, "proximal_mu": 0.4}])
def test_without_a_share_of_the_teacher_it_is_local_sgd_to_the_bit(options):
    usual, _, _ = fit(SGDClient, config=CONFIG, **options)
    own = taught(alpha=0.0, **options)
    found, count, _ = own.fit(start_of(own), CONFIG)
    assert same(found, usual)
    assert count == 11
    half = taught(alpha=0.5, **options)
    assert not same(half.fit(start_of(half), CONFIG)[0], usual)


@pytest.fixture
def _front_end_alone(monkeypatch):
    """Compile by the compiler's front end, which costs no C++ compiler."""
    plain = torch.compile
    torch.compiler.reset()
    monkeypatch.setattr(training, "_compilers", training._Compilers())
    monkeypatch.setattr(
        torch, "compile", lambda f, *, options, **more: plain(f, backend="eager", **more)
    )


@pytest.mark.usefixtures("_front_end_alone")
@pytest.mark.parametrize("kernel", ["compiled", "vmap"])
def test_every_kernel_gives_what_the_eager_loop_gives(kernel):
    model, module = net(), large()

    def cohort(how):
        return [
            taught(
                model=model,
                teacher=module,
                data=client_data(support, seed=seed),
                name=str(seed),
                kernel=how,
                batch_size=4,
                local_epochs=2,
            )
            for seed, support in enumerate((6, 6, 9, 6))
        ]

    wanted = [own.fit(start_of(own), CONFIG) for own in cohort("eager")]
    clients = cohort(kernel)
    if kernel == "vmap":
        sent = start_of(clients[0])
        params = clients[0].load(sent)
        outcomes = run_cohort([own.training(params, CONFIG) for own in clients])
        found = [
            own.answered(outcome, sent, CONFIG)
            for own, outcome in zip(clients, outcomes, strict=True)
        ]
    else:
        found = [own.fit(start_of(own), CONFIG) for own in clients]
    for (arrays, count, metrics), (others, other_count, other_metrics) in zip(
        found, wanted, strict=True
    ):
        assert count == other_count
        assert metrics == pytest.approx(other_metrics, rel=1e-5)
        for one, other in zip(arrays, others, strict=True):
            np.testing.assert_allclose(one, other, **F32)


def test_a_client_without_its_teacher_fails_alone_in_a_cohort():
    model, module = net(), large()
    options = {"model": model, "teacher": module, "kernel": "vmap"}
    clients = [taught(name="a", **options), taught(name="b", sent=False, **options)]
    params = clients[0].load(start_of(clients[0]))
    good, bad = run_cohort([own.training(params, CONFIG) for own in clients])
    assert good.metrics["train-loss"] > 0
    assert isinstance(bad, WireError)
    assert "'b' has no outputs of teacher" in str(bad)


# --- what leaves ----------------------------------------------------------------------------------


class Served:
    """A client of ``kind`` behind Flower's messages, over several rounds."""

    def __init__(self, make):
        self.make = make
        self.grid = CohortGrid(client_app(make), num_nodes=1)

    def ask(self, number, *, asked="train", teacher=None, **config):
        arrays = dict(zip(net().state_dict(), start_of(client(SGDClient)), strict=True))
        content = {"arrays": to_record(arrays)}
        if teacher is not None:
            content[TEACHER] = to_record(teacher)
        sent = ConfigRecord({**told(arrays_of(large()), number), **config})
        (node,) = self.grid.get_node_ids()
        whole = RecordDict({**content, "config": sent})
        message = self.grid.create_message(whole, asked, node, "0")
        (reply,) = self.grid.send_and_receive([message])
        return reply


def keeps_the_outputs_at_home(kind):
    served = Served(lambda held: taught(kind, context=held, sent=False, name="anna"))
    arrays = arrays_of(large())
    weights = np.concatenate([value.ravel() for value in arrays.values()]).tolist()
    secret = [*all_logits().flatten().tolist(), *weights]
    spelt = [struct.pack(form, value) for value in secret for form in ("<f", ">f", "<d", ">d")]
    replies = [
        served.ask(1, teacher=arrays),
        served.ask(2),
        served.ask(2, asked="evaluate", teacher=arrays),
    ]
    for reply in replies:
        assert not reply.has_error(), reply.error
        whole = bytes_of(reply)
        assert not any(one in whole for one in spelt)
    assert list(replies[0].content["arrays"]) == list(net().state_dict())
    assert set(replies[0].content) == {"arrays", "metrics"}
    assert set(replies[0].content["metrics"]) == {"train-loss", "num-examples"}


class Telling(TaughtClient):
    """Reports how sure its teacher is of the first record."""

    def answered(self, result, parameters, config):
        arrays, count, metrics = super().answered(result, parameters, config)
        logits = self.outputs.of(self.data.all[0], config)
        return arrays, count, {**metrics, "sure": logits[0, 0].item()}


def test_no_byte_of_a_reply_is_an_output_or_a_weight_of_the_teacher():
    keeps_the_outputs_at_home(TaughtClient)


def test_that_check_finds_a_client_that_tells():
    with pytest.raises(AssertionError):
        keeps_the_outputs_at_home(Telling)


def test_a_client_of_another_kind_leaves_the_teacher_aside():
    served = Served(lambda held: client(SGDClient, context=held))
    reply = served.ask(1, teacher=arrays_of(large()))
    wanted, _, _ = fit(SGDClient, config={"server-round": 1})
    assert same([one.numpy() for one in reply.content["arrays"].values()], wanted)
