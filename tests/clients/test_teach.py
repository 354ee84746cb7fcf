"""A student learns from a teacher's outputs on labelled and unlabelled records: in closed form."""

import numpy as np
import pytest
import torch
from torch import nn

from metabloom.clients import teach
from tests.clients.small_clients import net
from tests.clients.teachers import all_logits
from tests.clients.toy_problems import client_data, weights

A, T = 0.6, 3.0


class Linear(nn.Module):
    """z = x W, in float64."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.W = nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))

    def forward(self, x):
        return x @ self.W


def problem(count=9, labelled=4):
    generator = torch.Generator().manual_seed(11)
    inputs = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    logits = 2 * torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return inputs, logits, torch.tensor([2, 0, 1, 2])[:labelled]


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def keeps_the_closed_form(teaching):
    """Adam, written out, on the gradient of a T^2 KL over all and (1 - a) H over the labelled."""
    student = Linear(1)
    inputs, logits, classes = problem()
    options = {"alpha": A, "temperature": T, "steps": 6, "lr": 0.1}
    found = teaching(student, weights(student), inputs, logits, classes, **options)
    X, q, y = inputs.numpy(), softmax(logits.numpy() / T), classes.numpy()
    W = student.W.detach().numpy().copy()
    m, v = np.zeros_like(W), np.zeros_like(W)
    for step in range(1, 7):
        soft = A * T * X.T @ (softmax(X @ W / T) - q) / len(X)
        S = X[: len(y)]
        hard = (1 - A) * S.T @ (softmax(S @ W) - np.eye(3)[y]) / len(y)
        g = soft + hard
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        W = W - 0.1 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    np.testing.assert_allclose(found["W"].numpy(), W, rtol=1e-9)


def on_the_support_alone(student, start, inputs, logits, classes, **options):
    """Forgets the unlabelled records."""
    S = len(classes)
    return teach(student, start, inputs[:S], logits[:S], classes, **options)


def without_temperature_squared(student, start, inputs, logits, classes, *, alpha, **options):
    """Weighs the teacher T^2 times less."""
    t2 = options["temperature"] ** 2
    share = alpha / t2 / (alpha / t2 + 1 - alpha)
    return teach(student, start, inputs, logits, classes, alpha=share, **options)


def with_labels_that_it_does_not_have(student, start, inputs, logits, classes, **options):
    """Takes the teacher's word for labels of the unlabelled records."""
    guessed = torch.cat([classes, logits[len(classes) :].argmax(1)])
    return teach(student, start, inputs, logits, guessed, **options)


def test_teaching_is_adam_on_the_closed_form_gradient():
    keeps_the_closed_form(teach)


@pytest.mark.parametrize(
    "wrong",
    [on_the_support_alone, without_temperature_squared, with_labels_that_it_does_not_have],
)
def test_wrong_teaching_breaks_the_closed_form(wrong):
    with pytest.raises(AssertionError):
        keeps_the_closed_form(wrong)


def test_a_student_that_can_comes_to_say_what_its_teacher_says():
    student, teacher = Linear(1), Linear(2)
    inputs, _, classes = problem(40)
    logits = teacher(inputs).detach()
    options = {"alpha": 1.0, "temperature": 2.0, "lr": 0.05}
    found = teach(student, weights(student), inputs, logits, classes, steps=400, **options)
    said = (inputs @ found["W"]).softmax(1)
    assert float((said - logits.softmax(1)).abs().max()) < 0.01
    before = student(inputs).detach().softmax(1)
    assert float((before - logits.softmax(1)).abs().max()) > 0.3


def test_without_labels_of_its_own_a_student_learns_from_the_teacher_alone():
    """With alpha = 1 labels are not looked at: a support set may be empty."""
    student = Linear(1)
    inputs, logits, _ = problem()
    options = {"alpha": 1.0, "temperature": T, "steps": 3, "lr": 0.1}
    none = torch.empty(0, dtype=torch.long)
    found = teach(student, weights(student), inputs, logits, none, **options)
    other = teach(student, weights(student), inputs, logits, torch.tensor([1, 1]), **options)
    assert torch.equal(found["W"], other["W"])
    assert found["W"].isfinite().all()


def test_only_what_may_move_moves_and_nothing_given_changes():
    model, start = net(), weights(net())
    before = {name: value.clone() for name, value in start.items()}
    data = client_data()
    options = {"alpha": A, "temperature": T, "steps": 4, "lr": 0.1}
    found = teach(
        model,
        start,
        data.all[0],
        all_logits(),
        data.support[1],
        moves=lambda name: name.startswith("head"),
        **options,
    )
    assert [name for name in found if torch.equal(found[name], start[name])] == [
        "body.weight",
        "body.bias",
    ]
    assert all(torch.equal(start[name], before[name]) for name in start)
    assert all(torch.equal(value, weights(net())[n]) for n, value in weights(model).items())
    assert not any(value.requires_grad for value in found.values())
