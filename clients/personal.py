"""A model that stays on its client, and lasts over the rounds."""

import torch
from flwr.app import Context

from ..errors import ConfigError
from ..wire import NamedArrays
from .objective import Params
from .store import ClientStore, Config, LastingState

PERSONAL = "personal"


class PersonalModel:
    """The personal model of one client.

    Args:
        context: Flower's, in whose state the model lasts.
        client: the client's name.
        store: where it outlives the context; None: nowhere.
        kind: of the state: models that must not be taken for each other have different ones.

    Raises:
        ConfigError: where there is no context to keep it in.
    """

    def __init__(
        self,
        context: Context | None,
        *,
        client: str = "",
        store: ClientStore | None = None,
        kind: str = PERSONAL,
    ) -> None:
        if context is None:
            raise ConfigError(
                "a personal model needs context=: it lasts over rounds in Flower's Context.state"
            )
        self._state = LastingState(context, kind=kind, client=client, store=store)

    def before(self, config: Config, device: str) -> Params | None:
        """Return the model of the rounds before ``config``'s on ``device``; None where none is."""
        return _on(device, self._state.before(config))

    def after(self, config: Config, device: str) -> Params | None:
        """Return the model that ``config``'s round and those before left; None where none did."""
        return _on(device, self._state.after(config))

    def keep(self, config: Config, params: Params) -> None:
        """Keep ``params`` as what ``config``'s round left."""
        self._state.keep(config, {n: value.detach().cpu().numpy() for n, value in params.items()})


def _on(device: str, arrays: NamedArrays | None) -> Params | None:
    if arrays is None:
        return None
    return {name: torch.tensor(value, device=device) for name, value in arrays.items()}
