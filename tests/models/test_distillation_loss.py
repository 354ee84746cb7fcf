"""Distillation losses: known answers, closed forms, torch's own kl_div, wrong variants, edges."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from metabloom.errors import ConfigError, ModelError
from metabloom.models import (
    cross_entropy,
    distillation_loss,
    kl_to,
    mutual_losses,
    soft_cross_entropy,
)

f64 = partial(torch.tensor, dtype=torch.float64)
LN3 = math.log(3)
STUDENT = f64([[0.6, 0.4], [0.4, 0.6], [0.7, 0.3], [0.3, 0.7], [0.6, 0.4]])
TEACHER = f64([[0.8, 0.2], [0.3, 0.7], [0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
CLASSES = torch.tensor([0, 1, 0, 1, 0])


def drawn(*shape, seed=0, spread=2.0, dtype=torch.float64):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (spread * values).to(dtype)


def by_hand(student, teacher, classes, alpha, temperature):
    """J in plain loops over float64 numbers."""
    total = 0.0
    for z_s, z_t, y in zip(student.tolist(), teacher.tolist(), classes.tolist(), strict=True):
        p, p_soft, q = (
            [math.exp(v / t) / math.fsum(math.exp(w / t) for w in z) for v in z]
            for z, t in ((z_s, 1), (z_s, temperature), (z_t, temperature))
        )
        soft = -math.fsum(a * math.log(b) for a, b in zip(q, p_soft, strict=True))
        total += (1 - alpha) * -math.log(p[y]) + alpha * temperature**2 * soft
    return total / len(student)


# --- laws, and wrong implementations that break them ----------------------------------------------


def gives_the_known_answer(loss):
    z_s, z_t = f64([[0.0, 0.0]], requires_grad=True), f64([[2 * LN3, 0.0]])
    value = loss(z_s, z_t, torch.tensor([0]), alpha=0.5, temperature=2)
    assert value.item() == pytest.approx(1.732868, abs=5e-7)  # (1/2 + 4/2) ln 2
    value.backward()
    assert z_s.grad.tolist() == [pytest.approx([-0.5, 0.5], abs=1e-12)]


def equals_plain_loops(loss):
    z_s, z_t = drawn(4, 3), drawn(4, 3, seed=1)
    y = torch.tensor([2, 0, 1, 1])
    for alpha, temperature in ((0.3, 4.0), (1.0, 0.5), (0.0, 3.0)):
        found = loss(z_s, z_t, y, alpha=alpha, temperature=temperature).item()
        assert found == pytest.approx(by_hand(z_s, z_t, y, alpha, temperature), rel=1e-12)


def leaves_the_teacher_alone(loss):
    z_s, z_t = drawn(2, 3).requires_grad_(), drawn(2, 3, seed=1).requires_grad_()
    loss(z_s, z_t, torch.tensor([0, 2]), alpha=0.5, temperature=2).backward()
    assert z_t.grad is None


def wrong(*, reduction="batchmean", hard_at=None, power=2, detach=True):
    """Return J with a mistake in one place."""

    def loss(student, teacher, targets, *, alpha, temperature):
        t = temperature
        q = torch.softmax((teacher.detach() if detach else teacher) / t, dim=1)
        log_p = torch.log_softmax(student / t, dim=1)
        kl = F.kl_div(log_p, q, reduction="none")
        kl = kl.sum() / len(kl) if reduction == "batchmean" else getattr(kl, reduction)()
        entropy = -(q * q.log()).sum(1).mean()
        hard = F.cross_entropy(student / (hard_at or 1), targets)
        return (1 - alpha) * hard + alpha * t**power * (kl + entropy)

    return loss


LAWS = [gives_the_known_answer, equals_plain_loops, leaves_the_teacher_alone]
WRONG = {
    "divides by the classes too": (wrong(reduction="mean"), gives_the_known_answer),
    "sums over the batch": (wrong(reduction="sum"), equals_plain_loops),
    "forgets T squared": (wrong(power=0), gives_the_known_answer),
    "multiplies by T alone": (wrong(power=1), gives_the_known_answer),
    "softens the first term too": (wrong(hard_at=2), gives_the_known_answer),
    "teaches the teacher": (wrong(detach=False), leaves_the_teacher_alone),
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_loss_keeps_the_law(law):
    law(distillation_loss)
    law(wrong())  # right unless it is given a mistake: the oracle of the others


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_loss_breaks_its_law(name):
    loss, law = WRONG[name]
    with pytest.raises(AssertionError):
        law(loss)


# --- other answers --------------------------------------------------------------------------------


def test_five_records_give_the_sums_of_the_worked_example():
    """Probabilities are given, so log p are the logits and T is the factor T^2 alone."""
    hard = 5 * cross_entropy(STUDENT.log(), CLASSES).item()
    soft = 5 * soft_cross_entropy(STUDENT.log(), TEACHER).item()
    assert (hard, soft) == pytest.approx((2.2458, 2.8244), abs=5e-5)
    assert 0.5 * hard + 0.5 * 2**2 * soft == pytest.approx(6.7717, abs=5e-5)
    at_one = distillation_loss(STUDENT.log(), TEACHER.log(), CLASSES, alpha=0.5, temperature=1)
    assert 5 * at_one.item() == pytest.approx((hard + soft) / 2, rel=1e-12)


def test_the_divergence_has_the_known_answer_and_others():
    def kl(z, q, **more):
        return kl_to(f64([z]), f64([q]), **more).item()

    assert kl([0, 0], [0.75, 0.25]) == pytest.approx(0.130812, abs=5e-7)
    assert kl([0, 0, 0], [0.5, 0.5, 0.0]) == pytest.approx(math.log(1.5), rel=1e-12)
    assert kl([4 * LN3, 0], [0.9, 0.1], temperature=2) == pytest.approx(0, abs=1e-12)
    # p = (.75, .25), q = (.25, .75): .25 ln(1/3) + .75 ln 3 = ln(3) / 2
    assert kl([LN3, 0], [0.25, 0.75]) == pytest.approx(LN3 / 2, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 7.0])
def test_the_divergence_is_torchs_with_batchmean_and_not_with_mean(temperature):
    z, q = drawn(6, 4), torch.softmax(drawn(6, 4, seed=1), dim=1)
    log_p = torch.log_softmax(z / temperature, dim=1)
    found = kl_to(z, q, temperature=temperature).item()
    assert found == pytest.approx(F.kl_div(log_p, q, reduction="batchmean").item(), rel=1e-12)
    over_classes = F.kl_div(log_p, q, reduction="none").mean().item()  # "mean", torch's default
    assert found == pytest.approx(4 * over_classes, rel=1e-12)  # C = 4 times smaller


def test_both_soft_losses_have_one_gradient():
    q = torch.softmax(drawn(3, 4, seed=1), dim=1)
    grads = []
    for loss in (soft_cross_entropy, kl_to):
        z = drawn(3, 4).requires_grad_()
        loss(z, q, temperature=3).backward()
        grads.append(z.grad)
    closed = (torch.softmax(drawn(3, 4) / 3, 1) - q) / (3 * 3)  # / B / T
    torch.testing.assert_close(grads[0], closed, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(grads[1], closed, rtol=1e-12, atol=1e-15)


def test_probabilities_as_targets_equal_the_classes_that_they_name():
    z_s, z_t, y = drawn(3, 4), drawn(3, 4, seed=1), torch.tensor([3, 0, 0])
    one_hot = F.one_hot(y, 4).double()
    found = [distillation_loss(z_s, z_t, t, alpha=0.4, temperature=3) for t in (y, one_hot)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)
    smooth = 0.9 * one_hot + 0.025
    torch.testing.assert_close(cross_entropy(z_s, smooth), F.cross_entropy(z_s, smooth))


def test_gradients_agree_with_finite_differences():
    y, z_t = torch.tensor([1, 0]), drawn(2, 3, seed=1)

    def loss(z):
        return distillation_loss(z, z_t, y, alpha=0.6, temperature=1.7)

    z = drawn(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(loss, z)
    assert torch.autograd.gradgradcheck(loss, z)  # a meta-gradient goes through it twice


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    z_s, z_t = drawn(5, 3, dtype=dtype), drawn(5, 3, seed=1, dtype=dtype)
    y = torch.tensor([0, 1, 2, 0, 1])
    found = distillation_loss(z_s.requires_grad_(), z_t, y, alpha=0.5, temperature=300)
    assert found.dtype == torch.float32
    # Of the same half-precision logits: float32 rounds by 6e-8, T^2 = 90,000 overflows float16.
    wanted = by_hand(z_s.detach().double(), z_t.double(), y, 0.5, 300)
    assert found.item() == pytest.approx(wanted, rel=1e-6)
    found.backward()
    assert z_s.grad.dtype == dtype
    assert z_s.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 20.0])
def test_logits_of_ten_thousand_give_finite_losses_and_gradients(dtype, temperature):
    z_s = torch.tensor([[1e4, -1e4, 0], [-1e4, 0, 1e4]], dtype=dtype, requires_grad=True)
    z_t = -z_s.detach()
    y = torch.tensor([0, 0])
    for loss in (
        distillation_loss(z_s, z_t, y, alpha=0.5, temperature=temperature),
        kl_to(z_s, torch.softmax(z_t.float(), 1), temperature=temperature),
        mutual_losses(z_s, z_t, y).mentor,
    ):
        (grad,) = torch.autograd.grad(loss, z_s)
        assert loss.isfinite()
        assert loss.item() > 0
        assert grad.isfinite().all()


def test_a_class_that_nobody_expects_adds_nothing_where_its_probability_vanishes():
    z = torch.tensor([[0.0, -1e30]], requires_grad=True)
    loss = kl_to(z, torch.tensor([[1.0, 0.0]]), temperature=1e-10)  # log p = -inf, q = 0
    loss.backward()
    assert loss.item() == 0
    assert z.grad.tolist() == [[0, 0]]


def test_a_float64_teacher_does_not_widen_a_float32_student():
    z_s, z_t = drawn(2, 3, dtype=torch.float32), drawn(2, 3, seed=1)
    found = distillation_loss(z_s, z_t, torch.tensor([0, 1]), alpha=0.5, temperature=2)
    assert found.dtype == torch.float32


def test_clients_at_once_give_what_each_gives_alone():
    z_s, z_t, y = drawn(3, 4, 2), drawn(3, 4, 2, seed=1), torch.tensor([[0, 1, 1, 0]] * 3)

    def loss(*batch):
        return distillation_loss(*batch, alpha=0.5, temperature=2)

    together = torch.func.vmap(torch.func.grad(loss))(z_s, z_t, y)
    alone = torch.stack([torch.func.grad(loss)(*one) for one in zip(z_s, z_t, y, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-15)


# --- FedKD ----------------------------------------------------------------------------------------


def fedkd_by_hand(z_t, z_s, y, hidden=0.0):
    p_t, p_s = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (z_t, z_s))
    ce_t, ce_s = (-np.log(p[np.arange(len(y)), y]).mean() for p in (p_t, p_s))
    to_t = (p_s * np.log(p_s / p_t)).sum(1).mean() + hidden
    to_s = (p_t * np.log(p_t / p_s)).sum(1).mean() + hidden
    return ce_t + to_t / (ce_t + ce_s), ce_s + to_s / (ce_t + ce_s)


def test_mutual_losses_equal_the_papers_formulas():
    z_t, z_s, y = drawn(4, 3), drawn(4, 3, seed=1), torch.tensor([0, 2, 1, 1])
    h_t, h_s = drawn(4, 6, seed=2), drawn(4, 6, seed=3)
    found = mutual_losses(z_t, z_s, y)
    wanted = fedkd_by_hand(z_t.numpy(), z_s.numpy(), y.numpy())
    assert [v.item() for v in found] == pytest.approx(wanted, rel=1e-12)
    found = mutual_losses(z_t, z_s, y, hidden=(h_t, h_s))
    mse = ((h_t - h_s) ** 2).mean().item()
    wanted = fedkd_by_hand(z_t.numpy(), z_s.numpy(), y.numpy(), mse)
    assert [v.item() for v in found] == pytest.approx(wanted, rel=1e-12)


def test_each_mutual_loss_teaches_its_own_model_and_the_denominator_teaches_nobody():
    y = torch.tensor([0, 2])
    z_t, z_s = drawn(2, 3).requires_grad_(), drawn(2, 3, seed=1).requires_grad_()
    h_t, h_s = (drawn(2, 5, seed=seed).requires_grad_() for seed in (2, 3))
    losses = mutual_losses(z_t, z_s, y, hidden=(h_t, h_s))
    of_t = torch.autograd.grad(losses.mentor, (z_t, z_s, h_t, h_s), allow_unused=True)
    of_s = torch.autograd.grad(losses.mentee, (z_t, z_s, h_t, h_s), allow_unused=True)
    assert [g is not None for g in of_t] == [True, False, True, False]
    assert [g is not None for g in of_s] == [False, True, False, True]
    # grad CE = (p - y) / B; grad KL(q || p) = (p - q) / B; both by the closed form.
    p_t, p_s = (torch.softmax(z.detach(), 1) for z in (z_t, z_s))
    below = sum(F.cross_entropy(z.detach(), y) for z in (z_t, z_s))
    one_hot = F.one_hot(y, 3)
    wanted = ((p_t - one_hot) + (p_t - p_s) / below) / 2
    torch.testing.assert_close(of_t[0], wanted, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(of_t[2], 2 * (h_t - h_s).detach() / 10 / below)


def test_two_models_without_loss_give_no_nan():
    sure = torch.tensor([[200.0, 0.0]], requires_grad=True)
    for loss in mutual_losses(sure, sure.detach().clone(), torch.tensor([0])):
        assert loss.item() == 0


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, math.inf])
def test_a_share_of_the_teacher_outside_0_to_1_is_refused(alpha):
    with pytest.raises(ConfigError, match=rf"alpha = {alpha}: must be in \[0, 1\]"):
        distillation_loss(STUDENT, TEACHER, CLASSES, alpha=alpha, temperature=1)


@pytest.mark.parametrize("temperature", [0, -1, math.nan, math.inf])
@pytest.mark.parametrize("loss", [soft_cross_entropy, kl_to, distillation_loss])
def test_a_temperature_that_is_not_finite_and_above_0_is_refused(loss, temperature):
    more = {"targets": CLASSES, "alpha": 0.5} if loss is distillation_loss else {}
    with pytest.raises(ConfigError, match=f"temperature = {temperature}: must be a finite"):
        loss(STUDENT, TEACHER, temperature=temperature, **more)


@pytest.mark.parametrize(
    ("student", "teacher", "targets", "words"),
    [
        (STUDENT, TEACHER[:4], CLASSES, r"teacher_logits has shape \(4, 2\).*shape \(5, 2\)"),
        (STUDENT, torch.ones(5, 3), CLASSES, r"teacher_logits has shape \(5, 3\).*same classes"),
        (STUDENT, CLASSES, CLASSES, "teacher_logits has shape .* torch.int64"),
        (STUDENT[0], TEACHER[0], CLASSES, r"student_logits has shape \(2,\)"),
        (STUDENT[:0], TEACHER[:0], CLASSES[:0], r"student_logits has shape \(0, 2\)"),
        (STUDENT.int(), TEACHER, CLASSES, "student_logits has shape .* torch.int32"),
        (STUDENT, TEACHER, CLASSES[:4], r"targets have shape \(4,\).*5 int64 classes"),
        (STUDENT, TEACHER, CLASSES[:, None], r"targets have shape \(5, 1\)"),
        (STUDENT, TEACHER, CLASSES.int(), "targets have .* dtype torch.int32"),
        (STUDENT, TEACHER, TEACHER[:, :1], r"target_probs has shape \(5, 1\)"),
    ],
)
def test_shapes_and_dtypes_that_do_not_fit_are_refused(student, teacher, targets, words):
    with pytest.raises(ModelError, match=words):
        distillation_loss(student, teacher, targets, alpha=0.5, temperature=2)


@pytest.mark.parametrize("target", [-100, -1, 2])
def test_no_class_means_ignore(target):
    with pytest.raises(RuntimeError, match="out of bounds"):
        cross_entropy(STUDENT[:1], torch.tensor([target]))


def test_hidden_states_of_two_widths_are_refused():
    y, (h_t, h_s) = torch.tensor([0, 1]), (drawn(2, 6), drawn(2, 3))
    with pytest.raises(ModelError, match=r"\(2, 6\) of the mentor and \(2, 3\) of the mentee"):
        mutual_losses(drawn(2, 2), drawn(2, 2), y, hidden=(h_t, h_s))
