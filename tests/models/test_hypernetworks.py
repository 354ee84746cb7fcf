"""Networks that generate parameters, against NumPy, torch's own GRU and finite differences."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from metabloom.errors import ConfigError
from metabloom.models import GeneratedModel, Hypernetwork, build_model
from metabloom.models.hypernetworks import (
    GRU,
    Generator,
    ParameterHead,
    ParameterReader,
    SetEncoder,
    autoregressive,
    generated,
    layers_of,
    with_generator,
)
from metabloom.streams import torch_seeded
from tests.clients.toy_problems import (
    direction,
    dot,
    initialised,
    loss_at,
    moved,
    records,
    slope,
    small_net,
    weights,
)

CROSS_ENTROPY = nn.functional.cross_entropy
SUPPORT, QUERY = records(6, 1), records(5, 2)
WIDTH, LARGEST = 5, 7  # the first layer of ``small_net`` has 16 numbers: three chunks of 6


def small_model(seed: int = 0, *, drawn: bool = True, largest: int = LARGEST) -> GeneratedModel:
    """Return ``small_net`` with a generator; ``drawn``: nothing of it is zero any more."""
    base = small_net(seed)
    shapes = {name: tuple(value.shape) for name, value in base.named_parameters()}
    features = nn.Sequential(nn.Linear(3, WIDTH), nn.Tanh())
    with torch_seeded(seed, "test"):
        generator = Generator(features, shapes, num_classes=3, width=WIDTH, largest=largest)
    model = GeneratedModel(base, generator.double())
    return initialised(model, seed + 10) if drawn else model


# --- known answers --------------------------------------------------------------------------------


def chain_gradient(loop) -> dict[str, float]:
    """Return the gradient of known answer 11: theta_1 = w_1 z, theta_2 = w_2 z + u theta_1."""
    at = {"z": 1.0, "w1": 2.0, "w2": 1.0, "u": 0.5}
    leaf = {name: torch.tensor(value, requires_grad=True) for name, value in at.items()}
    first, second = loop(
        leaf["z"],
        [torch.zeros(()), torch.zeros(())],
        [lambda s: leaf["w1"] * s, lambda s: s],
        [lambda s, theta: leaf["w2"] * s + leaf["u"] * theta],
    )
    found = torch.autograd.grad([first, second], list(leaf.values()), _delta(0.1, 0.2))
    return {name: value.item() for name, value in zip(leaf, found, strict=True)}


def _delta(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(value) for value in values]


def detached(state, base, give, take):
    """A wrong variant: what a layer is to those after it reaches no parameter."""
    made = [base[0] + give[0](state)]
    for layer, one, absorb in zip(base[1:], give[1:], take, strict=True):
        state = absorb(state, made[-1].detach())
        made.append(layer + one(state))
    return made


CHAIN = {"z": 0.6, "w1": 0.2, "w2": 0.2, "u": 0.4}


def test_the_gradient_of_a_layer_reaches_all_that_made_it():
    assert chain_gradient(autoregressive) == pytest.approx(CHAIN)


def test_a_state_that_is_detached_is_found_by_the_known_answer():
    wrong = chain_gradient(detached)
    assert wrong["w1"] == pytest.approx(0.1)
    assert wrong != pytest.approx(CHAIN)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_loop_of_numbers_is_what_is_written_in_the_module(count: int):
    base = [torch.tensor(float(i)) for i in range(count)]
    give = [lambda s, i=i: (i + 1) * s for i in range(count)]
    take = [lambda s, theta, i=i: s / 2 + (i + 1) * theta for i in range(count - 1)]
    state, wanted = 0.7, []
    for i in range(count):
        wanted.append(i + (i + 1) * state)
        state = state / 2 + (i + 1) * wanted[-1]
    found = autoregressive(torch.tensor(0.7), base, give, take)
    assert [one.item() for one in found] == pytest.approx(wanted)


# --- parts ----------------------------------------------------------------------------------------


def test_the_recurrent_unit_is_torchs_own():
    ours, theirs = GRU(WIDTH).double(), nn.GRUCell(WIDTH, WIDTH).double()
    pairs = (("from_input", "ih"), ("from_state", "hh"))
    theirs.load_state_dict(
        {f"{kind}_{b}": getattr(getattr(ours, a), kind) for a, b in pairs for kind in PARTS}
    )
    for seed in range(5):
        state, x = records(2, seed, features=WIDTH)[0]
        torch.testing.assert_close(ours(state, x), theirs(x, state), rtol=1e-12, atol=1e-14)


PARTS = ("weight", "bias")


@pytest.mark.parametrize(("size", "largest", "chunks"), [(10, 4, 3), (12, 4, 3), (4, 4, 1)])
def test_chunks_share_a_matrix_and_have_a_place_each(size: int, largest: int, chunks: int):
    head = initialised(ParameterHead(3, size, largest=largest).double())
    reader = initialised(ParameterReader(3, size, largest=largest).double())
    assert head.places.shape == reader.places.shape == (chunks, 3)
    state = records(1, 4)[0][0]
    found = head(state)
    length = len(head.weight)
    wanted = [
        sum(head.weight[n, d] * state[d] * head.places[j, d] for d in range(3))
        for j in range(chunks)
        for n in range(length)
    ]
    torch.testing.assert_close(found, torch.stack(wanted)[:size], rtol=1e-12, atol=1e-14)
    padded = torch.cat([found, found.new_zeros(chunks * length - size)]).reshape(chunks, length)
    said = [reader.read.weight @ row + reader.read.bias for row in padded]
    mean = sum(one * place for one, place in zip(said, reader.places, strict=True)) / chunks
    torch.testing.assert_close(reader(found), mean, rtol=1e-12, atol=1e-14)


def test_a_head_does_not_grow_with_its_layer_but_for_places():
    small, large = (ParameterHead(8, size, largest=100) for size in (1_000, 100_000))
    assert small.weight.shape == large.weight.shape == (100, 8)
    assert large.places.shape == (1_000, 8)


def encoder(seed: int = 0) -> SetEncoder:
    return initialised(SetEncoder(nn.Linear(3, WIDTH), 3, WIDTH).double(), seed)


def test_a_summary_is_the_mean_of_products_whatever_the_order():
    net, (inputs, targets) = encoder(), SUPPORT
    rows = [net.features(x) * net.classes[y] for x, y in zip(inputs, targets, strict=True)]
    wanted = torch.stack(rows).mean(0)
    torch.testing.assert_close(net(inputs, targets), wanted, rtol=1e-12, atol=1e-14)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    again = net(inputs[order], targets[order])
    torch.testing.assert_close(again, wanted, rtol=1e-12, atol=1e-14)
    swapped = net(inputs, targets.roll(1))
    assert (swapped - wanted).abs().max() > 1e-3  # which record has which class does matter


def test_targets_of_many_columns_are_taken_as_they_are():
    net, (inputs, targets) = encoder(), SUPPORT
    rows = torch.eye(3, dtype=torch.float64)[targets]
    torch.testing.assert_close(net(inputs, rows), net(inputs, targets))


def test_padding_has_no_share_in_a_summary_even_where_it_is_nan():
    net, (inputs, targets) = encoder(), SUPPORT
    lost = torch.full((2, 3), float("nan"), dtype=torch.float64)
    mask = torch.tensor([True] * 6 + [False] * 2)
    padded = net(torch.cat([inputs, lost]), torch.cat([targets, targets[:2]]), mask)
    torch.testing.assert_close(padded, net(inputs, targets), rtol=1e-12, atol=1e-14)


def test_the_parameters_of_one_module_are_a_layer():
    model = build_model("conv4", input_shape=(1, 8, 8), num_classes=3, seed=0, width=8)
    layers = layers_of([name for name, _ in model.named_parameters()])
    owners = [name for name, one in model.named_modules() if one._parameters]
    assert [{name.rpartition(".")[0] for name in layer} for layer in layers] == [
        {owner} for owner in owners
    ]
    assert sum(map(len, layers)) == len(list(model.parameters()))


# --- the generator --------------------------------------------------------------------------------


def by_hand(model: GeneratedModel, support) -> dict[str, np.ndarray]:
    """The oracle: the module's text in NumPy, by loops."""
    at = {name: value.detach().numpy() for name, value in model.named_parameters()}
    own = {n.removeprefix("generator."): value for n, value in at.items()}

    def gates(kind: str, x: np.ndarray) -> list[np.ndarray]:
        return np.split(own[f"gru.{kind}.weight"] @ x + own[f"gru.{kind}.bias"], 3)

    inputs, targets = (value.numpy() for value in support)
    z = np.zeros(WIDTH)
    for x, y in zip(inputs, targets, strict=True):
        weight, bias = (own[f"encoder.features.0.{kind}"] for kind in PARTS)
        z += np.tanh(weight @ x + bias) * own["encoder.classes"][y] / len(targets)
    found, state = {}, z
    for number, layer in enumerate(("body", "head")):
        names = [f"base.{layer}.weight", f"base.{layer}.bias"]
        base = np.concatenate([at[name].ravel() for name in names])
        places, matrix = (own[f"heads.{number}.{kind}"] for kind in ("places", "weight"))
        delta = np.concatenate([matrix @ (state * place) for place in places])[: len(base)]
        theta = base + delta
        rows = at[names[0]].size
        found[names[0]] = theta[:rows].reshape(at[names[0]].shape)
        found[names[1]] = theta[rows:]
        if layer == "body":
            places, weight, bias = (
                own[f"readers.0.{kind}"] for kind in ("places", "read.weight", "read.bias")
            )
            length = weight.shape[1]
            padded = np.append(theta, np.zeros(len(places) * length - len(theta)))
            chunks = padded.reshape(len(places), length)
            said = ((chunks @ weight.T + bias) * places).mean(axis=0)
            (r, u, n), (rs, us, ns) = gates("from_input", said), gates("from_state", state)
            new = np.tanh(n + ns / (1 + np.exp(-r - rs)))
            update = 1 / (1 + np.exp(-u - us))
            state = (1 - update) * new + update * state
    return found


@pytest.mark.parametrize("seed", range(3))
def test_what_is_generated_is_what_loops_in_numpy_give(seed: int):
    model = small_model(seed)
    found = generated(model, weights(model), SUPPORT)
    wanted = by_hand(model, SUPPORT)
    assert list(found) == [name for name, _ in model.named_parameters()]
    for name, value in wanted.items():  # sums of some ten terms in another order
        np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-12, atol=1e-13, err_msg=name)
    moved_away = found["base.head.weight"] - model.base.head.weight
    assert moved_away.abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "shape"), [("mlp", (1, 4, 4)), ("conv4", (1, 8, 8)), ("cnn", (1, 8, 8))]
)
def test_the_first_generated_model_is_the_base_model_to_the_bit(name: str, shape):
    def build(outputs: int) -> nn.Module:
        return build_model(name, input_shape=shape, num_classes=outputs, seed=outputs)

    model = with_generator(
        build(3), build=build, num_classes=3, input_dtype=torch.float32, width=16
    )
    inputs = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    params = weights(model)
    found = generated(model, params, (inputs, torch.tensor([0, 1, 2, 0])))
    for key, value in params.items():
        assert torch.equal(found[key], value), key
    moved_once = {
        k: v + 0.01 * torch.ones_like(v) if "heads" in k else v for k, v in params.items()
    }
    found = generated(model, moved_once, (inputs, torch.tensor([0, 1, 2, 0])))
    for key in params:
        assert torch.equal(found[key], moved_once[key]) != key.startswith("base."), key


def query_loss(model: GeneratedModel, params) -> torch.Tensor:
    return loss_at(model, CROSS_ENTROPY, generated(model, params, SUPPORT), QUERY)


def test_the_gradient_of_a_query_loss_is_its_slope_in_every_part():
    model = small_model()
    params = {name: value.requires_grad_() for name, value in weights(model).items()}
    found = torch.autograd.grad(query_loss(model, params), list(params.values()))
    gradient = dict(zip(params, found, strict=True))
    at = weights(model)
    parts = ("base", "encoder.features", "encoder.classes", "heads", "readers", "gru")
    for part in (*parts, ""):
        own = {name: value for name, value in at.items() if part in name}
        towards = direction(own, 3)
        whole = {name: towards.get(name, torch.zeros_like(value)) for name, value in at.items()}
        with torch.no_grad():
            wanted = slope(lambda h, w=whole: query_loss(model, moved(at, w, h)).item(), 1e-3)
        # The error of five points is some h^4 = 1e-12, and rounding 1e-16 / h.
        assert dot(gradient, whole) == pytest.approx(wanted, rel=1e-7, abs=1e-10), part
        assert max(gradient[name].abs().max() for name in own) > 1e-6, part


def test_several_clients_at_once_are_what_they_are_alone():
    model, params = small_model(), weights(small_model())
    sets = [records(4, seed) for seed in range(3)]
    inputs, targets = (torch.stack(values) for values in zip(*sets, strict=True))
    found = vmap(lambda x, y: generated(model, params, (x, y)))(inputs, targets)
    for i, one in enumerate(sets):
        for name, value in generated(model, params, one).items():
            torch.testing.assert_close(found[name][i], value, rtol=1e-12, atol=1e-14)


def test_called_as_a_model_it_is_its_base():
    model = small_model()
    assert torch.equal(model(QUERY[0]), model.base(QUERY[0]))


def test_parameters_that_do_not_train_are_not_generated():
    base = small_net()
    base.body.weight.requires_grad_(False)
    model = with_generator(
        base, build=lambda n: nn.Linear(3, n), num_classes=3, input_dtype=torch.float64, width=4
    )
    assert list(model.generator.shapes) == ["body.bias", "head.weight", "head.bias"]


def test_characters_are_refused():
    with pytest.raises(ConfigError, match=r"takes images and tables, the records are torch\.int64"):
        with_generator(
            small_net(), build=nn.Identity, num_classes=3, input_dtype=torch.int64, width=4
        )


# --- from an embedding ----------------------------------------------------------------------------

SHAPES = {"body.weight": (4, 3), "body.bias": (4,), "scale": ()}


def network(seed: int = 0, largest: int = 5) -> Hypernetwork:
    made = Hypernetwork(SHAPES, embedding_size=2, width=6, largest=largest)
    return initialised(made.double(), seed)


def test_a_hypernetwork_adds_nothing_at_first():
    fresh = Hypernetwork(SHAPES, embedding_size=2, width=6)
    for name, value in fresh(torch.ones(2)).items():
        assert value.shape == SHAPES[name]
        assert not value.any()


def test_a_hypernetwork_is_a_perceptron_and_a_head_for_each_layer():
    net, v = network(), np.array([0.4, -1.2])
    at = {name: value.detach().numpy() for name, value in net.named_parameters()}
    hidden = v
    for place in (0, 2, 4):
        hidden = np.maximum(at[f"trunk.{place}.weight"] @ hidden + at[f"trunk.{place}.bias"], 0)
    assert hidden.any()
    found = net(torch.from_numpy(v))
    for number, names in enumerate((("body.weight", "body.bias"), ("scale",))):
        matrix, places = at[f"heads.{number}.weight"], at[f"heads.{number}.places"]
        wanted = np.concatenate([matrix @ (hidden * place) for place in places])
        got = np.concatenate([found[name].detach().numpy().ravel() for name in names])
        np.testing.assert_allclose(got, wanted[: len(got)], rtol=1e-12, atol=1e-14)


def test_a_hypernetwork_without_storage_takes_weights_from_elsewhere():
    """Both ends keep its shape alone; weights are arrays of a state or a message."""
    net = network()
    with torch.device("meta"):
        hollow = Hypernetwork(SHAPES, embedding_size=2, width=6, largest=5)
    v = torch.tensor([0.4, -1.2], dtype=torch.float64)
    found = functional_call(hollow, weights(net), (v,))
    for name, value in net(v).items():
        assert torch.equal(found[name], value)
