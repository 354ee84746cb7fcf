"""The Flower ServerApp: runs the configured strategy and writes the results."""

from collections.abc import Callable
from logging import INFO, WARNING
from pathlib import Path

from flwr.app import Context
from flwr.common import log
from flwr.serverapp import Grid, ServerApp

from .config import RunConfig
from .files import check_writable
from .sim.results import results_of, write_results
from .strategies import RoundReport
from .task import idle_keys, model_of, recipe_of
from .wire import to_record

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what ``context.run_config`` describes; called by Flower."""
    config = RunConfig.read(context.run_config)
    for key in idle_keys(config):
        log(WARNING, "%s has no effect under %s", key, config.strategy)
    log(INFO, "results: %s", run(grid, config).resolve())


def run(
    grid: Grid, config: RunConfig, *, on_round: Callable[[RoundReport], None] | None = None
) -> Path:
    """Run the configured strategy on ``grid`` and return the folder with the results.

    Raises:
        MetabloomError: where the configuration, the model or the data cannot work, or no client
            answers.
    """
    recipe, model = recipe_of(config), model_of(config)
    check_writable(Path(config.out))
    strategy = recipe.strategy(
        seed=config.seed,
        clients_per_round=config.clients_per_round,
        eval_every=config.eval_every,
        on_round=on_round,
        min_train_nodes=1,
        min_evaluate_nodes=1,
        min_available_nodes=1,
    )
    initial = {name: value.numpy() for name, value in model.state_dict().items()}
    result = strategy.start(
        grid, to_record(initial), num_rounds=config.rounds, timeout=config.timeout_s
    )
    return write_results(Path(config.out), results_of(config, result), result.arrays)
