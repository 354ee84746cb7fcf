"""The fast kernels are the same mechanism as Opacus: equal sums, noise, books and refusals.

"traced" is "compiled" without the compiler: the same graph, the same padding, in milliseconds.
"""

import logging

import pytest
import torch
from torch import nn

from metabloom.clients.privacy import record_sums, releases
from metabloom.clients.privacy.audit import Engine, run_audit
from metabloom.clients.privacy.identity import NoKeyError, key_of
from metabloom.clients.privacy.noise import seeded_sources
from metabloom.clients.privacy.releases import Draw, Releases
from metabloom.errors import ModelError, PrivacyError
from metabloom.ledger import Charge
from metabloom.models import build_model
from tests.clients.privacy.engine_problems import (
    SmoothNet,
    clipped,
    direction,
    flat,
    record_gradients,
    smooth_records,
    weights,
)
from tests.clients.privacy.test_record_gradients import layer_problem, layers

SIGMA, BOUND, SIZE, RATE = 1.3, 0.4, 5.0, 0.5
CROSS_ENTROPY = nn.functional.cross_entropy
MODELS = {"mlp": {}, "cnn": {"dense": 5}, "conv4": {"width": 16}}
NEAR = {torch.float64: 1e-12, torch.float32: 1e-6}
RANDOM = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 3)).double()


@pytest.fixture(params=["vmap", "traced"])
def kernel(request, monkeypatch):
    if request.param == "vmap":
        return "vmap"
    monkeypatch.setattr(record_sums, "compiled", lambda function: function)
    monkeypatch.setattr(record_sums, "STEPS", record_sums.Kept(32))
    return "compiled"


def engine(model, records, kernel, *, loss_fn=CROSS_ENTROPY, count=4, sigma=SIGMA, seed=3):
    charge = Charge({(sigma, RATE): count})
    return Releases(
        model,
        loss_fn,
        records,
        sample_rate=RATE,
        expected_batch_size=SIZE,
        charge=charge,
        sources=seeded_sources(seed),
        kernel=kernel,
    )


def released(model, records, kernel, *, names=None, draw=None, sigma=SIGMA):
    """A gradient, a gradient of some names, a product: all that a step can ask for."""
    own = engine(model, records, kernel, sigma=sigma, count=3)
    point, some = weights(model), names or list(weights(model))[-2:]
    rows = [None if draw is None else Draw(draw) for _ in range(3)]
    arguments = {"noise_multiplier": sigma, "max_grad_norm": BOUND}
    found = [
        own.gradient(point, **arguments, draw=rows[0]),
        own.gradient(point, **arguments, names=some, draw=rows[1]),
        own.hessian_product(
            point, direction(point, 4), noise_multiplier=sigma, max_norm=BOUND, draw=rows[2]
        ),
    ]
    assert own._charge.is_used_up
    return [list(one) for one in found], torch.cat([flat(one) for one in found]), own


def assert_equals_opacus(model, records, kernel, **more):
    names, wanted, _ = released(model, records, "eager", **more)
    own_names, found, own = released(model, records, kernel, **more)
    assert own._sums is not None, "the fast kernel was not used"
    assert own_names == names
    assert found.isfinite().all()
    assert (found - wanted).abs().max() <= NEAR[found.dtype]


def images(name, dtype, size=45):
    model = build_model(name, input_shape=(1, 8, 8), num_classes=3, seed=0, **MODELS[name])
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(size, 1, 8, 8, generator=draw, dtype=torch.float64).to(dtype)
    return model.to(dtype), (inputs, torch.randint(3, (size,), generator=draw))


# --- equal to Opacus ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("name", MODELS)
def test_a_kernel_s_releases_are_those_of_opacus(name, dtype, kernel):
    assert_equals_opacus(*images(name, dtype), kernel)


def test_compiled_releases_are_those_of_opacus():
    assert_equals_opacus(*images("mlp", torch.float64, 30), "compiled")


@pytest.mark.parametrize("name", [n for n in layers() if n not in ("weight norm", "embedding")])
def test_every_layer_s_sums_are_those_of_opacus(name, kernel):
    model, records = layer_problem(name, torch.float64)
    own = engine(model, records, kernel, sigma=0.0)
    found = own.gradient(
        weights(model), noise_multiplier=0.0, max_grad_norm=BOUND, draw=Draw(torch.arange(6))
    )
    wanted = clipped(record_gradients(model, records), BOUND) / SIZE
    assert own._sums is not None
    assert (flat(found) - wanted).abs().max() <= 1e-12


@pytest.mark.parametrize("size", [0, 1, 16, 17, 48, 49, 64, 65, 300])
def test_batches_of_every_size_are_those_of_opacus(size, kernel):
    records = smooth_records(300)
    assert_equals_opacus(SmoothNet(), records, kernel, draw=torch.arange(size))


def test_records_that_raise_or_are_not_finite_count_as_with_opacus(kernel):
    model, (inputs, targets) = images("mlp", torch.float64, 20)
    inputs[0], inputs[1], inputs[2] = torch.nan, torch.inf, 1e200
    for wrong in (77, -1, -100):  # beyond the output; compiled code would take -1 for the last
        targets[3] = wrong
        assert_equals_opacus(model, (inputs, targets), kernel, draw=torch.arange(20))


def test_a_batch_of_records_that_raise_alone_is_noise(kernel):
    model, (inputs, targets) = images("mlp", torch.float64, 3)
    assert_equals_opacus(model, (inputs, targets + 70), kernel, draw=torch.arange(3))


# --- the mechanism --------------------------------------------------------------------------------


def test_a_release_is_taken_before_anything_is_computed(kernel):
    own = engine(SmoothNet(), smooth_records(5), kernel, count=0)
    draw = own.draw()
    with pytest.raises(PrivacyError, match="not reserved"):
        own.gradient(weights(SmoothNet()), noise_multiplier=SIGMA, max_grad_norm=1.0, draw=draw)
    assert len(draw.take()) >= 0  # it was not used


def test_a_batch_is_summed_in_as_few_calls_as_its_pieces(kernel, monkeypatch):
    calls, honest = [], record_sums.clipped_sums
    own = engine(SmoothNet(), smooth_records(300), kernel)

    def counted(rows, mask, bound):
        calls.append(len(mask))
        return honest(rows, mask, bound)

    monkeypatch.setattr(record_sums, "clipped_sums", counted)
    own.gradient(
        weights(SmoothNet()), noise_multiplier=SIGMA, max_grad_norm=1.0, draw=Draw(torch.arange(90))
    )
    assert calls == ([90] if kernel == "vmap" else [64, 16, 16])


def without_mask(rows, mask, bound):
    return HONEST(rows, torch.ones_like(mask), bound)


def clip_after_the_sum(rows, mask, bound):
    sums = HONEST(rows, mask, bound * 0 + 1e12)
    length = torch.stack([one.norm() for one in sums]).norm()
    return [one * (bound / (length + 1e-6)).clamp(max=1.0) for one in sums]


def rows_that_are_no_numbers_times_zero(rows, mask, bound):
    whole = [r if isinstance(r, torch.Tensor) else r[0][:, :, None] * r[1][:, None] for r in rows]
    norms = torch.stack([one.flatten(1).norm(dim=1) for one in whole]).norm(dim=0)
    shares = (bound / (norms + 1e-6)).clamp(max=1.0) * mask
    return [torch.einsum("i,i...->...", shares, one) for one in whole]


def noise_by_padded_rows(sums, std, size, generator):
    return NOISY(sums, std * (64 / SIZE) ** 0.5, size, generator)


HONEST, NOISY = record_sums.clipped_sums, record_sums.noisy


@pytest.mark.parametrize(
    ("where", "name", "wrong"),
    [
        (record_sums, "clipped_sums", without_mask),
        (record_sums, "clipped_sums", clip_after_the_sum),
        (record_sums, "clipped_sums", rows_that_are_no_numbers_times_zero),
        (releases, "noisy", noise_by_padded_rows),
    ],
)
def test_the_comparison_with_opacus_refuses_the_planted_bug(where, name, wrong, monkeypatch):
    monkeypatch.setattr(record_sums, "compiled", lambda function: function)
    monkeypatch.setattr(record_sums, "STEPS", record_sums.Kept(32))
    model, (inputs, targets) = images("mlp", torch.float64, 20)
    inputs[0] = torch.inf
    arguments = (model, (inputs, targets), "compiled")
    assert_equals_opacus(*arguments, draw=torch.arange(20))
    monkeypatch.setattr(record_sums, "STEPS", record_sums.Kept(32))
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(AssertionError):
        assert_equals_opacus(*arguments, draw=torch.arange(20))


def test_the_audit_passes_on_a_kernel(kernel):
    def build(*arguments, **more):
        return Releases(*arguments, **more, kernel=kernel)

    checks = ["gradient", "hvp", "fomaml", "second-order", "noise", "fresh-noise", "fresh-batches"]
    audited = Engine(releases=build, noise_seed=3)
    found = run_audit(only=checks, engine=audited, canaries=400)
    assert all(one.is_ok for one in found)


# --- models that a kernel cannot take, and what is kept -------------------------------------------


def closing_over(factor):
    return lambda outputs, targets: factor * CROSS_ENTROPY(outputs, targets)


@pytest.mark.parametrize(
    ("model", "loss_fn", "name"),
    [(RANDOM, CROSS_ENTROPY, "vmap"), (SmoothNet(), closing_over(2.0), "compiled")],
    ids=["random layers", "a loss without a key"],
)
def test_what_a_kernel_cannot_take_stays_with_opacus_and_one_warning(model, loss_fn, name, caplog):
    record_sums._warn_once.cache_clear()
    logging.getLogger("flwr").propagate = True
    with caplog.at_level(logging.WARNING, logger="flwr"):
        for _ in range(2):
            own = engine(model, smooth_records(5), name, loss_fn=loss_fn)
            assert own._sums is None
    assert sum("trains by hooks" in one.message for one in caplog.records) == 1


def test_equal_models_share_one_graph_and_none_of_their_numbers(kernel):
    record_sums.STEPS._values.clear()
    for seed in (0, 1):
        model = SmoothNet(seed)
        assert_equals_opacus(model, smooth_records(9, seed), kernel, draw=torch.arange(9))
    if kernel == "compiled":
        assert len(record_sums.STEPS) == 2  # for all names, and for some


def test_a_check_that_passed_is_not_made_again_and_one_that_failed_is(monkeypatch):
    made, honest = [], releases.check_records_are_apart

    def counted(model, inputs):
        made.append(1)
        honest(model, inputs)

    monkeypatch.setattr(releases, "check_records_are_apart", counted)
    for seed in (0, 0, 1):  # other numbers are another model
        engine(SmoothNet(seed), smooth_records(5), "eager")
    assert len(made) == 2

    def refuses(model, inputs):
        made.append(1)
        raise ModelError("mixes records")

    monkeypatch.setattr(releases, "check_records_are_apart", refuses)
    for _ in range(2):
        with pytest.raises(ModelError):
            engine(SmoothNet(0), smooth_records(5), "eager")
    assert len(made) == 4


def test_a_record_whose_gradient_is_an_extreme_product_has_no_more_influence_than_the_bound(kernel):
    # A server's weights: one factor of the outer product so small that its square is 0 in float32,
    # the other one so large that the product is not.
    model = nn.Sequential(nn.Linear(1, 128), nn.ReLU(), nn.Linear(128, 62))
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
        model[0].weight.fill_(1.3e18)
        model[2].bias[0] = 52.0
    inputs, bound = torch.tensor([[0.0], [0.0], [0.0], [1.0]]), 1e-3
    records = inputs, torch.zeros(4, dtype=torch.long)
    sums = record_sums.RecordSums(model, CROSS_ENTROPY, records, kernel=kernel)
    params = {name: value.detach() for name, value in model.named_parameters()}

    def total(count: int) -> torch.Tensor:
        found = record_sums.sums_over(
            lambda batch, limit: sums.gradient(params, sums.names, batch, limit),
            records,
            record_sums.pieces(torch.arange(count), 64),
            bound,
            params,
        )
        return torch.cat([one.flatten() for one in found]).double()

    assert (total(4) - total(3)).norm() <= bound * (1 + 1e-6)


SCALE = 1.0


def scaled_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return SCALE * CROSS_ENTROPY(output, target)


def test_a_loss_that_reads_a_global_is_told_from_itself_with_another_one(monkeypatch):
    before = key_of(scaled_loss)
    monkeypatch.setitem(scaled_loss.__globals__, "SCALE", 3.0)
    assert key_of(scaled_loss) != before
    monkeypatch.setitem(scaled_loss.__globals__, "SCALE", object())
    with pytest.raises(NoKeyError, match="object"):
        key_of(scaled_loss)


def test_what_cannot_be_taken_is_tried_once_only(monkeypatch):
    monkeypatch.setattr(record_sums, "REFUSED", record_sums.Kept(4))
    tries = []
    monkeypatch.setattr(record_sums, "rows_of", lambda *_: tries.append(1) or 1 / 0)
    for _ in range(3):
        with pytest.raises(ModelError, match="ZeroDivisionError"):
            record_sums.RecordSums(RANDOM, CROSS_ENTROPY, smooth_records(3), kernel="vmap")
    assert len(tries) == 1
