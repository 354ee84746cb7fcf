"""Small nets of the distillation benchmark, cheap enough for many runs on CPUs: strides first.

Registered by the plug-in ``distillation_data``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metabloom.models import register_model

CNN, RESNET = "bench-strided-cnn", "bench-small-resnet"
GROUPS = 4  # of GroupNorm: widths are multiples of it


@register_model(CNN)
class StridedCNN(nn.Module):
    """Map images (B, C, H, W) to logits: conv 5x5/2, W - conv 3x3/2, 2 W - dense 4 W - logits.

    ReLU follows all but the last.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, *, width: int = 8) -> None:
        super().__init__()
        channels, *sides = input_shape
        cells = 1
        for side in sides:
            cells *= -(-side // 4)
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * cells, 4 * width),
            nn.ReLU(),
        )
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.body(x))
        return logits


class _Block(nn.Module):
    """Compute relu(F(x) + shortcut(x)) with F = GN conv relu GN conv; it halves the image."""

    def __init__(self, wide_in: int, wide_out: int) -> None:
        super().__init__()
        self.residue = nn.Sequential(
            nn.Conv2d(wide_in, wide_out, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(GROUPS, wide_out),
            nn.ReLU(),
            nn.Conv2d(wide_out, wide_out, 3, padding=1, bias=False),
            nn.GroupNorm(GROUPS, wide_out),
        )
        self.shortcut = nn.Conv2d(wide_in, wide_out, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, wide_out, H / 2, W / 2)."""
        return torch.relu(self.residue(x) + self.shortcut(x))


@register_model(RESNET)
class SmallResNet(nn.Module):
    """Map images (B, C, H, W) to logits: conv 5x5/2, W - two residual blocks, 2 W and 4 W - mean.

    With GroupNorm; each block halves the image.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, *, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(input_shape[0], width, 5, stride=2, padding=2, bias=False),
            nn.GroupNorm(GROUPS, width),
            nn.ReLU(),
            _Block(width, 2 * width),
            _Block(2 * width, 4 * width),
        )
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.body(x).mean((2, 3)))
        return logits
