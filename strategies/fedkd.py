r"""FedKD (Wu et al., 2108.13323): clients teach a small shared mentee, whose updates go compressed.

    u_i = D(C_E(s_i - s))                    what a client of the round sends, s_i from its mentor
    s  <- s + D(C_E(sum_i p_i u_i))          what the server sends back, p_i = 1/n
    E   = E_start + (E_end - E_start) * (updates so far) / (rounds - 1)

C keeps the share E of the energy of each matrix (``compression``). The server adds what clients can
add too, so all hold the same bits. A client that answered in the round of the last update gets that
update, any other one the whole mentee, and so does one that has lost it. The mentors never leave
the clients.

A reply that is no update is a model, as other strategies' clients send it, and is taken as such:
their clients are sent the whole mentee each time.

Differences from the paper: E grows with the updates that were made: a round that is skipped moves
neither. The mean is that of ``aggregation``, by ``weighting``; the paper's are mean and uniform. A
run that is resumed for more rounds goes on with the E of the new number.
"""

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from logging import WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common import log

from ..compression import compress_update, energy_threshold
from ..config import RunConfig
from ..errors import ConfigError, WireError, shortened
from ..sent_updates import BASE_ROUND, DIGEST, ENERGY, REPLY, UPDATE, applied, digest_of, update_of
from ..wire import ARRAYS, NamedArrays, from_record, size_of, to_record
from .fedavg import local_sgd
from .recipe import STRATEGIES, Recipe, aggregation_of, weighting_of
from .rules import Aggregation, Arrays, Reply, Rule, State, Weighting, check_weighting, mean
from .shell import RuleStrategy
from .shell.firewall import Judged
from .shell.partial_sums import Part
from .shell.reply_metrics import records_of
from .shell.roll_call import Node

UPDATES = "updates"  # of the rule's state: how many were made; the last one is beside it
BASE, HOLDERS = "base", "holders"  # beside the rule's state: who has the model of which round


@dataclass(frozen=True)
class Energy:
    """E of each update.

    Attributes:
        start: of the first one, in (0, 1].
        end: of the last one, in (0, 1].
        rounds: of the run, >= 1.

    Raises:
        ConfigError: a value is outside its range, naming it.
    """

    start: float
    end: float
    rounds: int

    def __post_init__(self) -> None:
        energy_threshold(0, self.start, self.end)
        if not (isinstance(self.rounds, int) and self.rounds >= 1):
            raise ConfigError(f"rounds = {self.rounds!r}: must be a whole number >= 1")

    def after(self, updates: int) -> float:
        """Return E of the update that follows so many others."""
        return energy_threshold(min(1.0, updates / max(1, self.rounds - 1)), self.start, self.end)


def compressed_mean(
    energy: Energy, *, weighting: Weighting = "uniform", aggregate: Aggregation = mean
) -> Rule:
    """Return the rule w <- w + D(C_E(x - w)), with x the aggregate of the replies.

    Its state has the compressed update, to be sent.

    Raises:
        ConfigError: where the weighting is unknown.
    """
    check_weighting(weighting)

    def update(state: State, sent: NamedArrays, replies: Sequence[Reply]) -> tuple[State, Arrays]:
        step = update_of(aggregate(sent, replies, weighting), sent)
        flat = compress_update(step, energy.after(state[UPDATES]))
        return {UPDATES: state[UPDATES] + 1, UPDATE: flat}, applied(sent, flat)

    return Rule(lambda _: {UPDATES: 0, UPDATE: {}}, update)


class FedKD(RuleStrategy):
    """Average the clients' compressed updates, and send the compressed mean.

    After the last round the training clients are scored, with their mentors
    (``RunResult.trained``).

    Args:
        rounds: of the run, >= 1: E grows over them.
        energy: E_start and E_end, in (0, 1].
        weighting: "uniform" or "examples" (p_i = n_i / sum n).
        aggregate: how the clients' models become one: ``mean``, ``median()``, ...
        shell: see ``RuleStrategy``; without ``architectures``.

    Raises:
        ConfigError: where a value is out of range, or with ``architectures``.
    """

    scores_training_clients = True

    def __init__(
        self,
        *,
        rounds: int,
        energy: tuple[float, float] = (0.95, 0.98),
        weighting: Weighting = "uniform",
        aggregate: Aggregation = mean,
        **shell: Any,
    ) -> None:
        if names := tuple(shell.get("architectures", ())):
            raise ConfigError(
                f"architectures = {', '.join(names)!r} with fedkd: all clients share one mentee, "
                "and it is their mentors that may be large; choose one model, or another strategy"
            )
        self._energy = Energy(*energy, rounds)
        rule = compressed_mean(self._energy, weighting=weighting, aggregate=aggregate)
        super().__init__(rule, **shell)
        self.weighting = weighting
        self.energy = "{} to {}".format(*energy)  # a run that is resumed must have the same
        self._updated: set[str] = set()  # clients of the round whose good reply is an update

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the next mentee and the metrics; note who can add the next update to what."""
        self._updated = set()
        arrays, metrics = super().aggregate_train(server_round, replies)
        if self._state is not None:
            # Whoever was asked holds this round's mentee, or none: in a skipped round, the same one
            # under another number.
            base = self._state.get(BASE, 0) if arrays is None else server_round
            kept = set(self._state.get(HOLDERS, ())) - set(self._round.clients)
            holders = kept if arrays is None else self._updated
            self._state = {**self._state, BASE: base, HOLDERS: sorted(holders)}
        return arrays, metrics

    def _own_state(self) -> State:
        """Return what the rule left; user-level privacy puts a state of its own around it."""
        state = self._state or {}
        own: State = state.get("rule", state) if self._account else state
        return own

    def _messages(
        self, arrays: ArrayRecord, config: ConfigRecord, nodes: list[Node], kind: str
    ) -> list[Message]:
        """Return messages; to train, some nodes get the last update in the place of the mentee."""
        if kind != MessageType.TRAIN:
            return super()._messages(arrays, config, nodes, kind)
        own, beside = self._own_state(), self._state or {}
        asked = ConfigRecord({**config, ENERGY: self._energy.after(own.get(UPDATES, 0))})
        update = to_record(own.get(UPDATE, {}))
        holders = set(beside.get(HOLDERS, ())) if size_of(update) < size_of(arrays) else set()
        others = [node for node in nodes if node.name not in holders]
        messages = super()._messages(arrays, asked, others, kind)
        if held := [node for node in nodes if node.name in holders]:
            told = {BASE_ROUND: beside[BASE], DIGEST: digest_of(from_record(arrays))}
            messages += super()._messages(update, ConfigRecord({**asked, **told}), held, kind)
        self._round.messages = messages
        return list(messages)

    def _good(
        self, replies: Iterable[Message], sent: NamedArrays | None, parts: Sequence[Part] = ()
    ) -> list[tuple[Node, Judged]]:
        """Return the good replies, which are judged as the models that they come to."""
        if sent is None:
            return super()._good(replies, sent, parts)
        asked = {one.metadata.message_id: one.metadata.dst_node_id for one in self._round.messages}
        updates: dict[str, Message] = {}  # as they came, by the message that they answer
        faulty: set[str] = set()
        seen: set[str] = set()  # of several replies to one message the first counts
        models: list[Message] = []
        for reply in replies:
            question = reply.metadata.reply_to_message_id if isinstance(reply, Message) else ""
            is_first = question in asked and question not in seen
            seen.add(question)
            if is_first and _is_update(reply):
                try:
                    models.append(_as_model(reply, sent))
                except Exception as err:  # whatever it holds is its sender's fault, not the run's
                    self._quarantine(asked[question], err)
                    faulty.add(question)
                else:
                    updates[question] = reply
            else:
                models.append(reply)
        self._round.messages = [
            one for one in self._round.messages if one.metadata.message_id not in faulty
        ]
        good = []
        for node, judged in super()._good(models, sent, parts):
            if update := updates.get(judged.message.metadata.reply_to_message_id):
                self._updated.add(node.name)
                judged = replace(judged, message=update)  # whose bytes are counted
            good.append((node, judged))
        return good

    def _quarantine(self, node_id: int, err: Exception) -> None:
        name, number = self._roster.get(node_id).name, self._round.number
        said = str(err) if isinstance(err, WireError) else f"{type(err).__name__}: {err}"
        reason = shortened(f"its update cannot be read: {said}")
        log(WARNING, "round %d: %s is quarantined: %s", number, name, reason)
        self._round.quarantined.append((name, reason))
        self._history.offences[name] += 1


def _is_update(reply: Message) -> bool:
    return reply.has_content() and any(
        isinstance(record, ConfigRecord) and record.get(REPLY) == UPDATE
        for record in reply.content.values()
    )


def _as_model(reply: Message, sent: NamedArrays) -> Message:
    """Return a reply with the model that its update comes to in the place of the update.

    Raises:
        WireError: it has other names, shapes or dtypes than ``sent``, or not one ArrayRecord.
    """
    records = records_of(reply.content, ArrayRecord)
    if len(records) != 1:
        raise WireError(f"{len(records)} ArrayRecords: exactly one is needed")
    others = {name: one for name, one in reply.content.items() if not isinstance(one, ArrayRecord)}
    arrays = to_record(applied(sent, from_record(records[0])))
    model = copy(reply)  # the reply stays as it came
    model.content = RecordDict({ARRAYS: arrays, **others})
    return model


@STRATEGIES.register("fedkd")
def recipe(config: RunConfig) -> Recipe:
    """Each client's private, larger mentor and the small shared mentee teach each other."""
    if config.is_private:
        raise ConfigError(
            "fedkd with privacy.noise-multiplier: the mentee that clients send learns from mentors "
            "that are trained without noise, so that no ledger would hold what leaves; leave "
            "privacy.* out, or use 'fedavg'. user-privacy.* can be used"
        )
    return Recipe(
        strategy=partial(
            FedKD,
            rounds=config.rounds,
            energy=(config.energy_start, config.energy_end),
            weighting=weighting_of(config, "uniform"),
            aggregate=aggregation_of(config),
        ),
        client="fedkd",
        client_options=local_sgd(config),
        client_needs=("mentor",),
    )
