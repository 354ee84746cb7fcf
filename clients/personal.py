"""A model that stays on its client, kept over the rounds in Flower's Context.state."""

import torch
from flwr.app import Context

from ..errors import ConfigError
from ..wire import from_record, to_record
from .objective import Params

STATE_KEY = "metabloom.personal"


class PersonalModel:
    """The personal model of one client.

    Raises:
        ConfigError: where there is no context to keep it in.
    """

    def __init__(self, context: Context | None) -> None:
        if context is None:
            raise ConfigError(
                "a personal model needs context=: it lasts over rounds in Flower's Context.state"
            )
        self._state = context.state

    def load(self, device: str) -> Params | None:
        """Return the model of earlier rounds on ``device``; None before the first."""
        if STATE_KEY not in self._state.array_records:
            return None
        kept = from_record(self._state.array_records[STATE_KEY])
        return {name: torch.tensor(value, device=device) for name, value in kept.items()}

    def keep(self, params: Params) -> None:
        """Put ``params`` in the place of the model of earlier rounds."""
        arrays = {name: value.detach().cpu().numpy() for name, value in params.items()}
        self._state[STATE_KEY] = to_record(arrays)
