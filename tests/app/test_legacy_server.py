"""Our clients under a legacy Flower server: fit and evaluate instead of the Message API."""

import numpy as np
import pytest
from flwr.server import ServerConfig
from flwr.server.compat import start_grid
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp.strategy import FedAvg

from metabloom.client_app import app
from metabloom.config import RunConfig
from metabloom.sim import CohortGrid
from metabloom.task import model_of
from metabloom.wire import from_record, to_record

ROUNDS, CLIENTS = 2, 6


@pytest.mark.parametrize("strategy", ["fedavg", "per-fedavg"])
def test_a_legacy_server_and_a_message_api_server_reach_the_same_model(strategy: str) -> None:
    # Small batches: they are the same only if a legacy client learns the round as others do.
    keys = {"num-clients": CLIENTS, "strategy": strategy, "batch-size": 5}
    config = RunConfig.read(keys)
    models: list[list[np.ndarray]] = []
    start_grid(
        grid=CohortGrid(app, num_nodes=CLIENTS, run_config=config.to_flower()),
        config=ServerConfig(num_rounds=ROUNDS),
        strategy=LegacyFedAvg(
            min_fit_clients=CLIENTS,
            min_available_clients=CLIENTS,
            evaluate_fn=lambda _round, arrays, _config: models.append(arrays),
        ),
    )
    initial = {name: value.numpy() for name, value in model_of(config).state_dict().items()}
    result = FedAvg(min_available_nodes=CLIENTS).start(
        CohortGrid(app, num_nodes=CLIENTS, run_config=config.to_flower()),
        to_record(initial),
        num_rounds=ROUNDS,
    )
    assert len(models) == ROUNDS + 1
    moved = from_record(result.arrays)
    assert any(np.abs(moved[name] - value).max() > 1e-3 for name, value in initial.items())
    for legacy, (name, new) in zip(models[-1], moved.items(), strict=True):
        # Flower adds the clients' arrays up in float32 in two orders: rounding alone differs.
        np.testing.assert_allclose(legacy, new, rtol=0, atol=1e-5, err_msg=name)
