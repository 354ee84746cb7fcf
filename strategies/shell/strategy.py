"""The shared Flower shell: roll call, sampling, firewall, a pure rule, evaluation, checkpoints.

``RuleStrategy`` is a Flower FedAvg: it takes FedAvg's keyword arguments, runs under Flower's own
``Strategy.start`` loop and touches nothing but the Grid, so the same object works in the simulator,
under ``flwr run`` and on a SuperLink.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from logging import INFO, WARNING
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from ...errors import ConfigError, MetabloomError
from ...keys import Scalar
from ...wire import NamedArrays, from_record, size_of, to_record
from ..rules import Rule, State
from ..user_level import UserLevelPrivacy
from .answers import scores_of
from .checkpoint import Checkpoints
from .ending import Ending, Watch, played
from .exchange import sort_replies
from .firewall import Firewall, Judged, not_finite
from .history import History
from .kinds import Kinds
from .lock import held
from .partial_sums import Part, PartialSums, fingerprint, summing
from .reply_metrics import DIVERGED, aggregate_metrics
from .reports import ClientScore, RoundReport, RunResult
from .resume import EvaluateFn, ResumedRun, Saver, closing, snapshot_to_resume, told_of_run
from .roll_call import Node, Roster
from .round import RoundInProgress
from .sampling import Sampler, poisson_sample
from .snapshot import Snapshot
from .user_account import SPENT, UserAccount


class RuleStrategy(FedAvg):
    """A Flower strategy made of a pure rule and the shared shell.

    Args:
        rule: how replies become the next global model.
        seed: of node sampling, which also depends on the round; of nodes that answer the roll call
            it depends on partitions, never on ids or their order.
        clients_per_round: training clients of a round; None: ``fraction_train`` and
            ``min_train_nodes`` decide.
        eval_every: validate every so many rounds; 0: never. The unseen clients are evaluated once,
            after the last round.
        firewall: what replies are refused; None: the defaults of ``Firewall``.
        min_fit_replies: good replies that a round needs, >= 1; with fewer the model stays as it is
            and the round is marked as skipped.
        max_offences: a client with so many bad replies (raised, or refused) is not sampled any
            more; None: all always are.
        checkpoints: where the state is saved and resumed from; None: nowhere. Without ``settings``
            of their own they take the strategy's.
        on_round: called with a RoundReport after each round (a progress bar).
        user_privacy: differential privacy of whole clients (see ``user_level``): the rule gets one
            noisy reply a round; None: off. Its noise is fresh, also where a run is resumed, so two
            runs are not the same to the bit; rounds that are played again are booked again.
        partial_sums: let a grid that can do so average replies beside the clients (see
            ``partial_sums``), where the rule needs no single ones; False: each reply comes here.
        architectures: names of them, where clients differ (see ``metabloom.architectures``): each
            node gets the model of the one that it says at the roll call; the rule sees each apart.
        ending: what ends the run early, and whether it leaves its best model; None: nothing.
        fedavg: any keyword argument of Flower's FedAvg.

    Raises:
        ConfigError: where a value is out of range, naming it.
    """

    scores_training_clients = False  # after the last round: strategies with personal models

    def __init__(
        self,
        rule: Rule,
        *,
        seed: int = 0,
        clients_per_round: int | None = None,
        eval_every: int = 1,
        firewall: Firewall | None = None,
        min_fit_replies: int = 1,
        max_offences: int | None = None,
        checkpoints: Checkpoints | None = None,
        on_round: Callable[[RoundReport], None] | None = None,
        user_privacy: UserLevelPrivacy | None = None,
        partial_sums: bool = True,
        architectures: Sequence[str] = (),
        ending: Ending | None = None,
        **fedavg: Any,
    ) -> None:
        for name, value, least in (
            ("clients_per_round", clients_per_round, 1),
            ("eval_every", eval_every, 0),
            ("min_fit_replies", min_fit_replies, 1),
            ("max_offences", max_offences, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{name} = {value}: must be at least {least}")
        super().__init__(**fedavg)
        self._account = UserAccount.of(
            user_privacy, min_fit_replies=min_fit_replies, max_offences=max_offences
        )
        self.user_privacy = user_privacy
        self._kinds = Kinds.of(architectures, rule)
        rule = self._kinds.rule_for_each(rule, is_user_private=self._account is not None)
        self.rule = self._account.private(rule) if self._account else rule
        self.seed = seed
        self.clients_per_round = clients_per_round
        self.eval_every = eval_every
        self.firewall = UserAccount.firewall(firewall or Firewall(), user_privacy)
        self.min_fit_replies = min_fit_replies
        self.max_offences = max_offences
        self.checkpoints = checkpoints
        self.on_round = on_round
        self.partial_sums = partial_sums
        self.ending = ending or Ending()
        self._runs_itself = False
        self._begin(None, {}, 3600.0)

    @property
    def settings(self) -> dict[str, Scalar]:
        """What a checkpoint must have been written with, unless it is told otherwise.

        The public attributes that are numbers or texts, but where sums are made: as with the kind
        of the grid, that changes how they are rounded.
        """
        own = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        del own["partial_sums"]
        told = {key: value for key, value in own.items() if isinstance(value, Scalar)}
        told |= {"firewall": str(self.firewall), **self.ending.settings}
        private = self.user_privacy.settings if self.user_privacy else {}
        return {"strategy": type(self).__name__, **told, **private}

    def _begin(self, kept: Snapshot | None, arrays: NamedArrays, timeout_s: float) -> None:
        """Set the state of a run, from a snapshot or anew."""
        self._arrays = kept.arrays if kept else arrays
        self._state: State | None = kept.state if kept else None
        self._history = History.of(kept) if kept else History()
        self._roster = Roster(kept.told if kept else (), self._kinds.names)
        self._round = RoundInProgress()
        self._saver = Saver(self.checkpoints, kept)
        self._watch = Watch(self.ending, kept)
        self._timeout = timeout_s
        self._closes_with_evaluate_fn = False
        self._sampler = Sampler(self.seed)

    # -- the run -----------------------------------------------------------------------------------

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
        """Run Flower's loop up to round ``num_rounds``, then evaluate the unseen clients.

        Arguments as in Flower. With ``checkpoints`` that say so, the run goes on from the newest
        one. Whatever ends the run early (Ctrl-C, an error), the last whole round is saved first.

        Raises:
            MetabloomError: where too few nodes connect, or none of them can train.
            ConfigError: where the checkpoint is of another run (see ``snapshot_to_resume``), or
                another run is using the folder.
        """
        initial = self._kinds.with_beside(from_record(initial_arrays))
        if self.checkpoints and not self.checkpoints.settings:
            self.checkpoints = replace(self.checkpoints, settings=self.settings)
        with held(self.checkpoints):
            kept = snapshot_to_resume(self.checkpoints, initial, num_rounds)
            self._begin(kept, initial, timeout)
            done = kept.round if kept else 0
            first = to_record(kept.arrays if kept else initial)
            loop = ResumedRun(self, done).start if done else super().start
            self._closes_with_evaluate_fn = evaluate_fn is not None
            told = self._history.server_metrics
            models, close = self._kinds.models, self._close_round
            scored = evaluate_fn and closing(evaluate_fn, done, told, close, models)
            left = 0 if self._watch.over else num_rounds - done
            configs = train_config, evaluate_config
            self._runs_itself = True
            try:
                with self._saver.flushed():
                    result = played(loop, grid, first, left, timeout, *configs, scored)
            finally:
                self._runs_itself = False
        arrays = models(self._watch.model(result.arrays or first))
        config = evaluate_config or ConfigRecord()
        self._round = RoundInProgress(len(self._history.reports))
        if not self._roster.was_called:  # nothing was left to train
            self._gather(grid)
        unseen = self._final_scores(grid, arrays, config, "unseen")
        trained = self.scores_training_clients or self.ending.trained
        self._saver.finish()
        return RunResult(
            arrays=arrays,
            **self._history.result,
            unseen=unseen,
            trained=self._final_scores(grid, arrays, config, "train") if trained else [],
            **self._round.final,
            clients=self._roster.counts(),
            dropped=self._roster.dropped,
            user_level=self._account.spent(self._state) if self._account else None,
            **self._watch.result,
        )

    def summary(self) -> None:
        """Log FedAvg's summary and what the shell adds to it."""
        log(INFO, "\t├──> Clients per round: %s", self.clients_per_round or "by fraction_train")
        log(INFO, "\t├──> Validation: every %s rounds", self.eval_every)
        log(INFO, "\t├──> Firewall: %s", self.firewall)
        super().summary()

    # -- training ----------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return train messages to the round's sample of the training nodes."""
        self._round = RoundInProgress(server_round)
        self._arrays = from_record(arrays)
        if self.fraction_train == 0.0:
            return []
        self._gather(grid, role="train" if self._history.reports else "")
        candidates = self._roster.with_role("train")
        if not candidates:
            why = self._roster.first_fault() or "no node has the role 'train'"
            raise MetabloomError(f"round {server_round}: nobody can train; {why}")
        run, size = self._history.token, len(candidates)
        if self._account and not self._account.reserve(run, server_round, num_clients=size):
            return []
        chosen = self._sample(candidates, server_round)
        self._round.clients = tuple(node.name for node in chosen)
        messages = self._messages(arrays, config, chosen, MessageType.TRAIN)
        grid_that_sums = summing(grid)
        if grid_that_sums and self.rule.mean_by and self._needs_no_single_replies:
            wall, key, name = self.firewall, self.weighted_by_key, self.arrayrecord_key
            sent = fingerprint(self._kinds.trained(arrays))
            reducer = PartialSums(wall, key, name, self.rule.mean_by, sent)
            self._round.reduction = grid_that_sums.reduced(messages, reducer)
        return messages

    @property
    def _needs_no_single_replies(self) -> bool:
        """Whether nobody but the rule reads the arrays of replies.

        A subclass may, or a function of the user's, or a strategy in which this one is wrapped.
        """
        aggregate = getattr(self.aggregate_train, "__func__", None)
        return (
            self.partial_sums
            and self._runs_itself
            and aggregate is RuleStrategy.aggregate_train
            and self.train_metrics_aggr_fn is aggregate_metricrecords
        )

    def _sample(self, candidates: list[Node], server_round: int) -> list[Node]:
        trusted = self._history.trusted(candidates, self.max_offences)
        if self._account and self.user_privacy:
            if (rate := self.user_privacy.sample_rate) is not None:
                return poisson_sample(trusted, rate, self._account.coins())
            trusted = candidates  # another would take the place of one that is left out
        size = self.clients_per_round or max(
            int(len(candidates) * self.fraction_train), self.min_train_nodes
        )
        return self._sampler.sample(trusted, size, "sample", server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the next model and the metrics, or (None, None) where the round is skipped."""
        if self.fraction_train == 0.0:
            return None, None
        if self._account and not self._account.is_paid:
            return self._round.skip(SPENT)
        replies, parts = self._round.received(replies)
        sent, wall, key = self._kinds.trained(self._arrays), self.firewall, self.weighted_by_key
        found = self._good(replies, sent, parts)
        self._kinds.tell_of_absent(found, server_round)
        if len(found) < self.min_fit_replies and not self._account:  # it tells not who was there
            return self._round.skip_for_want(len(found), self.min_fit_replies)
        # Values that overflow are found by their result.
        with np.errstate(over="ignore", invalid="ignore"):
            state = self.rule.init(sent) if self._state is None else self._state
            answers = self._kinds.answers(found, parts, sent, wall, key)
            state, new = self.rule.update(state, sent, answers)
        if wild := not_finite(new):
            return self._round.skip(f"the aggregated array {wild!r} {DIVERGED}")
        self._state, self._arrays = state, {**self._arrays, **new}
        contents = [one.message.content for _, one in found]
        metrics = aggregate_metrics(contents, self.train_metrics_aggr_fn, key)
        names = [node.name for node, _ in found]
        self._round.note_training(zip(names, contents, strict=True), parts, metrics)
        self._history.train_metrics[server_round] = metrics
        return to_record(self._arrays), metrics

    # -- evaluation --------------------------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return evaluate messages to the validation nodes; without roles, to FedAvg's sample."""
        if self.fraction_evaluate == 0.0 or not self.eval_every or server_round % self.eval_every:
            return []
        self._gather(grid)
        if self._roster.has_roles:
            chosen = self._roster.with_role("validation")
        else:
            nodes = self._roster.with_role("train")
            size = max(int(len(nodes) * self.fraction_evaluate), self.min_evaluate_nodes)
            chosen = self._sampler.sample(nodes, size, "evaluate", server_round)
        return self._messages(arrays, config, chosen, MessageType.EVALUATE)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the aggregated metrics; None where no client was asked, or none answered."""
        self._round.validation, contents = self._scores(replies)
        metrics = None
        if contents:
            aggregate = self.evaluate_metrics_aggr_fn
            metrics = aggregate_metrics(contents, aggregate, self.weighted_by_key)
            self._history.evaluate_metrics[server_round] = metrics
        if not self._closes_with_evaluate_fn:  # which comes after this
            self._close_round()
        return metrics

    def _final_scores(
        self, grid: Grid, arrays: ArrayRecord, config: ConfigRecord, role: str
    ) -> list[ClientScore]:
        nodes = [node for node in self._roster.with_role(role) if node.role and self.ending.scored]
        messages = self._messages(arrays, config, nodes, MessageType.EVALUATE)
        replies = grid.send_and_receive(messages, timeout=self._timeout) if messages else []
        return list(self._scores(replies)[0])

    # -- the end of a round ------------------------------------------------------------------------

    def _close_round(self) -> None:
        report = self._round.report()
        self._history.reports.append(report)
        self._watch.note(report, self._arrays)
        parts = self._arrays, self._state, self._roster.told, self._watch.best
        self._saver.offer(self._history.snapshot(report.round, *parts))
        if self.on_round:
            self.on_round(report)
        self._watch.end(self._arrays)

    # -- nodes and messages ------------------------------------------------------------------------

    def _gather(self, grid: Grid, role: str = "") -> None:
        least, patience = self.min_available_nodes, self._timeout
        self._roster.gather(grid, min_nodes=least, timeout_s=patience, role=role)
        for name, reason in self._roster.new_faults():
            log(WARNING, "%s cannot take part: %s", name, reason)
            self._round.failures.append((name, reason))

    def _messages(
        self, arrays: ArrayRecord, config: ConfigRecord, nodes: list[Node], kind: str
    ) -> list[Message]:
        told = told_of_run(self._round.number, self._history.token, self.checkpoints)
        sent = ConfigRecord({**config, **told})
        messages: list[Message] = []
        for own, ids in self._kinds.seen(arrays, nodes, is_training=kind == MessageType.TRAIN):
            record = RecordDict({self.arrayrecord_key: own, self.configrecord_key: sent})
            self._round.bytes_down += size_of(own) * len(ids)
            messages += self._construct_messages(record, ids, kind)
        self._round.messages = messages
        return list(messages)

    def _good(
        self, replies: Iterable[Message], sent: NamedArrays | None, parts: Sequence[Part] = ()
    ) -> list[tuple[Node, Judged]]:
        """Return the good replies, by partition; note the others and the missing."""
        messages, self._round.messages = self._round.messages, []
        wall, key, wait = self.firewall, self.weighted_by_key, self._timeout
        sort = partial(sort_replies, firewall=wall, weight_key=key, timeout_s=wait, parts=parts)
        exchange = self._kinds.exchange(messages, replies, sent, self._roster, sort)
        self._round.note(exchange, lambda node_id: self._roster.get(node_id).name)
        for node_id in exchange.offenders:
            self._history.offences[self._roster.get(node_id).name] += 1
        good = [(self._roster.get(node_id), one) for node_id, one in exchange.good]
        return sorted(good, key=lambda pair: pair[0].order)

    def _scores(
        self, replies: Iterable[Message]
    ) -> tuple[tuple[ClientScore, ...], list[RecordDict]]:
        """Return the scores in good replies, and these replies; what diverged is left out."""
        scores, contents, notes = scores_of(self._good(replies, None), self.weighted_by_key)
        self._round.quarantined += notes
        return scores, contents
