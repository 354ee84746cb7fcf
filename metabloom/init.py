"""Weights to start at, in the place of the seed's: the key ``init``.

    init = results/pretrained          the results folder of a run, or of ``metabloom pretrain``
    init = weights.safetensors         any file of named arrays
    init = torchvision:resnet18        weights by name, as torchvision's own API finds them

An array is taken where the model has one of its name and shape; the others stay as the seed made
them, usually the head alone, and a ``Fit`` tells which. The server alone reads them: clients get
what it sends.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .architectures import full_name
from .config import RunConfig
from .errors import ConfigError, MissingDataError, nearest
from .files import read_arrays
from .wire import NamedArrays

RESULTS, MODEL = "results.json", "model.safetensors"  # in a results folder
TORCHVISION = "torchvision:"
WHERE = f"name a results folder, a safetensors file, or {TORCHVISION}resnet18"
TOLD = 3  # arrays that a line names

Told = Mapping[str, Any]
Weights = Mapping[str, NamedArrays]  # by architecture; of "" those for all


@dataclass(frozen=True)
class Fit:
    """What became of the weights that a run starts at.

    Attributes:
        origin: the key ``init``.
        loaded: names of the model's arrays that they gave.
        missing: those of which they say nothing.
        misshapen: (name, shape in the model, shape in the weights).
        unused: names in the weights that the model does not have.
    """

    origin: str
    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    misshapen: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether every array of the model was loaded."""
        return not (self.missing or self.misshapen)

    @property
    def data(self) -> dict[str, Any]:
        """What results.json has of it."""
        shapes = [
            {"array": name, "model": list(own), "weights": list(theirs)}
            for name, own, theirs in self.misshapen
        ]
        return {
            "from": self.origin,
            "loaded": list(self.loaded),
            "missing": list(self.missing),
            "misshapen": shapes,
            "unused": list(self.unused),
        }

    def __str__(self) -> str:
        """Return one line for a log."""
        total = len(self.loaded) + len(self.missing) + len(self.misshapen)
        parts = [f"init = {self.origin}: {len(self.loaded)} of {total} arrays loaded"]
        shapes = [f"{name} {own} here, {theirs} there" for name, own, theirs in self.misshapen]
        for what, names in (
            ("another shape", shapes),
            ("not in these weights", self.missing),
            ("not in this model", self.unused),
        ):
            parts += [f"{what}: {_some(names)}"] if names else []
        return "; ".join(parts)


@dataclass(frozen=True)
class Source:
    """Weights as they were found.

    Attributes:
        origin: the key ``init``.
        weights: by architecture.
        told: what the results.json beside them says; empty where there is none.
        is_public: they are nobody's secret, since torchvision has them.
    """

    origin: str
    weights: Weights
    told: Told = field(default_factory=dict)
    is_public: bool = False


def started(
    config: RunConfig, initial: NamedArrays, *, held_out: int = 0
) -> tuple[dict[str, np.ndarray], Fit | None]:
    """Return the initial arrays of a run with those of ``init`` in their place, and what fitted.

    Args:
        config: of the run.
        initial: arrays of all architectures, as the seed made them; a strategy's own among them.
        held_out: records of the data set that no client gets.

    Raises:
        ConfigError: where there are no such weights, they cannot be read, are not finite, or fit
            nothing; where this run's clients have the records that they were trained on in public,
            or are private and the weights are neither so trained nor public.
        MissingDataError: where torchvision's are not on this machine, and may not be fetched.
    """
    if not config.init:
        return dict(initial), None
    source = source_of(config)
    check_apart(config, source.told, held_out)
    check_private(config, source)
    return fitted(source.origin, initial, source.weights, [one.name for one in config.kinds])


def source_of(config: RunConfig) -> Source:
    """Return the weights that ``init`` names; see ``started`` for what it raises."""
    if config.init.startswith(TORCHVISION):
        name = config.init.removeprefix(TORCHVISION)
        arrays = torchvision_weights(name, download=config.download)
        return Source(config.init, {"": arrays}, is_public=True)
    place = Path(config.init).expanduser()
    if place.is_file():
        return Source(
            config.init,
            {"": read_arrays(place, key="init", remedy=WHERE)},
            _told_in(place.with_name(RESULTS)),
        )
    if not place.is_dir():
        raise ConfigError(f"init = {config.init!r}: there is no such file or folder; {WHERE}")
    files = _models_in(place, [one.name for one in config.kinds], config.init)
    weights = {name: read_arrays(file, key="init", remedy=WHERE) for name, file in files.items()}
    return Source(config.init, weights, _told_in(place / RESULTS))


def fitted(
    origin: str, initial: NamedArrays, weights: Weights, kinds: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], Fit]:
    """Return ``initial`` with what ``weights`` have of it, in its dtypes, and what fitted.

    Args:
        origin: of the weights, for errors and the report.
        initial: arrays of all architectures.
        weights: by architecture; those of "" are for each of them.
        kinds: the names of the architectures; none where there is one, without a name.

    Raises:
        ConfigError: where an array is not finite, or none fits.
    """
    theirs = {
        full_name(kind, name): value
        for architecture, arrays in weights.items()
        for kind in ([architecture] if architecture else kinds or [""])
        for name, value in arrays.items()
    }
    shared = {name: value.shape for name, value in theirs.items() if name in initial}
    loaded = tuple(name for name, own in initial.items() if shared.get(name) == own.shape)
    for name in loaded:
        if not np.isfinite(theirs[name]).all():
            raise ConfigError(
                f"init = {origin!r}: {name!r} holds NaN or infinity: no run can start there"
            )
    fit = Fit(
        origin,
        loaded,
        missing=tuple(name for name in initial if name not in theirs),
        misshapen=tuple(
            (name, own.shape, shared[name])
            for name, own in initial.items()
            if name in shared and name not in loaded
        ),
        unused=tuple(name for name in theirs if name not in initial),
    )
    if not loaded:
        raise ConfigError(f"{fit}: none fits; start at weights of the same model")
    taken = {name: theirs[name].astype(initial[name].dtype) for name in loaded}
    found = {name: taken.get(name, own) for name, own in initial.items()}
    return found, fit


def check_apart(config: RunConfig, told: Told, held_out: int) -> None:
    """Raise ConfigError where the run's clients hold what weights were trained on in public.

    Accuracies of clients whose records the start has seen are none. Weights of a federated run say
    nothing of the kind: its unseen clients are unseen to it with the same seed.

    Args:
        config: of the run.
        told: the results.json of ``metabloom pretrain``, or of another run.
        held_out: records that no client of this run gets.
    """
    public = told.get("pretraining")
    if not public:
        return
    source, size, seed = public["dataset"], public["held_out"], public["seed"]
    shared = config.dataset == source or config.dataset.startswith(f"{source}-")
    if not shared:
        return
    if not size or config.dataset != source:
        raise ConfigError(
            f"init = {config.init!r} was trained on the images of {source!r}, which the clients of "
            f"{config.dataset!r} hold: pretrain on another set, or on records held out of this one"
        )
    if held_out < size or config.seed != seed:
        raise ConfigError(
            f"init = {config.init!r} was trained on {size} records held out of {source!r} with "
            f"seed {seed}; this run has seed {config.seed} and holds out {held_out}, so that its "
            f"clients have some of them: set seed={seed} and dataset-args='held_out={size}'"
        )


def check_private(config: RunConfig, source: Source) -> None:
    """Raise ConfigError where private clients would start at what others' records taught.

    What weights have learnt stays in the models of the run, and its ledgers know nothing of it.
    """
    if source.is_public or config.init_is_public or source.told.get("pretraining"):
        return
    trained = source.told.get("config", {})
    for is_on, key, what in (
        (config.is_private, "privacy.noise-multiplier", "the clients of this run are private"),
        (config.is_user_private, "user-privacy.noise-multiplier", "this run has user privacy"),
    ):
        if is_on and not float(trained.get(key, 0.0)) > 0:
            raise ConfigError(
                f"init = {source.origin!r} was not trained with {key} above 0, or nobody says so, "
                f"and {what}: what it learnt of records would leave in the model uncounted; train "
                "it with the same privacy, or, where it is no secret, set init-is-public = true"
            )


def torchvision_weights(name: str, *, download: bool) -> NamedArrays:
    """Return weights of torchvision by name: of a model its usual ones, or an entry of its enums.

    Args:
        name: "resnet18", or "ResNet18_Weights.IMAGENET1K_V1".
        download: fetch them where they are not in torch's folder of weights.

    Raises:
        ConfigError: torchvision knows no such weights.
        MissingDataError: they are not there, or could not be fetched.
    """
    import torch.hub
    from torchvision import models

    try:
        # A name of the registry's has a hyphen where torchvision's has an underscore.
        entry = (
            models.get_weight(name)
            if "." in name
            else models.get_model_weights(name.replace("-", "_")).DEFAULT
        )
    except (ValueError, KeyError, AttributeError) as err:
        hint = nearest(name.replace("-", "_"), models.list_models(module=models))
        raise ConfigError(
            f"init = {TORCHVISION + name!r}: torchvision has no weights of that name: {hint}e.g. "
            f"{TORCHVISION}resnet18 or {TORCHVISION}ResNet18_Weights.IMAGENET1K_V1"
        ) from err
    file = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rpartition("/")[2]
    if not (download or file.exists()):
        raise MissingDataError(
            f"init = {TORCHVISION + name!r}: {str(file)!r} is not there: set download=true, or "
            f"fetch {entry.url} to it"
        )
    try:
        state = entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as err:  # the network; the file, or its checksum
        raise MissingDataError(
            f"init = {TORCHVISION + name!r}: {str(file)!r} could not be had ({err}): fetch "
            f"{entry.url} to it"
        ) from err
    return {key: value.numpy() for key, value in state.items()}


def _models_in(folder: Path, kinds: list[str], origin: str) -> dict[str, Path]:
    """Return the files of a results folder that this run's architectures start at; "": all do."""
    whole, own = folder / MODEL, {name: folder / f"model-{name}.safetensors" for name in kinds}
    if there := {name: file for name, file in own.items() if file.exists()}:
        return there
    if whole.exists():
        return {"": whole}
    others = ", ".join(sorted(file.name for file in folder.glob("model-*.safetensors")))
    if not others:
        raise ConfigError(f"init = {origin!r} holds no {MODEL}; {WHERE}")
    raise ConfigError(f"init = {origin!r} holds several models ({others}): name one of these files")


def _told_in(file: Path) -> Told:
    """Return what a results.json says; nothing where there is none."""
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as err:
        raise ConfigError(
            f"init: {str(file)!r} does not say how the weights beside it were trained "
            f"({type(err).__name__}: {err}): {WHERE}"
        ) from err


def _some(names: tuple[str, ...] | list[str]) -> str:
    more = len(names) - TOLD
    return ", ".join(names[:TOLD]) + (f" and {more} more" if more > 0 else "")
