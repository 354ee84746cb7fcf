"""cnn: the convolutional net of LEAF for FEMNIST (1812.01097).

Its layers are conv 5x5, 32 - ReLU - max-pool 2 - conv 5x5, 64 - ReLU - max-pool 2 - dense 2048 -
ReLU - logits.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ._build import register_model
from ._options import count, image_shape


@register_model("cnn")
class FemnistCNN(nn.Module):
    """Map images to logits through two convolutions and one wide dense layer.

    Input (B, C, H, W), floating, H and W at least 4; output (B, num_classes). The convolutions keep
    the size of the image ("same" padding). Raises ConfigError for a wrong option, ModelError where
    the records are no images of that size.

    Args:
        input_shape: (C, H, W) of one image.
        num_classes: width of the output; 62 in FEMNIST.
        dense: width of the dense layer, at least 1.

    >>> sum(value.numel() for value in FemnistCNN((1, 28, 28), 62).parameters())
    6603710
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, *, dense: int | str = 2048
    ) -> None:
        super().__init__()
        channels, height, width = image_shape("cnn", input_shape, smallest=4)
        dense = count("dense", dense)
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (height // 2 // 2) * (width // 2 // 2), dense),
            nn.ReLU(),
        )
        self.head = nn.Linear(dense, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images ``x`` (B, C, H, W)."""
        logits: Tensor = self.head(self.body(x))
        return logits
