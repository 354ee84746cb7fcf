"""What one client holds: a support set to adapt on and a query set to be judged on."""

from dataclasses import dataclass, replace

import torch

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class ClientData:
    """Hold one client's records, split in two; no record is in both.

    Attributes:
        support: inputs (S, *input_shape) float32, or int64 for characters; targets (S,) int64.
        query: the same for the (Q, ...) records that adaptation never sees.
        fixed_split: the two must not be mixed: windows of one text overlap, or the inputs were
            scaled by statistics of the support set.
        held_back: records that no training sees: evaluations judge by them, and not by the query
            set, which many algorithms train on; None: there are none.
    """

    support: Batch
    query: Batch
    fixed_split: bool = False
    held_back: Batch | None = None

    @property
    def judging(self) -> Batch:
        """Return the records that evaluations judge by."""
        return self.query if self.held_back is None else self.held_back

    @property
    def num_examples(self) -> int:
        """Return the number of records to learn from, support and query together."""
        return len(self.support[1]) + len(self.query[1])

    @property
    def all(self) -> Batch:
        """Return support and query as one batch, support first: inputs (S + Q, ...), targets."""
        inputs = torch.cat((self.support[0], self.query[0]))
        return inputs, torch.cat((self.support[1], self.query[1]))

    def to(self, device: str) -> "ClientData":
        """Return the same records on ``device``."""
        (xs, ys), (xq, yq), back = self.support, self.query, self.held_back
        return replace(
            self,
            support=(xs.to(device), ys.to(device)),
            query=(xq.to(device), yq.to(device)),
            held_back=back and (back[0].to(device), back[1].to(device)),
        )


def with_held_back(data: ClientData, share: float, generator: torch.Generator) -> ClientData:
    """Return the same records, a share of the query set held back from training.

    Args:
        data: of one client; with ``fixed_split`` its records may depend on each other, so that none
            can be held back by chance: it comes back as it is.
        share: in [0, 1), of the query records, rounded; one at least stays.
        generator: draws which.

    >>> data = ClientData((torch.zeros(4, 2), torch.zeros(4)), (torch.ones(10, 2), torch.ones(10)))
    >>> held = with_held_back(data, 0.5, torch.Generator())
    >>> len(held.query[1]), len(held.judging[1]), held.num_examples
    (5, 5, 9)
    """
    inputs, targets = data.query
    count = min(round(share * len(targets)), len(targets) - 1)
    if count < 1 or data.fixed_split:
        return data
    order = torch.randperm(len(targets), generator=generator).to(targets.device)
    back, left = order[:count].sort().values, order[count:].sort().values
    return replace(
        data,
        query=(inputs[left], targets[left]),
        held_back=(inputs[back], targets[back]),
    )
