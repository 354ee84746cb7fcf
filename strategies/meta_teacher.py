r"""A meta-teacher: a large meta-trained model teaches a small one on each new client.

The small model w is meta-trained by FedMeta (1802.07876); the large one t was, by an earlier run.
At evaluation a client adapts t to its support set S, and its student learns from that (1503.02531):

    t'  = t adapted by gradient steps on S
    q   = softmax(z_{t'}(x) / T)                        x in S and in unlabelled local records U
    w'  = argmin_w  a T^2 mean_{S, U} KL(q || softmax(z(x; w) / T)) + (1 - a) mean_S H(y, softmax z)

by some steps that begin at w. So a weak device gets a small model of its own. U is half of the
query set, without its labels; on the other half w' is judged, beside t' and w adapted directly. t
is sent to each client once; t', its outputs and w' stay there. Training never asks the teacher.
"""

from functools import partial

from flwr.app import MessageType

from ..config import RunConfig
from . import fedmeta
from .fedmeta import FedMeta
from .recipe import STRATEGIES, Recipe, aggregation_of, weighting_of
from .teaching import Teaching


class MetaTeacher(Teaching, FedMeta):
    """FedMeta of students that a larger meta-trained model teaches when they are evaluated.

    Args:
        teacher: that was meta-trained before.
        others: see ``FedMeta``.
    """

    teaches_in = MessageType.EVALUATE


@STRATEGIES.register("meta-teacher")
def recipe(config: RunConfig) -> Recipe:
    """FedMeta of a small model; at evaluation a large one, adapted, teaches it on each client."""
    return Recipe(
        strategy=partial(
            MetaTeacher,
            optimizer=config.server_optimizer,
            lr=config.outer_lr or 0.01,
            weighting=weighting_of(config, "uniform"),
            aggregate=aggregation_of(config),
        ),
        client="meta-teacher",
        client_options={
            **fedmeta.recipe(config).client_options,
            "alpha": config.distill_alpha,
            "temperature": config.distill_temperature,
            "teacher_steps": config.teacher_steps,
            "teach_steps": config.teach_steps,
            "teach_lr": config.teach_lr,
        },
        needs=("teacher",),
        client_needs=("teacher",),
    )
