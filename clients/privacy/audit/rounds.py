r"""Rounds of a client with its ledger's file: epsilon that is shown, against epsilon that is told.

A budget that is counted anew in each round, as by an engine that is built for each message, tells
the epsilon of one round, whatever was released before.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ....wire import PRIVACY_EPSILON, SERVER_ROUND
from ...data import ClientData
from ..config import PrivacyConfig
from .bench import DELTA, Bench
from .canaries import FLAT, Canaries, linear, loss_of_kind
from .findings import (
    Finding,
    epsilon_of_mu,
    least_separation,
    separation,
)

ROUNDS, SIGMA = 20, 4.0


class Told(NamedTuple):
    """What the server gets over the rounds.

    Attributes:
        moved: (R, m), by how much the model moved in each round, times -b: releases, unscaled.
        epsilon: the least that was told to hold for all rounds.
    """

    moved: Tensor
    epsilon: float


def check_rounds(bench: Bench) -> list[Finding]:
    """Train for 20 rounds at sigma = 4, by DP-SGD of two steps and by FOMAML of K = 1.

    Both book 40 releases; the models that are sent show all of DP-SGD's, mu = sqrt(40) / 4, and of
    FOMAML the queries', mu = sqrt(20) / 4. The lower bound of mu becomes one of epsilon at
    delta = 1e-5, which must not exceed the least of what the last reply and the ledger say. Finds
    a ledger that forgets, from round to round, or when it is opened anew. About the mean over the
    rounds, what was sent is chi^2 noise with m (R - 1) degrees: that finds noise that comes again.
    """
    sgd = (bench.engine.sgd_client, {"local_lr": 1.0, "local_steps": 2})
    maml = (bench.engine.maml_client, {"outer_lr": 1.0, "inner_steps": 1, "order": "first"})
    found = []
    for name, (build, options), shown in (("DP-SGD", sgd, 2), ("FOMAML", maml, 1)):
        canaries = bench.canaries(FLAT)
        told = _trained(replace(bench, name=f"{bench.name}-{name}"), build, options, canaries)
        found += [
            _epsilon_finding(bench, told, canaries, name),
            _noise_finding(bench, told, shown, name),
        ]
    return found


def _trained(bench: Bench, build: Any, options: dict[str, Any], canaries: Canaries) -> Told:
    inputs, targets = canaries.records
    half = len(targets) // 2
    data = ClientData((inputs[:half], targets[:half]), (inputs[half:], targets[half:]))
    file = bench.folder / bench.name / "ledger.jsonl"
    arrays = [np.zeros((1, bench.count), dtype=np.float32)]
    sent, epsilon = [torch.from_numpy(arrays[0])], math.nan
    for number in range(1, ROUNDS + 1):
        client = build(
            linear(bench.count),
            data,
            loss_fn=loss_of_kind,
            name="audited",
            privacy=_pinned(bench, bench.engine.ledger(file)),
            **options,
        )
        arrays, _, metrics = client.fit(arrays, {SERVER_ROUND: number})
        sent.append(torch.from_numpy(arrays[0]))
        epsilon = float(metrics[PRIVACY_EPSILON])
    moved = torch.cat(sent).double().diff(dim=0) * -bench.batch_size
    return Told(moved, min(epsilon, bench.engine.ledger(file).epsilon(DELTA)))


def _pinned(bench: Bench, ledger: Any) -> PrivacyConfig:
    return replace(
        bench.privacy,
        noise_multiplier=SIGMA,
        expected_batch_size=bench.batch_size,
        ledger=ledger,
        seed=bench.noise_seed,
    )


def _epsilon_finding(bench: Bench, told: Told, canaries: Canaries, name: str) -> Finding:
    mu = abs(separation(told.moved.sum(0), canaries.is_in))
    least = least_separation(mu, canaries.is_in, bench.alpha)
    return Finding(
        check=bench.name,
        what=f"epsilon after {ROUNDS} rounds of {name}",
        unit="epsilon",
        estimate=epsilon_of_mu(mu, DELTA),
        measured=epsilon_of_mu(least, DELTA),
        claimed=told.epsilon,
        bound_kind="at most",
        alpha=bench.alpha,
    )


def _noise_finding(bench: Bench, told: Told, shown: int, name: str) -> Finding:
    away = told.moved - told.moved.mean(0)
    freedom = (ROUNDS - 1) * bench.count
    deviation = math.sqrt(float(away.square().sum()) / freedom)
    ratio = deviation / (SIGMA * math.sqrt(shown))
    return bench.ratio_finding(ratio, freedom, f"noise of {ROUNDS} rounds of {name}, compared")
