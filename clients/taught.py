r"""Local SGD of a student that learns from labels and from a teacher at once (1503.02531).

    J(w) = (1 - a) H(y, softmax z(x; w)) + a T^2 H(softmax(z_t(x) / T), softmax(z(x; w) / T))
    w   <- w - lr * grad J(w; batch)

The teacher's logits z_t are computed on all records when the teacher comes, once, in evaluation
mode; they stay on the client. Evaluation, and the fine-tuning in it, see the labels alone.

A private client (1607.00133) takes DP-SGD steps on J: the teacher's logits on a record are part of
that record, for the teacher is fixed. That holds where the teacher itself tells nothing of the
records that was not counted: so it must be trained with privacy, or public, or it is refused.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from ..wire import NamedArrays
from .data import ClientData
from .learner import Config, NDArrays
from .objective import LossFn, Params
from .privacy.round import PrivateRounds, Training
from .sgd import SGDClient, sgd_update
from .soft_targets import pack, taught_loss
from .teacher_outputs import TeacherOutputs, check_may_teach
from .training import LocalTraining, Rule


class TaughtClient(SGDClient):
    """An SGDClient whose loss is J, with a teacher that the server sends once.

    Args:
        model: the student, see ``Learner``.
        data: see ``Learner``; targets are classes.
        teacher: a module of the teacher's architecture, with as many outputs as the student.
        alpha: a in [0, 1], the share of the teacher.
        temperature: T > 0.
        loss_fn: of evaluation and of the adaptation in it, on the labels; training has J.
        sgd: keyword arguments of ``SGDClient``; ``context`` is needed.

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
        loss_fn: LossFn = nn.functional.cross_entropy,
        **sgd: Any,
    ) -> None:
        self.taught_loss = taught_loss(alpha, temperature)
        super().__init__(model, data, loss_fn=self.taught_loss, **sgd)  # of private rounds too
        self.loss_fn = loss_fn
        self.outputs = TeacherOutputs(
            teacher,
            self.context,
            client=self.name,
            store=self.store,
            device=self.device,
            is_private=self.private is not None,
        )

    def take_teacher(self, arrays: NamedArrays) -> None:
        """Take the teacher that came beside the model."""
        self.outputs.take(arrays)

    def training(self, params: Params, config: Config) -> LocalTraining:
        """Return the epochs of SGD on J of the round that ``config`` names, from ``params``."""
        options = (("lr", self.local_lr), ("proximal_mu", self._proximal_mu(config)))
        return self.as_training(
            Rule(sgd_update, self.model, self.taught_loss, options),
            params,
            config,
            batches=lambda data: self._batches(self._taught(data, config), "sgd", config),
            steps=lambda data: self.local_epochs * self._batches_of_an_epoch(data.num_examples),
        )

    def train_privately(
        self, private: PrivateRounds, parameters: NDArrays, config: Config
    ) -> tuple[NDArrays, int, Config]:
        """Return the privatised student, and epsilon.

        Raises:
            RefusedError: where the server does not say that the teacher was trained with privacy,
                or is public.
            WireError: where there is no teacher, nor what an earlier one left.
        """
        check_may_teach(config, self.name)
        self.outputs.check(config)
        return super().train_privately(private, parameters, config)

    def fit_privately(
        self, private: PrivateRounds, training: Training, parameters: NDArrays, config: Config
    ) -> tuple[NDArrays, int, Config]:
        """Return what ``Learner.fit_privately`` does, of records whose targets hold the teacher."""
        params = self.load(parameters)
        with self.guarded():
            reply = private.train(
                params,
                config,
                training,
                lambda: self._taught(self.data, config),  # once the releases are paid for
                model=self.model,
            )
            count = self.count_told(lambda: self.data.num_examples)
            return self.dump(reply.params, parameters), count, {**reply.metrics}

    def _taught(self, data: ClientData, config: Config) -> ClientData:
        """Return ``data`` with the teacher's logits in its targets."""
        inputs, classes = data.all
        logits = self.outputs.of(inputs, config).to(inputs.device)
        is_private = self.private is not None
        targets = pack(classes, logits, name=self.name, unsound_as_nan=is_private)
        (xs, ys), (xq, _) = data.support, data.query
        return replace(data, support=(xs, targets[: len(ys)]), query=(xq, targets[len(ys) :]))
