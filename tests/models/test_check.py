"""The safety check refuses what breaks gradients, privacy or the wire, and changes nothing."""

import copy
import warnings

import pytest
import torch
from torch import nn

from metabloom.errors import ModelError
from metabloom.models import build_model, check_model, head_names


def refusal(model, *, input_shape=(4,), num_classes=2, **more):
    with pytest.raises(ModelError) as caught:
        check_model(model, input_shape=input_shape, num_classes=num_classes, **more)
    return caught.value


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(2),
        nn.BatchNorm2d(2, affine=False),
        nn.SyncBatchNorm(2),
        nn.BatchNorm2d(2, track_running_stats=False),
    ],
    ids=["plain", "no-affine", "sync", "no-statistics"],
)
def test_batch_norm_is_refused_by_the_name_of_its_layer(norm):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(norm), Mean())
    message = str(refusal(model, input_shape=(1, 8, 8)))
    assert "layer '1.0'" in message
    assert type(norm).__name__ in message
    assert "GroupNorm" in message
    assert "ModuleValidator.fix" in message


def test_instance_norm_is_refused_where_it_keeps_statistics_and_only_there():
    def model(keep):
        return nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2, track_running_stats=keep), Mean()
        )

    check_model(model(False), input_shape=(1, 8, 8), num_classes=2)
    message = str(refusal(model(True), input_shape=(1, 8, 8)))
    assert "layer '1' is InstanceNorm2d with track_running_stats=True" in message


class OwnStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running", torch.ones(4))
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        if self.training:
            self.running.mul_(0.9).add_(0.1 * x.mean(0))
        return self.layer(x - self.running)


def test_statistics_that_a_forward_pass_changes_are_refused_even_in_evaluation_mode():
    model = OwnStatistics().eval()
    assert "changes its buffer 'running'" in str(refusal(model))
    assert torch.equal(model.running, torch.ones(4))


def test_a_buffer_that_stays_is_accepted():
    model = nn.Sequential(nn.Linear(4, 2))
    model.register_buffer("constant", torch.ones(3))
    check_model(model, input_shape=(4,), num_classes=2)


@pytest.mark.parametrize("layer", [nn.LSTM(4, 2), nn.GRU(4, 2), nn.RNN(4, 2)])
def test_a_fused_recurrent_layer_is_refused_with_its_replacements(layer):
    model = nn.ModuleDict({"rnn": layer, "head": nn.Linear(2, 2)})
    message = str(refusal(model))
    assert f"layer 'rnn' is {type(layer).__name__}" in message
    assert "char-lstm" in message
    assert "DPLSTM" in message


def test_a_model_that_is_itself_a_bad_layer_is_refused():
    assert "layer 'of the model'" not in str(refusal(nn.LSTM(4, 2)))
    assert "the model is LSTM" in str(refusal(nn.LSTM(4, 2)))


def test_a_wrong_number_of_classes_is_refused_with_both_shapes():
    message = str(refusal(nn.Linear(4, 3), num_classes=10))
    assert "shape (2, 3)" in message
    assert "(2, 10)" in message
    assert "num_classes = 10" in message


@pytest.mark.parametrize("bad", [lambda y: y[0], lambda y: y.sum(1), lambda y: y[:, :, None]])
def test_an_output_that_is_no_row_for_each_record_is_refused(bad):
    class Wrong(nn.Linear):
        def forward(self, x):
            return bad(super().forward(x))

    assert "Wrong returned shape" in str(refusal(Wrong(4, 2)))


def test_an_output_that_is_no_tensor_is_refused():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    assert "Pair returned tuple" in str(refusal(Pair(4, 2)))


def test_a_forward_pass_that_raises_is_refused_with_its_cause():
    error = refusal(nn.Linear(5, 2))
    assert "Linear fails on 2 records of shape (4,) and dtype torch.float32" in str(error)
    assert isinstance(error.__cause__, RuntimeError)


def test_records_of_a_wrong_dtype_are_refused():
    model = build_model("char-lstm", input_shape=(4,), num_classes=2, seed=0)
    check_model(model, input_shape=(4,), num_classes=2, input_dtype=torch.int64)
    assert "torch.float32" in str(refusal(model))


def test_tied_parameters_are_refused_by_both_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    message = str(refusal(model, num_classes=4))
    assert "'0.weight' and '2.weight' share their memory" in message


def test_two_parameters_on_one_storage_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.detach().t())
    assert "share their memory" in str(refusal(model, num_classes=4))


def test_a_model_without_trainable_parameters_is_refused():
    frozen = nn.Linear(4, 2).requires_grad_(False)
    assert "Linear has no trainable parameter" in str(refusal(frozen))
    assert "Flatten has no trainable parameter" in str(refusal(nn.Flatten()))


def test_a_lazy_model_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some torch versions call lazy modules experimental
        model = nn.LazyLinear(2)
    assert "'weight' is lazy" in str(refusal(model))


def test_a_model_that_cannot_be_copied_is_refused():
    model = nn.Linear(4, 2)
    model.kept = model(torch.ones(3, 4))  # a computed tensor
    assert "Linear cannot be copied" in str(refusal(model))


def test_a_model_that_opacus_has_hooked_is_refused():
    from opacus import GradSampleModule

    assert "with Opacus' hooks on it" in str(refusal(GradSampleModule(nn.Linear(4, 2))))


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.drop = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.layer(self.drop(x))


@pytest.mark.parametrize("training", [True, False])
def test_the_check_changes_neither_the_model_nor_the_global_random_state(training):
    model = Remembers().train(training)
    before, random_state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    check_model(model, input_shape=(4,), num_classes=2)
    assert model.calls == 0
    assert [module.training for module in model.modules()] == [training] * 3
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert all(value.grad is None for value in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_partly_frozen_models_and_half_precision_are_accepted():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).bfloat16()
    model[0].requires_grad_(False)
    check_model(model, input_shape=(4,), num_classes=2, input_dtype=torch.bfloat16)


def test_a_model_of_one_layer_has_no_head():
    with pytest.raises(ModelError, match="has 1 layers with parameters"):
        head_names(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    with pytest.raises(ModelError, match="has 0 layers"):
        head_names(nn.Flatten())


def test_the_head_of_a_parametrised_layer_is_all_of_it():
    model = nn.Sequential(nn.Linear(4, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    assert head_names(model) == {name for name, _ in model.named_parameters() if name[0] == "1"}
    assert len(head_names(model)) == 3


def test_the_head_of_a_net_of_bare_parameters_is_refused():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 2))
            self.b = nn.Parameter(torch.ones(2))

    with pytest.raises(ModelError, match="Bare has 1 layers"):
        head_names(Bare())
