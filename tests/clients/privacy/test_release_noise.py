"""The noise of releases: its size, its law, its independence, and where it comes from."""

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import nn

from metabloom.clients.privacy.noise import Sources, fresh_sources, seeded_sources
from metabloom.clients.privacy.releases import Draw, Releases
from tests.clients.privacy import engine_mutants as mutants
from tests.clients.privacy.engine_problems import (
    CROSS_ENTROPY,
    charge_of,
    correlation,
    flat,
    linear,
    nothing,
    output_itself,
    releases_of,
    weights,
)

LOW, HIGH = 5e-7, 1 - 5e-7  # chi-square bounds: a false alarm has probability 1e-6
FAR = 6.0  # of a standard normal value: a false alarm has probability 2e-9
SIGMA, BOUND, SIZE = 1.3, 0.4, 25.0
STD = SIGMA * BOUND / SIZE


def wide(dtype=torch.float32):
    return nn.Linear(120, 100).to(dtype)


def noise_of(kind=Releases, *, dtype=torch.float32, sources=None, count=1, hessian=False):
    """The values of releases on no records, over what their deviation should be; (count, d)."""
    model = wide(dtype)
    releases = releases_of(
        model,
        nothing(120, dtype),
        kind=kind,
        rate=0.3,
        size=SIZE,
        charge=charge_of(count, SIGMA, 0.3),
        sources=sources or seeded_sources(5),
    )
    towards = {name: torch.full_like(value, 0.5) for name, value in weights(model).items()}
    length = float(flat(towards).norm())
    found = []
    for _ in range(count):
        if hessian:
            value = releases.hessian_product(
                weights(model), towards, noise_multiplier=SIGMA, max_norm=BOUND / length
            )
        else:
            value = releases.gradient(weights(model), noise_multiplier=SIGMA, max_grad_norm=BOUND)
        found.append(torch.cat([part.reshape(-1) for part in value.values()]) / STD)
    assert releases._charge.is_used_up
    return torch.stack(found)


# --- laws ----------------------------------------------------------------------------------------


def noise_is_normal_of_the_right_size(kind, **options):
    values = noise_of(kind, **options)[0].double()
    size = len(values)
    assert size == 12100
    assert stats.chi2.ppf(LOW, size) < float((values**2).sum()) < stats.chi2.ppf(HIGH, size)
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-6
    assert abs(float(values.mean())) * math.sqrt(size) < FAR


def releases_are_independent(kind):
    steps = noise_of(kind, count=4)
    for one, other in itertools.combinations(steps, 2):
        assert abs(correlation(one, other)) < FAR
    one = steps[0]
    assert abs(correlation(one[1:], one[:-1])) < FAR  # coordinate by coordinate
    weight, bias = one[:12000], one[12000:]
    for block in weight.split(100):  # parameter by parameter
        assert abs(correlation(block, bias)) < FAR


def two_releases_on_one_batch_differ_by_noise(kind):
    """Same records, same batch, same parameters: the difference has std sqrt(2) sigma C / b."""
    model = wide()
    inputs, targets = (
        torch.randn(6, 120, generator=torch.Generator().manual_seed(0)),
        torch.arange(6),
    )
    values = []
    for seed in (5, 6):  # a retry, with generators of its own
        releases = releases_of(
            model,
            (inputs, targets),
            kind=kind,
            size=SIZE,
            charge=charge_of(2, SIGMA),
            sources=seeded_sources(seed),
        )
        for _ in range(2):
            value = releases.gradient(
                weights(model),
                noise_multiplier=SIGMA,
                max_grad_norm=BOUND,
                draw=Draw(torch.arange(4)),
            )
            values.append(flat(value).double())
    for one, other in itertools.combinations(values, 2):
        scaled = ((one - other) / (math.sqrt(2) * STD)).pow(2).sum()
        assert stats.chi2.ppf(LOW, len(one)) < scaled < stats.chi2.ppf(HIGH, len(one))


LAWS = [
    noise_is_normal_of_the_right_size,
    releases_are_independent,
    two_releases_on_one_batch_differ_by_noise,
]


@pytest.mark.parametrize("law", LAWS)
def test_the_engine_keeps_the_law(law):
    law(Releases)


@pytest.mark.parametrize(
    ("law", "wrong"),
    [
        (noise_is_normal_of_the_right_size, mutants.NoiseOfSigmaAlone),
        (noise_is_normal_of_the_right_size, mutants.NoiseOverTheRootOfTheBatch),
        (noise_is_normal_of_the_right_size, mutants.NoiseForFilledBatchesOnly),
        (noise_is_normal_of_the_right_size, mutants.NoiseTimesNineTenths),
        (noise_is_normal_of_the_right_size, mutants.NoiseOfAUniformLaw),
        (releases_are_independent, mutants.NoiseThatComesAgain),
        (two_releases_on_one_batch_differ_by_noise, mutants.NoiseThatComesAgain),
        (two_releases_on_one_batch_differ_by_noise, mutants.NoiseOverTheRootOfTheBatch),
    ],
)
def test_the_law_refuses_the_planted_bug(law, wrong):
    with pytest.raises(AssertionError):
        law(wrong)


@pytest.mark.parametrize("hessian", [False, True], ids=["gradient", "hessian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_batches_release_noise_of_the_right_size_and_are_booked(dtype, hessian):
    noise_is_normal_of_the_right_size(Releases, dtype=dtype, hessian=hessian)


def test_noise_from_the_system_has_the_right_size_too():
    noise_is_normal_of_the_right_size(Releases, sources=fresh_sources())


def test_noise_of_double_parameters_has_all_their_digits():
    # In single precision it would lie on a grid, and what a sum adds below that grid would be told.
    values = noise_of(dtype=torch.float64)[0] * STD * SIZE
    assert (values != values.float().double()).double().mean() > 0.99


def test_an_empty_poisson_batch_among_filled_ones_is_no_less_noisy():
    model, count, rate = linear(3000), 40, 0.2
    releases = releases_of(
        model,
        (torch.ones(2, 3000), torch.zeros(2).long()),
        loss_fn=output_itself,
        rate=rate,
        charge=charge_of(count, SIGMA, rate),
        sources=seeded_sources(8),
    )
    seen = 0
    for _ in range(count):
        draw = releases.draw()
        seen += not len(draw.rows)
        (value,) = releases.gradient(
            weights(model), noise_multiplier=SIGMA, max_grad_norm=BOUND, draw=draw
        ).values()
        # The records' gradient is constant: what is left around the mean is noise.
        scaled = ((value - value.mean()).double() / (SIGMA * BOUND)).pow(2).sum()
        assert stats.chi2.ppf(1e-8, 2999) < scaled < stats.chi2.ppf(1 - 1e-8, 2999)
    assert 10 < seen < count  # 0.8^2 of 40 are empty
    assert releases._charge.is_used_up


# --- sources -------------------------------------------------------------------------------------


def words(generator: torch.Generator) -> torch.Tensor:
    """The 624 words of 32 bits of the Mersenne twister."""
    return generator.get_state()[24 : 24 + 8 * 624].view(torch.int64).clone()


def test_fresh_sources_share_no_state_and_have_none_that_a_seed_gives():
    found = [words(g) for _ in range(4) for s in [fresh_sources()] for g in (s.draws, s.noise)]
    for state in found:
        assert ((state >= 0) & (state < 2**32)).all()
        # A seed fills the state by a recursion (Knuth, TAOCP 2, 3rd ed., p. 106): none of 2^32
        # seeds gives a state that breaks it, and a random one keeps it at a word with chance 2^-32.
        last = state[:-1]
        step = (1812433253 * (last ^ (last >> 30)) + torch.arange(1, 624)) % 2**32
        assert (step != state[1:]).sum() >= 622
    assert (words(torch.Generator().manual_seed(7))[1:] == _seeded_words(7)[1:]).all()
    for one, other in itertools.combinations(found, 2):
        assert (one != other).sum() >= 623  # a word agrees by chance in 2^-32 * 624 * 28


def _seeded_words(seed):
    state = [seed]
    for number in range(1, 624):
        state.append((1812433253 * (state[-1] ^ (state[-1] >> 30)) + number) % 2**32)
    return torch.tensor(state)


def test_a_fresh_state_is_not_that_of_its_own_initial_seed():
    for generator in (fresh_sources().noise, fresh_sources().draws):
        again = torch.Generator().manual_seed(generator.initial_seed())
        assert (words(again) != words(generator)).sum() >= 623
        drawn = torch.randn(1000, generator=generator)
        assert not torch.equal(drawn, torch.randn(1000, generator=again))


def test_the_words_of_fresh_states_are_uniform_bits():
    state = torch.cat([words(fresh_sources().noise) for _ in range(40)])
    ones = torch.stack([(state >> bit) & 1 for bit in range(32)]).sum(1)
    low, high = stats.binom.ppf([LOW / 32, 1 - LOW / 32], len(state), 0.5)
    assert ((ones >= low) & (ones <= high)).all()


def test_clients_and_retries_have_independent_noise():
    found = [noise_of(sources=fresh_sources())[0] for _ in range(4)]
    for one, other in itertools.combinations(found, 2):
        assert abs(correlation(one, other)) < FAR


def test_draws_and_noise_of_one_client_are_other_streams():
    for sources in (fresh_sources(), seeded_sources(3)):
        one, other = (torch.randn(5000, generator=g) for g in (sources.draws, sources.noise))
        assert abs(correlation(one, other)) < FAR


def test_seeded_sources_reproduce_and_differ_by_seed():
    one, again, other = (noise_of(sources=seeded_sources(seed))[0] for seed in (5, 5, 6))
    assert torch.equal(one, again)
    assert abs(correlation(one, other)) < FAR
    streams = [
        g for seed in (5, 6) for g in (seeded_sources(seed).draws, seeded_sources(seed).noise)
    ]
    assert len({generator.initial_seed() for generator in streams}) == 4  # none is another's


# --- layers that draw ----------------------------------------------------------------------------


def masked(sources: Sources, *, hessian: bool = False) -> torch.Tensor:
    """A release without noise of a model with dropout, under one and the same global state."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 3))
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(0.1)
    records = torch.ones(4, 50), torch.arange(4) % 3
    releases = releases_of(model, records, loss_fn=CROSS_ENTROPY, sources=sources)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # as clients do, from what the server knows
        before = torch.get_rng_state()
        if hessian:
            found = releases.hessian_product(
                weights(model), weights(model), noise_multiplier=0.0, max_norm=1e9
            )
        else:
            found = releases.gradient(weights(model), noise_multiplier=0.0, max_grad_norm=1e9)
        assert torch.equal(before, torch.get_rng_state())
    return flat(found)


@pytest.mark.parametrize("hessian", [False, True], ids=["gradient", "hessian"])
def test_dropout_draws_from_the_secret_source_not_from_a_stream_that_the_server_knows(hessian):
    # Masks go by the row in the batch: were they known, one record more would shift those of all
    # after it, and so move the sum by more than C.
    one, other = (masked(fresh_sources(), hessian=hessian) for _ in range(2))
    assert not torch.equal(one, other)
    again, same = (masked(seeded_sources(4), hessian=hessian) for _ in range(2))
    assert torch.equal(again, same)
