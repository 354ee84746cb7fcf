"""A teacher larger than the small net of the clients, and clients that learn from it."""

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from metabloom.clients import TaughtClient
from metabloom.clients.teacher_outputs import LOGITS
from metabloom.teacher import digest_of
from metabloom.wire import SERVER_ROUND, TEACHER_DIGEST, TEACHER_PRIVATE
from tests.clients.small_clients import client, context
from tests.clients.toy_problems import client_data, initialised


class Large(nn.Module):
    """3 -> 8 -> 3 with tanh and dropout; it notes the records of each forward pass."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        return self.head(self.dropout(torch.tanh(self.body(x))))

    def __deepcopy__(self, memo):
        twin = type(self)()
        twin.load_state_dict(self.state_dict())
        twin.calls = self.calls  # of all copies
        return twin.train(self.training)


def large(seed: int = 7) -> Large:
    return initialised(Large(), seed)


def arrays_of(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in module.state_dict().items()}


def told(arrays, number: int = 1, **more):
    """Return the config of a message that means the teacher with ``arrays``."""
    return {
        SERVER_ROUND: number,
        TEACHER_DIGEST: digest_of(arrays),
        TEACHER_PRIVATE: True,
        **more,
    }


def taught(kind=TaughtClient, *, teacher=None, sent=True, **options):
    """Return a client, which was sent its teacher."""
    module = large() if teacher is None else teacher
    options = {"context": context(), "teacher": module} | options
    own = client(kind, **options)
    if sent:
        own.take_teacher(arrays_of(module))
    return own


def start_of(own):
    return own.get_parameters({})


def logits_by(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return what ``module`` says without dropout."""
    state = {name: value.detach() for name, value in module.state_dict().items()}
    twin = type(module)() if isinstance(module, Large) else module
    with torch.no_grad():
        return functional_call(twin.eval(), state, (inputs,))


def all_logits(data=None, module=None) -> torch.Tensor:
    data = client_data() if data is None else data
    return logits_by(large() if module is None else module, data.all[0])


def kept_logits(place) -> np.ndarray:
    """Return the logits in a client's context."""
    return place.state.array_records["metabloom.teacher-logits"][LOGITS].numpy()
