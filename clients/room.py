"""How many clients of a cohort the memory holds."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch

from .kernel import Few

ON_CPU = 8  # clients at once; more are slower, for caches and the allocator
PROBE = 4  # clients at once until their memory is known
MOST = 1024
SHARE = 0.7  # of the free memory: other processes may be on the same GPU

_bytes_of: Few[Hashable, float] = Few()  # memory of one client, by group


class Room:
    """Room for the clients of one group on one device.

    Args:
        group: clients of one need the same memory.
        device: where they compute.
        most: clients at once; 0: what the memory holds.
    """

    def __init__(self, group: Hashable, device: torch.device, most: int = 0) -> None:
        self._group = group
        self._device = device
        self._most = most or (MOST if device.type == "cuda" else ON_CPU)

    def clients(self) -> int:
        """Return how many clients may compute at once now, at least 1."""
        if self._device.type != "cuda":
            return self._most
        known = _bytes_of.get(self._group)
        if known is None:
            return min(PROBE, self._most)
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(
            self._device
        )
        free = torch.cuda.mem_get_info(self._device)[0] + unused
        return max(1, min(int(SHARE * free / known), self._most))

    @contextmanager
    def measured(self, clients: int) -> Iterator[None]:
        """Run a block in which ``clients`` compute, and remember what they need."""
        is_new = self._device.type == "cuda" and self._group not in _bytes_of
        if is_new:
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
        yield
        if is_new:
            needed = torch.cuda.max_memory_allocated(self._device) - before
            _bytes_of[self._group] = max(needed / clients, 1.0)

    def halve(self, clients: int) -> None:
        """Go on with half of ``clients``, which were too many.

        Raises:
            torch.OutOfMemoryError: where that is less than one.
        """
        if clients == 1:
            raise torch.OutOfMemoryError("one client needs more memory than there is")
        self._most = clients // 2
        if self._group in _bytes_of:  # each needs more than was measured
            _bytes_of[self._group] *= 2
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
