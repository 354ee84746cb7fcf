"""The model, the digits of one client, and plain training and testing."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

Batch = tuple[torch.Tensor, torch.Tensor]


class Net(nn.Module):
    """A multilayer perceptron for 8x8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.output = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return class scores: (B, 64) -> (B, 10)."""
        return self.output(torch.relu(self.hidden(images)))


def load_data(partition_id: int, num_partitions: int) -> tuple[Batch, Batch]:
    """Return a client's training batch and test batch."""
    digits = load_digits()
    rows = np.flatnonzero(np.arange(len(digits.target)) % num_partitions == partition_id)
    images = torch.tensor(digits.data[rows] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target[rows])
    most = len(rows) * 4 // 5
    return (images[:most], labels[:most]), (images[most:], labels[most:])


def train(net: nn.Module, batch: Batch, lr: float, steps: int = 5) -> float:
    """Take gradient steps on ``net`` in place and return the loss of the last one."""
    images, labels = batch
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.no_grad()
def test(net: nn.Module, batch: Batch) -> tuple[float, float]:
    """Return loss and accuracy of ``net``."""
    images, labels = batch
    scores = net(images)
    accuracy = (scores.argmax(dim=1) == labels).float().mean()
    return nn.functional.cross_entropy(scores, labels).item(), accuracy.item()
