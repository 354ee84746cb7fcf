"""ScaffoldClient: corrected steps by plain autograd, its variate over the rounds, what leaves."""

import numpy as np
import pytest
import torch
from torch import nn

from metabloom.clients import ClientStore, ScaffoldClient, SGDClient
from metabloom.clients.scaffold import ACCOUNTED, VARIATE, corrected_update
from metabloom.clients.store import LastingState
from metabloom.errors import ConfigError, PrivacyError
from tests.clients.privacy.private_clients import pinned
from tests.clients.small_clients import arrays_of, client, context, net, same
from tests.clients.toy_problems import Shifted, client_data, initialised, loss_at

CROSS_ENTROPY = nn.functional.cross_entropy
F32 = {"rtol": 1e-4, "atol": 1e-5}  # float32, differences of models over K lr
NAMES = tuple(net().state_dict())
LR = 0.3


def of(place=None, **options):
    return client(ScaffoldClient, context=place or context(), local_lr=LR, **options)


def question(number: int = 1) -> dict[str, np.ndarray]:
    """Return a model and a variate, others for each number."""
    rng = np.random.default_rng(number)
    arrays = dict(zip(NAMES, arrays_of(net(number)), strict=True))
    controls = {
        f"control/{name}": (0.1 * rng.normal(size=value.shape)).astype(value.dtype)
        for name, value in arrays.items()
    }
    return {**arrays, **controls}


def variate(own, config=None) -> dict[str, np.ndarray]:
    return {n: v.numpy() for n, v in own.variate.after(config or {}, "cpu").items()}


def by_autograd(sent, own, *, steps):
    """The oracle: y <- y - lr (g - c_i + c), and option II of c_i; on all records at once."""
    x = {n: torch.from_numpy(sent[n]) for n in NAMES}
    c = {n: torch.from_numpy(sent[f"control/{n}"]) for n in NAMES}
    y = dict(x)
    for _ in range(steps):
        leaves = {n: v.clone().requires_grad_() for n, v in y.items()}
        loss = loss_at(net(), CROSS_ENTROPY, leaves, client_data().all)
        found = torch.autograd.grad(loss, list(leaves.values()))
        y = {n: y[n] - LR * (g - own[n] + c[n]) for n, g in zip(leaves, found, strict=True)}
    after = {n: own[n] - c[n] + (x[n] - y[n]) / (steps * LR) for n in NAMES}
    return y, after


def assert_close(found, wanted):
    assert set(found) == set(wanted)
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name], **F32, err_msg=name)


@pytest.mark.parametrize("steps", [1, 3])
def test_rounds_are_those_of_plain_autograd_with_option_ii(steps: int):
    place = context()
    own = {name: torch.zeros_like(value) for name, value in net().state_dict().items()}
    for number in (1, 2, 3):
        one = of(place, local_epochs=steps)  # a new object for each message, as under Flower
        sent = question(number)
        said, count, metrics = one.fit_named(sent, {"server-round": number})
        y, after = by_autograd(sent, own, steps=steps)
        assert_close({n: said[n] for n in NAMES}, y)
        change = {n: sent[f"control/{n}"] + (after[n] - own[n]).numpy() for n in NAMES}
        assert_close({n: said[f"control/{n}"] for n in NAMES}, change)
        assert_close(variate(one, {"server-round": number}), after)
        own = after
        assert count == len(client_data().all[1])
        assert metrics["train-loss"] > 0
    assert list(said) == list(question())


def test_forgetting_the_variate_or_turning_its_sign_is_seen():
    place = context()
    first, second = question(1), question(2)
    of(place).fit_named(first, {"server-round": 1})
    said, _, _ = of(place).fit_named(second, {"server-round": 2})
    zero = {name: torch.zeros_like(value) for name, value in net().state_dict().items()}
    _, own = by_autograd(first, zero, steps=1)
    for wrong in (zero, {name: -value for name, value in own.items()}):
        y, _ = by_autograd(second, wrong, steps=1)
        assert not np.allclose(said["body.weight"], y["body.weight"], atol=1e-3)


def test_without_variates_a_round_is_that_of_sgd():
    sent = {n: np.zeros_like(v) if "control" in n else v for n, v in question().items()}
    said, _, _ = of(local_epochs=2, batch_size=4).fit_named(sent, {})
    plain = client(SGDClient, local_lr=LR, local_epochs=2, batch_size=4)
    wanted, _, _ = plain.fit([sent[name] for name in NAMES], {})
    assert same([said[name] for name in NAMES], wanted)


def test_a_message_that_comes_twice_has_one_effect(tmp_path):
    place, store = context(), ClientStore(tmp_path)
    replies = [
        of(place, store=store).fit_named(question(number), {"server-round": number})[0]
        for number in (1, 2, 2, 3)
    ]
    assert same(replies[1].values(), replies[2].values())
    fresh = context()  # another process, which has the store alone
    again = of(fresh, store=store).fit_named(question(3), {"server-round": 3})[0]
    assert same(again.values(), replies[3].values())


def test_the_variate_itself_never_leaves():
    """Its change does: c_i after round 2 is in no reply, of any round, in no byte."""
    place, left = context(), b""
    for number in (1, 2, 3):
        one = of(place)
        said, _, metrics = one.fit_named(question(number), {"server-round": number})
        left += b"".join(value.tobytes() for value in said.values()) + repr(metrics).encode()
        if number > 1:  # c_1 - 0 is the first change
            for value in variate(one, {"server-round": number}).values():
                assert value.tobytes() not in left


def test_what_is_not_trained_has_a_variate_that_nobody_moves():
    model = initialised(Shifted())
    model.body.requires_grad_(False)
    own = of(model=model)
    arrays = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    floating = {n: v for n, v in arrays.items() if v.dtype.kind == "f"}
    controls = {f"control/{n}": np.full_like(v, 0.01) for n, v in floating.items()}
    said, _, _ = own.fit_named({**arrays, **controls}, {})
    assert "control/seen" not in said
    for name in ("shift", "body.weight", "body.bias"):
        assert same(
            [said[name], said[f"control/{name}"]], [arrays[name], controls[f"control/{name}"]]
        )
    assert not np.array_equal(said["head.weight"], arrays["head.weight"])
    assert set(variate(own)) == {"head.weight", "head.bias"}


def test_another_server_gets_the_trained_model_as_from_plain_sgd():
    own = of()
    sent = arrays_of(net(1))
    assert own.fit_named(dict(zip(NAMES, sent, strict=True)), {}) is None
    assert same(own.fit(sent, {})[0], client(SGDClient, local_lr=LR).fit(sent, {})[0])
    assert own.variate.after({}, "cpu") is None


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_arrays_come_back_in_the_dtypes_that_they_had(dtype):
    sent = {name: value.astype(dtype) for name, value in question().items()}
    said, _, _ = of().fit_named(sent, {})
    assert {value.dtype for value in said.values()} == {np.dtype(dtype)}


def test_the_update_changes_none_of_its_arguments_and_leaves_the_drift():
    model = net()
    params = {name: value.detach().clone() for name, value in model.named_parameters()}
    drift = {f"drift/{name}": torch.full_like(value, 0.1) for name, value in params.items()}
    update = corrected_update(model, CROSS_ENTROPY, lr=LR)
    state = update.begin({**params, **drift})
    after = update.step(state, client_data().all)
    assert set(update.finish(after).params) == set(params)
    assert all(torch.equal(state.params[name], params[name]) for name in params)
    assert all(torch.equal(after.params[name], drift[name]) for name in drift)


# --- privacy --------------------------------------------------------------------------------------


def private(tmp_path, place, **options):
    privacy = pinned(tmp_path / "ledger.jsonl")
    return of(place, privacy=privacy, local_steps=3, **options)


def test_a_private_client_pays_for_its_steps_and_its_variate_is_made_of_them(tmp_path):
    place = context()
    own = {name: torch.zeros_like(value) for name, value in net().state_dict().items()}
    for number in (1, 2):
        one, sent = private(tmp_path, place), question(number)
        said, count, metrics = one.fit_named(sent, {"server-round": number})
        assert one.private.ledger.events == [(1.0, 0.5, 3 * number)]
        assert set(metrics) == {"privacy-epsilon", "privacy-delta"}
        assert count == 1
        # By option II all that is kept and sent follows from y, which was released.
        after = {
            n: own[n].numpy() - sent[f"control/{n}"] + (sent[n] - said[n]) / (3 * LR) for n in NAMES
        }
        assert_close(variate(one, {"server-round": number}), after)
        own = {name: torch.from_numpy(value) for name, value in after.items()}


def test_private_steps_are_corrected(tmp_path):
    """The same seeded noise with another c: y differs by K lr times the difference, by c alone."""

    def y(file: str, shift: float) -> dict:
        privacy = pinned(tmp_path / file, seed=3, max_grad_norm=1e-6)
        sent = {n: v + shift if "control" in n else v for n, v in question().items()}
        own = of(context(), privacy=privacy, local_steps=3)
        return own.fit_named(sent, {"server-round": 1})[0]

    one, other = y("a", 0.0), y("b", 0.5)
    for name in NAMES:
        np.testing.assert_allclose(one[name] - other[name], 3 * LR * 0.5, rtol=1e-4)


def test_a_private_question_that_comes_again_is_answered_alike_and_another_c_is_another(tmp_path):
    place, store = context(), ClientStore(tmp_path)
    first, again = (
        private(tmp_path, place, store=store).fit_named(question(), {"server-round": 1})
        for _ in range(2)
    )
    assert same(first[0].values(), again[0].values())
    own = private(tmp_path, place, store=store)
    assert own.private.ledger.events == [(1.0, 0.5, 3)]
    other = {n: v + 0.1 if "control" in n else v for n, v in question().items()}
    own.fit_named(other, {"server-round": 1})
    assert own.private.ledger.events == [(1.0, 0.5, 6)]


def test_a_variate_that_was_made_without_privacy_may_not_serve_a_private_client(tmp_path):
    place = context()
    of(place).fit_named(question(), {"server-round": 1})
    with pytest.raises(PrivacyError, match="'anna' was made without privacy in this run"):
        private(tmp_path, place).fit_named(question(), {"server-round": 2})
    states = [
        LastingState(place, kind=kind, client="anna", store=None) for kind in (VARIATE, ACCOUNTED)
    ]
    assert [state.after({}) is None for state in states] == [False, True]


def test_without_a_context_it_is_refused():
    with pytest.raises(ConfigError, match="SCAFFOLD needs context="):
        client(ScaffoldClient)
