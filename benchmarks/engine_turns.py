"""Sides of a comparison in turn, each in a fresh process; and what their figures come to."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from engine_processes import Peak, end_all, pss_of
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
SIDE = HERE / "engine_side.py"
ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # Ray's workers are niced otherwise, Flower's and ours
    "RAY_ADDRESS": "local",  # never join a cluster that happens to run on this machine
    "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_DEDUP_LOGS": "0",
    "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent))),
}


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        what: the comparison.
        figure: the median ratio of the turns, or what stands in its place; None: not measured.
        low: the least of the turns.
        high: the greatest.
        bar: what simulation has to reach; None: the line is only shown.
        aim: what it would like to reach.
        upper: whether bar and aim are upper bounds.
        unit: of the figure; empty: a ratio.
        note: the two sides in their own units.
    """

    what: str
    figure: float | None
    low: float | None
    high: float | None
    bar: float | None = None
    aim: float | None = None
    upper: bool = False
    unit: str = ""
    note: str = ""

    @property
    def verdict(self) -> str:
        """Return "reached", "MISSED", or nothing where there is no bar."""
        if self.bar is None or self.figure is None:
            return ""
        kept = self.figure <= self.bar if self.upper else self.figure >= self.bar
        return "reached" if kept else "MISSED"

    def as_json(self) -> dict[str, Any]:
        """Return the line as a dictionary."""
        return asdict(self)


def line_of(what: str, ratios: Sequence[float], **others: Any) -> Line:
    """Return a line from the ratios of the turns."""
    return Line(what, median(ratios), min(ratios), max(ratios), **others)


@dataclass(frozen=True)
class Turns:
    """Runs jobs, each in a process of its own, and keeps what they found.

    Attributes:
        work: folder of finished jobs: a benchmark that was stopped goes on where it stood. To be
            emptied after a change of the code.
        timeout_s: of one job.
        here: script -> what it does with a job and a folder, in this process; for tests.
    """

    work: Path
    timeout_s: float = 1800.0
    here: Mapping[str, Callable[[Any, Path], dict[str, Any]]] = field(default_factory=dict)

    def take(
        self,
        jobs: Mapping[str, Mapping[str, Any]],
        repeats: int,
        *,
        script: Mapping[str, Sequence[str]] | None = None,
    ) -> dict[str, list[dict[str, Any]]]:
        """Return what each side found in each turn: A B A B, every other turn backwards.

        Args:
            jobs: side -> its job.
            repeats: turns of each side.
            script: side -> the start of its command; others are ``engine_side.py``.
        """
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in jobs}
        for turn in range(repeats):
            sides = list(jobs) if turn % 2 == 0 else list(reversed(jobs))
            for side in sides:
                command = (script or {}).get(side, (sys.executable, str(SIDE)))
                found[side].append(self.run(jobs[side], turn, command))
        return found

    def run(self, job: Mapping[str, Any], turn: int, command: Sequence[str]) -> dict[str, Any]:
        """Return what a job found, from the folder where it is done; with ``peak``, its memory too.

        Raises:
            RuntimeError: where it fails, with the end of what it said.
        """
        text = json.dumps(job, sort_keys=True)
        name = hashlib.blake2b(f"{text} {turn} {command[-1]}".encode(), digest_size=8).hexdigest()
        folder = self.work / name
        result = folder / "result.json"
        if result.exists():
            return {**json.loads(result.read_text()), "folder": str(folder)}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.json").write_text(text + "\n")
        if alike := self.here.get(Path(command[-1]).name):
            found = {**alike(job, folder), "peak_mb": pss_of(os.getpid())}
        else:
            cache = job.get("compile_cache")
            environment = {"TORCHINDUCTOR_CACHE_DIR": str(cache)} if cache else {}
            command = [*command, str(folder / "job.json"), str(folder)]
            peak = self._process(
                command, folder, environment, is_measured=bool(job.get("peak", False))
            )
            found = {**json.loads((folder / "found.json").read_text()), "peak_mb": peak}
        if found.get("failures"):
            raise RuntimeError(f"{text}: clients failed: {found['failures']}")
        result.write_text(json.dumps(found) + "\n")
        return {**found, "folder": str(folder)}

    def _process(
        self,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        *,
        is_measured: bool,
    ) -> float:
        """Run a command, nothing of which is left behind, and return the peak of its memory.

        That is 0 where it is not measured: see ``Peak``.
        """
        log = folder / "log.txt"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                env={**os.environ, **ENVIRONMENT, **environment},
                cwd=folder,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        every_s = 0.25 if is_measured else 1.0
        with Peak(process.pid, every_s, is_measured=is_measured) as peak:
            try:
                process.wait(self.timeout_s)
            finally:
                end_all(peak.family)
        if process.returncode:
            said = log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{command} ended with {process.returncode}:\n{said}")
        return peak.megabytes


def usual(found: Mapping[str, Any]) -> float:
    """Return the median seconds of a round, the first left out."""
    return float(median(found["later"]))


def difference(one: Mapping[str, Any], other: Mapping[str, Any], number: int) -> float:
    """Return the largest difference of two sides' models after round ``number``."""
    first, second = (
        load_file(Path(side["folder"]) / f"round-{number}.safetensors") for side in (one, other)
    )
    if set(first) != set(second):
        raise RuntimeError(f"the models differ in their arrays: {set(first) ^ set(second)}")
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)


def machine() -> dict[str, Any]:
    """Return what the figures were taken on."""
    import flwr
    import ray
    import torch

    return {
        "cores": os.cpu_count(),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flwr": flwr.__version__,
        "ray": ray.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "load": [round(one, 1) for one in os.getloadavg()],
    }
