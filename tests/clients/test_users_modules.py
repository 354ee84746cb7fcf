"""Modules and data as users have them: dropout, frozen layers, regression, too few classes."""

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from torch import nn

from metabloom.clients import ClientData, MAMLClient, SGDClient
from metabloom.clients.batches import resplit
from metabloom.clients.maml import _fresh
from metabloom.errors import ConfigError, DataError, ModelError


def records(n: int, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 4, generator=generator), torch.arange(n) % classes


DATA = ClientData(records(9), records(12))
CLIENTS = pytest.mark.parametrize("make", [MAMLClient, SGDClient])


def net(*, dropout: float = 0.0, classes: int = 3) -> nn.Sequential:
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, classes)]
    return nn.Sequential(*layers)


def arrays(model: nn.Module) -> list[np.ndarray]:
    return [value.detach().numpy() for value in model.state_dict().values()]


@CLIENTS
def test_dropout_draws_from_the_clients_stream_in_training_and_not_at_all_in_evaluation(make):
    model = net(dropout=0.5)
    client = make(model, DATA, name="a")
    first, again, other_round = (
        client.fit(arrays(model), {"server-round": number})[0] for number in (1, 1, 2)
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other_round, strict=True))
    before = torch.get_rng_state()
    losses = {make(model, DATA).evaluate(arrays(model), {})[0] for _ in range(3)}
    assert len(losses) == 1
    assert torch.equal(before, torch.get_rng_state())
    assert model.training  # the user's module is as it was


def test_hessian_free_meta_gradients_refuse_dropout_which_draws_a_mask_for_each_gradient():
    with pytest.raises(ConfigError, match=r"order = 'hf'.*dropout"):
        MAMLClient(net(dropout=0.5), DATA, order="hf")
    MAMLClient(net(dropout=0.0), DATA, order="hf")


@CLIENTS
def test_frozen_parameters_stay_as_they_are_received_and_the_others_train(make):
    model = net()
    model[0].requires_grad_(False)
    sent = [value + 0.25 for value in arrays(model)]
    reply, _, _ = make(model, DATA).fit(sent, {})
    assert np.array_equal(reply[0], sent[0])
    assert np.array_equal(reply[1], sent[1])
    assert not np.array_equal(reply[2], sent[2])


def test_training_uses_the_frozen_values_that_were_received_not_the_modules_own():
    model = net()
    model[0].requires_grad_(False)
    sent = [np.zeros_like(value) if i < 2 else value for i, value in enumerate(arrays(model))]
    reply, _, _ = SGDClient(model, DATA).fit(sent, {})
    assert np.array_equal(reply[2], sent[2])  # features are all 0: the head's weights cannot move


@CLIENTS
def test_regression_reports_losses_and_no_accuracy(make):
    model = nn.Linear(4, 1)
    x, _ = records(6)
    data = ClientData((x, x.sum(1, keepdim=True)), (x, x.sum(1, keepdim=True)))
    client = make(model, data, loss_fn=nn.functional.mse_loss)
    _, _, metrics = client.evaluate(arrays(model), {})
    assert sorted(metrics) == ["loss-after-1", "loss-after-5", "loss-before"]


@CLIENTS
def test_a_model_with_too_few_outputs_for_the_classes_is_named_with_both_numbers(make):
    model = net(classes=2)
    with pytest.raises(ModelError, match=r"shape \(\d+, 2\), the largest target is 2"):
        make(model, DATA).fit(arrays(model), {})


@CLIENTS
def test_batch_norm_is_refused_by_layer_with_the_remedy(make):
    with pytest.raises(ModelError, match=r"layer '1' is BatchNorm1d.*GroupNorm"):
        make(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), DATA)


def test_an_empty_query_set_is_refused_where_it_is_scored():
    empty = ClientData(records(6), (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)))
    with pytest.raises(DataError, match="no records to score"):
        SGDClient(net(), empty).evaluate(arrays(net()), {})


def test_a_client_without_a_name_takes_its_partitions_and_so_a_stream_of_its_own():
    def client(partition: int) -> SGDClient:
        context = Context(1, 77, {"partition-id": partition}, RecordDict(), {})
        return SGDClient(net(), DATA, context=context, batch_size=4)

    def order(of: SGDClient) -> list[int]:
        return torch.randperm(50, generator=of.stream("sgd", {})).tolist()

    assert order(client(1)) == order(client(1)) != order(client(2))


def test_data_with_a_fixed_split_are_never_mixed_and_others_are():
    generator = torch.Generator().manual_seed(0)
    fixed = ClientData(records(9), records(12), fixed_split=True)
    assert torch.equal(_fresh(fixed, 0, generator).support[0], fixed.support[0])
    assert not torch.equal(_fresh(DATA, 0, generator).support[0], DATA.support[0])


def test_a_fresh_split_of_targets_that_are_no_classes_is_refused_with_the_remedy():
    x, _ = records(6)
    data = ClientData((x, x.sum(1)), (x, x.sum(1)))
    with pytest.raises(DataError, match="use split='fixed'"):
        resplit(data, generator=torch.Generator())


def test_dittos_adaptation_moves_only_what_adapt_selects():
    context = Context(1, 1, {}, RecordDict(), {})
    client = SGDClient(
        net(), DATA, ditto_lambda=0.1, context=context, adapt=lambda name: name.startswith("3.")
    )
    params = client.load(arrays(net()))
    start, advance = client.adaptation(params)
    moved = advance(start, 2)
    assert {name for name in params if not torch.equal(moved[name], params[name])} == {
        "3.weight",
        "3.bias",
    }
