"""conv4: the four-block convolutional net of few-shot learning (MAML, 1703.03400, section 5.2).

Each block is conv 3x3 - GroupNorm - ReLU - max-pool 2; one linear layer follows the four.

Differences: GroupNorm (1803.08494) stands where the paper has BatchNorm, which is not safe under
per-sample gradients; and a map smaller than 2x2 is not pooled, so that small images work too.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ._build import register_model
from ._norm import group_norm
from ._options import count, image_shape

BLOCKS = 4


@register_model("conv4")
class Conv4(nn.Module):
    """Map images to logits through four convolution blocks of equal width.

    Input (B, C, H, W), floating, any C, H, W of at least 1; output (B, num_classes). Raises
    ConfigError for a wrong option, ModelError where the records are no images.

    Args:
        input_shape: (C, H, W) of one image.
        num_classes: width of the output.
        width: channels of each block, at least 1. The paper uses 64 on Omniglot and 32 on
            miniImageNet; the default is 32, since an exact meta-gradient then costs half of what it
            does at 64, which matters where one laptop computes for every client.

    >>> Conv4((1, 28, 28), 5).head
    Linear(in_features=32, out_features=5, bias=True)
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, *, width: int | str = 32
    ) -> None:
        super().__init__()
        channels, *size = image_shape("conv4", input_shape)
        width = count("width", width)
        layers: list[nn.Module] = []
        for _ in range(BLOCKS):
            layers += [nn.Conv2d(channels, width, 3, padding=1), group_norm(width), nn.ReLU()]
            channels = width
            if min(size) >= 2:
                layers.append(nn.MaxPool2d(2))
                size = [length // 2 for length in size]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(width * size[0] * size[1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images ``x`` (B, C, H, W)."""
        logits: Tensor = self.head(self.body(x))
        return logits
