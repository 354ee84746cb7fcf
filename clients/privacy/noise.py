"""Where the randomness of a release comes from: the operating system, never a round or a run."""

import secrets
from dataclasses import dataclass

import torch

from ...errors import PrivacyError

_WORDS = 624  # of the Mersenne twister's state
_HEAD, _SIZE = 24, 5056  # bytes before them, and of all, in torch's CPU generator


@dataclass(frozen=True)
class Sources:
    """The generators of one round of one client.

    Attributes:
        draws: of Poisson batches, on the CPU.
        noise: of Gaussian noise, on the device of the parameters.
    """

    draws: torch.Generator
    noise: torch.Generator


def fresh_sources(device: str = "cpu") -> Sources:
    """Return generators that nobody can know: each has a state of its own from the system."""
    if torch.device(device).type == "cpu":
        return Sources(_fresh_on_cpu(), _fresh_on_cpu())
    noise = torch.Generator(device).manual_seed(secrets.randbits(63))
    return Sources(_fresh_on_cpu(), noise)


def seeded_sources(seed: int, device: str = "cpu") -> Sources:
    """Return reproducible generators, for tests: noise that can be reproduced protects nobody."""
    draws = torch.Generator().manual_seed(2 * seed)
    return Sources(draws, torch.Generator(device).manual_seed(2 * seed + 1))


def _fresh_on_cpu() -> torch.Generator:
    # manual_seed keeps 32 bits of a seed on the CPU: few enough to try them all. The whole state
    # of the twister is filled instead.
    generator = torch.Generator().manual_seed(secrets.randbits(32))
    state = generator.get_state()
    if state.numel() != _SIZE:
        raise PrivacyError(
            f"the state of torch {torch.__version__}'s generator has {state.numel()} bytes, "
            f"{_SIZE} are known: noise would come from 32 bits of entropy; use another torch"
        )
    words = torch.frombuffer(bytearray(secrets.token_bytes(4 * _WORDS)), dtype=torch.int32)
    whole = (words.to(torch.int64) & 0xFFFFFFFF).view(torch.uint8)
    state[_HEAD : _HEAD + 8 * _WORDS] = whole
    return generator.set_state(state)
