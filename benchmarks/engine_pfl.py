"""The side of pfl-research in a comparison, in a virtual environment of its own.

pfl 0.6.0 needs dp-accounting below 0.6, metabloom 0.6 or above, so the two do not go into one:

    python -m venv pfl-venv
    pfl-venv/bin/pip install "pfl[pytorch]==0.6.0" torch==VERSION safetensors

with the VERSION of torch that metabloom has. ``benchmarks/engine.py --pfl-python
pfl-venv/bin/python`` then calls this script:

    pfl-venv/bin/python benchmarks/engine_pfl.py JOB.json OUT

The way that pfl's own benchmarks go: FederatedAveraging on a SimulatedBackend, one resident model,
users' tensors in memory, users one after another, no evaluation while it is timed.
"""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RANK, ADDRESSES = "PFL_WORKER_RANK", "PFL_WORKER_ADDRESSES"


def run(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Return the seconds of each round and processor seconds, of this process alone."""
    import numpy as np
    import torch
    from engine_model import SmallCNN
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    np.random.seed(0)  # noqa: NPY002  pfl's own streams begin there, the same on each worker
    folder = Path(job["data"])
    inputs = torch.from_numpy(np.load(folder / "inputs.npy"))  # (users, records, 1, 28, 28)
    targets = torch.from_numpy(np.load(folder / "targets.npy"))

    class Net(SmallCNN):
        """The net with the two methods that pfl asks for."""

        def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            """Return the mean cross-entropy."""
            return torch.nn.functional.cross_entropy(self(x), y)

        def metrics(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
            """Return nothing but a count."""
            return {"records": Weighted(len(y), len(y))}

    class Clock(TrainingProcessCallback):  # type: ignore[misc]  # pfl is not installed here
        """Note when each round ended; keep the model after the first."""

        def __init__(self) -> None:
            self.marks, self.cpu = [time.perf_counter()], [time.process_time()]

        def after_central_iteration(
            self, aggregate_metrics: Any, model: Any, *, central_iteration: int
        ) -> Any:
            """Take the times of one round."""
            self.marks.append(time.perf_counter())
            self.cpu.append(time.process_time())
            if central_iteration == 0 and os.environ.get(RANK, "0") == "0":
                now = model.pytorch_model.state_dict()
                copies = {name: value.clone() for name, value in now.items()}
                save_file(copies, out / "round-1.safetensors")
            return False, Metrics()

    net = Net((1, *inputs.shape[-2:]), 10)
    net.load_state_dict(load_file(folder / "first.safetensors"))
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))
    users = [
        Dataset([x, y], user_id=i) for i, (x, y) in enumerate(zip(inputs, targets, strict=True))
    ]
    sampler = get_user_sampler("minimize_reuse", range(len(users)))
    weights = {i: len(user) for i, user in enumerate(users)} if RANK in os.environ else None
    data = FederatedDataset(users.__getitem__, sampler, weights)
    clock = Clock()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=job["rounds"],
            evaluation_frequency=10**9,  # the first round alone, which is not counted
            train_cohort_size=len(users),
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(data, data),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=job["lr"], local_batch_size=job["batch"]
        ),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    return {
        "first": clock.marks[1] - clock.marks[0],
        "later": np.diff(clock.marks)[1:].tolist(),
        "later_cpu": (clock.cpu[-1] - clock.cpu[1]) / max(1, job["rounds"] - 1),
    }


def main(given: Path, out: Path) -> None:
    """Run the job, in as many processes as it says, and write what the first one found."""
    logging.getLogger("pfl").setLevel(logging.ERROR)
    job = json.loads(given.read_text())
    count = job["processes"]
    if RANK in os.environ or count == 1:
        found = run(job, out)
        rank = os.environ.get(RANK, "0")
        (out / f"found-{rank}.json").write_text(json.dumps(found) + "\n")
        if count > 1:
            return
    else:
        addresses = ",".join(f"127.0.0.1:{job['port'] + i}" for i in range(count))
        command = [sys.executable, __file__, str(given), str(out)]
        ranks = [
            subprocess.Popen(command, env={**os.environ, RANK: str(i), ADDRESSES: addresses})
            for i in range(count)
        ]
        ends = [one.wait() for one in ranks]
        if any(ends):
            raise SystemExit("a process of pfl failed")
    all_of_them = [json.loads((out / f"found-{i}.json").read_text()) for i in range(count)]
    found = {**all_of_them[0], "later_cpu": sum(one["later_cpu"] for one in all_of_them)}
    (out / "found.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
