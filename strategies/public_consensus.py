r"""The server of strategies that agree on public records in the place of averaging models.

    round r:  every client of the round says z_i(x) of the records x of round r
              c(x) = what they agree on, by the strategy's own consensus
              the server's student of each architecture learns softmax(c)
    round r + 1:  c goes to the clients of that round, which learn it and then train on their own

Models never travel in training, so clients may have any architecture, and the bytes of a round do
not depend on the size of models. What travels is named by round and records (``public_logits``): a
reply about others is quarantined by name, and so is one that is not finite.

The students are the strategy's global models: validation and unseen clients begin with them, and
they are what a run leaves. Clients that train have personal models, which are scored at the end.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from logging import WARNING
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.common import log
from flwr.serverapp import Grid
from torch import nn

from ..architectures import full_name, names_of, part_of
from ..errors import ConfigError, MetabloomError
from ..public import PublicData
from ..public_logits import Subsets, round_of
from ..streams import torch_stream
from ..wire import NamedArrays, from_record, to_record
from .distilled import Distillation, distilled
from .rules import Arrays, Reply, Rule, State
from .shell import RuleStrategy
from .shell.firewall import Judged
from .shell.partial_sums import Part
from .shell.reports import RunResult
from .shell.resume import EvaluateFn
from .shell.roll_call import Node
from .sound_outputs import sound

EXCHANGED = "public"  # prefix of what travels in training, beside the students' arrays

# consensus(logits (K, n, C)) -> logits (n, C), whose softmax is learnt
Consensus = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


def consensus_rule(
    consensus: Consensus,
    subsets: Subsets,
    models: Mapping[str, nn.Module],
    num_classes: int,
    how: Distillation,
    *,
    device: str = "cpu",
) -> Rule:
    """Return the rule that agrees on what replies say, and teaches it to each student.

    Args:
        consensus: of the clients' logits.
        subsets: the public records of each round.
        models: the module of each architecture by its name; of "" where there is one.
        num_classes: C.
        how: students learn.
        device: where students learn.
    """
    modules = {name: deepcopy(model).to(device).eval() for name, model in models.items()}
    inputs = subsets.public.inputs.to(device)

    def update(state: State, sent: NamedArrays, replies: Sequence[Reply]) -> tuple[State, Arrays]:
        number = round_of(replies[0].arrays)
        said = np.stack([subsets.unpacked(reply.arrays, num_classes) for reply in replies])
        agreed = subsets.packed(consensus(said), number)
        # As clients will see it, after the rounding of what travels.
        logits = torch.from_numpy(subsets.unpacked(agreed, num_classes)).to(device)
        rows = torch.from_numpy(subsets.rows(number)).to(device)
        students: Arrays = {}
        for name, module in modules.items():
            stream = torch_stream(subsets.seed, "student", number, name)
            before, targets = part_of(sent, name), logits.double().softmax(dim=1).to(inputs.dtype)
            own = {key: value for key, value in before.items() if not key.startswith(_PREFIX)}
            learnt = distilled(module, own, inputs[rows], targets, how, stream)
            students |= {full_name(name, key): value for key, value in learnt.items()}
        return state, {**_exchanged(agreed), **students}

    return Rule(lambda _: {}, update, exchanged=EXCHANGED)


class PublicConsensus(RuleStrategy):
    """Base of FedMD and DS-FL; see the module's text.

    Args:
        consensus: of the clients' logits.
        models: the module of each architecture by its name, of "" without ``architectures``.
        public: records that are no secret; clients hold the same ones.
        num_classes: C, the columns of the models' outputs.
        public_subset: how many of them a round is about, drawn by chance; 0: all.
        encoding: of logits that travel: "float32", "float16" or "int8".
        distillation: how the students learn; None: the defaults.
        device: "cpu", or anything else for a GPU where the server has one.
        shell: see ``RuleStrategy``; its ``seed`` must be the clients' too.

    Raises:
        ConfigError: where a value is out of range, ``models`` are not those of ``architectures``,
            or with ``user_privacy``.
    """

    scores_training_clients = True

    def __init__(
        self,
        consensus: Consensus,
        *,
        models: Mapping[str, nn.Module],
        public: PublicData,
        num_classes: int,
        public_subset: int = 0,
        encoding: str = "float32",
        distillation: Distillation | None = None,
        device: str = "auto",
        **shell: Any,
    ) -> None:
        names = tuple(shell.get("architectures", ()))
        if set(models) != set(names or ("",)):
            raise ConfigError(
                f"models of {', '.join(map(repr, models))}, architectures {', '.join(names)!r}: "
                "the server teaches the module of each, and without architectures that of ''"
            )
        if EXCHANGED in names:
            raise ConfigError(
                f"architectures = {', '.join(names)!r}: {EXCHANGED!r} is what clients say of "
                "public records; choose another name"
            )
        if shell.get("user_privacy") is not None:
            raise ConfigError(
                f"user_privacy with {type(self).__name__}: its noise is made for sums of updates, "
                "and clients send what they say of public records; privacy.* trains each client's "
                "model privately"
            )
        place = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        how = distillation or Distillation()
        self._subsets = Subsets(public, public_subset, shell.get("seed", 0), encoding)
        self._classes = num_classes
        self._nothing = self._subsets.nothing(num_classes)  # raises where the subset is too large
        rule = consensus_rule(consensus, self._subsets, models, num_classes, how, device=place)
        super().__init__(rule, **{**shell, "partial_sums": False})
        self.public = f"{public.name} {public.fingerprint}"  # the same in a run that is resumed
        self.public_subset = public_subset
        self.encoding = encoding
        self.distillation = str(how)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> RunResult:
        """Run; see ``RuleStrategy.start``. ``initial_arrays`` are the students' first models."""
        first = to_record({**_exchanged(self._nothing), **from_record(initial_arrays)})
        scored = evaluate_fn and (lambda number, arrays: evaluate_fn(number, _models(arrays)))
        result = super().start(
            grid, first, num_rounds, timeout, train_config, evaluate_config, scored
        )
        return replace(result, arrays=_models(result.arrays))

    def _good(
        self, replies: Iterable[Message], sent: NamedArrays | None, parts: Sequence[Part] = ()
    ) -> list[tuple[Node, Judged]]:
        """Return the good replies; of those about public records, such as speak of this round's."""
        found = super()._good(replies, sent, parts)
        if sent is None:
            return found
        good = []
        for node, judged in found:
            if reason := self._fault(judged.arrays):
                number = self._round.number
                log(WARNING, "round %d: %s is quarantined: %s", number, node.name, reason)
                self._round.quarantined.append((node.name, reason))
                self._history.offences[node.name] += 1
            else:
                good.append((node, judged))
        return good

    def _fault(self, arrays: NamedArrays) -> str:
        try:
            values = self._subsets.unpacked(arrays, self._classes)
            if (number := round_of(arrays)) != self._round.number:
                return f"it answers for round {number}, this is round {self._round.number}"
        except MetabloomError as err:
            return str(err)
        return sound(values[None])[0]  # what was finite in few bits may not be in float32


_PREFIX = full_name(EXCHANGED, "")


def _exchanged(arrays: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    return {full_name(EXCHANGED, name): value for name, value in arrays.items()}


def _models(arrays: ArrayRecord) -> ArrayRecord:
    """Return the arrays of the students alone."""
    other = names_of(arrays, EXCHANGED)
    return ArrayRecord({name: value for name, value in arrays.items() if name not in other})
