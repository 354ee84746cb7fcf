"""One run of benchmarks/privacy.py: who holds which records, training with a ledger, the scores."""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

Settings = Mapping[str, Any]
Curves = dict[str, list[float]]  # rate of adaptation -> accuracy after each number of STEPS

DELTA = 1e-5
TUNING_SEED = 0
STEPS = (0, 1, 5, 20, 100)  # of adaptation
TASKS: dict[str, Settings] = {
    "digits": {
        "options": {"ways": 10, "support_fraction": 0.6},
        "clients": 10,
        "rates": (0.1, 0.3, 1.0, 3.0),
    },
    "mnist-writers": {"options": {}, "clients": 120, "rates": (0.1, 0.3, 1.0, 3.0)},
}
LOCAL = "local only"


@dataclass(frozen=True)
class Held:
    """The records of one data set, and who holds them.

    Attributes:
        shape: of one input.
        training: client -> its ClientData, of those that train.
        judged: for each judged client, the records it adapts to, and those of each role.
    """

    shape: tuple[int, ...]
    training: dict[str, Any]
    judged: list[tuple[Any, dict[str, Any]]]


@lru_cache(maxsize=1)
def held_of(task: str, seed: int, data_root: str) -> Held:
    """Return the records of ``task``: the split, the permutations and the roles are the seed's."""
    from metabloom.clients import ClientData
    from metabloom.sim import load_federation

    wanted = TASKS[task]
    federation = load_federation(
        task, root=data_root, seed=seed, num_clients=wanted["clients"], **wanted["options"]
    )
    if task == "digits":
        training, judged = {}, []
        for index, name in enumerate(federation.client_ids):
            data = federation.client(index)
            half = len(data.support[1]) // 2
            parts = [[t[:half] for t in data.support], [t[half:] for t in data.support]]
            training[name] = ClientData(tuple(parts[0]), tuple(parts[1]))
            middle = len(data.query[1]) // 2
            roles = {
                "validation": tuple(t[:middle] for t in data.query),
                "test": tuple(t[middle:] for t in data.query),
            }
            judged.append((data.support, roles))
        return Held((1, 8, 8), training, judged)
    clients = {i: _smaller(federation.client(i)) for i in range(len(federation))}
    names = federation.client_ids
    return Held(
        (1, 7, 7),
        {names[i]: clients[i] for i in federation.indices("train")},
        [
            (clients[i].support, {role: clients[i].query})
            for role, own in (("validation", "validation"), ("test", "unseen"))
            for i in federation.indices(own)
        ],
    )


def _smaller(data: Any) -> Any:
    """Return 28x28 images as 7x7 ones, means of 4x4 pixels: a public map of each record alone."""
    from dataclasses import replace

    from torch.nn.functional import avg_pool2d

    (xs, ys), (xq, yq) = data.support, data.query
    return replace(data, support=(avg_pool2d(xs, 4), ys), query=(avg_pool2d(xq, 4), yq))


def run_job(settings: dict[str, Any], seed: int, data_root: str, work: str) -> dict[str, Any]:
    """Train once and score: validation records with the seed of tuning, else test records too."""
    key = hashlib.sha256(json.dumps([settings, seed], sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(work) / key
    if (folder / "scores.json").exists():
        kept: dict[str, Any] = json.loads((folder / "scores.json").read_text())
        return kept
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped: nobody saw its model
    folder.mkdir(parents=True)
    # Torch and Flower are imported in the worker processes only.
    import torch

    from metabloom.models import build_model

    torch.set_num_threads(1)
    held = held_of(settings["task"], seed, data_root)
    model = build_model("mlp", input_shape=held.shape, num_classes=10, seed=seed, hidden=64)
    start = time.perf_counter()
    sigma = noise_of(settings) if settings.get("epsilon") else 0.0
    params = train(model, held, settings, seed, folder, sigma)
    seconds = time.perf_counter() - start
    roles = ("validation",) if seed == TUNING_SEED else ("validation", "test")
    found = {
        "settings": settings,
        "seed": seed,
        "noise_multiplier": sigma,
        "epsilon": epsilon_in(folder),
        "seconds": seconds,
        **{role: curves(model, params, held, role, settings["task"]) for role in roles},
    }
    (folder / "scores.json").write_text(json.dumps(found))
    return found


def events_of(settings: Settings, sigma: float) -> list[Any]:
    """Return all releases of one client over a whole run, from the definition of its method."""
    from metabloom.accounting import Event

    steps, rounds, q = settings["steps"], settings["rounds"], settings["q"]
    gradients = {"reptile": steps, "alone": steps}.get(settings["method"], steps + 1)
    products = steps if settings["method"] == "second order" else 0
    return [Event(sigma, q, rounds * (gradients + products))]


def noise_of(settings: Settings) -> float:
    """Return the least noise multiplier at which the run costs its epsilon."""
    from metabloom.accounting import calibrated_noise

    epsilon: float = settings["epsilon"]
    return calibrated_noise(lambda s: events_of(settings, s), epsilon=epsilon, delta=DELTA)


def train(
    model: Any, held: Held, settings: Settings, seed: int, folder: Path, sigma: float
) -> dict[str, dict[str, Any]]:
    """Return the parameters after training: under "" those of all, else those of each client."""
    start = dict(model.state_dict())
    if settings["method"] == LOCAL:
        return {"": start}
    from flwr.app import Context

    from metabloom.clients import MAMLClient, SGDClient, client_app
    from metabloom.sim import CohortGrid
    from metabloom.strategies import FedMeta, Reptile
    from metabloom.wire import CLIENT_NAME, PARTITION_ID, ROLE, from_record, to_record

    names = list(held.training)
    is_meta = settings["method"] in ("FOMAML", "second order")

    def client_of(name: str, context: Context | None) -> Any:
        rest = {"seed": seed, "name": name, "context": context}
        if sigma:
            rest["privacy"] = privacy_of(settings, sigma, folder / f"{name}.jsonl")
        data, steps = held.training[name], settings["steps"]
        if is_meta:
            order = "exact" if settings["method"] == "second order" else "first"
            rest |= {"inner_lr": settings["inner-lr"], "inner_steps": steps, "order": order}
            return MAMLClient(model, data, split="fresh", **rest)
        local = {"local_steps": steps, "local_epochs": steps}
        return SGDClient(model, data, local_lr=settings["inner-lr"], **local, **rest)

    arrays = {name: value.numpy() for name, value in start.items()}
    if settings["method"] == "alone":
        return {n: _alone(client_of(n, None), arrays) for n in names}
    app = client_app(
        lambda context: client_of(names[int(context.node_config[PARTITION_ID])], context),
        properties=lambda context: {
            ROLE: "train",
            CLIENT_NAME: names[int(context.node_config[PARTITION_ID])],
        },
    )
    shell = {"seed": seed, "eval_every": 0, "min_train_nodes": 1, "min_available_nodes": 1}
    strategy = (
        FedMeta(optimizer=settings["server"][0], lr=settings["server"][1], **shell)
        if is_meta
        else Reptile(**shell)
    )
    logging.getLogger("flwr").setLevel(logging.ERROR)
    grid = CohortGrid(app, num_nodes=len(names), seed=seed)
    result = strategy.start(grid, to_record(arrays), num_rounds=settings["rounds"])
    if any(r.failures or r.quarantined or r.exhausted or r.skipped for r in result.rounds):
        raise RuntimeError(f"a client did not take part in every round: {settings}, seed {seed}")
    import torch

    return {"": {n: torch.tensor(v) for n, v in from_record(result.arrays).items()}}


def _alone(client: Any, arrays: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    trained, _, _ = client.fit(list(arrays.values()), {})
    return {name: torch.tensor(value) for name, value in zip(arrays, trained, strict=True)}


def privacy_of(settings: Settings, sigma: float, ledger: Path) -> Any:
    """Return a client's pinned parameters; its ledger is a file of its own."""
    from metabloom.clients import PrivacyConfig

    return PrivacyConfig(
        noise_multiplier=sigma,
        max_grad_norm=settings["C"],
        sample_rate=settings["q"],
        expected_batch_size=settings["q"] * settings["records"],
        target_epsilon=settings["epsilon"],
        target_delta=DELTA,
        ledger=ledger,
    )


def epsilon_in(folder: Path) -> float:
    """Return the largest epsilon that any ledger of the run has come to; 0 where there is none."""
    from metabloom.ledger import PrivacyLedger

    return max((PrivacyLedger(file).epsilon(DELTA) for file in folder.glob("*.jsonl")), default=0.0)


def curves(model: Any, params: Mapping[str, Any], held: Held, role: str, task: str) -> Curves:
    """Return the mean accuracy over the clients of ``role``, for each rate and number of steps."""
    from functools import partial

    from torch.nn.functional import cross_entropy

    from metabloom.clients import adapt, adaptation_curve

    names = ["accuracy-before", *(f"accuracy-after-{n}" for n in STEPS[1:])]

    def advance(point: Any, steps: int, *, support: Any, rate: float) -> Any:
        return adapt(model, cross_entropy, point, support, inner_lr=rate, steps=steps)

    found: Curves = {}
    for rate in TASKS[task]["rates"]:
        rows = []
        for client, (own, roles) in zip(_owners(params, held), held.judged, strict=True):
            if role in roles:
                move = partial(advance, support=own, rate=rate)
                curve = adaptation_curve(
                    model, cross_entropy, params[client], roles[role], steps=STEPS[1:], advance=move
                )
                rows.append([curve[name] for name in names])
        found[str(rate)] = [fmean(column) for column in zip(*rows, strict=True)]
    return found


def _owners(params: Mapping[str, Any], held: Held) -> Sequence[str]:
    return [""] * len(held.judged) if "" in params else list(held.training)
