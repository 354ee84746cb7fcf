"""Wrong implementations, kept: the laws in the tests must refuse each of them.

Each is a mistake that was made in public, or that is easy to make, with the signature of what it
stands in for.
"""

import numpy as np
import torch
from torch.func import functional_call

from metabloom.clients import MetaGradient, adapt, meta_gradient, run_update, sgd_update
from metabloom.clients.objective import objective
from metabloom.strategies import mean
from metabloom.strategies.rules import is_floating


def maml_with_a_detached_inner_step(
    model, loss_fn, params, support, query, *, inner_lr, steps=1, order="exact", **more
):
    """The inner step writes param.data (Flower's fedmeta baseline): no graph leads back."""
    theta = {name: value.clone().requires_grad_() for name, value in params.items()}
    for _ in range(steps):
        loss = loss_fn(functional_call(model, theta, (support[0],)), support[1])
        found = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        for value, gradient in zip(theta.values(), found, strict=True):
            value.data = value.data - inner_lr * gradient
    loss = loss_fn(functional_call(model, theta, (query[0],)), query[1])
    found = torch.autograd.grad(loss, list(theta.values()))
    return MetaGradient(dict(zip(theta, found, strict=True)), None, loss.detach())


def first_order_sold_as_exact(*arguments, order="exact", **more):
    """FOMAML whatever is asked for."""
    return meta_gradient(*arguments, order="first", **more)


def exact_sold_as_first_order(*arguments, order="exact", **more):
    """The Hessian is paid for and applied also where it was to be dropped."""
    return meta_gradient(*arguments, order="exact", **more)


def meta_gradient_with_the_support_s_loss(model, loss_fn, params, support, query, **more):
    """Scores the adapted model on the records that it adapted to."""
    return meta_gradient(model, loss_fn, params, support, support, **more)


def multi_step_with_one_hessian(*arguments, steps=1, **more):
    """Backpropagates through the last of the K steps alone."""
    if steps == 1:
        return meta_gradient(*arguments, **more)
    model, loss_fn, params, support, query = arguments
    near = adapt(model, loss_fn, params, support, inner_lr=more["inner_lr"], steps=steps - 1)
    return meta_gradient(model, loss_fn, near, support, query, **more)


def anil_that_drops_the_body(*arguments, adapt=None, **more):
    """What the inner loop does not adapt gets no outer gradient either."""
    found = meta_gradient(*arguments, adapt=adapt, **more)
    grads = {n: g if adapt is None or adapt(n) else 0 * g for n, g in found.grads.items()}
    return MetaGradient(grads, found.inner_lr_grads, found.query_loss)


def meta_sgd_with_the_weight_s_own_gradient(*arguments, **more):
    """alpha gets the gradient of the weight that it belongs to (Flower's fedmeta baseline)."""
    found = meta_gradient(*arguments, **more | {"order": "first"})
    return MetaGradient(found.grads, found.grads, found.query_loss)


def meta_sgd_of_the_last_step(*arguments, steps=1, **more):
    """alpha gets the gradient of one of the K steps in which it acts."""
    found = meta_gradient(*arguments, steps=steps, **more)
    last = multi_step_with_one_hessian(*arguments, steps=steps, **more)
    return MetaGradient(found.grads, last.inner_lr_grads, found.query_loss)


def hessian_free_at_the_adapted_point(
    model, loss_fn, params, support, query, *, inner_lr, delta=1e-4, curvature=None, **more
):
    """The central difference is taken around w~, where the paper takes it around w."""
    loss = objective(model, loss_fn)
    there = adapt(model, loss_fn, params, support, inner_lr=inner_lr)
    v, value = torch.func.grad_and_value(loss)(there, query)
    batch = support if curvature is None else curvature
    ahead, behind = (
        torch.func.grad(loss)({n: there[n] + sign * delta * v[n] for n in v}, batch)
        for sign in (1, -1)
    )
    grads = {n: v[n] - inner_lr * (ahead[n] - behind[n]) / (2 * delta) for n in v}
    return MetaGradient(grads, None, value)


def hessian_on_the_support_batch(*arguments, curvature=None, **more):
    """Per-FedAvg with D for D'': the product of the two is then biased."""
    return meta_gradient(*arguments, **more)


def fedprox_whose_anchor_is_exhausted(model, loss_fn, params, batches, *, lr, proximal_mu):
    """The anchor is a generator of the frozen parameters: from the second batch on it is empty."""
    anchor = (value.clone() for value in params.values())
    for batch in batches:
        pull = dict(zip(params, anchor, strict=False))
        moved = run_update(sgd_update(model, loss_fn, lr=lr), params, [batch]).params
        params = {
            name: moved[name] - lr * proximal_mu * (params[name] - pull[name])
            if name in pull
            else moved[name]
            for name in params
        }
    return params


def fedprox_whose_anchor_follows(model, loss_fn, params, batches, *, lr, proximal_mu):
    """The anchor is not detached from the model: it is where the model is, and the penalty 0."""
    for batch in batches:
        update = sgd_update(model, loss_fn, lr=lr, proximal_mu=proximal_mu)
        params = run_update(update, params, [batch]).params
    return params


def fedprox_with_an_unsquared_norm(model, loss_fn, params, batches, *, lr, proximal_mu):
    """The penalty is mu/2 ||w - anchor||, not its square (in a public baseline)."""
    anchor = params
    for batch in batches:
        moved = run_update(sgd_update(model, loss_fn, lr=lr), params, [batch]).params
        length = sum(((params[n] - anchor[n]) ** 2).sum() for n in params).sqrt().clamp(min=1e-12)
        params = {
            n: moved[n] - lr * proximal_mu / 2 * (params[n] - anchor[n]) / length for n in params
        }
    return params


def ditto_anchored_to_itself(model, loss_fn, personal, received, batches, *, lr, strength):
    """The personal model is pulled to where it began, not to the received one."""
    update = sgd_update(model, loss_fn, lr=lr, proximal_mu=strength)
    return run_update(update, personal, batches).params


def ditto_that_begins_at_the_received_model(
    model, loss_fn, personal, received, batches, *, lr, strength
):
    """The personal model of the rounds before is forgotten."""
    update = sgd_update(model, loss_fn, lr=lr, proximal_mu=strength, anchor=received)
    return run_update(update, received, batches).params


def adam_rebuilt_each_round(gradients, *, lr):
    """A new optimiser for each round: the moments are lost and each step is lr * sign(g)."""
    weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for gradient in gradients:
        optimizer = torch.optim.Adam([weight], lr=lr)
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    return weight.item()


# --- aggregations: in place of median(), trimmed_mean(beta) and multi_krum(f, m) ------------------


def median_that_takes_the_upper_value():
    """Of an even number of values the upper one of the middle two."""
    return _coordinate_wise(lambda values: np.sort(values, axis=0)[len(values) // 2])


def median_of_counters_too():
    """Integer buffers are aggregated as well: the counter is no longer what was sent."""
    return _coordinate_wise(lambda values: np.median(values, axis=0), taken=lambda value: True)


def median_of_all_coordinates():
    """The middle of all numbers of an array, not of each coordinate."""
    return _coordinate_wise(lambda values: np.full(values.shape[1:], np.median(values)))


def trimmed_mean_of_one_end(beta):
    """Only the greatest values are cut: low ones move the mean."""

    def reduce(values):
        return np.sort(values, axis=0)[: len(values) - int(beta * len(values))].mean(axis=0)

    return _coordinate_wise(reduce)


def trimmed_mean_that_divides_by_all(beta):
    """The sum of what is left is divided by n, not by n - 2k: the model shrinks."""

    def reduce(values):
        k = int(beta * len(values))
        return np.sort(values, axis=0)[k : len(values) - k].sum(axis=0) / len(values)

    return _coordinate_wise(reduce)


def krum_that_neighbours_itself(num_malicious, num_selected=0):
    """The distance 0 to oneself is one of the n - f - 2: a true neighbour too few counts."""

    def score(squared):
        return np.sort(squared, axis=1)[:, : len(squared) - num_malicious - 2].sum(axis=1)

    return _krum(num_malicious, num_selected, score=score)


def krum_of_all_neighbours(num_malicious, num_selected=0):
    """The distances to all others count, bad ones included."""
    return _krum(num_malicious, num_selected, score=lambda squared: squared.sum(axis=1))


def krum_that_takes_the_highest_scores(num_malicious, num_selected=0):
    """The models that stand apart are kept and the others dropped."""
    return _krum(num_malicious, num_selected, score=lambda squared: -squared.sum(axis=1))


def krum_by_norms(num_malicious, num_selected=0):
    """||x||^2 + ||y||^2 - 2xy in the models' own float32 (Flower's MultiKrum): digits cancel."""

    def distances(models):
        flat = np.stack([np.concatenate([a.ravel() for a in model]) for model in models])
        norms = np.square(flat).sum(axis=1)
        return norms[:, None] + norms[None, :] - 2 * flat @ flat.T

    return _krum(num_malicious, num_selected, distances=distances)


def krum_that_measures_counters(num_malicious, num_selected=0):
    """Counters of batches are part of the distance, where they outweigh every parameter."""
    return _krum(num_malicious, num_selected, taken=lambda value: True)


def _coordinate_wise(reduce, taken=is_floating):
    def aggregate(sent, replies, weighting):
        return {
            name: reduce(np.stack([reply.arrays[name] for reply in replies]).astype(np.float64))
            if taken(value)
            else value
            for name, value in sent.items()
        }

    return aggregate


def _by_differences(models):
    return np.array(
        [
            [
                sum(((a - b.astype(np.float64)) ** 2).sum() for a, b in zip(x, y, strict=True))
                for y in models
            ]
            for x in models
        ]
    )


def _krum(f, m, *, score=None, distances=_by_differences, taken=is_floating):
    """Multi-Krum, right unless it is given a wrong part."""

    def nearest(squared):
        return np.sort(squared, axis=1)[:, 1 : len(squared) - f - 1].sum(axis=1)

    def aggregate(sent, replies, weighting):
        names = [name for name, value in sent.items() if taken(value)]
        squared = distances([[reply.arrays[name] for name in names] for reply in replies])
        lowest = np.argsort((score or nearest)(squared), kind="stable")[: m or len(replies) - f]
        return mean(sent, [replies[i] for i in sorted(lowest)], weighting)

    return aggregate
