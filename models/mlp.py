"""mlp: a multilayer perceptron on flattened records.

h_0 = flatten(x); h_k = activation(W_k h_{k-1} + b_k); logits = W h_K + b.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import Tensor, nn

from ._build import register_model
from ._options import ACTIVATIONS, choice, counts


@register_model("mlp")
class MLP(nn.Module):
    """Map records of any shape to logits through hidden layers of given widths.

    Input (B, *input_shape), floating; output (B, num_classes). Raises ConfigError for a wrong
    option.

    Args:
        input_shape: shape of one record; it is flattened.
        num_classes: width of the output.
        hidden: widths of the hidden layers: ``64``, ``"64,64"`` or ``(64, 64)``, each at least 1.
        activation: ``relu``, ``tanh`` or ``gelu``; the last two are smooth.

    >>> MLP((1, 15, 15), 5, hidden=64).head
    Linear(in_features=64, out_features=5, bias=True)
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        hidden: int | str | Sequence[int] = "64",
        activation: str = "relu",
    ) -> None:
        super().__init__()
        widths = (prod(input_shape), *counts("hidden", hidden))
        nonlinearity = choice("activation", activation, ACTIVATIONS)
        layers: list[nn.Module] = [nn.Flatten()]
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nonlinearity()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of records ``x`` (B, *input_shape)."""
        logits: Tensor = self.head(self.body(x))
        return logits
