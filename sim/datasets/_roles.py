"""Choice of clients and of their roles, by the clients' identities and never by their order."""

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from ...errors import DataError
from ...streams import stream_seed

Role = Literal["train", "validation", "unseen"]
ROLES: tuple[Role, ...] = get_args(Role)


def role_sizes(num_clients: int) -> dict[Role, int]:
    """Return how many of ``num_clients`` >= 3 clients have each role: 80/10/10, at least one each.

    >>> role_sizes(400), role_sizes(4)
    ({'train': 320, 'validation': 40, 'unseen': 40}, {'train': 2, 'validation': 1, 'unseen': 1})
    """
    tenth = max(1, round(num_clients / 10))
    return {"train": num_clients - 2 * tenth, "validation": tenth, "unseen": tenth}


def check_roles(name: str, clients: Iterable[str], roles: Mapping[str, Role]) -> None:
    """Raise DataError for a client of data set ``name`` whose role is missing or not known."""
    for key in clients:
        if roles.get(key) not in ROLES:
            found = f"role {roles[key]!r}" if key in roles else "no role"
            raise DataError(
                f"client {key!r} of {name!r} has {found} in roles: give every client one of "
                f"{', '.join(map(repr, ROLES))}, or leave roles out for a seeded 80/10/10 split"
            )


def choose(
    name: str, alive: list[str], num_clients: int, seed: int, roles: Mapping[str, Role] | None
) -> list[str]:
    """Return the ids of the federation, sorted; with given roles the choice keeps 80/10/10."""
    wanted = num_clients or len(alive)
    if not wanted >= 3:
        raise DataError(
            f"data set {name!r}, number of clients or nodes = {wanted}: at least 3 clients/nodes "
            "are needed: one each for train, validation, unseen. Set num_clients to at least 3 and "
            f"start as many nodes; {len(alive)} clients are large enough for the split"
        )
    pools: list[tuple[str, list[str], int]] = [("", alive, wanted)]
    if roles is not None and num_clients:
        sizes = role_sizes(num_clients)
        pools = [(f"{r} ", [k for k in alive if roles[k] == r], sizes[r]) for r in ROLES]
    chosen: list[str] = []
    for role, pool, size in pools:
        if size > len(pool):
            raise DataError(
                f"data set {name!r} with num_clients = {num_clients} needs {size} {role}clients, "
                f"but {len(pool)} are large enough: ask for fewer clients or for smaller splits"
            )
        chosen += sorted(pool, key=lambda key: stream_seed(seed, "choose", key))[:size]
    return sorted(chosen)


def seeded_roles(chosen: list[str], seed: int) -> dict[str, Role]:
    """Return the role of each client: ``role_sizes`` of them, in an order drawn from ``seed``."""
    order = sorted(chosen, key=lambda key: stream_seed(seed, "role", key))
    sizes = role_sizes(len(order))
    names = [role for role in ROLES for _ in range(sizes[role])]
    return dict(zip(order, names, strict=True))
