"""The whole state of a run after a round, and the two files that hold it.

The first file is in the format of safetensors: the arrays of the model as ``model/NAME``, those of
the rule's state as ``rule/N``. The second, the record, is strict JSON under a checksum (see
``metabloom.files.seal_json``): everything else, and the size and the SHA-256 of the first. Mappings
whose keys are not fixed are lists of pairs; for the rule's state see ``state_tree``. Where a run
looks for its best model, the first file holds that too, as ``best/NAME``.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load, save

from ...errors import CheckpointError
from ...files import Json, seal_json, unseal_json
from ...keys import Scalar
from ...wire import NamedArrays
from ..rules import State
from .reports import ClientScore, RoundReport
from .state_tree import pack, storable, unpack

FORMAT = 1
INSTEAD = "start anew with resume = false"
HISTORIES = ("train_metrics", "evaluate_metrics", "server_metrics")
MetricHistory = Mapping[int, Mapping[str, int | float | list[int] | list[float]]]


@dataclass(frozen=True)
class Snapshot:
    """The whole state of a run after a round.

    Attributes:
        round: its number, >= 1.
        arrays: the model; the order of the names is kept.
        state: the rule's, of dict, list, tuple, None, bool, int, float, str, torch.Tensor,
            np.ndarray and NumPy scalars; keys are str or int. Tensors come back on the CPU.
        reports: of every round so far.
        train_metrics: Flower's history of them, by round.
        evaluate_metrics: the same of the clients' evaluations.
        server_metrics: the same of the server's own evaluations, which begin at round 0.
        offences: how many bad replies each client has sent.
        told: the nodes whose fault the user knows of.
        token: identity of the run, the same over resumes.
        best: the model that validation clients liked best so far; None: nobody looks for it.
    """

    round: int
    arrays: NamedArrays
    state: State | None
    reports: tuple[RoundReport, ...]
    train_metrics: MetricHistory
    evaluate_metrics: MetricHistory
    server_metrics: MetricHistory
    offences: Mapping[str, int]
    told: tuple[str, ...]
    token: str
    best: NamedArrays | None = None


def packed(snapshot: Snapshot, settings: Mapping[str, Scalar]) -> tuple[bytes, bytes]:
    """Return what the two files hold, arrays first.

    Raises:
        CheckpointError: where the state or a history holds what cannot be saved, naming it.
    """
    arrays = {
        f"{kind}/{name}": storable(value, f"the model's {name!r}")
        for kind, model in (("model", snapshot.arrays), ("best", snapshot.best or {}))
        for name, value in model.items()
    }
    root = None if snapshot.state is None else dict(snapshot.state)
    try:
        state = pack(root, "state", arrays)
    except RecursionError as err:
        raise CheckpointError("state cannot be saved: it is nested too deeply") from err
    try:
        blob = save(arrays)
    except UnicodeError as err:
        raise CheckpointError(f"the name of an array cannot be saved: {err}") from err
    past = {key: [[n, dict(one)] for n, one in vars(snapshot)[key].items()] for key in HISTORIES}
    try:
        record = seal_json(
            {
                "format": FORMAT,
                "round": snapshot.round,
                "token": snapshot.token,
                "settings": list(settings.items()),
                "names": list(snapshot.arrays),
                "state": state,
                "offences": list(snapshot.offences.items()),
                "told": list(snapshot.told),
                **past,
                "reports": Json(f"[{','.join(one.as_json for one in snapshot.reports)}]"),
                "arrays": _identity(blob),
            }
        )
    except (TypeError, ValueError) as err:
        raise CheckpointError(f"round {snapshot.round} cannot be saved: {err}") from err
    return blob, record


def unpacked(file: Path, arrays_file: Path) -> tuple[Snapshot, dict[str, Scalar]]:
    """Return a snapshot and the settings of its run.

    Raises:
        CheckpointError: where a later version of this project wrote it.
        OSError, SafetensorError, ValueError, KeyError, TypeError: where a file is not whole.
    """
    told = _checked(file)
    blob = arrays_file.read_bytes()
    if _identity(blob) != told["arrays"]:
        raise ValueError(f"{arrays_file.name} is cut short or altered")
    arrays = load(blob)
    for value in arrays.values():
        value.flags.writeable = False
    snapshot = Snapshot(
        round=told["round"],
        arrays={name: arrays[f"model/{name}"] for name in told["names"]},
        best=_named("best", told["names"], arrays),
        state=unpack(told["state"], arrays),
        reports=tuple(map(_report, told["reports"])),
        **{key: dict(told[key]) for key in HISTORIES},
        offences=dict(told["offences"]),
        told=tuple(told["told"]),
        token=told["token"],
    )
    return snapshot, dict(told["settings"])


def _named(kind: str, names: list[str], arrays: NamedArrays) -> NamedArrays | None:
    """Return the arrays of one model; None where the file holds none of them."""
    if not any(name.startswith(f"{kind}/") for name in arrays):
        return None
    return {name: arrays[f"{kind}/{name}"] for name in names}


def _report(told: dict[str, Any]) -> RoundReport:
    scores = tuple(ClientScore(**score) for score in told.pop("validation"))
    return RoundReport(**{key: _tuples(one) for key, one in told.items()}, validation=scores)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _checked(file: Path) -> dict[str, Any]:
    told = unseal_json(file.read_bytes())
    if told["format"] > FORMAT:
        raise CheckpointError(
            f"checkpoint {str(file)!r} is of format {told['format']}, this metabloom reads up to "
            f"{FORMAT}: use the version that wrote it, or {INSTEAD}"
        )
    if told["format"] != FORMAT:
        raise ValueError(f"it is of format {told['format']!r}, not {FORMAT}")
    return told


def _identity(blob: bytes) -> dict[str, Any]:
    return {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
