"""One client's step, compiled: equal to the eager loop, for any sizes, with few compilations."""

import functools

import pytest
import torch
from torch import nn

from metabloom.clients import ClientData, SGDClient, kernel, training
from metabloom.errors import ConfigError, ModelError
from tests.clients.cohorts import TOLERANCE, away, one_by_one, ragged
from tests.clients.small_clients import same
from tests.clients.toy_problems import initialised, records, small_net

COMPILE = torch.compile


@pytest.fixture(autouse=True)
def _nothing_compiled_yet(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(training, "_compilers", training._Compilers())
    monkeypatch.setattr(
        training, "_warn_once", functools.lru_cache(training._warn_once.__wrapped__)
    )
    monkeypatch.setattr(kernel, "_warn_once", functools.lru_cache(kernel._warn_once.__wrapped__))


@pytest.fixture
def warned(monkeypatch):
    said = []
    for module in (training, kernel):
        monkeypatch.setattr(module, "log", lambda level, text, *values: said.append(text % values))
    return said


@pytest.fixture
def graphs(monkeypatch):
    """Take the compiler's front end alone, which costs no C++ compiler; the graphs it makes."""
    made = []

    def note(graph, inputs):
        made.append(graph)
        return graph.forward

    def front_end(function, *, options, **more):
        return COMPILE(function, backend=note, **more)

    monkeypatch.setattr(torch, "compile", front_end)
    return made


def pair(rule, dtype=torch.float64, **options):
    options = {"model": small_net(dtype=dtype), "sizes": (1, 2, 3, 5, 8, 11)} | options
    return ragged(rule, dtype, **options), ragged(rule, dtype, kernel="compiled", **options)


def distance(eager, fast):
    return away(one_by_one(fast), one_by_one(eager), eager[0].get_parameters({}))


@pytest.mark.parametrize(
    ("rule", "dtype"), [("fedprox", torch.float32), ("maml", torch.float64)], ids=str
)
def test_what_is_compiled_equals_the_eager_loop(rule, dtype, warned):
    assert distance(*pair(rule, dtype)) < TOLERANCE[dtype]
    assert not warned


# --- by the front end alone --------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fedavg", "maml-batches", "anil", "first", "hf", "meta-sgd"])
def test_every_rule_is_one_graph_for_sizes_of_a_class(rule, graphs, warned):
    eager, fast = pair(rule, sizes=(4, 5, 8, 11))
    assert distance(eager, fast) < TOLERANCE[torch.float64]
    assert len(graphs) == 1  # no batch has 16 records or more
    assert not warned


def test_large_batches_are_another_class(graphs):
    eager, fast = pair("maml", sizes=(3, 15, 17, 40, 90), split="independent")
    assert distance(eager, fast) < TOLERANCE[torch.float64]
    assert len(graphs) == 2


def test_clients_share_what_is_compiled_for_their_rule(graphs):
    eager, fast = pair("fedavg")
    one_by_one(fast)
    one_by_one(ragged("fedavg", model=eager[0].model, kernel="compiled"))
    assert len(graphs) == 1
    one_by_one(ragged("fedavg", model=eager[0].model, kernel="compiled", local_lr=0.2))
    assert len(graphs) == 2


def test_a_batch_of_one_record_is_not_compiled(graphs):
    eager, fast = pair("fedavg", batch_size=1, sizes=(3, 5))
    for found, wanted in zip(one_by_one(fast), one_by_one(eager), strict=True):
        assert same(found[0], wanted[0])
    assert not graphs


def conv():
    torch_net = nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Tanh(), nn.Linear(4, 3)
    )
    return torch_net.double()


def test_second_derivatives_of_convolutions_are_compiled_for_the_batch_size(graphs, warned):
    options = {"model": conv(), "split": "independent", "batch_size": 4}
    eager, fast = pair("maml", sizes=(1, 2, 5, 7, 8), **options)  # 3 records: no full batch
    whole = one_by_one(eager)
    assert away(one_by_one(fast), whole, eager[0].get_parameters({})) < TOLERANCE[torch.float64]
    assert same(one_by_one(fast)[0][0], whole[0][0])
    assert len(graphs) == 1
    assert not warned


def test_without_a_batch_size_they_are_not_compiled_and_one_warning_says_so(graphs, warned):
    eager, fast = pair("maml", model=conv(), sizes=(2, 4, 5))
    for found, wanted in zip(one_by_one(fast), one_by_one(eager), strict=True):
        assert same(found[0], wanted[0])
    assert not graphs
    (said,) = warned
    assert "second derivatives of convolutions" in said
    assert "set batch-size" in said


def steps_taken(clients, monkeypatch):
    """Return whether each step of each client, by name, was compiled."""
    taken = {}
    step_of = training._Compilers.step_of

    def note(self, asked, state, item):
        step = step_of(self, asked, state, item)
        taken.setdefault(name, []).append(step is not None)
        return step

    with monkeypatch.context() as patch:
        patch.setattr(training, "_compilers", training._Compilers())
        patch.setattr(training._Compilers, "step_of", note)
        for one in clients:
            name = one.name
            one_by_one([one])
    return taken


@pytest.mark.parametrize("batch_size", [0, 4])
@pytest.mark.parametrize("rule", ["fedavg", "maml"])
def test_which_steps_are_compiled_does_not_depend_on_who_came_first(
    rule, batch_size, graphs, monkeypatch
):
    options = {"model": conv(), "sizes": (2, 3, 4, 5, 6, 7, 8), "batch_size": batch_size}
    clients = ragged(rule, kernel="compiled", **options)
    forward = steps_taken(clients, monkeypatch)
    assert forward == steps_taken(clients[::-1], monkeypatch)


class Hidden(nn.Module):
    """Draws random numbers where nobody can see it."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x):
        return self.head(nn.functional.dropout(x, 0.5))


@pytest.mark.parametrize("works", [True, False], ids=["compiled", "without-a-compiler"])
def test_a_client_draws_the_same_numbers_whether_it_came_first_or_not(works, monkeypatch, graphs):
    if not works:
        monkeypatch.setattr(torch, "compile", broken)
    options = {"model": initialised(Hidden()), "sizes": (8, 8), "batch_size": 4}
    eager, clients = pair("fedavg", **options)
    first, second = one_by_one(clients)
    again = one_by_one(clients)
    assert same(first[0], again[0][0])
    assert same(second[0], again[1][0])
    assert same(first[0], one_by_one(eager)[0][0])  # the front end alone draws as the eager loop
    assert bool(graphs) == works


# --- what goes another way ---------------------------------------------------------------------


def broken(function, **options):
    def call(*arguments):
        raise RuntimeError("no C++ compiler was found\nsecond line")

    return call


def test_without_a_compiler_one_warning_is_given_and_the_eager_loop_runs(monkeypatch, warned):
    monkeypatch.setattr(torch, "compile", broken)
    for batch_size in (0, 4):
        eager, fast = pair("fedavg", sizes=(4, 4, 4), batch_size=batch_size)
        for found, wanted in zip(one_by_one(fast), one_by_one(eager), strict=True):
            assert same(found[0], wanted[0])
        (said,) = warned
        assert "RuntimeError: no C++ compiler was found)" in said
        warned.clear()


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_lack_of_memory_is_no_end_of_what_is_compiled(error, monkeypatch, warned):
    calls = []

    def short(function, **options):
        def call(*arguments):
            calls.append(arguments)
            if len(calls) == 1:
                raise error("too much at once")
            return function(*arguments)

        return call

    monkeypatch.setattr(torch, "compile", short)
    double = kernel.compiled(lambda value: 2 * value)
    assert [double(value) for value in (1, 2, 3)] == [2, 4, 6]
    assert len(calls) == 3
    assert not warned


def test_a_model_for_each_client_is_found_to_be_of_no_use(graphs, warned):
    for seed in range(7):
        one_by_one(ragged("fedavg", sizes=(3,), model=small_net(seed), kernel="compiled"))
    assert len(graphs) == training.RULES_FOR_ONE
    (said,) = warned
    assert "build the model once" in said


def test_a_model_that_comes_again_after_many_others_is_compiled(graphs, warned):
    for seed in range(7):
        last = ragged("fedavg", sizes=(3,), model=small_net(seed), kernel="compiled")
        one_by_one(last)
    one_by_one(last)
    assert len(graphs) == training.RULES_FOR_ONE + 1
    one_by_one(ragged("fedavg", sizes=(3,), model=small_net(9), kernel="compiled"))
    assert len(graphs) == training.RULES_FOR_ONE + 2


def test_a_client_that_fails_first_leaves_the_compilation_to_the_next(graphs, warned):
    bad = ClientData((records(3, 0)[0], torch.tensor([0, 1, 7])), records(3, 1))
    model = small_net()
    with pytest.raises(ModelError):
        one_by_one([SGDClient(model, bad, name="bad", kernel="compiled")])
    graphs.clear()
    one_by_one(ragged("fedavg", model=model, sizes=(3, 5), local_lr=0.1, kernel="compiled"))
    assert len(graphs) == 1
    assert not warned


def test_layers_that_draw_random_numbers_run_eagerly(graphs):
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3, dtype=torch.float64))
    eager, fast = pair("fedavg", model=model, sizes=(3, 5))
    for found, wanted in zip(one_by_one(fast), one_by_one(eager), strict=True):
        assert same(found[0], wanted[0])
    assert not graphs


@pytest.mark.parametrize("target", [-1, 7])
def test_a_target_that_is_no_class_is_the_client_s_error_and_no_failure(target, warned):
    inputs = records(4, 0)[0]
    bad = ClientData((inputs, torch.tensor([0, 1, 2, target])), records(3, 1))
    own = SGDClient(small_net(), bad, name="anna", kernel="compiled")
    said = "smallest target is -1" if target < 0 else "largest target is 7"
    with pytest.raises(ModelError, match=said):
        own.fit(own.get_parameters({}), {})
    assert not warned


def test_a_kernel_that_nobody_knows_is_refused():
    with pytest.raises(ConfigError, match="kernel = 'fast': must be one of eager, compiled, vmap"):
        SGDClient(small_net(), records(3, 0), kernel="fast")


def test_functions_of_one_code_do_not_share_their_recompilations(graphs):
    def times(factor):
        return kernel.compiled(lambda value: value * factor)

    ones = [times(factor) for factor in range(20)]  # torch gives up after 8 of one code
    assert [one(torch.ones(1)).item() for one in ones] == list(range(20))
    assert len(graphs) == 20
