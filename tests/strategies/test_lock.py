"""One run at a time in a folder of checkpoints.

``python test_lock.py FOLDER`` has forked processes hold the folder, and prints what became of each.
"""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metabloom.errors import ConfigError
from metabloom.strategies import Checkpoints
from metabloom.strategies.shell.lock import held
from tests.strategies.snapshots import saved


def is_free(checkpoints: Checkpoints) -> bool:
    try:
        with held(checkpoints):
            return True
    except ConfigError:
        return False


@pytest.mark.parametrize("options", [{}, {"every": 0, "resume": True}])
def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path, options):
    checkpoints = Checkpoints(tmp_path / "new" / "c", **options)
    said = rf"another run is using '{checkpoints.folder}': wait for it, or choose another .* out"
    with held(checkpoints):
        for other in (Checkpoints(tmp_path / "new" / "c"), checkpoints):
            with pytest.raises(ConfigError, match=said), held(other):
                pass
        assert is_free(Checkpoints(tmp_path / "new" / "d"))
    assert is_free(checkpoints)
    assert list((tmp_path / "new").iterdir()) == []


def test_setting_the_folder_aside_does_not_free_it(tmp_path):
    checkpoints = saved(tmp_path / "c", 1)
    with held(checkpoints):
        checkpoints.set_aside()
        assert not is_free(checkpoints)
        saved(tmp_path / "c", 1)
        assert not is_free(checkpoints)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "c-previous"]


def test_an_error_in_a_run_frees_the_folder_and_is_passed_on(tmp_path):
    with pytest.raises(KeyboardInterrupt), held(Checkpoints(tmp_path / "c")):
        raise KeyboardInterrupt
    assert is_free(Checkpoints(tmp_path / "c"))


def test_runs_that_use_no_folder_hold_none(tmp_path):
    unused = Checkpoints(tmp_path / "c", every=0)
    for checkpoints in (None, unused):
        with held(checkpoints), held(checkpoints):
            assert list(tmp_path.iterdir()) == []


def test_a_file_that_the_run_before_removes_in_the_meantime_is_not_held(tmp_path, monkeypatch):
    """Its lock would hold nobody off: the next run makes another file."""
    checkpoints, real, calls = Checkpoints(tmp_path / "c"), fcntl.flock, []

    def locks(handle, operation):
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / "c.lock").unlink()
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", locks)
    with held(checkpoints):
        assert len(calls) == 2
        assert not is_free(checkpoints)


def test_where_the_file_system_refuses_locks_the_run_goes_on_with_a_warning(
    tmp_path, monkeypatch, caplog
):
    def refuses(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuses)
    with held(Checkpoints(tmp_path / "c")):
        assert "cannot be locked ([Errno 37] No locks available): see to it" in caplog.text


def test_where_the_system_has_no_such_locks_the_run_goes_on_with_a_warning(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with held(Checkpoints(tmp_path / "c")), held(Checkpoints(tmp_path / "c")):
        assert "cannot be locked" in caplog.text


def test_processes_hold_each_other_off_and_a_killed_one_frees_the_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "c")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "free while it is held": False,
        "left by kill -9": ["c.lock"],
        "free after kill -9": True,
        "free while a child of a run that is over lives": True,
        "left at the end": [],
    }


def forked(work) -> int:
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return child


def killed(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main(folder: Path) -> None:
    checkpoints, told = Checkpoints(folder), {}
    reading, writing = os.pipe()

    def holds() -> None:
        with held(checkpoints):
            os.write(writing, b"!")
            time.sleep(100)

    def left() -> list[str]:
        return sorted(path.name for path in folder.parent.iterdir())

    holder = forked(holds)
    os.read(reading, 1)
    told["free while it is held"] = is_free(checkpoints)
    killed(holder)
    told["left by kill -9"] = left()
    told["free after kill -9"] = is_free(checkpoints)
    with held(checkpoints):
        child = forked(lambda: time.sleep(100))  # it has the handle too, as a data loader's worker
    told["free while a child of a run that is over lives"] = is_free(checkpoints)
    killed(child)
    print(json.dumps({**told, "left at the end": left()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
