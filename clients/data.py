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
    """

    support: Batch
    query: Batch
    fixed_split: bool = False

    @property
    def num_examples(self) -> int:
        """Return the number of records, support and query together."""
        return len(self.support[1]) + len(self.query[1])

    @property
    def all(self) -> Batch:
        """Return support and query as one batch, support first: inputs (S + Q, ...), targets."""
        inputs = torch.cat((self.support[0], self.query[0]))
        return inputs, torch.cat((self.support[1], self.query[1]))

    def to(self, device: str) -> "ClientData":
        """Return the same records on ``device``."""
        (xs, ys), (xq, yq) = self.support, self.query
        return replace(
            self,
            support=(xs.to(device), ys.to(device)),
            query=(xq.to(device), yq.to(device)),
        )
