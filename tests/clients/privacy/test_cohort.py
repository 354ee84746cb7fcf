"""Many clients at once are the same mechanism as Opacus, one client after another."""

import pytest
import torch
from torch import nn

from metabloom.clients.privacy.cohort import cohort_gradients, padded
from metabloom.clients.privacy.noise import Sources, seeded_sources
from metabloom.clients.privacy.releases import Draw, Releases
from metabloom.errors import ConfigError, ModelError, PrivacyError
from metabloom.ledger import Charge
from metabloom.models import build_model

SIGMA, BOUND, SIZE = 1.3, 0.4, 5.0
SHAPE = (1, 8, 8)
NOBODY = torch.tensor([], dtype=torch.long)


def clients(dtype):
    """Seven clients with 4 to 34 records, one of which is infinite."""
    draw = torch.Generator().manual_seed(3)
    held = []
    for number in range(7):
        size = 4 + 5 * number
        x = torch.randn(size, *SHAPE, generator=draw, dtype=dtype)
        held.append((x, torch.randint(3, (size,), generator=draw)))
    held[4][0][2] = torch.inf
    return held


def stacked_params(model, count, dtype):
    draw = torch.Generator().manual_seed(4)
    return {
        name: torch.stack(
            [torch.randn(value.shape, generator=draw, dtype=dtype) / 3 for _ in range(count)]
        )
        for name, value in model.named_parameters()
    }


def drawn(held):
    """Some records of each client; none of the second one's, the infinite one of the fifth's."""
    draw = torch.Generator().manual_seed(9)
    rows = [(torch.rand(len(y), generator=draw) < 0.5).nonzero()[:, 0] for _, y in held]
    rows[1], rows[4] = NOBODY, torch.arange(7)
    return rows


def one_by_one(model, held, params, rows, sources: list[Sources]):
    found = []
    for number, (own, pick) in enumerate(zip(held, rows, strict=True)):
        releases = Releases(
            model,
            nn.functional.cross_entropy,
            own,
            sample_rate=0.5,
            expected_batch_size=SIZE,
            charge=Charge({(SIGMA, 0.5): 1}),
            sources=sources[number],
        )
        point = {name: value[number] for name, value in params.items()}
        found.append(
            releases.gradient(point, noise_multiplier=SIGMA, max_grad_norm=BOUND, draw=Draw(pick))
        )
    return {name: torch.stack([one[name] for one in found]) for name in params}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", ["mlp", "conv4"])
def test_a_cohort_is_opacus_client_by_client(name: str, dtype: torch.dtype, tolerance: float):
    model = build_model(name, input_shape=SHAPE, num_classes=3, seed=0).to(dtype)
    held = clients(dtype)
    params, rows = stacked_params(model, len(held), dtype), drawn(held)
    expected = one_by_one(model, held, params, rows, [seeded_sources(n) for n in range(7)])
    found = cohort_gradients(
        model,
        nn.functional.cross_entropy,
        params,
        padded(held, [Draw(pick) for pick in rows]),
        noise_multiplier=SIGMA,
        max_grad_norm=BOUND,
        expected_batch_size=SIZE,
        noise=[seeded_sources(n).noise for n in range(7)],
        layers=seeded_sources(7).draws,
    )
    for key, value in expected.items():
        assert value.isfinite().all()
        assert (found[key] - value).abs().max() <= tolerance


def test_what_is_padding_has_no_share():
    """Zeros have a gradient of their own: without the mask they would be records."""
    model = build_model("mlp", input_shape=SHAPE, num_classes=3, seed=0)
    held = clients(torch.float32)[:2]
    params = stacked_params(model, 2, torch.float32)
    inputs, targets, mask = padded(held, [Draw(torch.tensor([0, 1])), Draw(NOBODY)])
    assert mask.tolist() == [[1, 1], [0, 0]]

    def released(mask):
        return cohort_gradients(
            model,
            nn.functional.cross_entropy,
            params,
            (inputs, targets, mask),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            expected_batch_size=1.0,
            noise=(),
            layers=seeded_sources(7).draws,
        )

    assert all(not value[1].any() for value in released(mask).values())
    assert any(value[1].any() for value in released(torch.ones(2, 2)).values())


def test_a_client_has_a_draw_of_its_own_that_is_used_once():
    held = clients(torch.float32)[:2]
    draws = [Draw(torch.tensor([0])), Draw(torch.tensor([1]))]
    with pytest.raises(ConfigError, match="1 draws for 2 clients"):
        padded(held, draws[:1])
    padded(held, draws)
    with pytest.raises(PrivacyError, match="released twice"):
        padded(held, draws)


def test_whole_numbers_as_inputs_are_refused_since_embeddings_are_joined():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3))
    params = stacked_params(model, 2, torch.float32)
    inputs, targets = torch.zeros(2, 3, 2, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ModelError, match="another client's embedding"):
        cohort_gradients(
            model,
            nn.functional.cross_entropy,
            params,
            (inputs, targets, torch.ones(2, 3)),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            expected_batch_size=2.0,
            noise=(),
            layers=torch.Generator().manual_seed(0),
        )
