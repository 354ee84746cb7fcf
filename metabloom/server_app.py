"""The Flower ServerApp: runs the configured strategy and writes the results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import INFO, WARNING
from pathlib import Path

from flwr.app import Context
from flwr.common import log
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

from .clients.evaluation import accuracy_after, loss_after
from .config import RunConfig
from .errors import MetabloomError
from .execution import idle_under_flower, kernel_under_flower
from .files import check_writable
from .sim.beside_flower import await_ray_of
from .sim.results import results_of, write_results
from .simulation import as_carried_out, cohort_grid
from .strategies import Checkpoints, Ending, Firewall, RoundReport, UserLevelPrivacy
from .task import idle_keys, initial_arrays, recipe_of, server_parts, started
from .wire import to_record

CHECKPOINTS = "checkpoints"  # folder in that of the results
USER_LEDGER = "user-level.jsonl"  # file in that folder
IDENTITY = ("task_id", "run_id", "node_id")  # what Flower knows of the process's task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what ``context.run_config`` describes; called by Flower."""
    config = RunConfig.read(context.run_config)
    for key in idle_keys(config):
        log(WARNING, "%s has no effect under %s", key, config.strategy)
    if config.engine == "cohort":
        folder = _run_on_cohort_engine(grid, config)
    else:
        for key in idle_under_flower(config):
            log(WARNING, "%s has no effect under Flower's own engine: set engine = 'cohort'", key)
        log(INFO, "engine: flower, kernel: %s", kernel_under_flower(config))
        folder = run(grid, config)
    log(INFO, "results: %s", folder.resolve())


def run(
    grid: Grid, config: RunConfig, *, on_round: Callable[[RoundReport], None] | None = None
) -> Path:
    """Run the configured strategy on ``grid`` and return the folder with the results.

    Raises:
        MetabloomError: where the configuration, the model, the data or the checkpoint to resume
            from cannot work; once the results are written, where no round had enough good replies.
    """
    recipe, initial = recipe_of(config), initial_arrays(config)
    architectures = [one.name for one in config.kinds]
    out = Path(config.out)
    check_writable(out)
    strategy = recipe.strategy(
        seed=config.seed,
        clients_per_round=config.clients_per_round,
        eval_every=config.eval_every,
        firewall=_firewall(config),
        min_fit_replies=config.min_fit_replies,
        max_offences=config.max_offences or None,
        checkpoints=Checkpoints(
            out / CHECKPOINTS,
            every=config.checkpoint_every,
            keep=config.checkpoints_kept,
            settings=config.identity(),
            resume=config.resume,
        ),
        on_round=on_round,
        user_privacy=user_privacy_of(config),
        min_train_nodes=1,
        min_evaluate_nodes=1,
        min_available_nodes=1,
        architectures=architectures,
        ending=ending_of(config),
        **server_parts(config),
    )
    initial, fit = started(config, initial)
    if fit:
        log(INFO if fit.is_whole else WARNING, "%s", fit)
        if strategy.rule.exchanged:
            what = "init: the clients of %s keep models of their own, which begin at the seed's"
            log(WARNING, what, config.strategy)
    result = strategy.start(
        grid, to_record(initial), num_rounds=config.rounds, timeout=config.timeout_s
    )
    results = results_of(config, result) | ({"init": fit.data} if fit else {})
    write_results(out, results, result.arrays, architectures=architectures)
    if all(report.skipped for report in result.rounds):
        if config.is_user_private and not any(report.clients for report in result.rounds):
            raise MetabloomError(
                "the user-level budget was spent before the first round, the model is the initial "
                f"one: {str(out / USER_LEDGER)!r} has what earlier runs have told of these clients"
            )
        if any(report.exhausted for report in result.rounds):
            raise MetabloomError(
                "no client had any privacy budget left, the model is the initial one: 'metabloom "
                "privacy show' tells what was spent on; the ledgers outlive runs"
            )
        bad = [one for report in result.rounds for one in (*report.failures, *report.quarantined)]
        client, reason = bad[0] if bad else ("nobody", "nothing")
        raise MetabloomError(
            f"no round had enough good replies, the model is the initial one; {client}: {reason}"
        )
    return out


def _run_on_cohort_engine(idle: Grid, config: RunConfig) -> Path:
    """Run ``config`` as the command line does; the nodes of Flower's grid stay ``idle``."""
    config = as_carried_out(config)
    if config.workers != "0":
        await_ray_of(idle)
    with _identity_kept(), cohort_grid(config) as grid:
        log(INFO, "engine: cohort, workers: %d, kernel: %s", grid.workers, config.kernel)
        return run(grid, config)


@contextmanager
def _identity_kept() -> Iterator[None]:
    """Give the process back the identity of Flower's task, which another grid replaces."""
    before = {name: getattr(TaskIdentity, f"_{name}") for name in IDENTITY}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)


def user_privacy_of(config: RunConfig) -> UserLevelPrivacy | None:
    """Return the parameters of user-level privacy; None where it is off."""
    if not config.is_user_private:
        return None
    return UserLevelPrivacy(
        noise_multiplier=config.user_privacy_noise_multiplier,
        max_update_norm=config.user_privacy_max_update_norm,
        expected_clients=config.clients_per_round,
        target_delta=config.user_privacy_target_delta,
        sample_rate=config.user_privacy_sample_rate or None,
        target_epsilon=config.user_privacy_target_epsilon,
        adaptive_quantile=config.user_privacy_adaptive_quantile or None,
        ledger=Path(config.out) / USER_LEDGER,
    )


def ending_of(config: RunConfig) -> Ending:
    """Return what ends the run early, and by what its best model is known."""
    most = config.adaptation_steps[-1]
    return Ending(
        patience=config.patience,
        max_bytes=config.max_bytes,
        max_seconds=config.max_seconds,
        accuracy=accuracy_after(most),
        loss=loss_after(most),
        scored=config.score_unseen,
        trained=config.score_training,
    )


def _firewall(config: RunConfig) -> Firewall:
    return Firewall(
        max_value=config.max_value,
        max_weight=config.max_weight,
        max_share=config.max_share,
        max_update_norm=config.max_update_norm or None,
        norm_action=config.norm_action,
    )
