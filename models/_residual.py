"""Parts of torchvision's nets as torch can differentiate them under hooks and twice.

Adding a shortcut in place is refused by torch on the output of a layer that has backward hooks, and
Opacus hooks every layer; torch.nn.Hardsigmoid has no second derivative. The parameters, their names
and the values computed stay torchvision's.
"""

import torch
from torch import Tensor, nn
from torchvision.models.mobilenetv3 import InvertedResidual
from torchvision.models.resnet import BasicBlock


class ResidualBlock(BasicBlock):  # type: ignore[misc]  # torchvision has no types
    """Compute ResNet-18's block (1512.03385), y = relu(F(x) + shortcut(x)), out of place."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output (B, C', H', W') for ``x`` (B, C, H, W)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        residue = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        total: Tensor = self.relu(residue + shortcut)
        return total


class InvertedBlock(nn.Module):
    """Compute MobileNetV3's block (1905.02244), y = F(x) + x where shapes agree, out of place."""

    def __init__(self, original: InvertedResidual) -> None:
        super().__init__()
        self.block = original.block
        self.has_shortcut: bool = original.use_res_connect

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output (B, C', H', W') for ``x`` (B, C, H, W)."""
        residue: Tensor = self.block(x)
        return residue + x if self.has_shortcut else residue


class HardSigmoid(nn.Module):
    """Compute relu6(x + 3) / 6, elementwise; its second derivative, zero, exists."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of ``x`` with values in [0, 1]."""
        return torch.clamp(x + 3.0, 0.0, 6.0) / 6.0
