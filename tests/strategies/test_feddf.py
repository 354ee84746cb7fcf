"""FedDF: what the ensemble says, in closed form, is what the students come to say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from metabloom.architectures import joined, part_of
from metabloom.config import RunConfig
from metabloom.errors import ConfigError, DataError
from metabloom.public import PublicData
from metabloom.strategies import STRATEGIES, Distillation, FedDF, Reply, interpolate
from metabloom.strategies.by_architecture import by_architecture
from metabloom.strategies.distilled import distilled, logits_of
from metabloom.strategies.feddf import _targets, ensemble_distillation
from metabloom.wire import from_record
from tests.strategies.toy import Toy, ToyNet, larger, model, server_parts, start, strategy_of

HOW = Distillation(steps=400, lr=0.05, batch_size=32)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator)


class Flat(nn.Module):
    """z = x W."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.zeros(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.W


class Deep(nn.Module):
    """z = x U V: the same functions, but the mean of two is none of U and V."""

    def __init__(self) -> None:
        super().__init__()
        self.U, self.V = nn.Parameter(torch.zeros(4, 5)), nn.Parameter(torch.zeros(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.U @ self.V


MODELS = {"flat": Flat(), "deep": Deep()}
PUBLIC = draw(200, 4)
DECLARED = PublicData.of("drawn", PUBLIC)


def flat(seed: int) -> dict[str, np.ndarray]:
    return {"W": draw(4, 3, seed=seed).numpy()}


def deep(seed: int) -> dict[str, np.ndarray]:
    return {"U": draw(4, 5, seed=seed).numpy(), "V": draw(5, 3, seed=seed).numpy()}


def reply(kind: str, arrays: dict[str, np.ndarray], count: int = 1) -> Reply:
    return Reply(joined({kind: arrays}), count)


def rule(how: Distillation = HOW, models: dict[str, nn.Module] | None = None, **more):
    models = models or MODELS
    average = by_architecture(interpolate(), list(models))
    return ensemble_distillation(average, models, PUBLIC, how, **more)


def after(replies: list[Reply], sent: dict[str, np.ndarray], how: Distillation = HOW):
    chosen = rule(how)
    return chosen.update(chosen.init(sent), sent, replies)


def distance(kind: str, arrays: dict[str, np.ndarray], wanted: torch.Tensor) -> float:
    """Return the largest distance of a probability from what is wanted."""
    said = logits_of(MODELS[kind], part_of(arrays, kind), PUBLIC).softmax(1)
    return float((said - wanted).abs().max())


def test_every_architecture_learns_the_closed_form_ensemble_of_all_clients():
    replies = [reply("flat", flat(1)), reply("deep", deep(2)), reply("deep", deep(3))]
    product = [torch.from_numpy(deep(seed)["U"] @ deep(seed)["V"]) for seed in (2, 3)]
    mean = (torch.from_numpy(flat(1)["W"]) + product[0] + product[1]) / 3
    wanted = (PUBLIC @ mean).softmax(1)
    sent = joined({"flat": flat(0), "deep": deep(0)})
    averaged = by_architecture(interpolate(), ["flat", "deep"])
    _, before = averaged.update(averaged.init(sent), sent, replies)
    _, found = after(replies, sent)
    for kind in MODELS:
        assert distance(kind, before, wanted) > 0.3
        assert distance(kind, found, wanted) < 0.02
        assert {key: value.dtype for key, value in found.items()} == {
            key: value.dtype for key, value in sent.items()
        }


def test_logits_are_averaged_and_not_probabilities():
    """Known answer 13: logits (4, 0) and (0, 2)."""

    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z = nn.Parameter(torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.z.expand(len(x), 2)

    replies = [reply("", {"z": np.array(z, np.float32)}) for z in ((4, 0), (0, 2))]
    targets = _targets({"": Same()}, PUBLIC, replies)
    torch.testing.assert_close(targets[0], torch.tensor([0.731059, 0.268941]), atol=1e-6, rtol=0)
    of_each = [torch.tensor(z).softmax(0)[0] for z in ((4.0, 0.0), (0.0, 2.0))]
    assert float(sum(of_each) / 2) == pytest.approx(0.5506, abs=1e-4)  # what it must not be


def test_teachers_count_alike_however_many_records_they_have():
    few = _targets(MODELS, PUBLIC, [reply("flat", flat(1)), reply("flat", flat(2))])
    many = _targets(MODELS, PUBLIC, [reply("flat", flat(1), 1000), reply("flat", flat(2))])
    assert torch.equal(few, many)


def test_an_architecture_of_which_nobody_answered_learns_from_the_others():
    sent = joined({"flat": flat(0), "deep": deep(0)})
    _, found = after([reply("flat", flat(1))], sent)
    wanted = (PUBLIC @ torch.from_numpy(flat(1)["W"])).softmax(1)
    assert distance("deep", found, wanted) < 0.02
    assert np.array_equal(found["flat/W"], flat(1)["W"])


def test_where_all_agree_the_average_stays_to_the_bit():
    replies = [reply("flat", flat(1)), reply("flat", flat(1))]
    sent = joined({"flat": flat(0), "deep": deep(0)})
    _, found = after(replies, sent)
    assert np.array_equal(found["flat/W"], flat(1)["W"])


def test_a_student_is_never_further_from_the_ensemble_than_it_was():
    wild = replace(HOW, lr=100.0, patience=1)
    arrays, targets = flat(1), (PUBLIC @ torch.from_numpy(flat(2)["W"])).softmax(1)
    found = distilled(Flat(), arrays, PUBLIC, targets, wild, torch.Generator().manual_seed(0))

    def loss(W: np.ndarray) -> float:
        said = logits_of(Flat(), {"W": W}, PUBLIC).log_softmax(1)
        return float((targets * (targets.log() - said)).sum(1).mean())

    assert loss(found["W"]) <= loss(arrays["W"])


def test_it_stops_once_the_loss_has_not_fallen_for_some_checks():
    calls = []

    class Counted(Flat):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(torch.is_grad_enabled())
            return super().forward(x)

    targets = (PUBLIC @ torch.from_numpy(flat(2)["W"])).softmax(1)
    hopeless = replace(HOW, lr=1e4, patience=2)  # no step of so long a stride is one nearer
    generator = torch.Generator().manual_seed(0)
    found = distilled(Counted(), flat(1), PUBLIC, targets, hopeless, generator)
    assert sum(calls) == 2 * HOW.steps // 10  # two checks in vain of ten
    assert np.array_equal(found["W"], flat(1)["W"])


def test_the_logits_of_a_teacher_are_computed_once_a_round():
    calls = []

    class Counted(Flat):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(len(x))
            return super().forward(x)

    _targets({"": Counted()}, PUBLIC, [reply("", flat(1)), reply("", flat(2))])
    assert calls == [len(PUBLIC)] * 2


def test_a_model_whose_logits_are_not_finite_teaches_nobody():
    broken = {"W": np.full((4, 3), 3e38, np.float32)}
    good = [reply("flat", flat(1))]
    with_it = _targets(MODELS, PUBLIC, [*good, reply("flat", broken)])
    assert torch.equal(with_it, _targets(MODELS, PUBLIC, good))
    assert _targets(MODELS, PUBLIC, [reply("flat", broken)]) is None


def test_two_rounds_are_the_same_from_run_to_run_and_draw_other_batches():
    replies = [reply("flat", flat(1)), reply("deep", deep(2))]
    sent = joined({"flat": flat(0), "deep": deep(0)})
    chosen = rule(replace(HOW, steps=20))
    state = chosen.init(sent)
    runs = [chosen.update(state, sent, replies) for _ in range(2)]
    assert all(np.array_equal(runs[0][1][key], runs[1][1][key]) for key in sent)
    _, next_round = chosen.update(runs[0][0], sent, replies)
    assert any(not np.array_equal(runs[0][1][key], next_round[key]) for key in sent)
    assert runs[0][0]["round"] == 1


def test_a_checkpoint_must_have_been_written_with_the_same_distillation():
    one, other = (
        FedDF(models={"": Flat()}, public=DECLARED, distillation=replace(HOW, steps=steps)).settings
        for steps in (10, 20)
    )
    assert one != other


def test_models_that_are_not_those_of_the_architectures_are_refused():
    with pytest.raises(ConfigError, match="'flat', 'deep'"):
        FedDF(models=MODELS, public=DECLARED, architectures=("flat",))
    with pytest.raises(ConfigError, match="FedDF computes with the module of each"):
        FedDF(models=MODELS, public=DECLARED)


@pytest.mark.parametrize(
    ("key", "value"), [("steps", 0), ("lr", 0.0), ("lr", float("nan")), ("batch_size", -1)]
)
def test_settings_out_of_range_are_refused_by_name(key: str, value: float):
    with pytest.raises(ConfigError, match=key):
        Distillation(**{key: value})


def test_in_a_run_the_architectures_come_to_say_the_same():
    """Two architectures whose clients learn different things: FedDF brings them together."""
    kinds = ("small", "large")
    toy = Toy(architectures=kinds * 2)
    models = {"small": model(), "large": larger()}
    public = server_parts(STRATEGIES["feddf"](RunConfig.read({})), kinds)["public"].inputs
    apart = {}
    for name in ("fedavg", "feddf"):
        strategy = strategy_of(
            name, {"distill-lr": 0.05, "distill-steps": 500}, architectures=kinds
        )
        found = from_record(start(strategy, toy, nodes=4, rounds=1, arrays=joined(models)).arrays)
        small, large = (
            logits_of(ToyNet(own), part_of(found, kind), public).softmax(1)
            for kind, own in models.items()
        )
        apart[name] = float((small - large).abs().mean())
    # "large" has no bias: it cannot say all that "small" does.
    assert apart["feddf"] < 0.75 * apart["fedavg"]


# -- what a labelled validation set adds -----------------------------------------------------------

LABELS = (PUBLIC @ torch.from_numpy(flat(1)["W"])).argmax(1)  # as the first model has it
VALIDATION = (PUBLIC, LABELS)


def contrary() -> dict[str, np.ndarray]:
    return {"W": -3 * flat(1)["W"]}  # never right, and surer than the others


def test_a_model_below_chance_teaches_nobody():
    good, bad = reply("flat", flat(1)), reply("flat", contrary())
    found = _targets(MODELS, PUBLIC, [good, bad], VALIDATION)
    assert torch.equal(found, _targets(MODELS, PUBLIC, [good]))
    assert not torch.equal(_targets(MODELS, PUBLIC, [good, bad]), found)  # without it, it teaches


def test_where_all_are_below_chance_all_teach():
    bad = [reply("flat", contrary()), reply("flat", contrary())]
    assert torch.equal(_targets(MODELS, PUBLIC, bad, VALIDATION), _targets(MODELS, PUBLIC, bad))


def test_a_student_stops_where_the_validation_set_likes_it_best():
    """The ensemble is wrong for the validation set: what is learnt of it is not kept."""
    wrong = (PUBLIC @ torch.from_numpy(contrary()["W"])).softmax(1)
    arguments = (Flat(), flat(1), PUBLIC, wrong, HOW, torch.Generator().manual_seed(0))
    assert np.array_equal(distilled(*arguments, VALIDATION)["W"], flat(1)["W"])
    assert not np.array_equal(distilled(*arguments)["W"], flat(1)["W"])


def test_a_validation_set_needs_labels():
    with pytest.raises(DataError, match="no targets"):
        FedDF(models={"": Flat()}, public=DECLARED, validation=DECLARED)


# -- an ensemble that resists bad models -----------------------------------------------------------


@pytest.mark.parametrize("ensemble", [{"by": "median"}, {"by": "trimmed-mean", "trim": 0.4}])
def test_a_resistant_ensemble_is_between_the_good_models(ensemble: dict):
    replies = [reply("flat", flat(1))] * 2 + [reply("flat", {"W": 1e3 * flat(5)["W"]})]
    found = _targets(MODELS, PUBLIC, replies, None, ensemble)
    wanted = (PUBLIC @ torch.from_numpy(flat(1)["W"])).softmax(1)
    assert torch.allclose(found, wanted, atol=1e-6)
    assert not torch.allclose(_targets(MODELS, PUBLIC, replies), wanted, atol=0.1)
