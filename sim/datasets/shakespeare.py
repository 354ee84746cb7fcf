"""Shakespeare: predict the next character of a speaking role (McMahan et al. 2017; LEAF).

A client is a role of tinyshakespeare. Its earlier speeches are the support and its later ones the
query: no character is in both.
"""

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ...errors import ConfigError, DataError
from ..federation import Federation, federate, register_dataset
from ._files import missing
from ._records import Records
from ._spec import DataSpec

# LEAF's 80 characters; every other one (tinyshakespeare's "$") is UNKNOWN.
VOCABULARY = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
UNKNOWN = len(VOCABULARY)

REMEDY = "copy data/tinyshakespeare/input.txt of the GitHub repository karpathy/char-rnn there"

SequenceLength = Annotated[int, Field(ge=1, le=10_000)]
Count = Annotated[int, Field(ge=1)]
Windows = Annotated[int, Field(ge=2)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


def shakespeare_spec(sequence_length: int) -> DataSpec:
    """Return the spec of next-character prediction after ``sequence_length`` characters."""
    return DataSpec((sequence_length,), UNKNOWN + 1, "char-lstm", {}, "int64")


def roles_of(text: str) -> dict[str, str]:
    r"""Return all that each role says, in the order of the text.

    >>> roles_of("ROMEO:\nAy me!\n\nJULIET:\nO.\n\nROMEO:\nNo.")
    {'ROMEO': 'Ay me!\nNo.\n', 'JULIET': 'O.\n'}
    """
    speeches: dict[str, list[str]] = defaultdict(list)
    for block in text.split("\n\n"):
        name, _, speech = block.strip("\n").partition("\n")
        if name.endswith(":"):
            speeches[name.removesuffix(":")].append(speech + "\n")
    return {name: "".join(said) for name, said in speeches.items()}


def encode(text: str) -> npt.NDArray[np.int64]:
    """Return the ids of the characters of ``text`` (n,), in [0, UNKNOWN]."""
    ids = {character: number for number, character in enumerate(VOCABULARY)}
    return np.fromiter((ids.get(character, UNKNOWN) for character in text), np.int64, len(text))


@register_dataset("shakespeare", shakespeare_spec, split=None)
def shakespeare(
    *,
    root: Path,
    seed: int,
    num_clients: int,
    sequence_length: SequenceLength = 80,
    stride: Count = 3,
    min_characters: Count = 1000,
    max_windows: Windows = 200,
    support_fraction: Fraction = 0.5,
) -> Federation:
    """Return the federation of the roles with at least ``min_characters`` of text.

    Of a longer role's windows ``max_windows`` are kept, evenly spaced in time.
    """
    needed = int(np.ceil((sequence_length + 1) / min(support_fraction, 1 - support_fraction))) + 1
    if min_characters < needed:
        raise ConfigError(
            f"data set 'shakespeare': min_characters = {min_characters} is too little for a window "
            f"of sequence_length = {sequence_length} in support and query: at least {needed}"
        )
    path = root / "shakespeare" / "input.txt"
    if not path.is_file():
        raise missing("shakespeare", path, root, REMEDY)
    texts = roles_of(path.read_text(encoding="utf-8"))
    long_enough = {key: said for key, said in texts.items() if len(said) >= min_characters}
    if not long_enough:
        longest = max(texts, key=lambda key: len(texts[key]), default="nobody")
        raise DataError(
            f"data set 'shakespeare': no role has min_characters = {min_characters}; the longest, "
            f"{longest!r}, has {len(texts.get(longest, ''))}: lower min_characters"
        )
    caps = _caps(max_windows, support_fraction)
    records = {
        key: _records(encode(said), sequence_length, stride, caps, support_fraction)
        for key, said in long_enough.items()
    }
    spec = shakespeare_spec(sequence_length)
    return federate(
        "shakespeare",
        spec,
        records,
        seed=seed,
        num_clients=num_clients,
        already_dropped=len(texts) - len(long_enough),
    )


def _caps(max_windows: int, support_fraction: float) -> tuple[int, int]:
    support = min(max(1, round(max_windows * support_fraction)), max_windows - 1)
    return support, max_windows - support


def _records(
    ids: npt.NDArray[np.int64], length: int, stride: int, caps: tuple[int, int], fraction: float
) -> Records:
    cut = round(len(ids) * fraction)
    support = _starts(0, cut, length, stride, caps[0])
    query = _starts(cut, len(ids), length, stride, caps[1])
    starts = np.concatenate((support, query))
    windows = partial(_windows, ids, starts, length)
    return Records(ids[starts + length], windows, support_rows=len(support))


def _windows(
    ids: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], length: int
) -> npt.NDArray[np.int64]:
    return np.lib.stride_tricks.sliding_window_view(ids, length)[starts]  # (n, length)


def _starts(begin: int, end: int, length: int, stride: int, cap: int) -> npt.NDArray[np.int64]:
    """Return where windows begin whose target, too, lies in [begin, end): at most ``cap``."""
    starts = np.arange(begin, end - length, stride)
    if len(starts) <= cap:
        return starts
    return starts[np.linspace(0, len(starts) - 1, cap).astype(np.int64)]
