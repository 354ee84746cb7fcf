"""A client that trains and uses a generator: against plain autograd, and that it does learn."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from metabloom.clients import (
    ClientData,
    GeneratorClient,
    MetaBatch,
    PrivacyConfig,
    generator_update,
    run_update,
)
from metabloom.clients.evaluation import score
from metabloom.errors import ConfigError, DataError
from metabloom.models import GeneratedModel
from metabloom.models.hypernetworks import generated, with_generator
from metabloom.streams import torch_seeded
from tests.clients.cohorts import CONFIG, SIZES, TOLERANCE, away, data_of, distance, one_by_one
from tests.clients.small_clients import arrays_of, same
from tests.clients.toy_problems import client_data, initialised, loss_at, records, weights
from tests.models.test_hypernetworks import small_model

CROSS_ENTROPY = nn.functional.cross_entropy
KINDS = {
    "whole sets": {"split": "fixed", "local_steps": 2},
    "batches": {"split": "fresh", "batch_size": 2, "local_steps": 3},
}


def client(**options) -> GeneratorClient:
    model = options.pop("model", None) or small_model()
    data = options.pop("data", None) or client_data(dtype=torch.float64)
    return GeneratorClient(model, data, **{"name": "anna", "split": "fixed"} | options)


# --- training -------------------------------------------------------------------------------------


def test_local_steps_are_gradient_steps_on_the_query_loss():
    model, batches = small_model(), [MetaBatch(records(5, s), records(4, 9 + s)) for s in range(3)]
    found = run_update(generator_update(model, CROSS_ENTROPY, lr=0.3), weights(model), batches)
    twin, losses = copy.deepcopy(model), []
    for batch in batches:  # the oracle: torch's own SGD on the module itself
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.3)
        base = dict(twin.base.named_parameters())
        made = twin.generator(*batch.support, base)
        loss = loss_at(twin.base, CROSS_ENTROPY, made, batch.query)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, value in twin.named_parameters():
        torch.testing.assert_close(found.params[name], value.detach(), rtol=1e-10, atol=1e-13)
    assert found.metrics["query-loss"] == pytest.approx(np.mean(losses))


def test_nothing_that_is_given_is_changed():
    model, batch = small_model(), MetaBatch(records(5, 1), records(4, 2))
    before, params = weights(model), weights(model)
    kept = {name: value.clone() for name, value in params.items()}
    run_update(generator_update(model, CROSS_ENTROPY, lr=0.3), params, [batch])
    for name, value in weights(model).items():
        assert torch.equal(value, before[name])
        assert torch.equal(params[name], kept[name])


def test_a_reply_holds_the_arrays_that_were_sent_and_nothing_of_the_data():
    """With a rate of almost nothing the update is none: no summary of the records travels."""
    own = client(local_lr=1e-300)
    sent = own.get_parameters({})
    reply, count, metrics = own.fit(sent, CONFIG)
    assert same(reply, sent)
    assert count == own.records.num_examples
    assert list(metrics) == ["query-loss"]


def test_a_fresh_split_is_another_one_each_step_and_round_and_keeps_the_classes():
    own = client(split="fresh", local_steps=3, batch_size=2)
    taken = [
        batch
        for number in (1, 2)
        for batch in own.training(weights(own.model), {"server-round": number}).batches(own.data)
    ]
    assert len({batch.support[0].numpy().tobytes() for batch in taken}) == 6
    for batch in taken:
        assert sorted(batch.support[1].tolist()) == sorted(own.data.support[1].tolist())
        assert len(batch.query[1]) == 2  # the support is whole whatever the size of a batch


def test_data_that_must_not_be_mixed_keep_their_split():
    data = ClientData(records(4, 1), records(4, 2), fixed_split=True)
    own = client(split="fresh", data=data)
    (batch,) = own.training(weights(own.model), CONFIG).batches(data)
    assert torch.equal(batch.support[0], data.support[0])


# --- evaluation -----------------------------------------------------------------------------------


def test_the_curve_is_base_then_one_forward_pass_then_gradient_steps():
    model = small_model()
    own = client(model=model, eval_steps=(1, 3), inner_lr=0.2)
    _, count, curve = own.evaluate(arrays_of(model), CONFIG)
    data, at = own.data, weights(model)
    base_loss, base_accuracy = score(model, CROSS_ENTROPY, at, data.query)
    assert (curve["loss-before"], curve["accuracy-before"]) == (base_loss, base_accuracy)
    made = generated(model, at, data.support)
    assert curve["loss-after-1"] == score(model, CROSS_ENTROPY, made, data.query)[0]
    net = copy.deepcopy(model.base)
    net.load_state_dict({n.removeprefix("base."): v for n, v in made.items() if "base." in n})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    for _ in range(2):
        optimizer.zero_grad()
        CROSS_ENTROPY(net(data.support[0]), data.support[1]).backward()
        optimizer.step()
    wanted = CROSS_ENTROPY(net(data.query[0]), data.query[1]).item()
    assert curve["loss-after-3"] == pytest.approx(wanted, rel=1e-10)
    assert count == len(data.query[1])
    losses = {curve[f"loss-{when}"] for when in ("before", "after-1", "after-3")}
    assert len(losses) == 3


def test_adaptation_never_sees_the_query():
    model, data = small_model(), client_data(dtype=torch.float64)
    other = ClientData(data.support, records(5, 77))
    adapted = []
    for one in (data, other):
        start, advance = client(model=model, data=one).adaptation(weights(model), CONFIG)
        adapted.append(advance(advance(start, 1), 2))
    for name, value in adapted[0].items():
        assert torch.equal(value, adapted[1][name])


def test_gradient_steps_move_what_adapt_names_of_the_base_alone():
    model = small_model()
    own = client(model=model, adapt=lambda name: "head" in name)
    start, advance = own.adaptation(weights(model), CONFIG)
    once = advance(start, 1)
    twice = advance(once, 1)
    changed = {name for name in once if not torch.equal(once[name], twice[name])}
    assert changed == {"base.head.weight", "base.head.bias"}


# --- kernels --------------------------------------------------------------------------------------


def ragged(kind: str, dtype: torch.dtype = torch.float64, **options) -> list[GeneratorClient]:
    """Return clients with support and query sets of many sizes, which share a model."""
    model = small_model().to(dtype)
    return [
        GeneratorClient(model, data_of(size, seed, dtype), name=str(seed), **KINDS[kind], **options)
        for seed, size in enumerate(SIZES)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_a_ragged_cohort_equals_its_clients_one_by_one(kind: str, dtype: torch.dtype):
    """Support sets of other sizes are padded: what is added has no share in the summary."""
    assert distance(ragged(kind, dtype)) < TOLERANCE[dtype]


def test_a_compiled_step_equals_the_eager_one():
    eager, fast = ragged("whole sets"), ragged("whole sets", kernel="compiled")
    sent = eager[0].get_parameters({})
    assert away(one_by_one(fast), one_by_one(eager), sent) < TOLERANCE[torch.float64]


# --- it learns ------------------------------------------------------------------------------------


def blobs(seed: int, shots: int = 4) -> ClientData:
    """Three clouds whose names are permuted: the same for no two clients, so a guess is a third."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0]])
    names = torch.randperm(3, generator=draw)
    rows = torch.arange(12 * shots) % 3
    inputs = centres[rows] + 0.7 * torch.randn(len(rows), 3, generator=draw)
    targets, cut = names[rows], 3 * shots
    return ClientData((inputs[:cut], targets[:cut]), (inputs[cut:], targets[cut:]))


def test_a_trained_generator_adapts_to_clients_that_it_has_never_seen():
    def build(outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, outputs))

    with torch_seeded(0, "test"):
        model = with_generator(
            build(3), build=build, num_classes=3, input_dtype=torch.float32, width=32
        )
    own = [
        GeneratorClient(model, blobs(seed), split="fixed", local_lr=1.0, name=str(seed))
        for seed in range(20)
    ]
    arrays = arrays_of(model)
    moments: list[torch.Tensor] = [torch.from_numpy(value.copy()) for value in arrays]
    optimizer = torch.optim.Adam([one.requires_grad_() for one in moments], lr=0.01)
    for number in range(60):
        replies = [one.fit(arrays, {"server-round": number})[0] for one in own[:10]]
        for value, sent, *answers in zip(moments, arrays, *replies, strict=True):
            value.grad = torch.from_numpy(sent - np.mean(answers, axis=0))
        optimizer.step()
        arrays = [value.detach().numpy().copy() for value in moments]
    curves = [one.evaluate(arrays, CONFIG)[2] for one in own[10:]]  # their labels are permuted too
    before, after = (
        np.mean([curve[f"accuracy-{when}"] for curve in curves]) for when in ("before", "after-1")
    )
    assert after - before > 0.3


# --- what is refused ------------------------------------------------------------------------------


def test_private_training_is_refused():
    privacy = PrivacyConfig(
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sample_rate=0.1,
        target_epsilon=8,
        target_delta=1e-5,
    )
    with pytest.raises(ConfigError, match="no record has a gradient of its own"):
        client(privacy=privacy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_lr": 0.0}, "local_lr = 0.0"),
        ({"local_steps": 0}, "local_steps = 0"),
        ({"split": "independent"}, "split = 'independent'"),
        ({"model": initialised(nn.Linear(3, 3))}, "Linear has no generator"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        client(**options)


@pytest.mark.parametrize(
    ("support", "message"),
    [
        (records(0, 1), "'anna' has no support records"),
        ((records(2, 1)[0], torch.tensor([0, 3])), "from 0 to 3, the generator knows .* 0 to 2"),
        ((records(2, 1)[0], torch.zeros(2, 4)), "targets have 4 numbers, the generator takes 3"),
    ],
)
def test_a_support_set_that_says_nothing_is_refused_by_name(support, message: str):
    own = client(data=ClientData(support, records(3, 2)))
    for ask in (own.fit, own.evaluate):
        with pytest.raises(DataError, match=message):
            ask(arrays_of(own.model), CONFIG)


def test_a_model_with_its_generator_is_one_model_on_the_wire():
    model = small_model()
    assert isinstance(model, GeneratedModel)
    own = client(model=model)
    assert own.array_names == tuple(model.state_dict())
