"""What a node has pinned of its privacy, and what is left for a run to wish for.

The run config comes from whoever starts the run, so on a SuperNode the node's own configuration
decides: the parameters, the folder of the ledger, and which ledger, for a run could name the same
records twice under two data sets.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from .clients import PrivacyConfig, PrivacyLedger
from .clients.privacy.config import WISHES
from .clients.store import file_name
from .config import RunConfig
from .errors import ConfigError, nearest
from .keys import Scalar, key_of
from .ledger import UNIT
from .wire import PARTITION_ID

LEDGERS = "ledgers"  # folder in that of the results
ROOT = "privacy.root"  # a key of the run config, and of a node's own
DATA = "privacy.data"  # a key of nodes alone: the identity of what they hold
KEYS = {key for key in RunConfig.defaults() if key.startswith("privacy.")}
STRENGTHS = {key_of(f"privacy_{name}") for name in WISHES}


def privacy_of(
    node_config: Mapping[str, Scalar], config: RunConfig, client: str
) -> PrivacyConfig | None:
    """Return the parameters of a node's private training; None where it is not private.

    Keys ``privacy.*`` of the node are pinned: those of the run are then a server's wishes, which
    may only be stronger. A run alone decides where the node says nothing but a root, as in
    simulations.

    Raises:
        ConfigError: where a key of the node is unknown, has no such value, or pins privacy without
            saying where the ledger lies.
        PrivacyError: where the run asks for less than the node has pinned.
    """
    _check(node_config)
    own = {key: value for key, value in node_config.items() if key in KEYS}
    root = str(own.pop(ROOT, ""))
    if not own:
        if not config.is_private:
            return None
        folder = Path(root or config.privacy_root or Path(config.out) / LEDGERS)
        return _privacy(config, _usual_ledger(folder, config.dataset, client))
    pinned = RunConfig.read(own)
    if not pinned.is_private:
        raise ConfigError(
            "privacy.noise-multiplier = 0 in this node's config pins that there is no privacy: set "
            "it above 0, or take the key out and leave it to each run"
        )
    if not root:
        raise ConfigError(
            "this node's config pins privacy.* without privacy.root: then each run would choose "
            "the folder of the ledger, and with a new one a new budget; name a folder"
        )
    data = str(node_config.get(DATA, f"partition-{node_config.get(PARTITION_ID, 0)}"))
    privacy = _privacy(pinned, _ledger_at(_file(Path(root), data), data))
    usual = RunConfig.defaults()
    wishes = config.to_flower()
    return privacy.under({key: wishes[key] for key in STRENGTHS if wishes[key] != usual[key]})


def _check(node_config: Mapping[str, Scalar]) -> None:
    """Raise ConfigError for a key that looks like a pin and is none: it would protect nothing."""
    bare = {key.removeprefix("privacy.") for key in KEYS}
    for key in sorted(set(node_config) - KEYS - {DATA}):
        plain = key.casefold().replace("_", "-")
        if plain.startswith("privacy") or plain in bare:
            hint = nearest(plain, KEYS | {DATA}) or nearest(f"privacy.{plain}", KEYS)
            raise ConfigError(
                f"unknown key {key!r} in this node's config: {hint}a pin that nobody reads "
                "protects nothing"
            )


def _privacy(config: RunConfig, ledger: PrivacyLedger) -> PrivacyConfig:
    return PrivacyConfig(
        noise_multiplier=config.privacy_noise_multiplier,
        max_grad_norm=config.privacy_max_grad_norm,
        sample_rate=config.privacy_sample_rate,
        target_epsilon=config.privacy_target_epsilon,
        target_delta=config.privacy_target_delta,
        accountant=config.privacy_accountant,
        expected_batch_size=config.privacy_expected_batch_size or None,
        ledger=ledger,
        hvp_noise_multiplier=config.privacy_hvp_noise_multiplier or None,
        hvp_max_norm=config.privacy_hvp_max_norm,
        public_counts=config.privacy_public_counts,
        unprotected_metrics=config.unprotected_metrics,
        max_releases=config.privacy_max_releases,
    )


def _usual_ledger(folder: Path, dataset: str, client: str) -> PrivacyLedger:
    return _ledger_at(_file(folder / file_name(dataset), client), f"{dataset}/{client}")


def _file(folder: Path, name: str) -> Path:
    return folder.expanduser().absolute() / f"{file_name(name)}.jsonl"


@lru_cache(maxsize=4096)
def _ledger_at(file: Path, data: str) -> PrivacyLedger:
    """Return the ledger, the same in a process: it reads only what it has not checked before."""
    return PrivacyLedger(file, data=data, unit=UNIT)
