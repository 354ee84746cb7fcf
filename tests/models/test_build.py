"""Models by name: what is refused, and how a user adds one."""

import doctest
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import metabloom.models
from metabloom.errors import ConfigError, ModelError
from metabloom.models import MODELS, build_model, check_model, head_names, register_model


@pytest.fixture
def own_names(monkeypatch):
    """Names that a test registers are gone after it."""
    monkeypatch.setattr(MODELS, "_entries", dict(MODELS._entries))


def test_the_registry_names_are_those_of_the_documentation():
    names = {"mlp", "conv4", "cnn", "resnet18", "mobilenet-v3-small", "char-lstm"}
    assert names <= set(MODELS)


def test_an_unknown_model_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown model 'conv5': did you mean 'conv4'\?"):
        build_model("conv5", input_shape=(1, 8, 8), num_classes=2, seed=0)


def test_an_unknown_option_is_refused_with_its_value_the_nearest_and_the_known():
    with pytest.raises(ConfigError) as caught:
        build_model("mlp", input_shape=(4,), num_classes=2, seed=0, hiden=64)
    assert str(caught.value) == (
        "model 'mlp' has no option hiden (= 64): did you mean 'hidden'? "
        "Its options: activation, hidden"
    )


def test_an_option_of_a_model_that_has_none_is_refused():
    with pytest.raises(ConfigError, match=r"\(= 3\): It has no options"):
        build_model("resnet18", input_shape=(1, 8, 8), num_classes=2, seed=0, width=3)


@pytest.mark.parametrize(
    ("name", "shape", "option", "value"),
    [
        ("mlp", (4,), "hidden", 0),
        ("mlp", (4,), "hidden", "abc"),
        ("mlp", (4,), "hidden", "64,,64"),
        ("mlp", (4,), "hidden", "64,-1"),
        ("mlp", (4,), "hidden", ()),
        ("mlp", (4,), "hidden", True),
        ("mlp", (4,), "hidden", 1.5),
        ("mlp", (4,), "activation", "rellu"),
        ("mlp", (4,), "activation", 3),
        ("conv4", (1, 8, 8), "width", -1),
        ("conv4", (1, 8, 8), "width", float("nan")),
        ("cnn", (1, 8, 8), "dense", "wide"),
        ("char-lstm", (8,), "embedding", 0),
        ("char-lstm", (8,), "hidden", "64,64"),
        ("char-lstm", (8,), "layers", 3),
    ],
)
def test_a_bad_value_is_refused_with_its_option_and_the_known(name, shape, option, value):
    with pytest.raises(ConfigError) as caught:
        build_model(name, input_shape=shape, num_classes=2, seed=0, **{option: value})
    message = str(caught.value)
    assert f"model {name!r}" in message
    assert f"option {option}" in message
    assert str(value) in message
    assert "Its options: " in message


@pytest.mark.parametrize("shape", [(), (0,), (1, -2), (1.5,), (True,), "28", 28])
def test_an_input_shape_that_is_no_shape_is_refused(shape):
    with pytest.raises(ModelError, match="input_shape"):
        build_model("mlp", input_shape=shape, num_classes=2, seed=0)


@pytest.mark.parametrize("classes", [0, -1, 2.0, None, True])
def test_a_number_of_classes_that_is_no_count_is_refused(classes):
    with pytest.raises(ModelError, match="num_classes"):
        build_model("mlp", input_shape=(3,), num_classes=classes, seed=0)


@pytest.mark.usefixtures("own_names")
def test_a_user_s_own_module_registers_and_builds():
    @register_model("two-layer")
    class TwoLayer(nn.Module):
        def __init__(self, input_shape, num_classes, width=8):
            super().__init__()
            self.inner = nn.Linear(input_shape[0], width)
            self.outer = nn.Linear(width, num_classes)

        def forward(self, x):
            return self.outer(self.inner(x).tanh())

    model = build_model("two-layer", input_shape=(4,), num_classes=3, seed=0, width=5)
    check_model(model, input_shape=(4,), num_classes=3)
    assert head_names(model) == {"outer.weight", "outer.bias"}
    assert model.inner.out_features == 5
    with pytest.raises(ConfigError, match="has no option depth"):
        build_model("two-layer", input_shape=(4,), num_classes=3, seed=0, depth=2)


@pytest.mark.usefixtures("own_names")
def test_a_builder_may_take_any_option():
    @register_model("open")
    def build(input_shape, num_classes, **options):
        return nn.Linear(input_shape[0], num_classes, **options)

    model = build_model("open", input_shape=(4,), num_classes=3, seed=0, bias=False)
    assert model.bias is None


@pytest.mark.usefixtures("own_names")
def test_a_builder_that_returns_no_module_is_refused():
    register_model("nothing")(lambda input_shape, num_classes: None)
    with pytest.raises(ModelError, match="'nothing' returned NoneType"):
        build_model("nothing", input_shape=(4,), num_classes=3, seed=0)


@pytest.mark.usefixtures("own_names")
def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ConfigError, match="'mlp' is registered twice"):
        register_model("mlp")(nn.Linear)


@pytest.mark.usefixtures("own_names")
def test_a_builder_that_fails_leaves_the_global_random_state():
    @register_model("failing")
    def build(input_shape, num_classes):
        torch.rand(3)
        raise RuntimeError("no")

    before = torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match="no"):
        build_model("failing", input_shape=(4,), num_classes=3, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


MODULES = [found.name for found in pkgutil.iter_modules(metabloom.models.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_are_true(name):
    module = importlib.import_module(f"metabloom.models.{name}")
    assert doctest.testmod(module).failed == 0
