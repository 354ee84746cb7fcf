"""Wrong user-level mechanisms, each of them plausible: the laws of the right one refuse them."""

import numpy as np

from metabloom.strategies.rules import is_floating
from metabloom.strategies.user_level import clipped_sum, clipped_update, released


def _noised(sent, total, privacy, max_norm, generator, *, over, factor=1.0):
    std = privacy.update_noise * max_norm * factor
    floating = {
        name: sent[name] + (value + std * generator.standard_normal(value.shape)) / over
        for name, value in total.items()
    }
    return {**sent, **floating}, max_norm


def clips_each_array(sent, replies, privacy, max_norm, generator):
    """Bound each array by C, so that a client weighs C times the root of their number."""
    total = {name: np.zeros(value.shape) for name, value in sent.items() if is_floating(value)}
    for reply in replies:
        for name in total:
            update = reply.arrays[name].astype(np.float64) - sent[name]
            norm = np.linalg.norm(update)
            total[name] += update * min(1.0, max_norm / norm if norm else 1.0)
    return _noised(sent, total, privacy, max_norm, generator, over=privacy.expected_clients)


def divides_by_the_number_of_replies(sent, replies, privacy, max_norm, generator):
    total, _ = clipped_sum(sent, replies, max_norm)
    return _noised(sent, total, privacy, max_norm, generator, over=max(len(replies), 1))


def divides_the_noise_twice(sent, replies, privacy, max_norm, generator):
    m = privacy.expected_clients
    total, _ = clipped_sum(sent, replies, max_norm)
    return _noised(sent, total, privacy, max_norm, generator, over=m, factor=1 / m)


def weighs_by_records(sent, replies, privacy, max_norm, generator):
    total = {name: np.zeros(value.shape) for name, value in sent.items() if is_floating(value)}
    for reply in replies:
        update, _ = clipped_update(reply.arrays, sent, max_norm)
        for name in total:
            total[name] += reply.num_examples * update[name]
    return _noised(sent, total, privacy, max_norm, generator, over=privacy.expected_clients)


def lets_nan_through(sent, replies, privacy, max_norm, generator):
    total = {name: np.zeros(value.shape) for name, value in sent.items() if is_floating(value)}
    for reply in replies:
        update = {name: reply.arrays[name].astype(np.float64) - sent[name] for name in total}
        norm = np.sqrt(sum(float(np.vdot(one, one)) for one in update.values()))
        for name in total:
            total[name] += update[name] * min(1.0, max_norm / norm if norm else 1.0)
    return _noised(sent, total, privacy, max_norm, generator, over=privacy.expected_clients)


def is_silent_without_replies(sent, replies, privacy, max_norm, generator):
    if not replies:
        return dict(sent), max_norm
    return released(sent, replies, privacy, max_norm, generator)


def has_too_little_noise(sent, replies, privacy, max_norm, generator):
    total, _ = clipped_sum(sent, replies, max_norm)
    m = privacy.expected_clients
    return _noised(sent, total, privacy, max_norm, generator, over=m, factor=0.9)


def has_the_same_noise_in_each_array(sent, replies, privacy, max_norm, generator):
    total, _ = clipped_sum(sent, replies, max_norm)
    seed = int(generator.integers(2**31))
    noise = {
        name: np.random.default_rng(seed).standard_normal(value.shape)
        for name, value in total.items()
    }
    std, m = privacy.update_noise * max_norm, privacy.expected_clients
    moved = {name: sent[name] + (value + std * noise[name]) / m for name, value in total.items()}
    return {**sent, **moved}, max_norm


def ignores_the_cost_of_the_count(sent, replies, privacy, max_norm, generator):
    """Adapt the norm and noise the updates by z alone: together they cost more than z."""
    total, _ = clipped_sum(sent, replies, max_norm)
    z, m = privacy.noise_multiplier, privacy.expected_clients
    factor = z / privacy.update_noise
    return _noised(sent, total, privacy, max_norm, generator, over=m, factor=factor)
