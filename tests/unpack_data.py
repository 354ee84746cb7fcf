"""Unpack packed data sets (.gz, Omniglot's zips) into the layout that metabloom reads.

Usage: python tests/unpack_data.py SRC DEST
DEST appears whole or not at all; where it exists already nothing is done.
"""

import argparse
import gzip
import os
import shutil
import tempfile
import zipfile
from pathlib import Path


def unpack(source: Path, destination: Path) -> Path:
    """Return ``destination``, holding every file of ``source`` unpacked."""
    if destination.is_dir():
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{destination.name}.", dir=destination.parent))
    try:
        for packed in sorted(path for path in source.rglob("*") if path.is_file()):
            _unpack_one(packed, partial / packed.relative_to(source))
        try:
            os.rename(partial, destination)
        except OSError:  # another process was first: its copy is as good
            if not destination.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return destination


def _unpack_one(packed: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if packed.suffix == ".gz":
        with gzip.open(packed) as stream, open(target.with_suffix(""), "wb") as out:
            shutil.copyfileobj(stream, out)
    elif packed.suffix == ".zip":
        with zipfile.ZipFile(packed) as archive:
            archive.extractall(target.parent)
    else:
        shutil.copyfile(packed, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    chosen = parser.parse_args()
    print(unpack(chosen.source, chosen.destination))


if __name__ == "__main__":
    main()
