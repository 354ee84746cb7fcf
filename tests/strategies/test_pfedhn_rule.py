"""pFedHN's mathematics: known answer 10, and a round of its rule by plain autograd."""

import numpy as np
import pytest
import torch

from metabloom.errors import MetabloomError
from metabloom.execution import on_one_thread
from metabloom.models import Hypernetwork
from metabloom.strategies import (
    Reply,
)
from metabloom.strategies.pfedhn import (
    hypernetwork_rule,
    middle,
    model_of,
    newcomer,
    pulled_back,
)
from tests.strategies.toy import moved

SIZES = {"embedding_size": 3, "width": 5}
CLIENTS = ("anna", "ben", "carl")


def sgd(params):
    return torch.optim.SGD(params, lr=1.0)


def restless(params):
    """Return an optimiser that moves a parameter on, gradient or not."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)


def linear(phi, v):
    return {"theta": phi["W"] @ v}


def test_a_linear_hypernetwork_gives_the_known_answer():
    """Known answer 10: c = 0, a = 1, one local step of rate .1, so Delta = .1 theta."""
    phi = {"W": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}
    v = torch.tensor([1.0, 1.0])
    theta = linear(phi, v)["theta"]
    delta = theta - (theta - 0.1 * theta)
    torch.testing.assert_close(delta, torch.tensor([0.1, 0.2]))
    found, own = pulled_back(linear, phi, v, {"theta": delta})
    torch.testing.assert_close(found["W"], torch.tensor([[0.1, 0.1], [0.2, 0.2]]))
    torch.testing.assert_close(own, torch.tensor([0.1, 0.4]))


def test_products_are_the_slopes_of_theta_along_delta():
    """(d theta / d phi)^T Delta is the gradient of <theta(phi), Delta>: by central differences."""
    shapes = {"a": (2, 3), "b": (2,)}
    network = Hypernetwork(shapes, **SIZES).double()
    draw = torch.Generator().manual_seed(0)

    def drawn(shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    phi = {name: drawn(value.shape) for name, value in network.named_parameters()}
    v, delta = drawn(3), {name: drawn(shape) for name, shape in shapes.items()}

    def make(weights, embedding):
        return torch.func.functional_call(network, dict(weights), (embedding,))

    def along(weights, embedding):
        theta = make(weights, embedding)
        return sum((theta[name] * delta[name]).sum().item() for name in delta)

    found, own = pulled_back(make, phi, v, delta)
    h = 1e-6
    for i in range(3):
        step = h * torch.eye(3, dtype=torch.float64)[i]
        wanted = (along(phi, v + step) - along(phi, v - step)) / (2 * h)
        assert own[i].item() == pytest.approx(wanted, rel=1e-6, abs=1e-8)
    for name, value in phi.items():
        towards = drawn(value.shape)
        ahead, behind = ({**phi, name: value + s * h * towards} for s in (1, -1))
        wanted = (along(ahead, v) - along(behind, v)) / (2 * h)
        assert (found[name] * towards).sum().item() == pytest.approx(wanted, rel=1e-6, abs=1e-8)


def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "body.weight": draw.normal(size=(4, 3)).astype(np.float32),
        "body.bias": draw.normal(size=4).astype(np.float32),
        "count": np.array(3),
        "norm.running_var": np.ones(2, dtype=np.float32),
        "head.weight": draw.normal(size=(2, 4)),
    }


GENERATED = ("body.weight", "body.bias", "head.weight")


def drawn_state(rule, seed: int = 1):
    """Return a state of which nothing is zero any more, in which ``CLIENTS`` have embeddings."""
    draw = np.random.default_rng(seed)
    state = rule.init(arrays())
    phi = {
        name: (value + 0.3 * draw.normal(size=value.shape)).astype(value.dtype)
        if name.startswith("network/")
        else value
        for name, value in state["phi"].items()
    }
    clients = {name: newcomer(0, name, SIZES["embedding_size"]) for name in CLIENTS}
    return {**state, "phi": phi, "clients": clients}


def replies_to(state, clients=CLIENTS) -> list[Reply]:
    """Return what clients answer to the models that a state makes for them."""
    draw = np.random.default_rng(5)
    found = []
    for number, name in enumerate(clients, 1):
        theta = model_of(state["phi"], arrays(), state["clients"][name]["embedding"], 5)
        own = {
            key: np.asarray(value + 0.1 * draw.normal(size=value.shape), value.dtype)
            if key in GENERATED
            else np.asarray(value + number, value.dtype)
            for key, value in theta.items()
        }
        found.append(Reply(own, number, client=name))
    return found


def round_by_hand(state, replies, weights):
    """The oracle: one backward pass through a module, in float64, with SGD of rate 1."""
    shapes = {name: arrays()[name].shape for name in GENERATED}
    network = Hypernetwork(shapes, **SIZES).double()
    network.load_state_dict(
        {
            name.removeprefix("network/"): torch.from_numpy(value.astype(np.float64))
            for name, value in state["phi"].items()
            if name.startswith("network/")
        }
    )
    base = {
        name: torch.tensor(state["phi"][f"base/{name}"], dtype=torch.float64, requires_grad=True)
        for name in GENERATED
    }
    embeddings = {
        name: torch.tensor(one["embedding"], dtype=torch.float64, requires_grad=True)
        for name, one in state["clients"].items()
    }
    for reply, weight in zip(replies, weights, strict=True):
        own = embeddings[reply.client]
        added = network(own)
        theta = {name: base[name] + added[name] for name in GENERATED}
        delta = {name: theta[name].detach() - torch.tensor(reply.arrays[name]) for name in theta}
        product = sum((theta[name] * delta[name]).sum() for name in theta)
        (slope,) = torch.autograd.grad(product, [own], retain_graph=True)
        (weight * product).backward(inputs=[*network.parameters(), *base.values()])
        embeddings[reply.client] = (own - slope).detach()
    stepped = {f"network/{n}": (p - p.grad).detach() for n, p in network.named_parameters()}
    stepped |= {f"base/{n}": (p - p.grad).detach() for n, p in base.items()}
    return {n: p.numpy() for n, p in stepped.items()}, embeddings


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_a_round_is_one_backward_pass_for_each_client(weighting: str):
    rule = hypernetwork_rule(sgd, weighting=weighting, **SIZES)
    state = drawn_state(rule)
    replies = replies_to(state)
    after, new = rule.update(state, arrays(), replies)
    weights = [1 / 3] * 3 if weighting == "uniform" else [1 / 6, 2 / 6, 3 / 6]
    phi, embeddings = round_by_hand(state, replies, weights)
    assert len(phi) == sum(name.startswith("network/") for name in state["phi"]) + 3
    for name, value in phi.items():
        # Models travel in float32, of numbers of some ones; a product has some ten of them.
        np.testing.assert_allclose(after["phi"][name], value, rtol=0, atol=1e-5, err_msg=name)
        assert np.abs(after["phi"][name] - state["phi"][name]).max() > 1e-3, name
    for name, value in embeddings.items():
        found = after["clients"][name]["embedding"]
        np.testing.assert_allclose(found, value.detach().numpy(), rtol=0, atol=1e-5)
    wanted = model_of(after["phi"], arrays(), middle(after["clients"], 3), 5)
    for name, value in wanted.items():
        assert new[name].tobytes() == value.tobytes()
    assert new["count"] == 3
    shares = dict(zip((1, 2, 3), weights, strict=True))
    mean = sum(share * (1.0 + number) for number, share in shares.items())
    np.testing.assert_allclose(new["norm.running_var"], mean, rtol=1e-6)  # counted, not generated


def one_after_another(rule, state, sent, replies):
    """A wrong variant: phi moves with each reply, so later products are of another phi."""
    for reply in replies:
        state, _ = rule.update(state, sent, [reply])
    return state


def test_products_are_of_the_phi_that_made_the_models():
    """A step for two halves of the replies is not the step for all of them."""
    rule = hypernetwork_rule(sgd, **SIZES)
    state = drawn_state(rule)
    replies = replies_to(state)
    whole = rule.update(state, arrays(), replies)[0]
    backwards = rule.update(state, arrays(), replies[::-1])[0]
    first, second = (
        one_after_another(rule, state, arrays(), some) for some in (replies, replies[::-1])
    )
    name = "network/heads.0.weight"
    np.testing.assert_allclose(backwards["phi"][name], whole["phi"][name], rtol=0, atol=1e-6)
    assert np.abs(first["phi"][name] - second["phi"][name]).max() > 1e-3


@pytest.mark.parametrize("factory", [restless, lambda p: torch.optim.AdamW(p, lr=0.1)])
def test_embeddings_of_clients_that_were_not_there_do_not_move(factory):
    """Momentum and weight decay would move a table of embeddings that has one optimiser."""
    rule = hypernetwork_rule(factory, **SIZES)
    state = drawn_state(rule)
    state, _ = rule.update(state, arrays(), replies_to(state))
    later, _ = rule.update(state, arrays(), replies_to(state, ("anna",)))
    for name in CLIENTS:
        before, after = (one["clients"][name]["embedding"] for one in (state, later))
        assert (before.tobytes() == after.tobytes()) == (name != "anna")
    table = torch.tensor(np.stack([state["clients"][name]["embedding"] for name in CLIENTS]))
    table.requires_grad_().grad = torch.zeros_like(table)
    optimizer = factory([table])
    optimizer.step()
    assert not np.array_equal(table.detach()[1], state["clients"]["ben"]["embedding"])


def test_an_embedding_has_the_momentum_of_its_own_rounds():
    rule = hypernetwork_rule(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), **SIZES)
    state = drawn_state(rule)
    by_hand = torch.tensor(state["clients"]["ben"]["embedding"], dtype=torch.float64)
    optimizer = torch.optim.SGD([by_hand.requires_grad_()], lr=0.1, momentum=0.9)
    for present in (("ben",), ("anna",), ("ben", "carl")):
        replies = replies_to(state, present)
        if "ben" in present:
            before = state["clients"]["ben"]["embedding"]
            slope = round_by_hand(state, replies, [1.0] * len(replies))[1]["ben"]
            by_hand.grad = torch.from_numpy(before.astype(np.float64)) - slope
            optimizer.step()
        state, _ = rule.update(state, arrays(), replies)
    found = state["clients"]["ben"]["embedding"]
    np.testing.assert_allclose(found, by_hand.detach().numpy(), rtol=0, atol=1e-5)


def test_nothing_of_a_state_is_changed_by_the_next():
    rule = hypernetwork_rule(restless, **SIZES)
    state = drawn_state(rule)
    state, _ = rule.update(state, arrays(), replies_to(state))
    before = str(state)
    rule.update(state, arrays(), replies_to(state))
    assert str(state) == before


def test_the_number_of_threads_is_as_it_was_and_no_bit_depends_on_it():
    rule = hypernetwork_rule(sgd, embedding_size=3, width=200)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with on_one_thread():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == threads
            state = rule.init(arrays())
            replies = [Reply(moved(arrays(), i, 1), 1, client=name) for i, name in enumerate("ab")]
            for _ in range(3):
                state, new = rule.update(state, arrays(), replies)
            found.append({name: value.tobytes() for name, value in new.items()})
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_a_reply_without_a_name_has_no_embedding():
    rule = hypernetwork_rule(sgd, **SIZES)
    with pytest.raises(MetabloomError, match="without the name of its client"):
        rule.update(rule.init(arrays()), arrays(), [Reply(arrays(), 1)])


def test_an_embedding_begins_by_the_name_and_the_seed_alone():
    one = newcomer(0, "anna", 400)["embedding"]
    assert np.array_equal(one, newcomer(0, "anna", 400)["embedding"])
    assert not np.array_equal(one, newcomer(0, "ben", 400)["embedding"])
    assert not np.array_equal(one, newcomer(1, "anna", 400)["embedding"])
    assert abs(one.mean()) < 0.2  # of 400 normal numbers: four standard deviations
    assert one.std() == pytest.approx(1, abs=0.15)
