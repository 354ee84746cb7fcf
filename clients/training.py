"""One client's local training as a value, and the two ways to run it by itself.

``run_eagerly`` is the loop that all others are held against. ``run_compiled`` runs the same loop
with its step compiled: one compilation serves all clients, for the batch dimension is left open.
``clients/cohort.py`` runs many clients at once.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from logging import WARNING
from typing import Any

import torch
from flwr.common import log
from torch import nn

from ..streams import torch_seeded
from .batches import joined, parts
from .data import Batch, ClientData
from .kernel import Kernel, compiled, first_line
from .local_update import LocalResult, LocalUpdate, run_update
from .objective import LossFn, Params
from .one_channel import OneChannelAsMatrix

SMALL = 16  # torch chooses another convolution from this batch size on
HINTS = {False: 10, True: 64}  # batch sizes that compilation sees, below SMALL and from it on
RULES_FOR_ONE = 4  # rules in a row that served one client each: compilation is then of no use
OF_NO_USE = (
    "each client brings a model, a loss function or a predicate of its own, so nothing compiled "
    "serves a second one: a client's first round in a process is eager from now on, and which bits "
    "it gets then depends on the workers; build the model once in a process and pass the same "
    "object"
)
NO_SIZE = (
    "the steps of this model are not compiled for open batch sizes (%s), and each client has sizes "
    "of its own: they run eagerly; set batch-size, or order = 'first'"
)


@dataclass(frozen=True)
class Rule:
    """How a ``LocalUpdate`` is made; equal rules make updates that do the same.

    Attributes:
        make: ``sgd_update`` or another function of its form, whose states are NamedTuples of
            parameters with the losses of the steps in ``losses``.
        model: its first argument.
        loss_fn: its second.
        options: its keyword arguments.
    """

    make: Callable[..., LocalUpdate[Any, Any]]
    model: nn.Module
    loss_fn: LossFn
    options: tuple[tuple[str, Any], ...]

    def update(self) -> LocalUpdate[Any, Any]:
        """Return a new update."""
        return self.make(self.model, self.loss_fn, **dict(self.options))


@dataclass(frozen=True)
class LocalTraining:
    """What one client does in a round, apart from how it is computed.

    Attributes:
        rule: of its steps.
        params: that it begins with, on the device where it computes.
        records: gives its data, wherever they are; may raise.
        batches: its batches, from its data on any device: the same ones each time it is called.
        steps: their number.
        seeded: a block in which layers draw the client's own random numbers.
        batch_size: records of a full batch; 0: all, so that each client has its own.
        is_plain: no layer draws random numbers, and all that the model holds are parameters that
            train; else it runs eagerly whatever the kernel.
    """

    rule: Rule
    params: Params
    records: Callable[[], ClientData]
    batches: Callable[[ClientData], Iterator[Any]]
    steps: Callable[[ClientData], int]
    seeded: Callable[[], AbstractContextManager[None]]
    batch_size: int
    is_plain: bool

    @property
    def device(self) -> torch.device:
        """Where the training computes."""
        return next(iter(self.params.values())).device


def run_eagerly(training: LocalTraining, data: ClientData) -> LocalResult:
    """Run the training step after step on ``data``, which is on its device."""
    with training.seeded():
        return run_update(training.rule.update(), training.params, training.batches(data))


def run_alone(training: LocalTraining, data: ClientData, kernel: Kernel) -> LocalResult:
    """Run the training of one client by ``kernel``; "vmap" is eager here, it needs a cohort."""
    if kernel == "compiled" and training.is_plain and has_indices(data):
        return run_compiled(training, data)
    return run_eagerly(training, data)


def run_compiled(training: LocalTraining, data: ClientData) -> LocalResult:
    """Run the training with its step compiled; the same up to rounding.

    What is compiled depends on the rule, on the kind of the records and on the sizes of the batch,
    in two classes, alone: never on which clients came before, but where each brings a rule of its
    own (``OF_NO_USE``). Batches of one record take the step as it is. Where the compiler must know
    each size, batches of exactly ``training.batch_size`` are compiled, and no others.
    """
    if not _compilers.serves(training.rule):
        return run_eagerly(training, data)
    update = training.rule.update()
    state, losses = update.begin(training.params), []
    looked_at: set[Step] = set()
    with training.seeded():
        for item in training.batches(data):
            step = _compilers.step_of(training, state, item)
            if step is None:
                state = update.step(state, item)
            else:
                state = step(state, parts(item), looked_at=step in looked_at)
                if not step.ran_eagerly:
                    looked_at.add(step)
            losses.append(state.losses[0])
            state = state._replace(losses=())
    return update.finish(state._replace(losses=tuple(losses)))


def has_indices(data: ClientData) -> bool:
    """Return whether no target is negative: fast kernels would take it for another index."""
    held = (targets for _, targets in (data.support, data.query))
    return all(y.is_floating_point() or not len(y) or int(y.min()) >= 0 for y in held)


def is_hashable(rule: Rule) -> bool:
    """Return whether ``rule`` can be compared: not with a learning rate for each parameter."""
    try:
        hash(rule)
    except TypeError:
        return False
    return True


class _Compilers:
    """The compiled steps of this process, by rule; the least recently used go out."""

    def __init__(self, most: int = 16) -> None:
        self._steps: dict[Rule, dict[tuple[Any, ...], Step]] = {}
        self._uses: dict[Rule, int] = {}
        self._needs_sizes: dict[Rule, bool] = {}
        self._most = most

    def serves(self, rule: Rule) -> bool:
        """Return whether a client of ``rule`` runs compiled, and count it.

        After ``RULES_FOR_ONE`` rules in a row that one client had, a new one waits for its second.
        """
        if not is_hashable(rule):
            return False
        is_new, latest = rule not in self._uses, list(self._uses.values())[-RULES_FOR_ONE:]
        self._uses[rule] = self._uses.pop(rule, 0) + 1
        self._steps[rule] = self._steps.pop(rule, {})
        if len(self._steps) > self._most:
            oldest = next(iter(self._steps))
            del self._steps[oldest], self._uses[oldest]
            self._needs_sizes.pop(oldest, None)
        if is_new and latest == [1] * RULES_FOR_ONE:
            _warn_once(OF_NO_USE)
            return False
        return True

    def step_of(self, training: LocalTraining, state: Any, item: Any) -> "Step | None":
        """Return the step, compiled, for items like this one; None: to take it as it is."""
        rule, batches = training.rule, parts(item)
        sizes = tuple(len(targets) for _, targets in batches)
        if min(sizes) <= 1:
            return None
        kinds = tuple((value.dtype, value.shape[1:]) for batch in batches for value in batch)
        common = (type(item), kinds, torch.get_num_threads())
        reason = "second derivatives of convolutions"
        if rule not in self._needs_sizes:  # it goes through all layers
            self._needs_sizes[rule] = _needs_sizes(rule)
        if not self._needs_sizes[rule]:
            large = tuple(size >= SMALL for size in sizes)
            hints = tuple(HINTS[one] for one in large)
            step = self._ready(("open", large, *common), rule, hints, state, item)
            if step.is_open:
                return step
            reason = step.reason
        if training.batch_size == 0:
            _warn_once(NO_SIZE % reason)
        if set(sizes) != {training.batch_size}:
            return None
        return self._ready(("fixed", sizes, *common), rule, sizes, state, item)

    def _ready(
        self, key: tuple[Any, ...], rule: Rule, sizes: tuple[int, ...], state: Any, item: Any
    ) -> "Step":
        """Return the step of ``rule`` with this key, compiled for batches of ``sizes``."""
        steps = self._steps[rule]
        if key not in steps:
            step = Step(rule, type(item), is_open=key[0] == "open")
            step.prepare(state, parts(item), sizes)  # raises where it is this client that fails
            steps[key] = step
        return steps[key]


class Step:
    """``step(state, batches)``, compiled by ``prepare``.

    Attributes:
        is_open: one compilation serves other sizes too.
        reason: why not, where it was meant to.
        ran_eagerly: in the last call, for something had changed that the compiler looks at first.
    """

    def __init__(self, rule: Rule, kind: type, *, is_open: bool) -> None:
        self.is_open = is_open
        self.reason = ""
        self.ran_eagerly = False
        update = rule.update()

        def local_step(state: Any, batches: tuple[Batch, ...]) -> Any:
            if not torch.compiler.is_compiling():
                self.ran_eagerly = True
            with OneChannelAsMatrix():
                return update.step(state, joined(kind, batches))

        self._fast = compiled(local_step, on_failure=self._close if is_open else None)

    def __call__(self, state: Any, batches: tuple[Batch, ...], *, looked_at: bool = False) -> Any:
        """Return the state after the step.

        Args:
            state: before it.
            batches: of it.
            looked_at: a compiled step of the same client and kind went before. What the compiler
                looks at first (the model's layers, torch's settings), which takes it a tenth of the
                time, then cannot have changed.
        """
        self.ran_eagerly = False
        with torch.compiler.set_stance("eager_on_recompile", skip_guard_eval_unsafe=looked_at):
            after = self._fast(state, tuple(map(self._marked, batches)))
        return after._replace(params=_laid_out_like(state.params, after.params))

    def prepare(self, state: Any, batches: tuple[Batch, ...], sizes: tuple[int, ...]) -> None:
        """Compile the step for batches of ``sizes``, made of the records of ``batches``.

        Sizes that came first would otherwise decide, by the compiler's heuristics, how the others
        are rounded. The client's random numbers stay as they are.
        """
        of_sizes = zip(sizes, batches, strict=True)
        examples = tuple(self._marked(_of_size(size, batch)) for size, batch in of_sizes)
        with torch_seeded(0, "compilation", device=str(batches[0][1].device)):
            self._fast(state, examples)

    def _close(self, err: Exception) -> None:
        """Note that the compiler does not know the step for open sizes."""
        self.is_open, self.reason = False, first_line(err)

    def _marked(self, batch: Batch) -> Batch:
        """Return the same batch, its first dimension marked as open to the compiler."""
        inputs, targets = (value.detach() for value in batch)  # the mark is not for the caller's
        for value in (inputs, targets) if self.is_open else ():
            torch._dynamo.mark_dynamic(value, 0)
        return inputs, targets


_compilers = _Compilers()


def _laid_out_like(before: Params, after: Params) -> Params:
    """Return ``after`` with the strides of ``before``, for which the step was compiled.

    The compiler may leave weights of convolutions in a layout of its own.
    """
    return {
        name: value
        if value.stride() == before[name].stride()
        else torch.empty_like(before[name]).copy_(value)
        for name, value in after.items()
    }


def _needs_sizes(rule: Rule) -> bool:
    """Return whether the compiler must know the sizes: in second derivatives of convolutions."""
    has_convolutions = any(isinstance(m, nn.modules.conv._ConvNd) for m in rule.model.modules())
    return has_convolutions and ("order", "exact") in rule.options


def _of_size(size: int, batch: Batch) -> Batch:
    """Return a batch of ``size`` of the same records, again and again."""
    index = torch.arange(size, device=batch[1].device) % len(batch[1])
    return batch[0][index], batch[1][index]


@lru_cache
def _warn_once(text: str) -> None:
    log(WARNING, "kernel = 'compiled': %s", text)
