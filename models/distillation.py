r"""Losses of a student that learns from a teacher's outputs (Hinton, Vinyals, Dean, 1503.02531).

    p(z, T) = softmax(z / T)
    J       = (1 - a) H(y, p(z_s, 1)) + a T^2 H(p(z_t, T), p(z_s, T))     ``distillation_loss``
    H(q, p) = - sum_c q_c log p_c                                        ``soft_cross_entropy``
    KL(q || p) = H(q, p) - H(q, q)                                       ``kl_to``

All are means over the records of a batch, never over the classes too: torch's ``kl_div`` divides by
both by default, which makes the loss C times smaller. T^2 keeps the size of the soft gradient when
T changes (the gradient of H(p(z_t, T), p(z_s, T)) is of order 1 / T^2).

A teacher's outputs are constants: no gradient leads to them. Half precision is computed in float32.
There is no decision on values here, so that each loss works under ``torch.func`` and compiled.

H and KL have the same gradient in the student, since H(q, q) is a constant of it; KL alone is 0
where the two agree. FedDF (2006.07242) minimises KL, DS-FL (2008.06180) minimises H.
"""

import math

import torch
from torch import Tensor

from ..errors import ConfigError, ModelError


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    *,
    alpha: float,
    temperature: float,
) -> Tensor:
    """Return J, the mean over the batch of (1 - a) H(y, p_s) + a T^2 H(p_t, p_s), a scalar.

    The first p_s is softmax(z_s), without T; p_t and the second p_s are at temperature T.

    Args:
        student_logits: (B, C) with B >= 1, floating.
        teacher_logits: (B, C); gets no gradient, moves to the student's dtype.
        targets: (B,) int64 classes in [0, C), or (B, C) probabilities, floating.
        alpha: share of the teacher, in [0, 1]: 0 is the plain cross-entropy.
        temperature: T, finite and above 0.

    Returns:
        J in the student's dtype, in float32 where that is narrower.

    Raises:
        ConfigError: alpha or temperature is outside its range.
        ModelError: a shape or a dtype does not fit.

    >>> student, teacher = torch.zeros(1, 2), torch.tensor([[2 * math.log(3), 0.0]])
    >>> loss = distillation_loss(student, teacher, torch.tensor([0]), alpha=0.5, temperature=2)
    >>> print(f"{loss:f}")
    1.732868
    """
    check_alpha(alpha)
    check_temperature(temperature)
    _check_logits("student_logits", student_logits)
    _check_same_shape("teacher_logits", teacher_logits, student_logits)
    hard = cross_entropy(student_logits, targets)
    teacher = _wide(teacher_logits.detach()).to(_wide(student_logits).dtype)
    soft_targets = torch.softmax(_tempered(teacher, temperature), dim=1)  # (B, C)
    soft = soft_cross_entropy(student_logits, soft_targets, temperature=temperature)
    return (1 - alpha) * hard + alpha * temperature**2 * soft


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return H(y, softmax(z)), the mean over the batch, of classes or of probabilities.

    It is ``torch.nn.functional.cross_entropy``, but half precision is computed in float32, and no
    class means "ignore": a target of -100 is an error like every other one outside [0, C).

    Args:
        logits: (B, C) with B >= 1, floating.
        targets: (B,) int64 classes in [0, C), or (B, C) probabilities, floating.

    Raises:
        ModelError: a shape or a dtype does not fit.
    """
    _check_logits("logits", logits)
    if targets.is_floating_point():
        return soft_cross_entropy(logits, targets)
    if targets.dtype != torch.int64 or targets.shape != logits.shape[:1]:
        raise ModelError(
            f"targets have shape {tuple(targets.shape)} and dtype {targets.dtype} beside logits of "
            f"shape {tuple(logits.shape)}: the loss needs {len(logits)} int64 classes, or floating "
            "probabilities of the logits' shape"
        )
    log_p = torch.log_softmax(_wide(logits), dim=1)  # (B, C)
    return -log_p.gather(1, targets[:, None]).mean()


def soft_cross_entropy(
    student_logits: Tensor, target_probs: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Return H(q, softmax(z_s / T)), the mean over the batch, without a factor T^2.

    Args:
        student_logits: z_s, (B, C) with B >= 1, floating.
        target_probs: q, (B, C), floating; the rows are distributions, which is not checked. They
            get no gradient and are not divided by T: what softens them is the caller's.
        temperature: T, finite and above 0.

    Raises:
        ConfigError: the temperature is outside its range.
        ModelError: a shape or a dtype does not fit.
    """
    log_p, q = _prepared(student_logits, target_probs, temperature)
    return -_expected(log_p, q).sum(dim=1).mean()  # (B, C) -> (B,) -> ()


def kl_to(student_logits: Tensor, target_probs: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return KL(q || softmax(z_s / T)), the mean over the batch, without a factor T^2.

    Where q_c = 0 a class adds 0. Arguments and errors are those of ``soft_cross_entropy``.

    >>> quarter = torch.tensor([[0.75, 0.25]])
    >>> print(f"{kl_to(torch.zeros(1, 2), quarter):f}")
    0.130812
    """
    log_p, q = _prepared(student_logits, target_probs, temperature)
    return (torch.xlogy(q, q) - _expected(log_p, q)).sum(dim=1).mean()


def check_alpha(alpha: float) -> None:
    """Raise ConfigError unless alpha is a number in [0, 1]."""
    if not 0 <= alpha <= 1:
        raise ConfigError(
            f"alpha = {alpha!r}: must be in [0, 1], the share of the teacher in the loss; 0 learns "
            "from the targets alone, 1 from the teacher alone"
        )


def check_temperature(temperature: float) -> None:
    """Raise ConfigError unless the temperature is a finite number above 0."""
    if not 0 < temperature < math.inf:
        raise ConfigError(
            f"temperature = {temperature!r}: must be a finite number above 0, since logits are "
            "divided by it; 1 leaves them as they are, usual are 1 to 20"
        )


def _prepared(
    student_logits: Tensor, target_probs: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return log softmax(z_s / T) and the detached targets, both (B, C) in one dtype."""
    check_temperature(temperature)
    _check_logits("student_logits", student_logits)
    _check_same_shape("target_probs", target_probs, student_logits)
    log_p = torch.log_softmax(_tempered(_wide(student_logits), temperature), dim=1)
    return log_p, target_probs.detach().to(log_p.dtype)


def _expected(log_p: Tensor, q: Tensor) -> Tensor:
    """Return q log p, and 0 where q = 0: there log p may be -inf, of logits far apart."""
    return torch.where(q == 0, torch.zeros_like(log_p), q * log_p)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """Return (z - max z) / T: the same softmax, and a small T overflows to -inf alone."""
    return (logits - logits.detach().amax(dim=1, keepdim=True)) / temperature


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_logits(name: str, logits: Tensor) -> None:
    if not logits.is_floating_point() or logits.ndim != 2 or 0 in logits.shape:
        raise ModelError(
            f"{name} has shape {tuple(logits.shape)} and dtype {logits.dtype}: the loss needs one "
            "row of floating logits a record, (B, C), of at least one record and one class"
        )


def _check_same_shape(name: str, value: Tensor, student_logits: Tensor) -> None:
    if not value.is_floating_point() or value.shape != student_logits.shape:
        raise ModelError(
            f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}, student_logits have "
            f"shape {tuple(student_logits.shape)}: both need the same records in the same order "
            "and the same classes, in floating numbers"
        )
