"""Ragged cohorts of clients, and how far two kernels may be apart."""

import torch

from metabloom.clients import ClientData, MAMLClient, MetaSGDClient, SGDClient
from metabloom.clients.cohort import run_cohort
from tests.clients.toy_problems import body, head, records, small_net

CONFIG = {"server-round": 3}
# Relative to the update. Sums of some hundred terms, padded or in another order: each is some
# roundings (2e-16, 1e-7) off, and a few steps carry that on.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

RULES = {
    "fedavg": (SGDClient, {"batch_size": 4, "local_epochs": 2}),
    "fedavg-all-records": (SGDClient, {"local_epochs": 3}),
    "fedprox": (SGDClient, {"batch_size": 4, "proximal_mu": 0.7}),
    "maml": (MAMLClient, {"split": "fixed"}),
    "maml-batches": (MAMLClient, {"split": "independent", "batch_size": 4, "local_steps": 3}),
    "maml-5-inner-steps": (MAMLClient, {"inner_steps": 5, "split": "fresh"}),
    "anil": (MAMLClient, {"inner_steps": 2, "split": "fixed", "adapt": head}),
    "boil": (MAMLClient, {"split": "independent", "adapt": body}),
    "first": (MAMLClient, {"order": "first", "inner_steps": 2}),
    "hf": (MAMLClient, {"order": "hf", "local_steps": 2}),
    "meta-sgd": (MetaSGDClient, {"inner_steps": 2, "split": "fresh"}),
}
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 11, 15, 3, 3)


def ragged(rule, dtype=torch.float64, *, sizes=SIZES, model=None, **options):
    """Return clients of ``rule`` that share a model; see ``data_of`` for their records."""
    kind, usual = RULES[rule]
    model = model or small_net(dtype=dtype)
    return [
        kind(model, data_of(size, seed, dtype), name=str(seed), **{**usual, **options})
        for seed, size in enumerate(sizes)
    ]


def data_of(size, seed, dtype):
    inputs, _ = records(size, seed, dtype=dtype)
    classes = torch.arange(size) % 3
    return ClientData((inputs, classes), records(size % 3 + 1, seed + 100, dtype=dtype))


def trainings(clients):
    """Return the trainings of ``clients`` and the arrays that they begin with."""
    sent = clients[0].get_parameters({})
    params = clients[0].load(sent)
    return [one.training(params, CONFIG) for one in clients], sent


def by_cohort(clients, **options):
    """Return the reply of each client, computed together."""
    asked, sent = trainings(clients)
    outcomes = run_cohort(asked, **options)
    return [one.answered(out, sent, CONFIG) for one, out in zip(clients, outcomes, strict=True)]


def one_by_one(clients):
    """Return the reply of each client by its own kernel."""
    return [one.fit(one.get_parameters({}), CONFIG) for one in clients]


def away(found, wanted, sent):
    """Return the largest distance of two replies, relative to the update and to the metrics."""
    far = []
    for (arrays, count, metrics), (others, other_count, other_metrics) in zip(
        found, wanted, strict=True
    ):
        assert count == other_count
        assert list(metrics) == list(other_metrics)
        pairs = list(zip(arrays, others, sent, strict=True))
        size = sum(((b - s) ** 2).sum() for _, b, s in pairs) ** 0.5
        assert size > 1e-3  # an update that is none would prove nothing
        far.append(sum(((a - b) ** 2).sum() for a, b, _ in pairs) ** 0.5 / size)
        far += [abs(metrics[key] - value) / abs(value) for key, value in other_metrics.items()]
    return max(map(float, far))


def distance(clients, **options):
    """Return how far the replies of a cohort are from those of its clients one by one."""
    found = by_cohort(clients, **options)
    return away(found, one_by_one(clients), clients[0].get_parameters({}))
