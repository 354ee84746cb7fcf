r"""A federated teacher, then a federated student (with the loss of 1503.02531).

Stage 1 is an earlier run of any strategy: it leaves the teacher, a large model t. Stage 2 is
FedAvg of a small model on

    J(w) = (1 - a) H(y, softmax z(x; w)) + a T^2 H(softmax(z_t(x) / T), softmax(z(x; w) / T))

over each client's own records. t is broadcast once. A client computes z_t on all its records, keeps
that, and forgets t; no output of the teacher ever leaves it. Stage 3, where wanted, is the
fine-tuning on each client that evaluation does anyway (``eval-steps``).
"""

from functools import partial

from ..config import RunConfig
from .fedavg import FedAvg, local_sgd
from .recipe import STRATEGIES, Recipe, aggregation_of, weighting_of
from .teaching import Teaching


class TeacherStudent(Teaching, FedAvg):
    """FedAvg of students that learn from a teacher on their clients.

    Args:
        teacher: that was trained before.
        others: see ``FedAvg``.
    """


@STRATEGIES.register("teacher-student")
def recipe(config: RunConfig) -> Recipe:
    """FedAvg of a student that learns, on each client, from a teacher trained by an earlier run."""
    return Recipe(
        strategy=partial(
            TeacherStudent,
            weighting=weighting_of(config, "examples"),
            aggregate=aggregation_of(config),
        ),
        client="taught",
        client_options={
            **local_sgd(config),
            "alpha": config.distill_alpha,
            "temperature": config.distill_temperature,
        },
        needs=("teacher",),
        client_needs=("teacher",),
    )
