"""One round of a private client, from the server's wishes to what it answers.

In this order: refuse what is weaker than the pinned parameters; give a message that comes again the
same bytes as before; reserve in the ledger, or refuse because the budget is spent; only then touch
data; keep the reply; answer by an allow-list. The texts of other errors stay on the client.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from logging import ERROR, WARNING
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Context
from flwr.common import log
from torch import nn

from ...accounting import Events, epsilon_of
from ...errors import (
    BudgetExhaustedError,
    MetabloomError,
    ModelError,
    PrivacyError,
    RefusedError,
)
from ...ledger import UNIT, Charge, Head, PrivacyLedger
from ...wire import KEPT_ROUND, PRIVACY_DELTA, PRIVACY_EPSILON, RUN_TOKEN, SERVER_ROUND
from ..data import ClientData
from ..kernel import Kernel
from ..local_update import LocalUpdate, run_update
from ..objective import LossFn, Params
from ..store import ClientStore, Versions, file_name
from .config import PrivacyConfig
from .noise import fresh_sources, seeded_sources
from .private_models import check_private_model
from .releases import Releases

FAILED = "a private client failed; the reason is in its own log"
DEPENDENT = (
    "the records of this client depend on each other (overlapping windows, or inputs scaled by the "
    "client's statistics), so to clip one bounds no record's influence: the data set cannot be "
    "used with privacy"
)
RUNS_KEPT = 4  # whose replies are kept, the newest ones
LEDGERS = "metabloom-ledgers"  # folder for clients that name no ledger
MIRROR = "metabloom.ledger"  # in Context.state
PLACE = (SERVER_ROUND, KEPT_ROUND, RUN_TOKEN)  # keys that say which message it is
LONGEST_TOKEN = 100  # characters
QUERY, SPENT = "query", "spent"  # beside the arrays of a kept reply

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Training:
    """What a client wants to do in a round.

    Attributes:
        mechanism: its name in the ledger.
        events: the releases that it takes, from the parameters.
        update: the local update, from releases and parameters.
        steps: of the update.
    """

    mechanism: str
    events: Callable[[PrivacyConfig], Events]
    update: Callable[[Releases, PrivacyConfig], LocalUpdate[Any, int]]
    steps: int


@dataclass(frozen=True)
class Reply:
    """What may leave the client: privatised parameters, and what the ledger has come to."""

    params: Params
    epsilon: float
    delta: float

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the reply: nothing of the data is in them."""
        return {PRIVACY_EPSILON: self.epsilon, PRIVACY_DELTA: self.delta}


@dataclass(frozen=True)
class Asked:
    """Which message a reply belongs to.

    Attributes:
        round: 0 where the server does not say.
        kept: the oldest round that the server may go back to.
        token: of the run, of bounded length.
    """

    round: int
    kept: int
    token: str

    @classmethod
    def of(cls, config: Config, context: Context | None) -> "Asked":
        """Return what ``config`` says.

        Raises:
            RefusedError: where a round is no whole number.
        """
        number = max(0, _whole(config, SERVER_ROUND, 0))
        usual = f"run-id {context.run_id if context else 0}"
        token = str(config.get(RUN_TOKEN, usual))
        return cls(number, _whole(config, KEPT_ROUND, number), token[:LONGEST_TOKEN])


def _whole(config: Config, key: str, usual: int) -> int:
    value = config.get(key, usual)
    if type(value) is not int or abs(value) >= 2**53:
        raise RefusedError(f"the server says {key} = {value!r}: a round is a whole number")
    return value


class PrivateRounds:
    """The private side of one client.

    Args:
        privacy: its pinned parameters.
        model: what it trains.
        loss_fn: a scalar mean over a batch.
        name: of the client; of its ledger's file, where it names none.
        device: where it computes.
        context: Flower's, in whose state the head of the ledger is mirrored; None: it is not.
        kernel: how releases are computed, see ``Releases``; what is released is the same.

    Raises:
        ModelError: where the model cannot be trained record by record.
    """

    def __init__(
        self,
        privacy: PrivacyConfig,
        *,
        model: nn.Module,
        loss_fn: LossFn,
        name: str,
        device: str,
        context: Context | None,
        kernel: Kernel = "eager",
    ) -> None:
        check_private_model(model)
        self.privacy = privacy
        self.ledger = ledger_of(privacy, name)
        self._loss_fn = loss_fn
        self._name = name
        self._device = device
        self._context = context
        self._kernel = kernel

    @property
    def tells_nothing(self) -> bool:
        """Whether nothing of an evaluation may leave the client."""
        return not (self.privacy.unprotected_metrics or self.privacy.public_counts)

    def train(
        self,
        params: Params,
        config: Config,
        training: Training,
        data: Callable[[], ClientData],
        *,
        model: nn.Module,
    ) -> Reply:
        """Return the reply to one train message.

        Args:
            params: the received parameters.
            config: the message's.
            training: what to do.
            data: gives the records; called only once the releases are paid for.
            model: with the buffers and frozen parameters that were received.

        Raises:
            RefusedError: where the server wishes for less than is pinned, or the model or the data
                cannot be private.
            BudgetExhaustedError: where the budget is spent; the data were not touched.
            LedgerError: where the ledger was altered, or has forgotten something.
        """
        privacy = self.privacy.under(config)
        events = training.events(privacy)
        count = sum(event.count for event in events)
        if count > privacy.max_releases:
            raise RefusedError(
                f"the round takes {count} releases, this client has pinned at most "
                f"{privacy.max_releases}: ask for fewer steps"
            )
        self._check_mirror()
        asked = Asked.of(config, self._context)
        received = {**model.state_dict(), **params}
        query = _digest(received, config, training.mechanism, events, privacy)
        if (kept := self._kept(asked, query)) is not None:
            return kept
        charge = self._reserve(events, privacy, training.mechanism, asked)
        self._mirror()
        held = data()
        if held.fixed_split:
            raise RefusedError(DEPENDENT)
        releases = self._releases(model, held, privacy, charge)
        result = run_update(training.update(releases, privacy), params, range(training.steps))
        reply = Reply(result.params, self._spent(privacy), privacy.target_delta)
        self._keep(asked, query, reply)
        return reply

    def _spent(self, privacy: PrivacyConfig) -> float:
        epsilon = self.ledger.epsilon(privacy.target_delta)
        # PRV, which takes a second, has admitted it: so it is at most the target.
        return min(epsilon, privacy.target_epsilon) if privacy.accountant == "prv" else epsilon

    def _releases(
        self, model: nn.Module, held: ClientData, privacy: PrivacyConfig, charge: Charge
    ) -> Releases:
        seed, device = privacy.seed, self._device
        if seed is None:
            sources = fresh_sources(device)
        else:
            sources = seeded_sources(seed + self.ledger.head.lines, device)
        try:
            return Releases(
                model,
                self._loss_fn,
                held.all,
                sample_rate=privacy.sample_rate,
                expected_batch_size=privacy.batch_size(held.num_examples),
                charge=charge,
                sources=sources,
                kernel=self._kernel,
            )
        except ModelError as err:  # says something of the model alone, and what to do about it
            raise RefusedError(str(err)) from None

    def _reserve(
        self, events: Events, privacy: PrivacyConfig, mechanism: str, asked: Asked
    ) -> Charge:
        if not self.ledger.head.lines and not self.ledger.admits(events, privacy.budget):
            cost = epsilon_of(events, privacy.target_delta, privacy.accountant)
            raise RefusedError(
                f"one round costs epsilon = {cost:.2f}, above the target of "
                f"{privacy.target_epsilon:g}: raise privacy.noise-multiplier, lower "
                "privacy.sample-rate or take fewer steps; 'metabloom privacy plan' says how far"
            )
        return self.ledger.reserve(
            events,
            budget=privacy.budget,
            pinned=self.privacy.budget,
            mechanism=mechanism,
            run=asked.token,
            server_round=asked.round,
            seeded=privacy.seed is not None,
        )

    # -- a message that comes again ----------------------------------------------------------------

    def _kept(self, asked: Asked, query: bytes) -> Reply | None:
        """Return the reply that was given to the same question, to the bit."""
        arrays = self._replies(asked).load_if_there(asked.round)
        if arrays is None or arrays[QUERY].tobytes() != query:
            return None
        params = {
            name.removeprefix("params/"): torch.tensor(value, device=self._device)
            for name, value in arrays.items()
            if name.startswith("params/")
        }
        return Reply(params, *map(float, arrays[SPENT]))

    def _keep(self, asked: Asked, query: bytes, reply: Reply) -> None:
        arrays: dict[str, np.ndarray] = {
            f"params/{name}": value.detach().cpu().numpy() for name, value in reply.params.items()
        }
        arrays[QUERY] = np.frombuffer(query, dtype=np.uint8)
        arrays[SPENT] = np.array([reply.epsilon, reply.delta])
        replies = self._replies(asked)
        try:
            replies.save(asked.round, arrays, kept=min(asked.kept, asked.round - 1))
            forget_old_runs(replies.folder.parents[1], RUNS_KEPT)
        except MetabloomError as err:  # a redelivered message is then charged again
            log(WARNING, "client %s: a reply is not kept: %s", self._name, err)

    def _replies(self, asked: Asked) -> Versions:
        folder = self.ledger.path.with_name(f"{self.ledger.path.stem}.replies")
        return ClientStore(folder).versions(asked.token, self._name, "reply")

    # -- the copy of the ledger's head -------------------------------------------------------------

    def _check_mirror(self) -> None:
        record = self._context and self._context.state.config_records.get(MIRROR)
        if record and record["path"] == str(self.ledger.path.absolute()):
            lines, checksum = int(record["lines"]), str(record["checksum"])  # type: ignore[arg-type]
            self.ledger.check_not_behind(Head(lines, checksum))

    def _mirror(self) -> None:
        if self._context is not None:
            told = {**self.ledger.head._asdict(), "path": str(self.ledger.path.absolute())}
            self._context.state[MIRROR] = ConfigRecord(told)


def ledger_of(privacy: PrivacyConfig, name: str) -> PrivacyLedger:
    """Return the ledger that ``privacy`` names, else that of client ``name`` in this folder."""
    if isinstance(privacy.ledger, PrivacyLedger):
        return privacy.ledger
    usual = Path(LEDGERS) / f"{file_name(name or 'client')}.jsonl"
    return PrivacyLedger(privacy.ledger or usual, unit=UNIT)


def forget_old_runs(current: Path, kept: int) -> None:
    """Remove the replies of other runs than ``current``, a folder, but those of the newest ones.

    So many are kept in all. A message of a forgotten run that comes again is charged again.
    """
    with suppress(OSError):  # another process may do the same
        others = [run for run in current.parent.iterdir() if run != current]
        others.sort(key=lambda run: run.stat().st_mtime_ns, reverse=True)
        for run in others[kept - 1 :]:
            shutil.rmtree(run, ignore_errors=True)


@contextmanager
def errors_kept(name: str, *, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Let only errors out that say nothing of the data; log the others, and raise a constant.

    Args:
        name: of the client, for its log.
        but: more kinds of errors that may be told.
    """
    try:
        yield
    except BudgetExhaustedError:
        raise BudgetExhaustedError from None
    except Exception as err:
        if isinstance(err, (RefusedError, *but)):
            raise
        _log(name, err)
        raise PrivacyError(FAILED) from None


def _log(name: str, err: Exception) -> None:
    log(ERROR, "private client %s: %s: %s", name, type(err).__name__, err, exc_info=err)


def _digest(
    params: Params, config: Config, mechanism: str, events: Events, privacy: PrivacyConfig
) -> bytes:
    """Return the SHA-256 of the question: all that a server asks, and what is answered to it."""
    wishes = sorted((key, repr(value)) for key, value in config.items() if key not in PLACE)
    told = [(name, str(value.dtype), tuple(value.shape)) for name, value in params.items()]
    pinned = (privacy.max_grad_norm, privacy.hvp_max_norm, privacy.expected_batch_size)
    digest = hashlib.sha256(ascii((mechanism, list(events), pinned, wishes, told)).encode())
    for value in params.values():
        digest.update(value.detach().cpu().numpy().tobytes())
    return digest.digest()
