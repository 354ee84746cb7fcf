"""Which part of a model is its head: by its own word, by name, by number, and where it has none."""

import pytest
import torch
from torch import nn

from metabloom.errors import ConfigError, ModelError
from metabloom.models import build_model, head_names, is_body, is_head


class Named(nn.Module):
    """A model that says what its head is: two layers, registered before its body."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
        self.body = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.head(self.body(x)) * self.scale


HEAD = {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}


def deep():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))


def test_a_model_s_own_word_counts_wherever_its_head_is_registered():
    assert head_names(Named()) == HEAD


@pytest.mark.parametrize("own", [None, "head", nn.ReLU()])
def test_an_attribute_that_holds_no_layers_says_nothing(own):
    model = deep()
    model.head = own
    assert head_names(model) == {"4.weight", "4.bias"}


@pytest.mark.parametrize(
    ("head", "names"),
    [
        ("2", {"2.weight", "2.bias"}),
        ("4.weight", {"4.weight"}),
        ("", {"4.weight", "4.bias"}),
    ],
)
def test_a_digit_is_a_number_of_layers_where_it_is_no_name(head, names):
    if head == "2":  # layers 2 and 4, although one is called "2"
        names = names | {"4.weight", "4.bias"}
    assert head_names(deep(), head) == names


def test_a_name_is_that_of_a_layer_or_of_a_block_and_no_beginning_of_one():
    assert head_names(Named(), "head.2") == {"head.2.weight", "head.2.bias"}
    assert head_names(Named(), "body") == {"body.weight", "body.bias"}
    assert head_names(Named(), "scale") == {"scale"}
    with pytest.raises(ConfigError, match=r"head = 'bod': Named has no layer .* of that name; "):
        head_names(Named(), "bod")


def test_a_wrong_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'head'"):
        is_head(Named(), "heads")


@pytest.mark.parametrize("count", ["0", "3", "12"])
def test_a_number_that_leaves_no_head_or_no_body_is_refused_with_what_there_is(count):
    with pytest.raises(ConfigError, match=f"head = '{count}': .* Sequential has 3"):
        is_head(deep(), count)


def test_a_head_that_is_everything_is_refused():
    only = nn.Sequential(nn.Linear(4, 2))
    for model, head in ((only, "0"), (nn.Sequential(only), "0.0")):
        with pytest.raises((ModelError, ConfigError)):
            is_head(model, head)
    own = nn.Module()
    own.head = nn.Linear(4, 2)
    with pytest.raises(ModelError, match="head = 'head' is all that Module has"):
        is_head(own)


def test_a_model_of_one_layer_cannot_be_told_apart_and_the_error_says_what_to_do():
    with pytest.raises(ModelError, match=r"Linear has 1 layers .* no body beside its head: use"):
        is_head(nn.Linear(4, 2))


@pytest.mark.parametrize("name", ["mlp", "conv4", "cnn", "resnet18", "mobilenet-v3-small"])
def test_head_and_body_are_all_arrays_of_a_model_and_none_twice(name):
    model = build_model(name, input_shape=(1, 16, 16), num_classes=3, seed=0)
    head, body = is_head(model), is_body(model)
    assert head.names | body.names == set(model.state_dict())
    assert not head.names & body.names
    rows = [len(value) for key, value in model.named_parameters() if head(key)]
    assert set(rows) == {3}  # the layer that knows the classes


def test_the_buffers_of_a_layer_go_with_it():
    model = deep()
    model[0].register_buffer("mean", torch.zeros(3))
    model[4].register_buffer("mean", torch.zeros(2))
    assert is_head(model)("4.mean")
    assert is_body(model)("0.mean")


def test_parts_of_equal_models_are_equal_so_that_clients_share_what_is_compiled():
    assert is_head(deep()) == is_head(deep())
    assert hash(is_body(deep())) == hash(is_body(deep()))
    assert is_head(deep()) != is_head(deep(), "2")
