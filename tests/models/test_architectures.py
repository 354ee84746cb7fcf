"""Each model is the one that its paper or its name describes."""

import pytest
import torch
from torch import nn

from metabloom.errors import ModelError
from metabloom.models import CharLSTM, Conv4, FemnistCNN, build_model


def test_an_mlp_of_64_on_15x15_images_has_the_shapes_225_64_5():
    model = build_model("mlp", input_shape=(1, 15, 15), num_classes=5, seed=0, hidden=64)
    shapes = [tuple(value.shape) for value in model.parameters()]
    assert shapes == [(64, 225), (64,), (5, 64), (5,)]


@pytest.mark.parametrize("hidden", ["7,6", (7, 6), [7, 6]])
def test_hidden_widths_come_as_text_or_as_a_sequence(hidden):
    model = build_model("mlp", input_shape=(3,), num_classes=2, seed=0, hidden=hidden)
    assert [len(value) for name, value in model.named_parameters() if "bias" in name] == [7, 6, 2]


def test_the_activation_of_an_mlp_is_the_one_asked_for():
    model = build_model("mlp", input_shape=(3,), num_classes=2, seed=0, activation="tanh")
    assert sum(isinstance(layer, nn.Tanh) for layer in model.modules()) == 1


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 15, 15), (3, 28, 28), (1, 1, 1), (1, 84, 40)])
def test_conv4_takes_images_of_any_size_and_number_of_channels(shape):
    assert Conv4(shape, 5, width=8)(torch.zeros(2, *shape)).shape == (2, 5)


@pytest.mark.parametrize("size", [15, 28])
def test_conv4_still_sees_the_image_behind_its_last_norm(size):
    # One channel a group on a 1x1 map would normalise everything to zero: the logits were constant.
    model = build_model("conv4", input_shape=(1, size, size), num_classes=5, seed=0)
    logits = model(torch.randn(4, 1, size, size, generator=torch.Generator().manual_seed(0)))
    assert logits.std(0).min() > 1e-2


def test_cnn_has_as_many_parameters_as_leaf_says():
    # 25*32+32 + 25*32*64+64 + 7*7*64*2048+2048 + 2048*62+62
    assert sum(value.numel() for value in FemnistCNN((1, 28, 28), 62).parameters()) == 6_603_710


def test_char_lstm_equals_torch_s_own_lstm():
    model = CharLSTM((6,), 9, embedding=3, hidden=4, layers=2).double()
    fused = nn.LSTM(3, 4, num_layers=2, batch_first=True, dtype=torch.float64)
    for number, layer in enumerate(model.body):
        own = {
            "weight_ih": layer.from_input.weight,
            "bias_ih": layer.from_input.bias,
            "weight_hh": layer.from_state.weight,
            "bias_hh": torch.zeros(16),
        }
        for key, value in own.items():
            getattr(fused, f"{key}_l{number}").data.copy_(value)
    characters = torch.randint(9, (5, 6), generator=torch.Generator().manual_seed(0))
    states, _ = fused(model.embedding(characters))
    # float64: the same sums in another order
    torch.testing.assert_close(model(characters), model.head(states[:, -1]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet-v3-small"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_torchvision_nets_take_any_number_of_channels(name, channels):
    model = build_model(name, input_shape=(channels, 20, 24), num_classes=7, seed=0)
    assert model(torch.zeros(2, channels, 20, 24)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet-v3-small"])
def test_torchvision_nets_keep_torchvision_s_names_and_shapes(name):
    import torchvision

    own = build_model(name, input_shape=(3, 32, 32), num_classes=10, seed=0)
    original = getattr(torchvision.models, name.replace("-", "_"))(num_classes=10)
    assert {key: value.shape for key, value in own.named_parameters()} == {
        key: value.shape for key, value in original.named_parameters()
    }


@pytest.mark.parametrize("name", ["resnet18", "mobilenet-v3-small"])
def test_torchvision_nets_compute_what_torchvision_s_do_with_the_same_norm(name):
    import torchvision

    from metabloom.models._norm import group_norm

    own = build_model(name, input_shape=(3, 32, 32), num_classes=4, seed=0)
    net = getattr(torchvision.models, name.replace("-", "_"))
    original = net(num_classes=4, norm_layer=group_norm).eval()  # eval: its dropout is off
    original.load_state_dict(own.state_dict())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    # float32: (x + 3) / 6 rounds otherwise than torch's own hard sigmoid
    torch.testing.assert_close(own(images), original(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("conv4", (15,)), ("cnn", (1, 3, 9)), ("resnet18", (8, 8)), ("char-lstm", (1, 8, 8))],
)
def test_a_shape_that_a_model_cannot_take_is_refused_by_name(name, shape):
    with pytest.raises(ModelError, match=rf"model {name} got input_shape \({shape[0]},"):
        build_model(name, input_shape=shape, num_classes=3, seed=0)
