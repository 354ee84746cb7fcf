"""A run of its own that is interrupted: ``python interrupted.py FLAG``.

It writes FLAG once its clients are at work, which never end by themselves.
"""

import signal
import sys
import threading
import time
from pathlib import Path

from metabloom.sim import CohortGrid
from tests.sim.engine.clients import app, ask, content, pids


def main(flag: Path) -> None:
    with CohortGrid(app, num_nodes=8, workers=2) as grid:
        workers = pids(ask(grid, content(seconds=0.1)))

        def tell() -> None:
            time.sleep(1.0)
            flag.write_text(" ".join(map(str, workers)))

        threading.Thread(target=tell).start()
        ask(grid, content(bad=list(range(8)), deed="sleep"), timeout=3600)


if __name__ == "__main__":
    # Jobs that a shell starts in the background ignore Ctrl-C, and so do those they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(Path(sys.argv[1]))
