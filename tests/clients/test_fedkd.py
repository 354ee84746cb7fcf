"""FedKDClient: both models move by the paper's closed form, and only the mentee's update leaves."""

import copy

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from flwr.supercore.task_identity import TaskIdentity
from torch import nn

from metabloom.clients import ClientStore, FedKDClient, PrivacyConfig, SGDClient, client_app
from metabloom.clients.batches import minibatches
from metabloom.clients.fedkd import MENTEE, MENTOR, mutual_update, paired, part_of
from metabloom.clients.local_update import run_update
from metabloom.compression import compress_update, num_bytes
from metabloom.errors import ConfigError, ModelError, WireError
from metabloom.sent_updates import applied, digest_of, update_of
from metabloom.streams import torch_stream
from tests.clients.messages import as_numpy, ask, place, record_of
from tests.clients.small_clients import context, same
from tests.clients.toy_problems import client_data, initialised

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, some hundred operations on numbers of size 1


def linear(seed: int, *, dtype=torch.float64) -> nn.Module:
    return initialised(nn.Linear(3, 3, bias=False), seed).to(dtype)


def wide(seed: int, hidden: int = 40) -> nn.Module:
    """Return a model of which an update has matrices that are worth compressing."""
    return initialised(
        nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        .append(nn.Linear(hidden, 3))
        .float(),
        seed,
    )


def matrix(model: nn.Module) -> np.ndarray:
    return model.weight.detach().numpy().copy()


def fedkd(**options) -> FedKDClient:
    options = {"name": "anna", "inner_lr": 0.4, "context": context(), **options}
    model, data = options.pop("model", None), options.pop("data", None)
    return FedKDClient(
        linear(1) if model is None else model,
        client_data(dtype=torch.float64) if data is None else data,
        **{"mentor": linear(2), "local_lr": 0.3, **options},
    )


def fedkd_wide(**options) -> FedKDClient:
    return fedkd(**{"model": wide(1), "mentor": wide(2, 60), "data": client_data(), **options})


# --- the closed form ------------------------------------------------------------------------------


def probabilities(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def paper(own, other, hard, ce_own, ce_other):
    """The gradient in the logits of H(y, p) + KL(other || own) / (CE_own + CE_other), times B."""
    return (own - hard) + (own - other) / (ce_own + ce_other)


def with_kl_the_other_way(own, other, hard, ce_own, ce_other):
    away = np.log(own) - np.log(other)
    return (own - hard) + own * (away - (own * away).sum(1, keepdims=True)) / (ce_own + ce_other)


def through_the_denominator(own, other, hard, ce_own, ce_other):
    kl = (other * (np.log(other) - np.log(own))).sum(1).mean()
    return paper(own, other, hard, ce_own, ce_other) - kl * (own - hard) / (ce_own + ce_other) ** 2


def averaged_over_classes(own, other, hard, ce_own, ce_other):
    return (own - hard) + (own - other) / own.shape[1] / (ce_own + ce_other)


def without_the_denominator(own, other, hard, ce_own, ce_other):
    return (own - hard) + (own - other)


def each_alone(own, other, hard, ce_own, ce_other):
    return own - hard


WRONG = [
    with_kl_the_other_way,
    through_the_denominator,
    averaged_over_classes,
    without_the_denominator,
    each_alone,
]


def by_hand(mentor, mentee, batches, *, mentor_lr, mentee_lr, slope=paper):
    """Return both matrices after steps on ``batches``, in NumPy."""
    for inputs, targets in batches:
        x, hard = inputs.numpy(), np.eye(3)[targets.numpy()]
        p_t, p_s = probabilities(x @ mentor.T), probabilities(x @ mentee.T)
        ce_t, ce_s = (-np.log((p * hard).sum(1)).mean() for p in (p_t, p_s))
        of_mentor = slope(p_t, p_s, hard, ce_t, ce_s).T @ x / len(x)
        of_mentee = slope(p_s, p_t, hard, ce_s, ce_t).T @ x / len(x)
        mentor, mentee = mentor - mentor_lr * of_mentor, mentee - mentee_lr * of_mentee
    return mentor, mentee


def steps_of(slope=paper, steps: int = 3):
    """Return what the update and the closed form come to from the same two matrices."""
    mentor, mentee = linear(2), linear(1)
    batches = [client_data(dtype=torch.float64).all] * steps
    update = mutual_update(mentor, mentee, mentor_lr=0.2, mentee_lr=0.5)
    start = paired(dict(mentor.named_parameters()), dict(mentee.named_parameters()))
    result = run_update(update, start, batches).params
    found = [part_of(result, kind)["weight"].numpy() for kind in (MENTOR, MENTEE)]
    rates = {"mentor_lr": 0.2, "mentee_lr": 0.5}
    return found, by_hand(matrix(mentor), matrix(mentee), batches, slope=slope, **rates)


def test_three_steps_of_both_models_are_the_closed_form():
    found, wanted = steps_of()
    for ours, right in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, right, **EXACT)


@pytest.mark.parametrize("slope", WRONG, ids=lambda slope: slope.__name__)
def test_a_wrong_gradient_is_another_one(slope):
    for ours, wrong in zip(*steps_of(slope), strict=True):
        assert np.abs(ours - wrong).max() > 1e-3


def test_a_round_takes_the_batches_of_sgdclient_and_the_mentor_goes_on_from_round_to_round():
    own, data = fedkd(batch_size=4, local_epochs=2, mentor_lr=0.1), client_data(dtype=torch.float64)
    mentor, place = matrix(linear(2)), own.context
    for number, sent in ((1, matrix(linear(1))), (2, matrix(linear(7)))):
        stream = torch_stream(0, "sgd", number, "anna")
        batches = minibatches(data.all, batch_size=4, epochs=2, generator=stream)
        rates = {"mentor_lr": 0.1, "mentee_lr": 0.3}
        mentor, wanted = by_hand(mentor, sent, list(batches), **rates)
        # A new object for each message, as under Flower.
        own = fedkd(batch_size=4, local_epochs=2, mentor_lr=0.1, context=place)
        (found,), count, metrics = own.fit([sent], {"server-round": number})
        np.testing.assert_allclose(found, wanted, **EXACT)
        kept = own._mentors.after({"server-round": number}, "cpu")["weight"].numpy()
        np.testing.assert_allclose(kept, mentor, **EXACT)
        assert count == 11
        assert metrics["train-loss"] > 0


def test_neither_module_is_changed_and_frozen_parameters_of_the_mentor_stay():
    mentor = wide(2, 60)
    mentor[0].weight.requires_grad_(False)
    own = fedkd_wide(mentor=mentor)
    before = copy.deepcopy((own.model.state_dict(), mentor.state_dict()))
    own.fit(own.get_parameters({}), {"server-round": 1})
    now = (own.model.state_dict(), mentor.state_dict())
    torch.testing.assert_close(now, before, rtol=0, atol=0)
    assert "0.weight" not in own._mentors.after({}, "cpu")


# --- what travels ---------------------------------------------------------------------------------


def named() -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in wide(1).state_dict().items()}


def asked(number: int, energy: float = 0.95, **more):
    return {"server-round": number, "energy": energy, **more}


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_the_reply_is_the_compressed_update_of_what_fit_returns(energy):
    own, sent = fedkd_wide(), named()
    trained, count, metrics = fedkd_wide().fit(list(sent.values()), asked(1, energy))
    new = dict(zip(own.array_names, trained, strict=True))
    reply, its_count, its_metrics = own.fit_named(sent, asked(1, energy))
    wanted = compress_update(update_of(new, sent), energy)
    assert list(reply) == list(wanted)
    assert same(reply.values(), wanted.values())
    assert (its_count, its_metrics) == (count, {**metrics, "reply": "update"})
    if energy == 1.0:  # all of it: the model that FedAvg would be sent, up to rounding
        for name, value in applied(sent, reply).items():
            np.testing.assert_allclose(value, new[name], rtol=0, atol=1e-6)
    else:
        assert "2.weight/u" in reply
        assert num_bytes(reply) < num_bytes(sent) / 2


def server_s(sent, energy: float = 0.5):
    """Return a compressed update of the server, and the config that it comes with."""
    rng = np.random.default_rng(3)
    step = {n: (v * 0.1 * rng.normal(size=v.shape)).astype(v.dtype) for n, v in sent.items()}
    flat = compress_update(step, energy)
    assert "2.weight/u" in flat
    return flat, {"base-round": 1, "mentee-digest": digest_of(applied(sent, flat))}


def after_round_1(**options) -> tuple[FedKDClient, dict[str, np.ndarray]]:
    own, sent = fedkd_wide(**options), named()
    own.fit_named(sent, asked(1))
    return fedkd_wide(**{"context": own.context, **options}), sent


def test_an_update_of_the_mentee_gives_the_bits_that_the_whole_mentee_gives():
    (first, sent), (second, _) = after_round_1(), after_round_1()
    flat, told = server_s(sent)
    by_update, count, metrics = first.fit_named(flat, asked(2, **told))
    by_whole = second.fit_named(applied(sent, flat), asked(2))
    assert list(by_update) == list(by_whole[0])
    assert same(by_update.values(), by_whole[0].values())
    assert (count, metrics) == by_whole[1:]
    held = first._mentees.after(asked(2))
    assert (
        digest_of({n.removeprefix(MENTEE): v for n, v in held.items() if n != "round"})
        == (told["mentee-digest"])
    )


def test_a_client_that_lost_the_mentee_says_so_by_name_and_its_mentor_is_not_trained():
    own, sent = after_round_1(context=context())
    flat, told = server_s(sent)
    lost = fedkd_wide()
    with pytest.raises(WireError, match=r"client 'anna' .* mentee of round 1, and holds none.*sta"):
        lost.fit_named(flat, asked(2, **told))
    assert lost._mentors.after({}, "cpu") is None
    with pytest.raises(WireError, match=r"of round 2, and holds that of round 1"):
        own.fit_named(flat, asked(3, **{**told, "base-round": 2}))


def test_a_client_that_comes_to_another_mentee_than_the_server_refuses_it():
    own, sent = after_round_1()
    flat, told = server_s(sent)
    with pytest.raises(WireError, match="client 'anna' comes to another mentee than the server"):
        own.fit_named({**flat, "0.bias": flat["0.bias"] + 1e-3}, asked(2, **told))
    with pytest.raises(WireError, match="comes to another mentee"):
        own.fit_named(flat, asked(2, **{"base-round": 1}))  # nothing was told of it


def test_an_update_of_other_names_and_a_mentee_of_other_names_are_refused():
    own, sent = after_round_1()
    flat, told = server_s(sent)
    with pytest.raises(WireError, match="arrays are not expected, 'x' first"):
        own.fit_named({**flat, "x": flat["0.bias"]}, asked(2, **told))
    wrong = {("x" if name == "0.bias" else name): value for name, value in sent.items()}
    with pytest.raises(WireError, match=r"differ in 0\.bias, x: both ends must build the same"):
        own.fit_named(wrong, asked(2))


def test_a_store_gives_both_back_and_a_question_that_comes_twice_gets_one_answer(tmp_path):
    store = ClientStore(tmp_path)
    own, sent = after_round_1(store=store)
    flat, told = server_s(sent)
    once = own.fit_named(flat, asked(2, **told))
    again = fedkd_wide(store=store).fit_named(flat, asked(2, **told))  # its process died
    assert same(once[0].values(), again[0].values())
    anew, _, _ = fedkd_wide().fit_named(applied(sent, flat), asked(2))
    assert not same(once[0].values(), anew.values())  # its mentor begins anew


# --- by messages ----------------------------------------------------------------------------------


@pytest.fixture
def _running_task(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.mark.usefixtures("_running_task")
@pytest.mark.parametrize("kernel", ["eager", "vmap"])
def test_a_server_that_asks_for_an_update_gets_it_and_any_other_one_the_mentee(kernel):
    app = client_app(lambda context: fedkd_wide(context=context, kernel=kernel))
    own, sent = fedkd_wide(), named()
    message = {"arrays": record_of(sent), "config": ConfigRecord(asked(1))}
    update = ask(app, "train", message, context=place())
    assert dict(update["properties"]) == {"reply": "update"}
    wanted, count, metrics = fedkd_wide().fit_named(sent, asked(1))
    assert list(update["arrays"]) == list(wanted)
    assert same(as_numpy(update["arrays"]).values(), wanted.values())
    numbers = {name: value for name, value in metrics.items() if name != "reply"}
    assert dict(update["metrics"]) == {**numbers, "num-examples": count}

    message["config"] = ConfigRecord({"server-round": 1})
    model = ask(app, "train", message, context=place())
    trained, _, _ = fedkd_wide().fit(list(sent.values()), {"server-round": 1})
    assert set(model) == {"arrays", "metrics"}
    assert tuple(model["arrays"]) == own.array_names
    assert same(as_numpy(model["arrays"]).values(), trained)


# --- evaluation -----------------------------------------------------------------------------------


def test_the_adaptation_is_the_mentee_s_and_the_mentor_is_told_beside_it_once_it_was_trained():
    own, sent = fedkd(), [matrix(linear(1))]
    plain = SGDClient(linear(1), client_data(dtype=torch.float64), name="anna", inner_lr=0.4)
    assert own.evaluate(sent, {}) == plain.evaluate(sent, {})
    own.fit(sent, {"server-round": 1})
    loss, count, metrics = own.evaluate(sent, {"server-round": 1})
    mentor, _ = by_hand(matrix(linear(2)), sent[0], [own.data.all], mentor_lr=0.3, mentee_lr=0.3)
    inputs, targets = (part.numpy() for part in own.data.query)
    said = probabilities(inputs @ mentor.T)
    wanted = -np.log(said[np.arange(count), targets]).mean()
    assert metrics.pop("mentor-loss") == pytest.approx(wanted, rel=1e-12)
    assert metrics.pop("mentor-accuracy") == pytest.approx((said.argmax(1) == targets).mean())
    assert (loss, count, metrics) == plain.evaluate(sent, {})
    early = own.evaluate(sent, {"server-round": 0})[2]  # no round is known: the newest there is
    assert "mentor-loss" in early


# --- construction ---------------------------------------------------------------------------------


def test_a_private_client_is_refused_since_the_mentor_is_accounted_nowhere(tmp_path):
    privacy = PrivacyConfig(
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sample_rate=0.5,
        target_epsilon=8.0,
        target_delta=1e-5,
        ledger=tmp_path / "anna.jsonl",
    )
    with pytest.raises(ConfigError, match=r"FedKD with privacy .*'anna'.*mentor, which is trained"):
        fedkd(privacy=privacy)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["local_lr", "mentor_lr"])
def test_a_rate_that_is_none_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"{key} = {value!r}"):
        fedkd(**{"mentor_lr": 0.1, key: value})


@pytest.mark.parametrize("value", [0, 1.5])
def test_epochs_that_are_none_are_refused_by_name(value):
    with pytest.raises(ConfigError, match=f"local_epochs = {value!r}"):
        fedkd(local_epochs=value)


def test_what_a_client_cannot_do_without_is_named():
    with pytest.raises(ConfigError, match="needs context="):
        fedkd(context=None)
    with pytest.raises(ModelError, match="BatchNorm"):
        fedkd(mentor=nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    other = fedkd(mentor=initialised(nn.Linear(3, 4, bias=False)).double())
    with pytest.raises(ModelError, match="same classes"):
        other.fit([matrix(linear(1))], {})
