"""A registry name's meaning: the server's strategy and its clients' local update."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..config import RunConfig
from ..registry import Registry
from .rules import Weighting
from .shell import RuleStrategy


@dataclass(frozen=True)
class Recipe:
    """Both ends of one algorithm.

    Attributes:
        strategy: ``strategy(**shell) -> RuleStrategy``, where ``shell`` are the keyword arguments
            that all strategies share.
        client: registry name of the client (``metabloom.clients.CLIENTS``): by name, since
            strategies do not import clients.
        client_options: keyword arguments of that client beyond those that all clients share.

    A recipe reads what it needs of the configuration when it is called (``partial``, no lambda):
    keys that it does not read are reported to the user as without effect.
    """

    strategy: Callable[..., RuleStrategy]
    client: str
    client_options: Mapping[str, object] = field(default_factory=dict)


STRATEGIES: Registry[Callable[[RunConfig], Recipe]] = Registry("strategy")


def weighting_of(config: RunConfig, usual: Weighting) -> Weighting:
    """Return the configured weighting, or the strategy's ``usual`` one where that is "auto"."""
    return usual if config.weighting == "auto" else config.weighting
