r"""FedKD's adaptive mutual distillation of a mentor t and a mentee s (Wu et al., 2108.13323).

    L_t = CE_t + [KL(p_s || p_t) + MSE(h_t, W h_s)] / (CE_t + CE_s)
    L_s = CE_s + [KL(p_t || p_s) + MSE(h_t, W h_s)] / (CE_t + CE_s)

The worse the two models predict the batch, the less they learn from each other. The other model's
outputs and the denominator are constants of each loss: a gradient through the denominator would
reward raising the cross-entropies. (A public implementation leaves it in, and averages KL over the
classes too.)

Differences from the paper: a denominator below 1e-8 counts as 1e-8, so that two models without any
loss give no NaN.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import mse_loss

from ..errors import ModelError
from .distillation import cross_entropy, kl_to

LEAST_DENOMINATOR = 1e-8


class MutualLosses(NamedTuple):
    """Hold the two losses of one batch, scalars: each has gradients in its own model alone."""

    mentor: Tensor
    mentee: Tensor


def mutual_losses(
    mentor_logits: Tensor,
    mentee_logits: Tensor,
    targets: Tensor,
    *,
    hidden: tuple[Tensor, Tensor] | None = None,
) -> MutualLosses:
    """Return L_t and L_s; their sum may be differentiated at once.

    Args:
        mentor_logits: (B, C) with B >= 1, floating.
        mentee_logits: (B, C).
        targets: (B,) int64 classes in [0, C), or (B, C) probabilities.
        hidden: h_t and W h_s of one shape, floating, W applied by the caller; W learns with the
            mentee. None: without this term.

    Raises:
        ModelError: a shape or a dtype does not fit.
    """
    ce_mentor, ce_mentee = (cross_entropy(z, targets) for z in (mentor_logits, mentee_logits))
    to_mentor = kl_to(mentor_logits, _probabilities(mentee_logits))
    to_mentee = kl_to(mentee_logits, _probabilities(mentor_logits))
    if hidden is not None:
        ours, projected = hidden
        if ours.shape != projected.shape:
            raise ModelError(
                f"the hidden states have shapes {tuple(ours.shape)} of the mentor and "
                f"{tuple(projected.shape)} of the mentee: give the mentee's as W h_s, projected to "
                "the mentor's width"
            )
        to_mentor = to_mentor + mse_loss(ours, projected.detach())
        to_mentee = to_mentee + mse_loss(projected, ours.detach())
    denominator = (ce_mentor + ce_mentee).detach().clamp(min=LEAST_DENOMINATOR)
    return MutualLosses(ce_mentor + to_mentor / denominator, ce_mentee + to_mentee / denominator)


def _probabilities(logits: Tensor) -> Tensor:
    """Return softmax(z) as a constant, in float32 at least."""
    wide = logits.detach()
    return (wide if wide.dtype.itemsize >= 4 else wide.float()).softmax(dim=1)
