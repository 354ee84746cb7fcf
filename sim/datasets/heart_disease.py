"""Heart disease at four hospitals (Detrano et al. 1989; UCI 45): tabular, with missing values.

Each hospital is a client. Whatever is learned from data (means, scales, fills) comes from the
hospital's own support, never from its query nor from another hospital.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ...errors import DataError
from ...streams import numpy_stream
from ..federation import register_dataset
from ._files import missing
from ._records import Records
from ._spec import DataSpec

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
REMEDY = (
    "download 'Heart Disease' (number 45) from the UCI Machine Learning Repository and put its "
    "four processed.*.data files there"
)

NUMERIC = {"age": 0, "trestbps": 3, "chol": 4, "thalach": 7, "oldpeak": 9, "ca": 11}
ZERO_IS_MISSING = ("trestbps", "chol")  # no living patient has 0: Switzerland's chol is all 0
CATEGORIES: dict[str, tuple[int, tuple[int, ...]]] = {
    "sex": (1, (0, 1)),
    "cp": (2, (1, 2, 3, 4)),
    "fbs": (5, (0, 1)),
    "restecg": (6, (0, 1, 2)),
    "exang": (8, (0, 1)),
    "slope": (10, (1, 2, 3)),
    "thal": (12, (3, 6, 7)),
}
# Age, sex and chest pain are never missing and restecg in 2 of 920 rows: no indicator for these.
INDICATED = (3, 4, 5, 7, 8, 9, 10, 11, 12)
TARGET = 13
WIDTH = len(NUMERIC) + sum(len(values) for _, values in CATEGORIES.values()) + len(INDICATED)

Table = npt.NDArray[np.float64]
Fraction = Annotated[float, Field(gt=0, lt=1)]


@register_dataset("heart-disease", DataSpec((WIDTH,), 2, "mlp", {"hidden": 64}), split=None)
def heart_disease(*, root: Path, seed: int, support_fraction: Fraction = 0.5) -> dict[str, Records]:
    """Return the records of the four hospitals; class 1: any narrowing of the vessels."""
    return {name: _records(_read(root, name), seed, name, support_fraction) for name in HOSPITALS}


def _read(root: Path, hospital: str) -> Table:
    path = root / "heart_disease" / f"processed.{hospital}.data"
    if not path.is_file():
        raise missing("heart-disease", path, root, REMEDY)
    import pandas as pd

    table: Table = pd.read_csv(path, header=None, na_values="?").to_numpy(np.float64)
    if table.ndim != 2 or table.shape[1] != TARGET + 1 or np.isnan(table[:, TARGET]).any():
        raise DataError(
            f"data set 'heart-disease': {path} has shape {table.shape}: {TARGET + 1} columns are "
            "needed, the last one (the diagnosis) without gaps; fetch the file again"
        )
    for column in (NUMERIC[name] for name in ZERO_IS_MISSING):
        table[table[:, column] == 0, column] = np.nan
    return table


def _records(table: Table, seed: int, hospital: str, support_fraction: float) -> Records:
    rows = numpy_stream(seed, "split", hospital).permutation(len(table))
    table = table[rows]
    support_rows = min(max(1, round(support_fraction * len(table))), len(table) - 1)
    targets = (table[:, TARGET] >= 1).astype(np.int64)
    return Records(targets, lambda: encode(table, support_rows), support_rows)


def encode(table: Table, support_rows: int) -> npt.NDArray[np.float32]:
    """Return inputs (n, WIDTH) without NaN; statistics from the first ``support_rows`` rows.

    Numeric columns: the support's median for a gap, then the support's mean and deviation.
    Categories: the support's commonest for a gap, then one-hot over fixed values. A column that
    the support misses wholly is 0. Last come 0/1 indicators of what was missing.
    """
    numeric = _fill(table[:, list(NUMERIC.values())], support_rows, "median")
    mean, scale = numeric[:support_rows].mean(0), numeric[:support_rows].std(0)
    numeric = np.nan_to_num((numeric - mean) / np.where(scale > 0, scale, 1))
    columns = [column for column, _ in CATEGORIES.values()]
    filled = _fill(table[:, columns], support_rows, "most_frequent")
    parts = [numeric]
    for position, (_, values) in enumerate(CATEGORIES.values()):
        parts.append(filled[:, [position]] == np.asarray(values))  # (n, values); NaN: all 0
    parts.append(np.isnan(table[:, list(INDICATED)]))
    return np.concatenate(parts, axis=1, dtype=np.float32)


def _fill(columns: Table, support_rows: int, strategy: str) -> Table:
    """Fill gaps from the support; a column that the support misses wholly becomes NaN."""
    from sklearn.impute import SimpleImputer

    present = ~np.isnan(columns[:support_rows]).all(0)
    filled = np.full_like(columns, np.nan)
    imputer = SimpleImputer(strategy=strategy).fit(columns[:support_rows, present])
    filled[:, present] = imputer.transform(columns[:, present])
    return filled
