"""A deployment on this machine for tests: deploy/local.sh in a folder and on ports of our own.

Its processes have an environment without our package: the app can only come from the bundle.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "deploy"
SCRIPT_S = 150.0  # `up` and `down` on a busy machine

needs_tools = pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("ssh-keygen")),
    reason="openssl and ssh-keygen make certificates and keys, and are not here",
)


def environment_without_our_package(folder: Path) -> Path:
    """Make a virtual environment with what is installed here, but our package; return its bin.

    Python does not read a .pth file in a folder that another .pth file adds: the one by which an
    editable install adds the checkout has no effect.
    """
    venv.create(folder, symlinks=True, with_pip=False)
    scheme = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", vars=scheme))
    installed = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site / "installed.pth").write_text("".join(f"{path}\n" for path in installed))
    for script in distribution("flwr").entry_points.select(group="console_scripts"):
        file = folder / "bin" / script.name
        start = (
            f"import sys\nfrom {script.module} import {script.attr}\nsys.exit({script.attr}())\n"
        )
        file.write_text(f"#!{folder}/bin/python\n{start}")
        file.chmod(0o755)
    return folder / "bin"


class Loopback:
    """deploy/local.sh, and what it starts.

    Args:
        folder: for everything that it writes.
        bin_folder: with the Flower commands.
    """

    def __init__(self, folder: Path, bin_folder: Path) -> None:
        self.folder = folder / "local"
        self.elsewhere = folder / "elsewhere"  # to start commands in
        self.elsewhere.mkdir(parents=True)
        self.port = _free_ports(20)
        self.address = f"127.0.0.1:{self.port}"
        self.environment = {
            key: value for key, value in os.environ.items() if not key.startswith("PYTHON")
        } | {
            "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
            "METABLOOM_LOCAL": str(self.folder),
            "METABLOOM_PORT": str(self.port),
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
        }
        self._started = time.monotonic()
        self._runs: list[subprocess.Popen[bytes]] = []

    def say(self, text: str) -> None:
        """Print what happens, and when: for `pytest -s`, and beside a failure."""
        print(f"[{time.monotonic() - self._started:5.0f} s] {text}", flush=True)

    def script(self, *arguments: str) -> str:
        """Return what deploy/local.sh says; fail with that and with every log."""
        self.say(f"deploy/local.sh {' '.join(arguments)}")
        status, said = self.command(str(DEPLOY / "local.sh"), *arguments, timeout_s=SCRIPT_S)
        assert status == 0, f"{said}\n{self.logs()}"
        return said

    def command(self, *arguments: str, timeout_s: float) -> tuple[int, str]:
        """Return the exit status of a command, in the same environment, and all that it says."""
        # Into a file: what a SuperNode starts keeps a pipe open until its end has been waited for.
        with tempfile.TemporaryFile() as file:
            done = subprocess.run(
                arguments,
                cwd=self.elsewhere,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                check=False,
            )
            file.seek(0)
            return done.returncode, file.read().decode(errors="replace")

    @contextlib.contextmanager
    def process(self, name: str, command: list[str]) -> Iterator[Path]:
        """Have a process run, in the same environment; yield the file with its log."""
        log = self.elsewhere.parent / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                cwd=self.elsewhere,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        try:
            yield log
        finally:
            process.terminate()
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start_run(self, *keys: str) -> tuple[subprocess.Popen[bytes], Path]:
        """Start `deploy/local.sh run`; return the process and the file with its log."""
        log = self.elsewhere.parent / f"run-{len(self._runs) + 1}.log"
        self.say(f"deploy/local.sh run {' '.join(keys)}")
        with log.open("wb") as file:
            run = subprocess.Popen(
                [str(DEPLOY / "local.sh"), "run", *keys],
                cwd=self.elsewhere,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._runs.append(run)
        return run, log

    def until(self, what: str, holds: Callable[[], bool], timeout_s: float) -> None:
        """Wait until ``holds``; fail with every log after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, f"{timeout_s:g} s without: {what}\n{self.logs()}"
            time.sleep(0.1)
        self.say(what)

    def kill(self, name: str) -> None:
        """Kill a SuperNode or the SuperLink, with nothing but signal 9."""
        os.kill(int((self.folder / name / "pid").read_text()), signal.SIGKILL)
        self.say(f"killed {name}")

    def said(self, name: str) -> str:
        """Return the log of a SuperNode or of the SuperLink since its last start."""
        return (self.folder / name / "log").read_text(errors="replace")

    def logs(self) -> str:
        """Return the end of every log."""
        files = [*self.elsewhere.parent.glob("*.log"), *self.folder.glob("*/log")]
        ends = [(file, file.read_text(errors="replace")[-6000:]) for file in sorted(files)]
        return "\n".join(f"--- {file}\n{end}" for file, end in ends)

    def processes(self) -> dict[int, str]:
        """Return the processes that belong to this deployment, by their number."""
        found = {}
        mark = f"FLWR_HOME={self.folder}/".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes():
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(entry.name)] = command.decode(errors="replace")
        return found

    def end(self) -> None:
        """Kill every process that is left."""
        for run in self._runs:
            run.kill()
            run.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def loopback(folder: Path) -> Iterator[Loopback]:
    """Make a deployment in ``folder``; nothing of it runs afterwards."""
    deployment = Loopback(folder, environment_without_our_package(folder / "venv"))
    try:
        yield deployment
    finally:
        deployment.end()


def _free_ports(count: int) -> int:
    """Return the first of ``count`` free ports in a row."""
    for first in range(20000 + os.getpid() % 1000 * 20, 60000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")
