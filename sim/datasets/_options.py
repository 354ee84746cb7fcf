"""Options of a data set, read from its loader's signature and checked before any file is opened."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

import pydantic

from ...errors import ConfigError, unknown_name
from ._records import Split

# Arguments that every loader may ask for by declaring them; load_federation supplies them.
SUPPLIED = frozenset({"root", "seed", "num_clients", "download"})


def declared(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Return each parameter of ``function`` with its annotation and its default (... for none)."""
    hints = get_type_hints(function, include_extras=True)
    return {
        name: (hints.get(name, Any), ... if p.default is inspect.Parameter.empty else p.default)
        for name, p in inspect.signature(function).parameters.items()
    }


def split_options(split: Split | None) -> dict[str, tuple[Any, Any]]:
    """Return the options that a split adds to a data set, with the split's values as defaults."""
    if split is None:
        return {}
    hints = get_type_hints(Split, include_extras=True)
    return {name: (hint, getattr(split, name)) for name, hint in hints.items()}


def checked(
    dataset: str, known: Mapping[str, tuple[Any, Any]], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return every option with its value; raise ConfigError for an unknown name or a bad value.

    Args:
        dataset: registry name, for the error.
        known: option -> (annotation, default); ranges stand in the annotation (pydantic's Field).
        given: option -> value, as a user wrote it.
    """
    for name in given:
        if name not in known:
            raise unknown_name(f"option of data set {dataset!r}", name, known)
    config = pydantic.ConfigDict(
        allow_inf_nan=False, arbitrary_types_allowed=True, protected_namespaces=()
    )
    fields: dict[str, Any] = dict(known)
    model = pydantic.create_model("Options", __config__=config, **fields)
    try:
        values = model(**given)
    except pydantic.ValidationError as err:
        raise ConfigError("\n".join(_line(dataset, dict(p)) for p in err.errors())) from err
    return {name: getattr(values, name) for name in known}


def _line(dataset: str, problem: Mapping[str, Any]) -> str:
    option = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"]
    received = "nothing" if problem["type"] == "missing" else repr(problem["input"])
    return (
        f"data set {dataset!r}: option {option} = {received}: {message[0].lower()}{message[1:]}; "
        "docs/datasets.md lists the options and their ranges"
    )
