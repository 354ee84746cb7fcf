"""NovaClient: its steps and the weights of its gradients, by torch and closed forms; its reply."""

import numpy as np
import pytest
import torch
from torch import nn

from metabloom.clients import NovaClient, SGDClient, nova_update, run_update
from metabloom.clients.fednova import normalised, normaliser
from metabloom.errors import ConfigError
from metabloom.wire import NOVA_STEPS
from tests.clients.privacy.private_clients import pinned
from tests.clients.small_clients import arrays_of, client, context, net, same
from tests.clients.toy_problems import Point, client_data, records, small_net, weights

CROSS_ENTROPY = nn.functional.cross_entropy
SOLVERS = [{}, {"momentum": 0.9}, {"proximal_mu": 1.0}, {"momentum": 0.5, "proximal_mu": 2.0}]
EACH = pytest.mark.parametrize("solver", SOLVERS, ids=str)


# --- ||a||_1 --------------------------------------------------------------------------------------


def slope(output, factor):
    """A loss whose gradient is ``factor``, whatever w is."""
    point, _ = output
    return (point * factor).sum()


def weight_of_each_gradient(steps: int, solver: dict, lr: float = 0.1) -> list[float]:
    """Return a, one gradient after another: a run in which step k alone has a gradient, of 1."""
    model = Point(theta=[0.0])
    update = nova_update(model, slope, lr=lr, **solver)
    found = []
    for k in range(steps):
        batches = [(torch.zeros(1), torch.tensor(float(k == j))) for j in range(steps)]
        moved = run_update(update, weights(model), batches).params["theta"]
        found.append(-moved.item() / lr)
    return found


@EACH
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_the_normaliser_is_the_sum_of_the_weights_of_all_gradients(steps: int, solver: dict):
    a = weight_of_each_gradient(steps, solver)
    assert normaliser(steps, lr=0.1, **solver) == pytest.approx(np.abs(a).sum(), rel=1e-12)


def test_known_answer_6_of_the_normaliser():
    assert normaliser(2, lr=0.1, momentum=0.9) == pytest.approx(2.9, rel=1e-12)
    assert normaliser(3, lr=0.1, proximal_mu=1.0) == pytest.approx(2.71, rel=1e-12)
    assert normaliser(3, lr=0.1) == 3.0
    assert normaliser(0, lr=0.1, momentum=0.9) == 0.0


@pytest.mark.parametrize("tau", [1, 4, 20])
def test_the_normaliser_has_its_closed_forms(tau: int):
    for rho in (0.1, 0.9):
        wanted = (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)
        assert normaliser(tau, lr=0.1, momentum=rho) == pytest.approx(wanted, rel=1e-12)
    for mu in (0.5, 3.0):
        wanted = (1 - (1 - 0.1 * mu) ** tau) / (0.1 * mu)
        assert normaliser(tau, lr=0.1, proximal_mu=mu) == pytest.approx(wanted, rel=1e-12)


# --- the local update -----------------------------------------------------------------------------


@EACH
def test_local_steps_are_those_of_torch_sgd(solver: dict):
    """The pull is written into the loss, the momentum is torch's own."""
    model, twin = small_net(), small_net()
    start = weights(model)
    batches = [records(size, seed) for seed, size in enumerate((5, 4, 6))]
    found = run_update(nova_update(model, CROSS_ENTROPY, lr=0.3, **solver), start, batches).params
    mu = solver.get("proximal_mu", 0.0)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.3, momentum=solver.get("momentum", 0.0))
    for inputs, targets in batches:
        optimizer.zero_grad()
        away = sum(((w - start[n]) ** 2).sum() for n, w in twin.named_parameters())
        (CROSS_ENTROPY(twin(inputs), targets) + mu / 2 * away).backward()
        optimizer.step()
    for name, value in twin.named_parameters():  # float64, the same sums in another order
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-11, atol=1e-14)


# --- the reply ------------------------------------------------------------------------------------


def question(seed: int = 1) -> dict[str, np.ndarray]:
    names = net().state_dict()
    return {**dict(zip(names, arrays_of(net(seed)), strict=True)), NOVA_STEPS: np.array(1)}


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, 1), ({"local_epochs": 3}, 3), ({"batch_size": 4}, 3), ({"momentum": 0.9}, 1)],
    ids=str,
)
def test_a_reply_is_normalised_and_tells_the_steps(options: dict, steps: int):
    own = client(NovaClient, local_lr=0.3, **options)
    sent = question()
    said, count, metrics = own.fit_named(sent, {})
    trained, _, _ = client(NovaClient, local_lr=0.3, **options).fit(arrays_of(net(1)), {})
    whole = normaliser(steps, lr=0.3, momentum=options.get("momentum", 0.0))
    for name, new in zip(own.array_names, trained, strict=True):
        wanted = sent[name] + (new - sent[name].astype(np.float64)) / whole
        np.testing.assert_allclose(said[name], wanted, rtol=1e-6)
        assert said[name].dtype == sent[name].dtype
    assert (said[NOVA_STEPS], said[NOVA_STEPS].dtype) == (steps, np.int64)
    assert count == len(client_data().all[1])
    assert metrics["train-loss"] > 0


def test_momentum_is_new_in_each_round():
    replies = [client(NovaClient, momentum=0.9, batch_size=4).fit_named(question(), {})]
    one = client(NovaClient, momentum=0.9, batch_size=4)
    replies += [one.fit_named(question(), {}) for _ in range(2)]
    for said, _, _ in replies[1:]:
        assert all(np.array_equal(said[name], replies[0][0][name]) for name in said)


def test_another_server_gets_the_trained_model_as_from_plain_sgd():
    own, plain = client(NovaClient, local_epochs=2), client(SGDClient, local_epochs=2)
    sent = arrays_of(net(1))
    assert own.fit_named(dict(zip(own.array_names, sent, strict=True)), {}) is None
    assert same(own.fit(sent, {})[0], plain.fit(sent, {})[0])


def test_integers_and_no_steps_at_all_are_left_alone():
    trained, received = [np.array([2.0]), np.array(9)], [np.array([1.0]), np.array(8)]
    assert normalised(trained, received, 4.0)[0].item() == 1.25
    assert normalised(trained, received, 4.0)[1] == 9
    assert normalised(trained, received, 0.0) is trained


def test_a_client_is_not_computed_in_a_cohort_since_its_question_holds_more_than_a_model():
    assert not client(NovaClient, kernel="vmap").is_for_cohorts
    assert client(SGDClient, kernel="vmap").is_for_cohorts


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"nova_mu": 1.0}], ids=str)
def test_a_private_client_normalises_what_was_released(options: dict, tmp_path):
    def of(file: str) -> NovaClient:
        privacy = pinned(tmp_path / file, seed=3)
        return client(
            NovaClient, context=context(), privacy=privacy, local_steps=4, local_lr=0.1, **options
        )

    said, count, metrics = of("a").fit_named(question(), {"server-round": 1})
    whole, _, _ = of("b").fit(arrays_of(net(1)), {"server-round": 1})
    solver = {"momentum": options.get("momentum", 0.0), "proximal_mu": options.get("nova_mu", 0.0)}
    divisor = normaliser(4, lr=0.1, **solver)
    for name, new in zip(net().state_dict(), whole, strict=True):
        wanted = question()[name] + (new - question()[name].astype(np.float64)) / divisor
        np.testing.assert_allclose(said[name], wanted, rtol=1e-6)
    assert said[NOVA_STEPS] == 4  # what the configuration says, and nothing of the data
    assert of("a").private.ledger.events == [(1.0, 0.5, 4)]
    assert set(metrics) == {"privacy-epsilon", "privacy-delta"}
    assert count == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("momentum", -0.1), ("momentum", 1.0), ("momentum", float("nan")), ("nova_mu", -1.0)],
)
def test_a_value_out_of_range_is_refused_by_name(key: str, value: float):
    with pytest.raises(ConfigError, match=f"{key} = {value!r}"):
        client(NovaClient, **{key: value})
