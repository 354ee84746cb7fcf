"""Real `flwr run`s for tests.

A local SuperLink of our own, started in a neutral directory, and the results of a run.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"
START_S = 60.0  # Flower itself gives its SuperLink 15 s, which a busy machine does not keep


class Flower:
    """A SuperLink that simulates, and `flwr run` against it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = _free_port()
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(self.port),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def run(
        self, app: Path, *, supernodes: int, config: Path | None = None, timeout_s: float
    ) -> str:
        """Return the log of one run; fail with the log where the run fails or takes too long."""
        command = [str(BIN / "flwr"), "run", str(app), "--stream"]
        command += ["--run-config", str(config)] if config else []
        size = f"num-supernodes={supernodes} client-resources-num-cpus=1"
        try:
            done = subprocess.run(
                [*command, "--federation-config", size],
                cwd=self.home,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as err:
            log = (err.stdout or b"").decode(errors="replace")
            raise AssertionError(
                f"flwr run took more than {timeout_s:g} s; its log:\n{log}"
            ) from None
        assert done.returncode == 0, (
            f"flwr run ended with {done.returncode}; its log:\n{done.stdout}"
        )
        return done.stdout


@contextlib.contextmanager
def flower(home: Path) -> Iterator[Flower]:
    """Start a local SuperLink in ``home`` and stop it, with all that it started, at the end.

    `flwr run` starts one where it finds none, but leaves it running: this one is ours to stop.
    """
    link = Flower(home)
    command = [
        str(BIN / "flower-superlink"),
        "--insecure",
        "--simulation",
        "--isolation",
        "subprocess",
    ]
    command += ["--host", "127.0.0.1", "--port", str(link.port)]
    log = home / "superlink.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=home,
            env=link.environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_for(process, link.port, log)
        yield link
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def toml_of(values: Mapping[str, object]) -> str:
    """Return a TOML file with ``values`` (numbers, booleans and strings)."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def results_in(folder: Path) -> dict:
    """Return results.json."""
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def clients_by_round(folder: Path) -> list[list[str]]:
    """Return who trained in each round."""
    return [entry["clients"] for entry in results_in(folder)["history"]]


def largest_difference(first: Path, second: Path) -> float:
    """Return the largest difference between two runs' models, whose names must agree."""
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert list(one) == list(other)
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return
        time.sleep(0.2)
    raise AssertionError(
        f"the SuperLink did not start; its log:\n{log.read_text(errors='replace')}"
    )
