"""LogitsClient: digest, revisit, answer, against steps of plain autograd; and what never leaves."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from metabloom.clients import SGDClient
from metabloom.clients.logits import LogitsClient, outputs
from metabloom.errors import ConfigError, PrivacyError, WireError
from metabloom.public import PublicData
from metabloom.public_logits import Subsets
from tests.clients.privacy.private_clients import pinned
from tests.clients.small_clients import client, context, net
from tests.clients.toy_problems import client_data, loss_at

PUBLIC = PublicData.of("drawn", torch.randn(12, 3, generator=torch.Generator().manual_seed(5)))
F32 = {"rtol": 1e-5, "atol": 1e-6}
KINDS = pytest.mark.parametrize("digest", ["absolute-error", "cross-entropy"])


def agreed(number: int = 1, *, subsets: Subsets | None = None, seed: int = 0) -> list[np.ndarray]:
    """Return what a server would send after round ``number``."""
    subsets = subsets or Subsets(PUBLIC, 0, 0)
    if not number:
        return list(subsets.nothing(3).values())
    rng = np.random.default_rng([number, seed])
    values = rng.normal(size=(len(subsets.rows(number)), 3)).astype(np.float32)
    return list(subsets.packed(2 * values, number).values())


def of(place=None, **options):
    usual = {"public": PUBLIC, "local_lr": 0.3, "digest_lr": 0.2, "digest_batch_size": 0}
    return client(LogitsClient, context=place or context(), **{**usual, **options})


def own_model(one: LogitsClient) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in one.own.after({}, "cpu").items()}


def step(params, loss, lr):
    """One step of plain autograd on named parameters."""
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    found = torch.autograd.grad(loss(leaves), list(leaves.values()))
    return {n: v.detach() - lr * g for (n, v), g in zip(leaves.items(), found, strict=True)}


def begin():
    return {name: value.clone() for name, value in net().state_dict().items()}


def said_by(params, inputs=PUBLIC.inputs):
    return functional_call(net(), params, (inputs,))


def revisit(params):
    data = client_data().all
    return step(params, lambda p: loss_at(net(), nn.functional.cross_entropy, p, data), 0.3)


def digested(params, digest, sent):
    c = torch.from_numpy(sent[0])

    def loss(leaves):
        z = said_by(leaves)
        if digest == "absolute-error":
            return (z - c).abs().mean()
        return -(c.softmax(1) * z.log_softmax(1)).sum(1).mean()

    return step(params, loss, 0.2)


@KINDS
def test_the_first_round_trains_on_its_own_records_and_answers(digest):
    one = of(digest=digest)
    reply, count, metrics = one.fit(agreed(0), {"server-round": 1})
    wanted = revisit(begin())
    for name, value in own_model(one).items():
        np.testing.assert_allclose(value, wanted[name], **F32)
    np.testing.assert_allclose(reply[0], said_by(wanted).detach(), **F32)
    assert count == len(client_data().all[1])
    assert "digest-loss" not in metrics


@KINDS
def test_a_later_round_digests_then_revisits_then_answers(digest):
    place = context()
    of(place, digest=digest).fit(agreed(0), {"server-round": 1})
    one = of(place, digest=digest)
    reply, _, metrics = one.fit(agreed(1), {"server-round": 2})
    wanted = revisit(digested(revisit(begin()), digest, agreed(1)))
    for name, value in own_model(one).items():
        np.testing.assert_allclose(value, wanted[name], **F32)
    np.testing.assert_allclose(reply[0], said_by(wanted).detach(), **F32)
    assert metrics["digest-loss"] > 0
    # The wrong order (revisit, then digest) and the other loss are seen.
    other = digested(revisit(revisit(begin())), digest, agreed(1))
    assert not np.allclose(reply[0], said_by(other).detach(), atol=1e-4)


def test_without_a_digest_a_client_learns_alone():
    place, alone = context(), begin()
    for number in (0, 1, 2):
        one = of(place, digest_epochs=0)
        one.fit(agreed(number), {"server-round": number + 1})
        alone = revisit(alone)
    for name, value in own_model(one).items():
        np.testing.assert_allclose(value, alone[name], rtol=1e-4, atol=1e-5)


def test_a_subset_is_that_of_its_own_round():
    subsets = Subsets(PUBLIC, 4, 0)
    one = of(public_subset=4)
    reply, _, _ = one.fit(agreed(0, subsets=subsets), {"server-round": 3})
    params = {name: torch.from_numpy(value) for name, value in own_model(one).items()}
    wanted = said_by(params, PUBLIC.inputs[torch.from_numpy(subsets.rows(3))])
    np.testing.assert_allclose(reply[0], wanted.detach(), **F32)
    assert int(reply[-2]) == 3
    assert np.array_equal(reply[-1], PUBLIC.mark_of(subsets.rows(3)))


def test_the_personal_model_never_leaves():
    """No byte of a parameter, of any round, is in what the client answers."""
    place = context()
    for number in (0, 1):
        one = of(place)
        reply, _, metrics = one.fit(agreed(number), {"server-round": number + 1})
        sent = b"".join(array.tobytes() for array in reply) + repr(metrics).encode()
        for value in own_model(one).values():
            assert value.tobytes() not in sent
            assert all(number.tobytes() not in sent for number in value.reshape(-1)[:3])
    assert set(one.exchanged_names) == {"logits", "round", "mark"}


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (agreed(1, subsets=Subsets(PublicData.of("x", PUBLIC.inputs + 1), 0, 0)), "differ"),
        (agreed(1, subsets=Subsets(PublicData.of("x", PUBLIC.inputs.flip(0)), 0, 0)), "differ"),
        (agreed(1, subsets=Subsets(PUBLIC, 5, 0)), "differ"),
        (agreed(1, subsets=Subsets(PUBLIC, 0, 0, "float16")), ""),
    ],
)
def test_what_is_said_of_other_records_is_not_learnt(sent, reason):
    one = of()
    if not reason:  # another encoding says the same
        one.fit(sent, {"server-round": 2})
        return
    with pytest.raises(WireError, match=reason):
        one.fit(sent, {"server-round": 2})
    assert one.own.after({}, "cpu") is None


def test_it_is_judged_by_its_personal_model_and_an_unseen_one_by_the_student():
    place, received = context(), [value.numpy() for value in net(3).state_dict().values()]
    unseen = of(place).evaluate(received, {})[2]
    plain = client(SGDClient).evaluate(received, {})[2]
    assert unseen == plain
    one = of(place)
    one.fit(agreed(0), {"server-round": 1})
    params = {name: torch.from_numpy(value) for name, value in own_model(one).items()}
    query = client_data().query
    wanted = loss_at(net(), nn.functional.cross_entropy, params, query).item()
    found = one.evaluate(received, {})[2]
    assert found["loss-before"] == pytest.approx(wanted, rel=1e-5)


def test_answers_are_given_without_dropout():
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    params = dict(model.named_parameters())
    first, second = (outputs(model, params, PUBLIC.inputs) for _ in range(2))
    assert torch.equal(first, second)
    assert model.training


@pytest.mark.parametrize(
    ("option", "value"),
    [("digest", "mse"), ("digest_epochs", -1), ("digest_lr", 0.0), ("digest_batch_size", 1.5)],
)
def test_options_out_of_range_are_refused_by_name(option, value):
    with pytest.raises(ConfigError, match=option):
        of(**{option: value})


def test_a_personal_model_needs_a_context():
    with pytest.raises(ConfigError, match="context="):
        client(LogitsClient, public=PUBLIC)


# --- privacy -------------------------------------------------------------------------------------


def private_of(tmp_path, place, **options):
    return of(place, privacy=pinned(tmp_path / "ledger.jsonl"), **options)


def test_a_private_client_answers_by_what_was_accounted(tmp_path):
    place = context()
    first = private_of(tmp_path, place)
    _, count, metrics = first.fit(agreed(0), {"server-round": 1})
    assert metrics["privacy-epsilon"] > 0
    assert count == 1
    spent = metrics["privacy-epsilon"]
    second = private_of(tmp_path, place)
    _, _, later = second.fit(agreed(1), {"server-round": 2})
    assert later["privacy-epsilon"] > spent
    assert "train-loss" not in later  # it would tell of the records


def test_a_model_that_was_not_accounted_may_not_answer_for_a_private_client(tmp_path):
    place = context()
    of(place).fit(agreed(0), {"server-round": 1})
    with pytest.raises(PrivacyError, match="'anna' was trained without privacy"):
        private_of(tmp_path, place).fit(agreed(1), {"server-round": 2})
