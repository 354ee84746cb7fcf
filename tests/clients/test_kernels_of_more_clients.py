"""Clients of FedNova, SCAFFOLD and shared parts with compiled steps: equal to the eager loop."""

import functools

import numpy as np
import pytest
import torch

from metabloom.clients import NovaClient, PartClient, ScaffoldClient, kernel, training
from metabloom.wire import NOVA_STEPS
from tests.clients.parts import FEDBABU, FEDPER, FEDREP, LG
from tests.clients.small_clients import arrays_of, client, context, net

COMPILE = torch.compile
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32, fused in another order


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Take the compiler's front end alone, which costs no C++ compiler; the graphs it makes."""
    torch.compiler.reset()
    monkeypatch.setattr(training, "_compilers", training._Compilers())
    monkeypatch.setattr(kernel, "_warn_once", functools.lru_cache(kernel._warn_once.__wrapped__))
    made = []

    def note(graph, inputs):
        made.append(graph)
        return graph.forward

    def front_end(function, *, options, **more):
        return COMPILE(function, backend=note, **more)

    monkeypatch.setattr(torch, "compile", front_end)
    return made


def arrays(number: int) -> dict[str, np.ndarray]:
    return dict(zip(net().state_dict(), arrays_of(net(number)), strict=True))


def with_steps(number: int) -> dict[str, np.ndarray]:
    return {**arrays(number), NOVA_STEPS: np.array(1)}


def with_variates(number: int) -> dict[str, np.ndarray]:
    own = arrays(number)
    return {**own, **{f"control/{name}": 0.1 * value for name, value in own.items()}}


CASES = {
    "fednova": (NovaClient, {"momentum": 0.5, "nova_mu": 0.1}, with_steps),
    "scaffold": (ScaffoldClient, {}, with_variates),
    **{
        name: (PartClient, method, None)
        for name, method in (
            ("fedper", FEDPER),
            ("fedrep", FEDREP),
            ("lg-fedavg", LG),
            ("fedbabu", FEDBABU),
        )
    },
}


@pytest.mark.parametrize("case", CASES)
def test_compiled_steps_give_what_eager_ones_give_over_two_rounds(case: str, graphs):
    kind, options, question = CASES[case]
    told = {}
    for chosen in ("eager", "compiled"):
        place, model = context(), net()
        for number in (1, 2):
            own = client(
                kind,
                model=model,
                context=place,
                kernel=chosen,
                batch_size=4,
                local_epochs=2,
                **options,
            )
            sent = question(number) if question else arrays(number)
            if question is None:
                sent = {name: value for name, value in sent.items() if own.shared(name)}
            told[chosen], _, _ = own.fit_named(sent, {"server-round": number})
        assert bool(graphs) == (chosen == "compiled")
    assert set(told["compiled"]) == set(told["eager"])
    for name, value in told["eager"].items():
        np.testing.assert_allclose(told["compiled"][name], value, **CLOSE, err_msg=name)
