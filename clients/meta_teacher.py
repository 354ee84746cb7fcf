r"""A large meta-trained teacher, adapted to a client, teaches a small student there.

Distillation 1503.02531 of a model adapted as by MAML, 1703.03400; the equations stand with the
strategy of the same name. Training is that of ``MAMLClient`` and never asks the teacher.

A private client trains as a private ``MAMLClient``. The teacher that it adapts to its support set
is not accounted, and need not be: neither it, nor its outputs, nor the student that learnt from it
ever leave; what an evaluation tells of them follows ``tells``.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..models.distillation import check_alpha, check_temperature, kl_to
from ..public import fingerprint_of
from ..streams import torch_stream
from ..wire import TEACHER_LR, NamedArrays
from .data import Batch, ClientData
from .evaluation import LOSS, LOSS_BEFORE, adaptation_curve, loss_after, score
from .learner import Config, NDArrays
from .maml import MAMLClient
from .meta_gradient import Predicate, adapt
from .objective import LossFn, Params, detached, grad_and_value, objective
from .personal import PersonalModel
from .teacher_outputs import TeacherOutputs, check_may_teach

TAUGHT_LOSS, TAUGHT_ACCURACY = "taught-loss", "taught-accuracy"
TEACHER_LOSS, TEACHER_ACCURACY = "teacher-loss", "teacher-accuracy"
TAUGHT = "taught"  # kind of the state that holds the student of a client


def teach(
    student: nn.Module,
    start: Params,
    inputs: Tensor,
    logits: Tensor,
    classes: Tensor,
    *,
    alpha: float,
    temperature: float,
    steps: int,
    lr: float,
    loss_fn: LossFn = nn.functional.cross_entropy,
    moves: Predicate | None = None,
) -> Params:
    r"""Return the student after some steps of Adam, each on all records at once.

    It minimises, from ``start`` on,

        a T^2 mean_N KL(softmax(z_t / T) || softmax(z_s / T)) + (1 - a) mean_S H(y, softmax z_s)

    Args:
        student: called functionally and never changed.
        start: its parameters at first.
        inputs: (N, ...): S labelled records, then unlabelled ones.
        logits: z_t, (N, C).
        classes: (S,), S <= N.
        alpha: a in [0, 1].
        temperature: T > 0.
        steps: >= 1.
        lr: of Adam, > 0. Adam, since its steps do not grow with T^2.
        loss_fn: H, a mean over the labelled records.
        moves: which parameter names move; None means all.
    """
    soft = torch.softmax(logits / temperature, dim=1)  # (N, C)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        found = alpha * temperature**2 * kl_to(outputs, soft, temperature=temperature)
        if alpha < 1:
            found = found + (1 - alpha) * loss_fn(outputs[: len(targets)], targets)
        return found

    function = objective(student, loss)
    moving = {n: w.detach().clone() for n, w in start.items() if moves is None or moves(n)}
    optimizer = torch.optim.Adam(list(moving.values()), lr=lr)
    for _ in range(steps):
        slopes, _ = grad_and_value(lambda p: function({**start, **p}, (inputs, classes)), moving)
        for name, value in moving.items():
            value.grad = slopes[name]
        optimizer.step()
    return detached({**start, **moving})


def halves(query: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the rows of the query set that are unlabelled, and those that are judged; ascending.

    >>> [len(rows) for rows in halves((torch.zeros(5, 2), torch.zeros(5)), torch.Generator())]
    [2, 3]
    """
    total = len(query[1])
    order = torch.randperm(total, generator=generator)
    return order[: total // 2].sort().values, order[total // 2 :].sort().values


class MetaTeacherClient(MAMLClient):
    """A MAMLClient whose evaluation also lets a larger model teach its own.

    The query set is cut in two by the client's own stream, the same way each time: one half serves
    as unlabelled records, on the other all are judged, so that they compare. The adaptation curve
    is that of the student adapted directly; ``taught-loss`` and ``taught-accuracy`` are of the
    student that was taught, ``teacher-loss`` and ``teacher-accuracy`` of the adapted teacher. The
    taught student is kept on the client.

    Args:
        model: the student, see ``Learner``.
        data: see ``Learner``; targets are classes.
        teacher: a module of the teacher's architecture, with as many outputs as the student.
        alpha: a in [0, 1], the share of the teacher.
        temperature: T > 0.
        teacher_steps: gradient steps that adapt the teacher, at the rate that the server tells,
            else at ``inner_lr``; 0: the last of ``eval_steps``.
        teach_steps: steps of the student, >= 1.
        teach_lr: their rate, > 0.
        maml: keyword arguments of ``MAMLClient``; ``context`` is needed.

    Raises:
        ConfigError: where a value is out of range, or there is no context.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ClientData | Callable[[], ClientData],
        *,
        teacher: nn.Module,
        alpha: float = 0.5,
        temperature: float = 4.0,
        teacher_steps: int = 0,
        teach_steps: int = 100,
        teach_lr: float = 0.01,
        **maml: Any,
    ) -> None:
        super().__init__(model, data, **maml)
        check_alpha(alpha)
        check_temperature(temperature)
        if not (isinstance(teacher_steps, int) and teacher_steps >= 0):
            raise ConfigError(f"teacher_steps = {teacher_steps!r}: must be a whole number >= 0")
        if not (isinstance(teach_steps, int) and teach_steps >= 1):
            raise ConfigError(f"teach_steps = {teach_steps!r}: must be a whole number >= 1")
        if not 0 < teach_lr < math.inf:
            raise ConfigError(f"teach_lr = {teach_lr!r}: must be a finite number above 0")
        self.alpha = alpha
        self.temperature = temperature
        self.teacher_steps = teacher_steps or (self.eval_steps[-1] if self.eval_steps else 0)
        self.teach_steps = teach_steps
        self.teach_lr = teach_lr
        self.outputs = TeacherOutputs(
            teacher, self.context, client=self.name, store=self.store, device=self.device
        )
        self.taught = PersonalModel(self.context, client=self.name, store=self.store, kind=TAUGHT)

    def take_teacher(self, arrays: NamedArrays) -> None:
        """Take the teacher that came beside the model."""
        self.outputs.take(arrays)

    def evaluate(self, parameters: NDArrays, config: Config) -> tuple[float, int, Config]:
        """Return (loss after the most steps, number of judged records, metrics).

        Raises:
            RefusedError: where the client is private, and the server does not say that the teacher
                was trained with privacy, or is public.
            WireError: where there is no teacher, nor what an earlier one left.
        """
        params = self.load(parameters)
        if self.private is not None:
            if self.private.tells_nothing:
                return math.nan, 1, {}  # not even whether it would have failed
            check_may_teach(config, self.name)
        self.outputs.check(config)
        with self.guarded():
            self.model = copy.deepcopy(self.model).eval()  # without dropout: the same each time
            inputs, classes = self.data.query
            hidden, judged = halves((inputs, classes), self._halving)
            known = inputs[judged], classes[judged]
            start, advance = self.adaptation(params, config)
            found = adaptation_curve(
                self.model, self.loss_fn, start, known, steps=self.eval_steps, advance=advance
            )
            found |= self._taught(params, config, hidden, judged)
            told = {name: value for name, value in found.items() if self.tells(name)}
            last = loss_after(self.eval_steps[-1]) if self.eval_steps else LOSS_BEFORE
            loss = found[last] if self.tells(LOSS) else math.nan
            return loss, self.count_told(lambda: len(judged)), {**told}

    @property
    def _halving(self) -> torch.Generator:
        return torch_stream(self.seed, "unlabelled", self.name)  # the same in every round

    def _taught(
        self, params: Params, config: Config, hidden: Tensor, judged: Tensor
    ) -> dict[str, float]:
        """Let the teacher teach, keep the student, and return the scores of both."""
        (xs, ys), (xq, yq) = self.data.support, self.data.query
        logits = self._teacher_logits(config).to(xs.device)
        of_support, of_query = logits[: len(ys)], logits[len(ys) :]
        student = teach(
            self.model,
            params,
            torch.cat([xs, xq[hidden]]),
            torch.cat([of_support, of_query[hidden]]),
            ys,
            alpha=self.alpha,
            temperature=self.temperature,
            steps=self.teach_steps,
            lr=self.teach_lr,
            loss_fn=self.loss_fn,
            moves=self.adapted,
        )
        self.taught.keep(config, student)
        said, classes = of_query[judged], yq[judged]
        loss, accuracy = score(self.model, self.loss_fn, student, (xq[judged], classes))
        found = {TAUGHT_LOSS: loss, TEACHER_LOSS: self.loss_fn(said, classes).item()}
        if accuracy is not None:
            found[TAUGHT_ACCURACY] = accuracy
            found[TEACHER_ACCURACY] = (said.argmax(1) == classes).double().mean().item()
        return found

    def _teacher_logits(self, config: Config) -> Tensor:
        """Return the logits, (S + Q, C), of the teacher adapted to the support set."""
        support, records = self.data.support, self.data.all[0]
        steps = self.teacher_steps
        lr = float(config.get(TEACHER_LR, self.inner_lr))

        def adapted(module: nn.Module, params: Params) -> Params:
            return adapt(module, self.loss_fn, params, support, inner_lr=lr, steps=steps)

        by = f"{steps} steps of {lr!r} on {len(support[1])} {fingerprint_of(support[1])}"
        return self.outputs.of(records, config, adapt=adapted if steps else None, adapted_by=by)
