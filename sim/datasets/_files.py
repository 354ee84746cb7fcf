"""Errors for data files that are not there: which, where, and how to get them."""

from pathlib import Path

from ...config import DATA_ENVIRONMENT_VARIABLE
from ...errors import MissingDataError


def missing(dataset: str, path: Path, root: Path, remedy: str) -> MissingDataError:
    """Return the error for a file or folder ``path`` that ``dataset`` needs under ``root``.

    ``remedy`` says how to get it, as the end of a sentence that begins with "To get it".
    """
    return MissingDataError(
        f"data set {dataset!r} needs {path.name!r}, which is not at {path.absolute()}. To get it, "
        f"{remedy}. The folder of data sets is {root.absolute()}: set data-root or "
        f"{DATA_ENVIRONMENT_VARIABLE} to use another."
    )


DOWNLOAD = (
    "pass download=True to load_federation (configuration key download), "
    "which lets torchvision fetch it"
)
