"""Random streams derived by identity, never from global state.

``numpy_stream(seed, "sample", round)`` depends on its arguments alone, so results do not depend on
the number of workers, on the order of replies or on what else drew random numbers before.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def stream_seed(seed: int, *identity: int | str) -> int:
    """Return a 63-bit seed for the stream that ``identity`` names under ``seed``.

    >>> stream_seed(0, "sample", 1) == stream_seed(0, "sample", 1)
    True
    >>> stream_seed(0, "sample", 1) == stream_seed(0, "sample", 2)
    False
    """
    text = repr((int(seed), *identity)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def numpy_stream(seed: int, *identity: int | str) -> np.random.Generator:
    """Return the NumPy generator of one stream."""
    return np.random.default_rng(stream_seed(seed, *identity))


def torch_stream(seed: int, *identity: int | str) -> "torch.Generator":
    """Return the torch (CPU) generator of one stream."""
    import torch

    return torch.Generator().manual_seed(stream_seed(seed, *identity))


@contextmanager
def torch_seeded(seed: int, *identity: int | str, device: str = "cpu") -> Iterator[None]:
    """Run a block under one stream where torch offers only its global generator.

    That is module initialisation and dropout. The generator, and that of a CUDA ``device``, is
    restored afterwards.
    """
    import torch

    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(stream_seed(seed, *identity))
        for one in devices:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(stream_seed(seed, *identity))
        yield


@contextmanager
def torch_drawing_from(generator: "torch.Generator", *, device: str = "cpu") -> Iterator[None]:
    """Run a block in which layers that draw random numbers (dropout) take them from ``generator``.

    For numbers that must stay secret: on the CPU the whole state of the generator is used, and it
    goes on from where the block leaves it; ``manual_seed`` keeps 32 bits of a seed there. A CUDA
    ``device`` is seeded by 62 bits of it.

    Args:
        generator: on the CPU.
        device: where the layers compute.
    """
    import torch

    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        for one in devices:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        torch.default_generator.set_state(generator.get_state())
        try:
            yield
        finally:
            generator.set_state(torch.default_generator.get_state())
