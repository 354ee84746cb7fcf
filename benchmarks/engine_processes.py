"""A process and all below it, as Linux tells of them in /proc: memory, processor seconds, the end.

Resident memory is proportional (PSS): a page that several processes share counts once in their sum.
"""

import os
import signal
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
PARENT, USER, SYSTEM, BEGAN = 1, 11, 12, 19  # fields of /proc/PID/stat behind the name in brackets
OWN = ("Pss_Anon", "Pss_Shmem")
TICKS = os.sysconf("SC_CLK_TCK")


def tree_of(pid: int) -> list[int]:
    """Return a process and all below it, parents first."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[PARENT]), []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def pss_of(pid: int, kinds: Sequence[str] = ("Pss",)) -> float:
    """Return the resident memory of a process in MB; 0 where it has ended.

    ``OWN`` leaves out the pages of files, whose share depends on who else has them open.
    """
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    found = dict(line.split()[:2] for line in lines[1:])
    return sum(float(found.get(f"{kind}:", 0)) for kind in kinds) * 1024 / 1e6


def cpu_of(pids: Iterable[int]) -> float:
    """Return the processor seconds that processes have taken; none of those that have ended."""
    stats = [fields for pid in pids if (fields := _stat(pid))]
    return sum(int(fields[USER]) + int(fields[SYSTEM]) for fields in stats) / TICKS


def end_all(family: Mapping[int, str], wait_s: float = 10.0) -> None:
    """Kill those of a family (``Peak.family``) that still live, and wait until they are gone."""
    alive = [pid for pid, began in family.items() if _began(pid) == began]  # a number comes again
    for pid in alive:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline and any(_began(pid) == family[pid] for pid in alive):
        time.sleep(0.05)


class Peak:
    """Watch a process and all below it, from a thread, and remember the most.

    Args:
        pid: of the process.
        every_s: how often; a shorter peak is not seen.
        is_measured: False: only which processes there are. To read the memory of a process walks
            all its pages, and slows it down: nothing that is timed may be measured.
    """

    def __init__(self, pid: int, every_s: float = 0.25, *, is_measured: bool = True) -> None:
        self.megabytes = 0.0
        self._is_measured = is_measured
        self.family = {pid: _began(pid)}  # all that were ever seen, and when they began
        self._pid, self._every_s = pid, every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            pids = tree_of(self._pid)
            self.family |= {pid: _began(pid) for pid in pids if pid not in self.family}
            if self._is_measured:
                self.megabytes = max(self.megabytes, sum(map(pss_of, pids)))
            self._ended.wait(self._every_s)


def _stat(pid: int) -> list[str]:
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _began(pid: int) -> str:
    """Return when a process began; empty where there is none, or only what is left of it."""
    fields = _stat(pid)
    return fields[BEGAN] if fields and fields[0] != "Z" else ""
