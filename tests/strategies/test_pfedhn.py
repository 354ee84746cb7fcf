"""pFedHN: known answer 10, a round by plain autograd, and whose model and embedding is whose."""

from pathlib import Path

import numpy as np
import pytest
import torch

from metabloom.architectures import joined, part_of
from metabloom.client_app import app as our_clients
from metabloom.config import RunConfig
from metabloom.errors import ConfigError, MetabloomError
from metabloom.models import Hypernetwork
from metabloom.sim import CohortGrid
from metabloom.strategies import (
    STRATEGIES,
    Checkpoints,
    Firewall,
    PFedHN,
    Reply,
    Rule,
    UserLevelPrivacy,
)
from metabloom.strategies.pfedhn import (
    hypernetwork_rule,
    middle,
    model_of,
    newcomer,
    on_one_thread,
    pulled_back,
)
from metabloom.strategies.shell import roll_call
from metabloom.task import idle_keys, server_parts
from metabloom.task import model_of as built_model
from metabloom.wire import from_record, to_record
from tests.strategies.toy import Toy, bits, larger, model, moved, start, strategy_of

SIZES = {"embedding_size": 3, "width": 5}
SMALL = {"embedding-size": 3, "hypernetwork-width": 5}
ROLES = ("train", "unseen", "train", "validation", "train")
CLIENTS = ("anna", "ben", "carl")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "POLL_S", 0.01)
    monkeypatch.setattr(roll_call, "GATHER_S", 0.05)


def sgd(params):
    return torch.optim.SGD(params, lr=1.0)


def restless(params):
    """Return an optimiser that moves a parameter on, gradient or not."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)


# --- the mathematics ------------------------------------------------------------------------------


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


# --- who is sent what -----------------------------------------------------------------------------


def seen_by(rounds: int, **more) -> tuple[PFedHN, dict]:
    """Return a strategy after its run, and the arrays that came to each client and round."""
    seen = {}

    def learns(sent, partition, number):
        seen[partition, number] = {name: value.copy() for name, value in sent.items()}
        return moved(sent, partition, number)

    strategy = strategy_of("pfedhn", SMALL, **more)
    start(strategy, Toy(roles=ROLES, learns=learns), rounds=rounds)
    return strategy, seen


def test_every_client_is_sent_a_model_of_its_own():
    _, seen = seen_by(2)
    for partition in (0, 2, 4):
        for name, value in model().items():
            assert np.array_equal(seen[partition, 1][name], value), name  # nothing is added yet
    second = [seen[partition, 2] for partition in (0, 2, 4)]
    for i, one in enumerate(second):
        other = second[i - 1]
        assert np.abs(one["weight"] - other["weight"]).max() > 1e-4
        assert list(one) == list(model())
        assert all(one[name].dtype == value.dtype for name, value in model().items())


def test_what_a_client_is_sent_is_the_model_of_its_embedding():
    strategy, seen = seen_by(3)
    again, _ = seen_by(2)
    state = again._state
    for partition in (0, 2, 4):
        embedding = state["clients"][f"c{partition}"]["embedding"]
        wanted = model_of(state["phi"], model(), embedding, 5)
        for name, value in wanted.items():
            assert seen[partition, 3][name].tobytes() == value.tobytes()
    assert set(strategy._state["clients"]) == {"c0", "c2", "c4"}


class Evaluated(Toy):
    """Clients that note the arrays with which they are evaluated."""

    def _evaluate(self, message, context):
        partition = int(context.node_config["partition-id"])
        self.received = {**getattr(self, "received", {}), partition: message.content["arrays"]}
        return super()._evaluate(message, context)


def test_new_clients_are_sent_the_model_of_the_mean_embedding_and_others_their_own():
    toy, strategy = Evaluated(roles=ROLES), strategy_of("pfedhn", SMALL)
    result = start(strategy, toy, rounds=2)
    state = strategy._state
    mean = np.mean([state["clients"][f"c{i}"]["embedding"] for i in (0, 2, 4)], axis=0)
    wanted = model_of(state["phi"], model(), mean, 5)
    for name, value in from_record(result.arrays).items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-5)
    for partition in (1, 3):
        assert bits(toy.received[partition]) == bits(result.arrays)
    for partition in (0, 2, 4):
        own = model_of(state["phi"], model(), state["clients"][f"c{partition}"]["embedding"], 5)
        assert bits(toy.received[partition]) == bits(to_record(own))
    assert [score.client for score in result.trained] == ["c0", "c2", "c4"]


def test_clients_that_fit_an_embedding_are_sent_phi_and_an_embedding_to_be_evaluated():
    toy = Evaluated(roles=ROLES)
    strategy = strategy_of("pfedhn", {**SMALL, "hypernetwork-adapts": "embedding"})
    start(strategy, toy, rounds=2)
    state = strategy._state
    for partition in range(5):
        held = from_record(toy.received[partition])
        own = state["clients"].get(f"c{partition}", {}).get("embedding")
        wanted = middle(state["clients"], 3) if own is None else own
        assert np.array_equal(held.pop("embedding"), wanted)
        assert list(held) == list(state["phi"])
        assert all(np.array_equal(held[name], value) for name, value in state["phi"].items())


def test_a_reply_is_judged_against_what_its_own_node_was_sent():
    """Models of two clients are 20 apart, and each moves by less than 1: within the bound of 2."""
    rule = strategy_of("pfedhn", SMALL).rule
    initial = {"weight": np.zeros((2, 3), dtype=np.float32)}
    state = rule.init(initial)
    phi = {n: v + 1 if "heads" in n else v for n, v in state["phi"].items()}
    state = {**state, "phi": phi, "clients": {f"c{i}": newcomer(0, f"c{i}", 3) for i in (0, 2, 4)}}
    for i in (0, 2, 4):
        state["clients"][f"c{i}"]["embedding"] = np.full(3, 20.0 * (i - 1), np.float32)

    def learns(sent, partition, number):
        return {name: value + np.float32(0.3) for name, value in sent.items()}

    toy, wall = Toy(roles=ROLES, learns=learns), Firewall(max_update_norm=2.0)
    strategy = strategy_of("pfedhn", SMALL, firewall=wall)
    begin = strategy._begin

    def begun(*arguments):
        begin(*arguments)
        strategy._state = state

    strategy._begin = begun
    result = start(strategy, toy, rounds=1, arrays=initial)
    sent = [strategy._sent_to(initial, roll_call.Node(i, client=f"c{i}"), True) for i in (0, 4)]
    assert np.linalg.norm(sent[0]["weight"] - sent[1]["weight"]) > 2.0
    assert not result.rounds[0].quarantined
    tight = strategy_of("pfedhn", SMALL, firewall=Firewall(max_update_norm=0.5))
    report = start(tight, toy, rounds=1, arrays=initial).rounds[0]
    assert [who for who, _ in report.quarantined] == ["c0", "c2", "c4"]


def test_an_update_that_is_clipped_is_clipped_around_what_the_node_was_sent():
    seen, shown = {}, []

    def learns(sent, partition, number):
        seen[f"c{partition}", number] = {name: value.copy() for name, value in sent.items()}
        return moved(sent, partition, number)

    wall = Firewall(max_update_norm=0.01, norm_action="clip")
    strategy = strategy_of("pfedhn", SMALL, firewall=wall)
    rule = strategy.rule

    def noting(state, sent, replies):
        shown.append(replies)
        return rule.update(state, sent, replies)

    strategy.rule = Rule(rule.init, noting)
    start(strategy, Toy(roles=ROLES, learns=learns), rounds=3)
    assert np.abs(seen["c0", 3]["weight"] - seen["c4", 3]["weight"]).max() > 0.0
    for number, replies in enumerate(shown, 1):
        for reply in replies:
            own = seen[reply.client, number]
            away = [reply.arrays[n] - own[n].astype(float) for n in own if n != "batches"]
            norm = np.sqrt(sum((one**2).sum() for one in away))
            assert norm == pytest.approx(0.01, rel=0.1)  # "half" has three digits


def test_each_architecture_has_a_hypernetwork_of_its_own():
    kinds = ("small", "large", "small", "large", "large")
    strategy = strategy_of("pfedhn", SMALL, architectures=("small", "large"))
    both = joined({"small": model(), "large": larger()})
    result = start(strategy, Toy(architectures=kinds), rounds=2, arrays=both)
    state = strategy._state
    assert list(state["small"]["clients"]) == ["partition-0", "partition-2"]
    assert list(state["large"]["clients"]) == ["partition-1", "partition-3", "partition-4"]
    found = part_of(from_record(result.arrays), "large")
    assert not np.array_equal(found["body"], larger()["body"])


# --- runs -----------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_same_personal_models(tmp_path: Path):
    def sent_after(**more) -> dict:
        return seen_by(5, **more)[1]

    whole = sent_after()
    start(
        strategy_of("pfedhn", SMALL, checkpoints=Checkpoints(tmp_path)), Toy(roles=ROLES), rounds=3
    )
    later = sent_after(checkpoints=Checkpoints(tmp_path, resume=True))
    assert {number for _, number in later} == {4, 5}
    for place, held in later.items():
        assert all(held[name].tobytes() == value.tobytes() for name, value in whole[place].items())


def test_another_size_is_not_resumed(tmp_path: Path):
    start(strategy_of("pfedhn", SMALL, checkpoints=Checkpoints(tmp_path)), Toy(), rounds=1)
    other = {**SMALL, "embedding-size": 4}
    resumed = strategy_of("pfedhn", other, checkpoints=Checkpoints(tmp_path, resume=True))
    with pytest.raises(ConfigError, match="embedding_size = 3, this run 4"):
        start(resumed, Toy(), rounds=2)


DIGITS = {"num-clients": 10, "device": "cpu", "eval-steps": "1,5", "clients-per-round": 8}


def run_digits(rounds: int, **keys):
    config = RunConfig.read({**DIGITS, **keys})
    initial = {name: value.numpy() for name, value in built_model(config).state_dict().items()}
    grid = CohortGrid(our_clients, num_nodes=10, run_config=config.to_flower())
    recipe = STRATEGIES[config.strategy](config)
    bounds = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
    strategy = recipe.strategy(eval_every=0, **bounds, **server_parts(config))
    return strategy.start(grid, to_record(initial), num_rounds=rounds, timeout=60)


def mean_of(scores, metric: str) -> float:
    return float(np.mean([score.metrics[metric] for score in scores]))


def test_clients_whose_labels_mean_other_things_get_models_that_no_common_one_can_be():
    """Chance is a fifth, and what FedAvg's model reaches before it is fine-tuned."""
    result = run_digits(40, strategy="pfedhn", **{"local-epochs": 5})
    assert mean_of(result.trained, "accuracy-before") > 0.6


def test_a_new_client_that_fits_its_embedding_gets_better():
    keys = {"hypernetwork-adapts": "embedding", "local-epochs": 5, "inner-lr": 0.1}
    result = run_digits(40, strategy="pfedhn", **keys)
    before, after = (mean_of(result.unseen, f"loss-{when}") for when in ("before", "after-5"))
    assert after < before
    assert mean_of(result.trained, "accuracy-before") > 0.6


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"embedding_size": 0}, "embedding_size = 0"),
        ({"width": 0}, "width = 0"),
        ({"adapts": "modle"}, "did you mean 'model'"),
        ({"lr": 0.0}, "lr = 0.0"),
        ({"optimizer": "adm"}, "did you mean 'adam'"),
        ({"weighting": "exmaples"}, "did you mean 'examples'"),
    ],
)
def test_an_argument_out_of_range_is_refused_by_name(wrong: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        PFedHN(**wrong)


def test_user_level_privacy_is_refused():
    privacy = UserLevelPrivacy(
        noise_multiplier=1.0, max_update_norm=1.0, expected_clients=2, target_delta=1e-5
    )
    with pytest.raises(ConfigError, match="each embedding is moved by one client alone"):
        strategy_of("pfedhn", user_privacy=privacy)


def test_keys_without_effect_are_told():
    keys = {**SMALL, "hypernetwork-adapts": "embedding", "outer-lr": 0.1, "local-epochs": 2}
    assert idle_keys(RunConfig.read({"strategy": "pfedhn", **keys})) == []
    idle = idle_keys(RunConfig.read({"strategy": "pfedhn", "split": "fixed"}))
    assert idle == ["split"]
