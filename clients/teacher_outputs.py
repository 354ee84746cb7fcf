"""What a teacher says of a client's records: computed once, kept on the client, never sent.

A server sends a teacher once. The client computes its outputs on all its records and forgets it:
the outputs are smaller, and are all that is ever needed, since neither changes. They last over the
rounds beside the digest of the teacher and the fingerprint of the records, and serve no others.
"""

import copy
from collections.abc import Callable

import numpy as np
import torch
from flwr.app import Context
from torch import Tensor, nn

from ..errors import ConfigError, RefusedError, WireError
from ..public import fingerprint_of
from ..teacher import digest_of
from ..wire import TEACHER_DIGEST, TEACHER_PRIVATE, NamedArrays
from .evaluation import CHUNK
from .objective import Params, predict
from .store import ClientStore, Config, LastingState

KIND = "teacher-logits"
LOGITS, OF_TEACHER, OF_RECORDS = "logits", "teacher", "records"

Adapt = Callable[[nn.Module, Params], Params]


class TeacherOutputs:
    """The outputs of one client's teacher.

    Args:
        teacher: a module of its architecture, copied and never changed.
        context: Flower's, in whose state the outputs last.
        client: the client's name.
        store: where they outlive the context; None: nowhere.
        device: where to compute.
        is_private: a record of which the teacher says nothing (it raises) gets NaN.

    Raises:
        ConfigError: where there is no context to keep them in.
    """

    def __init__(
        self,
        teacher: nn.Module,
        context: Context | None,
        *,
        client: str,
        store: ClientStore | None,
        device: str,
        is_private: bool = False,
    ) -> None:
        if context is None:
            raise ConfigError(
                "a client with a teacher needs context=: the teacher is sent once, and what it "
                "says of the records lasts in Flower's Context.state"
            )
        self._teacher = teacher
        self._state = LastingState(context, kind=KIND, client=client, store=store)
        self._client = client
        self._device = device
        self._is_private = is_private
        self._received: tuple[str, NamedArrays] | None = None  # with its digest
        self._held: tuple[tuple[str, str], Tensor] | None = None  # with whose they are

    def take(self, arrays: NamedArrays) -> None:
        """Take the weights of a teacher; its outputs are computed when they are first needed.

        Raises:
            WireError: where they are not those of the module.
        """
        own = self._teacher.state_dict()
        shapes = {name: tuple(value.shape) for name, value in own.items()}
        differ = sorted(
            name
            for name in shapes.keys() | arrays.keys()
            if name not in arrays or arrays[name].shape != shapes.get(name)
        )
        if differ:
            raise WireError(
                f"client {self._client!r} received a teacher that differs from its own "
                f"{type(self._teacher).__name__} in {', '.join(differ)}: both ends must build the "
                "same one; give both the same teacher-model"
            )
        self._received = digest_of(arrays), arrays

    def check(self, config: Config) -> None:
        """Raise WireError unless the teacher that ``config`` names is here, or its outputs are.

        It depends on no record.
        """
        self._kept(config)

    def of(
        self, inputs: Tensor, config: Config, *, adapt: Adapt | None = None, adapted_by: str = ""
    ) -> Tensor:
        """Return the teacher's logits on ``inputs``, (N, C), on the CPU, of 32 bits at least.

        Args:
            inputs: (N, ...), all that will ever be asked for.
            config: of the message; it names the round and the teacher.
            adapt: what becomes of the teacher's parameters first; None: they stay.
            adapted_by: what tells this adaptation from others; other outputs do not serve.

        Raises:
            WireError: see ``check``; or what was kept is of other records.
        """
        whose = self._wanted(config), f"{fingerprint_of(inputs)} {adapted_by}"
        if self._held is not None and self._held[0] == whose:
            return self._held[1]
        kept = self._kept(config)
        if kept is None:
            logits = self._computed(inputs, adapt)
            marks = {
                name: np.frombuffer(text.encode(), np.uint8)
                for name, text in zip((OF_TEACHER, OF_RECORDS), whose, strict=True)
            }
            self._state.keep(config, {LOGITS: logits.numpy(), **marks})
            self._received = None
        elif kept[OF_RECORDS].tobytes().decode() != whose[1]:
            raise WireError(
                f"client {self._client!r} kept the outputs of its teacher on other records than "
                "it has now: send the teacher again"
            )
        else:
            logits = torch.from_numpy(np.array(kept[LOGITS]))
        self._held = whose, logits
        return logits

    def _kept(self, config: Config) -> NamedArrays | None:
        """Return what an earlier round kept; None where the teacher itself has come."""
        wanted = self._wanted(config)
        if self._received is not None:
            if self._received[0] != wanted:
                raise WireError(
                    f"client {self._client!r} received a teacher of digest {self._received[0]}, "
                    f"the server means {wanted}: it must send the one that it names"
                )
            return None
        kept = self._state.after(config)
        if kept is None or kept[OF_TEACHER].tobytes().decode() != wanted:
            raise WireError(
                f"client {self._client!r} has no outputs of teacher {wanted}, and was not sent it: "
                "what it kept of an earlier round is lost; send the teacher again"
            )
        return kept

    def _wanted(self, config: Config) -> str:
        if TEACHER_DIGEST not in config:
            raise WireError(
                f"the server names no teacher to client {self._client!r}: its config must say "
                f"{TEACHER_DIGEST}, as that of strategies with a teacher does"
            )
        return str(config[TEACHER_DIGEST])

    def _computed(self, inputs: Tensor, adapt: Adapt | None) -> Tensor:
        module = copy.deepcopy(self._teacher).to(self._device).eval()
        arrays = self._received[1] if self._received else {}
        module.load_state_dict({n: torch.from_numpy(np.array(v)) for n, v in arrays.items()})
        named = module.named_parameters()
        params = {name: value.detach() for name, value in named if value.requires_grad}
        if adapt is not None:
            params = adapt(module, params)
        starts = range(0, max(len(inputs), 1), CHUNK)
        said = [self._said(module, params, inputs[start : start + CHUNK]) for start in starts]
        logits = torch.cat(said).cpu()
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _said(self, module: nn.Module, params: Params, inputs: Tensor) -> Tensor:
        try:
            return predict(module, params, inputs.to(self._device))
        except Exception:
            if not self._is_private or not len(inputs):
                raise
        rows: list[Tensor | None] = []
        for record in inputs.to(self._device):
            try:
                rows.append(predict(module, params, record[None]))
            except Exception:  # as records that raise have no share in a release
                rows.append(None)
        sound = next(row for row in rows if row is not None)
        return torch.cat([torch.full_like(sound, torch.nan) if r is None else r for r in rows])


def check_may_teach(config: Config, client: str) -> None:
    """Raise RefusedError unless the server says that the teacher may teach private clients.

    A client cannot know a teacher's past by itself.
    """
    if config.get(TEACHER_PRIVATE) is not True:
        raise RefusedError(
            f"private client {client!r} refuses the teacher: the server does not say that it was "
            f"trained with privacy or is public ({TEACHER_PRIVATE}), so what it learnt of records "
            "would leave in the student, and nobody would have counted it"
        )
