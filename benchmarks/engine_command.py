"""The command line of metabloom as one side: JOB.json has its arguments, OUT gets the results.

python benchmarks/engine_command.py JOB.json OUT
"""

import json
import sys
import time
from pathlib import Path

from metabloom.cli import app


def main(given: Path, out: Path) -> None:
    """Run the command and write how long it took."""
    arguments = [*json.loads(given.read_text())["argv"], "--out", str(out / "results")]
    began = time.perf_counter()
    app(arguments, standalone_mode=False)
    found = {"seconds": time.perf_counter() - began}
    (out / "found.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
