"""char-lstm: next-character prediction on Shakespeare (LEAF, 1812.01097), an LSTM of linear layers.

    i, f, g, o = split(W_x x_t + b + W_h h_{t-1})
    c_t = s(f) c_{t-1} + s(i) tanh(g)
    h_t = s(o) tanh(c_t)

with s the sigmoid and h_0 = c_0 = 0; the logits are W h_T + b'.

torch's fused nn.LSTM has no double backward on a GPU and no batching rule for vmap. Here the
gates are ordinary nn.Linear layers, W_h called once a step, so second derivatives, torch.func and
Opacus' hooks (which add up the calls of one layer) all work.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ._build import register_model
from ._options import count


class LSTMLayer(nn.Module):
    """Run one LSTM layer over time: (B, T, num_inputs) to (B, T, hidden), from a zero state.

    The forget gate starts with bias 1, as in LEAF's TensorFlow cell, so that early gradients reach
    far back.
    """

    def __init__(self, num_inputs: int, hidden: int) -> None:
        super().__init__()
        self.from_input = nn.Linear(num_inputs, 4 * hidden)
        self.from_state = nn.Linear(hidden, 4 * hidden, bias=False)
        with torch.no_grad():
            self.from_input.bias[hidden : 2 * hidden] += 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Return the states (B, T, hidden) after each step of ``x`` (B, T, num_inputs)."""
        gates = self.from_input(x)  # (B, T, 4 hidden), all steps at once
        state = gates.new_zeros(gates.shape[0], gates.shape[2] // 4)
        cell = torch.zeros_like(state)
        states = []
        for now in gates.unbind(1):
            i, f, g, o = (now + self.from_state(state)).chunk(4, dim=-1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            state = o.sigmoid() * cell.tanh()
            states.append(state)
        return torch.stack(states, 1)  # T x (B, hidden) -> (B, T, hidden)


@register_model("char-lstm")
class CharLSTM(nn.Module):
    """Map a string of character ids to the logits of the character that follows.

    Input (B, T), int64 in [0, num_classes), any T of at least 1; output (B, num_classes). Raises
    ConfigError for a wrong option, ModelError where a record is no sequence.

    Args:
        input_shape: (T,), the length of one string; 80 in LEAF.
        num_classes: size of the vocabulary, of the input and of the output.
        embedding: width of a character's vector, at least 1.
        hidden: width of each layer's state, at least 1.
        layers: LSTM layers on top of each other, 1 or 2.

    Differences: LEAF has 2 layers of 256. The defaults are smaller since an exact meta-gradient
    through 80 steps has to run on a laptop; ``hidden=256 layers=2`` gives LEAF's model.

    >>> CharLSTM((80,), 90)(torch.zeros(3, 80, dtype=torch.int64)).shape
    torch.Size([3, 90])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        embedding: int | str = 8,
        hidden: int | str = 64,
        layers: int | str = 1,
    ) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise ModelError(
                f"model char-lstm got input_shape {tuple(input_shape)}: it takes strings of "
                "character ids, (sequence_length,); for images use 'cnn' or 'conv4'"
            )
        embedding, hidden = count("embedding", embedding), count("hidden", hidden)
        widths = [embedding] + [hidden] * count("layers", layers, high=2)
        self.embedding = nn.Embedding(num_classes, embedding)
        self.body = nn.Sequential(*(LSTMLayer(below, above) for below, above in pairwise(widths)))
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of what follows the strings ``x`` (B, T)."""
        states = self.body(self.embedding(x))  # (B, T) -> (B, T, embedding) -> (B, T, hidden)
        logits: Tensor = self.head(states[:, -1])
        return logits
