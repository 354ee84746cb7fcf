"""Federations: real data as clients, each with a support set, a query set and a role.

A federation depends on its seed and on the clients' identities only: not on the order in which
clients are listed, not on global random state.
"""

import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from ..clients.data import ClientData
from ..config import data_folder
from ..errors import ConfigError, DataError
from ..registry import Registry
from ..streams import numpy_stream
from .datasets._options import SUPPLIED, checked, declared, split_options
from .datasets._records import Records, Rows, Split
from .datasets._roles import ROLES, Role, check_roles, choose, seeded_roles
from .datasets._spec import DataSpec, RecordsLike, as_records, check_inputs, to_batch

Loader = Callable[..., "Federation | Mapping[str, RecordsLike]"]
AnyLoader = TypeVar("AnyLoader", bound=Callable[..., Any])

__all__ = [
    "DATASETS",
    "DataSpec",
    "Federation",
    "Records",
    "Role",
    "Split",
    "dataset_spec",
    "federate",
    "load_federation",
    "register_dataset",
]

CACHE_BYTES = 256 * 2**20  # decoded clients kept by one federation; the oldest go first


class _Cache:
    """Keep recently decoded clients up to a number of bytes."""

    def __init__(self) -> None:
        self._kept: dict[int, ClientData] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["_Cache"], tuple[()]]:
        return _Cache, ()  # a copy in another process starts empty: a lock does not travel

    def get(self, index: int, decode: Callable[[], ClientData]) -> ClientData:
        with self._lock:
            data = self._kept.pop(index, None)
            if data is None:
                data = decode()
                self._bytes += _num_bytes(data)
            self._kept[index] = data  # last in the dict: used last
            while self._bytes > CACHE_BYTES and len(self._kept) > 1:
                self._bytes -= _num_bytes(self._kept.pop(next(iter(self._kept))))
            return data


@dataclass(frozen=True, eq=False)
class Federation:
    """Hold the clients of one data set; ``client(i)`` decodes client i when it is asked for.

    Attributes:
        name: registry name of the data set.
        spec: what a model takes and gives.
        client_ids: identities, sorted; client i is ``client_ids[i]``.
        roles: the role of each client.
        dropped: how many clients were too small for the split.
    """

    name: str
    spec: DataSpec
    client_ids: tuple[str, ...]
    roles: tuple[Role, ...]
    dropped: int
    _records: tuple[Records, ...] = field(repr=False)
    _rows: tuple[tuple[Rows, Rows], ...] = field(repr=False)  # of (support, query)
    _cache: _Cache = field(default_factory=_Cache, repr=False)

    def __len__(self) -> int:
        return len(self.client_ids)

    def client(self, index: int) -> ClientData:
        """Return client ``index`` in [0, len) as tensors: shared and cached, not to be changed."""
        if not 0 <= index < len(self):
            raise DataError(
                f"client {index} of {self.name!r} does not exist: there are {len(self)} clients, "
                f"numbered from 0; start as many nodes as clients or fewer"
            )
        return self._cache.get(index, lambda: self._decode(index))

    def has_fixed_split(self, index: int) -> bool:
        """Return whether the records of client ``index`` depend on each other; see ClientData."""
        return self._records[index].support_rows > 0

    def indices(self, role: Role) -> tuple[int, ...]:
        """Return the indices of the clients that have ``role``, ascending."""
        return tuple(i for i, own in enumerate(self.roles) if own == role)

    def counts(self) -> dict[Role, int]:
        """Return the number of clients of each role."""
        return {role: self.roles.count(role) for role in ROLES}

    def _decode(self, index: int) -> ClientData:
        records, (support, query) = self._records[index], self._rows[index]
        inputs = np.asarray(records.inputs())
        who = f"client {self.client_ids[index]!r} of {self.name!r}"
        check_inputs(who, self.spec, inputs, len(records.targets))
        return ClientData(
            to_batch(self.spec, inputs[support], records.targets[support]),
            to_batch(self.spec, inputs[query], records.targets[query]),
            fixed_split=self.has_fixed_split(index),
        )


def federate(
    name: str,
    spec: DataSpec,
    records: Mapping[str, RecordsLike],
    *,
    seed: int,
    num_clients: int = 0,
    split: Split | None = None,
    roles: Mapping[str, Role] | None = None,
    already_dropped: int = 0,
) -> Federation:
    """Return a federation of ``records``: clients chosen, roles given, support and query cut.

    Args:
        name: for errors and results.
        spec: inputs must have its shape, targets its range.
        records: client id -> (inputs (n, *input_shape), targets (n,)), or Records where decoding
            is expensive. uint8 inputs are images and become float32 in [0, 1].
        seed: of the choice of clients, of the roles and of every client's split.
        num_clients: a seeded choice of so many clients; 0: all.
        split: how to cut support and query; None: half and half.
        roles: client id -> "train", "validation" or "unseen" for every client, where the data
            decide it; None: a seeded 80/10/10 split of the clients with at least one of each.
        already_dropped: clients that the loader itself left out as too small, to be counted.

    Raises:
        DataError: records that do not fit ``spec``, every client too small, more clients asked
            for than there are, fewer than three, a client without one of the three roles.
    """
    split = split or Split()
    holders = {key: as_records(name, spec, key, records[key]) for key in sorted(records)}
    rows = {key: _split_rows(split, own, seed, key) for key, own in holders.items()}
    if roles is not None:
        check_roles(name, holders, roles)
    alive = [key for key in holders if rows[key] is not None]
    if not alive:
        raise _all_too_small(name, split, holders)
    chosen = choose(name, alive, num_clients, seed, roles)
    role_of = seeded_roles(chosen, seed) if roles is None else roles
    return Federation(
        name,
        spec,
        tuple(chosen),
        tuple(role_of[key] for key in chosen),
        already_dropped + len(holders) - len(alive),
        tuple(holders[key] for key in chosen),
        tuple(cast("tuple[Rows, Rows]", rows[key]) for key in chosen),
    )


def _split_rows(split: Split, own: Records, seed: int, key: str) -> tuple[Rows, Rows] | None:
    n, first = len(own.targets), own.support_rows
    if first:
        return (np.arange(first), np.arange(first, n)) if first < n else None
    return split.rows(own.targets, numpy_stream(seed, "split", key))


def _all_too_small(name: str, split: Split, holders: Mapping[str, Records]) -> DataError:
    if not holders:
        return DataError(f"data set {name!r} has no clients at all: its loader returned none")
    largest = max(holders, key=lambda key: len(holders[key].targets))
    targets = holders[largest].targets
    smallest_class = min(np.unique(targets, return_counts=True)[1], default=0)
    return DataError(
        f"every one of the {len(holders)} clients of {name!r} is too small: wanted "
        f"{split.wanted()}; the largest client, {largest!r}, has {len(targets)} records, "
        f"{smallest_class} of its rarest class: {split.remedy()}"
    )


def _num_bytes(data: ClientData) -> int:
    return sum(t.numel() * t.element_size() for t in (*data.support, *data.query))


@dataclass(frozen=True)
class _Entry:
    """Hold one registered data set."""

    spec: DataSpec | Callable[..., DataSpec]
    load: Loader
    split: Split | None

    def options(self) -> dict[str, tuple[Any, Any]]:
        own = {k: v for k, v in declared(self.load).items() if k not in SUPPLIED}
        return own | split_options(self.split)

    def make_spec(self, values: Mapping[str, Any]) -> DataSpec:
        if isinstance(self.spec, DataSpec):
            return self.spec
        return self.spec(**{k: values[k] for k in inspect.signature(self.spec).parameters})


HALVES = Split()
DATASETS: Registry[_Entry] = Registry("data set")


def register_dataset(
    name: str, spec: DataSpec | Callable[..., DataSpec], *, split: Split | None = HALVES
) -> Callable[[AnyLoader], AnyLoader]:
    """Return a decorator that registers a loader under ``name``.

    The loader takes keyword arguments only. Those named root (Path), seed, num_clients and
    download are supplied where it declares them; every other one is an option of the data set,
    checked against its annotation. It returns {client id: (inputs, targets)}, or a Federation.

    Args:
        name: registry name, e.g. "my-data".
        spec: a DataSpec, or a function of (some of) the options that returns one without data.
        split: how clients are cut; its fields are options too. None: the loader cuts them.
    """

    def decorate(load: AnyLoader) -> AnyLoader:
        DATASETS.add(name, _Entry(spec, load, split))
        return load

    return decorate


def dataset_spec(name: str, **options: Any) -> DataSpec:
    """Return the DataSpec of a data set with ``options``; needs no data files.

    Raises:
        ConfigError: unknown data set or option, or an option out of range.

    >>> dataset_spec("digits", ways=3).num_classes
    3
    """
    entry = DATASETS[name]
    return entry.make_spec(checked(name, entry.options(), options))


def load_federation(
    name: str,
    *,
    root: Path | str | None = None,
    seed: int = 0,
    num_clients: int = 0,
    download: bool = False,
    **options: Any,
) -> Federation:
    """Return the federation of a registered data set.

    Args:
        name: registry name, see ``DATASETS``.
        root: folder of data sets; None: METABLOOM_DATA, else ./data.
        seed: at least 0; of every random choice.
        num_clients: clients to make or to choose; 0: the data set's default, else at least 3.
        download: fetch what is missing, where the data set can.
        options: the data set's own, see docs/datasets.md.

    Raises:
        ConfigError: unknown name, unknown option, value out of range.
        MissingDataError: a file is not there.
        DataError: the data cannot give the clients that were asked for.
    """
    entry = DATASETS[name]
    for label, value in (("seed", seed), ("num_clients", num_clients)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"{label} = {value!r}: must be a whole number of at least 0")
    values = checked(name, entry.options(), options)
    asked = declared(entry.load)
    folder = data_folder(str(root or "")).absolute()
    supplied = {"root": folder, "seed": seed, "num_clients": num_clients, "download": download}
    arguments = {key: supplied.get(key, values.get(key)) for key in asked}
    loaded = entry.load(**arguments)
    if isinstance(loaded, Federation):
        return loaded
    given = {key: values[key] for key in split_options(entry.split) if key in options}
    return federate(
        name,
        entry.make_spec(values),
        loaded,
        seed=seed,
        num_clients=0 if "num_clients" in asked else num_clients,
        split=entry.split.with_options(given) if entry.split else None,
    )
