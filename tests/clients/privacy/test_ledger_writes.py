"""Writes that fail book nothing, and processes that write at once lose nothing."""

import fcntl
import json
import multiprocessing
import os

import pytest

from metabloom import ledger_file
from metabloom.accounting import Budget, Event
from metabloom.errors import BudgetExhaustedError, ConfigError, LedgerError
from metabloom.files import unseal_json
from metabloom.ledger import PrivacyLedger
from tests.clients.privacy.ledgers import (
    DELTA,
    ROUND,
    count_of,
    full,
    ledger_at,
    lines_of,
    read,
    written,
)

# --- writes that fail -----------------------------------------------------------------------------


def test_a_torn_last_line_is_dropped_by_the_next_reservation_and_the_file_is_whole(path):
    written(path, 3)
    whole = path.read_bytes()
    last = lines_of(path)[-1]
    for cut in (1, 2, len(last) // 2, len(last) - 2):
        path.write_bytes(whole + last[:cut].replace(b"\n", b""))
        assert count_of(path) == 1 + 2 + 3
        ledger_at(path).reserve([Event(9.0, 0.5)])
        lines = lines_of(path)
        assert len(lines) == 5
        assert all(unseal_json(line) for line in lines)
        assert path.read_bytes().startswith(whole)
        assert count_of(path) == 1 + 2 + 3 + 1


def test_a_first_write_that_was_torn_is_begun_anew(path):
    written(path, 1)
    whole = path.read_bytes()
    for size in range(0, len(lines_of(path)[0]), 7):
        path.write_bytes(whole[:size])
        ledger_at(path).reserve(ROUND)
        assert read(path) == [(1.0, 0.05, 20)]
        assert len(lines_of(path)) == 2


def test_the_first_line_alone_is_a_ledger_of_nothing(path):
    written(path, 1)
    path.write_bytes(lines_of(path)[0])
    ledger_at(path).reserve(ROUND)
    assert read(path) == [(1.0, 0.05, 20)]


@pytest.mark.parametrize("call", ["fsync", "pwrite"])
@pytest.mark.parametrize("before", [0, 2])
def test_a_full_disk_books_nothing_and_releases_nothing(path, monkeypatch, call, before):
    if before:
        written(path, before)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if before else b""
    ledger = ledger_at(path)
    with monkeypatch.context() as patched:
        patched.setattr(ledger_file.os, call, full)
        with pytest.raises(ConfigError, match=r"No space left.*nothing is released: free space"):
            ledger.reserve(ROUND)
    assert path.read_bytes() == content
    assert ledger.events == read(path)
    ledger.reserve(ROUND)
    assert count_of(path) == 20 + (3 if before else 0)


def test_a_write_that_the_system_cuts_short_books_nothing(path, monkeypatch):
    ledger, real = written(path, 2), os.pwrite
    content = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(ledger_file.os, "pwrite", lambda h, b, at: real(h, b[:-9], at))
        with pytest.raises(ConfigError, match="bytes were written"):
            ledger.reserve(ROUND)
    assert path.read_bytes() == content


def test_the_line_is_on_the_disk_before_a_charge_is_returned(path, monkeypatch):
    done = []
    real = {name: getattr(os, name) for name in ("pwrite", "fsync")}

    def noted(name):
        def call(*arguments):
            done.append(name)
            return real[name](*arguments)

        return call

    ledger = written(path, 1)
    for name in real:
        monkeypatch.setattr(ledger_file.os, name, noted(name))
    ledger.reserve(ROUND)
    assert done == ["pwrite", "fsync"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_refused_with_advice(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ConfigError, match=r"cannot be opened: .*privacy\.root"):
            ledger_at(tmp_path / "anna.jsonl").reserve(ROUND)
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_in_the_place_of_the_file_is_refused_with_advice(path):
    path.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"cannot be opened: .*privacy\.root"):
        ledger_at(path).reserve(ROUND)
    with pytest.raises(ConfigError, match=r"cannot be read: .*privacy\.root"):
        ledger_at(path).entries()


def test_a_file_in_the_place_of_the_folder_is_refused_with_advice(path):
    path.parent.write_text("no folder")
    with pytest.raises(ConfigError, match=r"cannot be opened: .*privacy\.root"):
        ledger_at(path).reserve(ROUND)


def test_a_ledger_that_is_removed_while_it_is_opened_is_not_written_to(path, monkeypatch):
    ledger = written(path, 1)
    monkeypatch.setattr("metabloom.ledger.lock", lambda handle, of: of.unlink())
    with pytest.raises(LedgerError, match="moved or removed while it was opened"):
        ledger.reserve(ROUND)


# --- several processes ----------------------------------------------------------------------------


def test_a_lock_that_another_process_holds_is_waited_for_within_bounds(path, monkeypatch):
    ledger = written(path, 1)
    content = path.read_bytes()
    monkeypatch.setattr(ledger_file, "LOCK_S", 0.05)
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"locked for 0\.05 s: another process holds it"):
            ledger.reserve(ROUND)
    assert path.read_bytes() == content
    ledger.reserve(ROUND)


def reserve_often(path: str, own: int, times: int) -> None:
    ledger = PrivacyLedger(path, data="digits/anna")
    for number in range(times):
        ledger.reserve([Event(1.0 + own, 0.05)], run=f"process {own}", server_round=number)


def test_processes_that_reserve_at_once_lose_no_line(path):
    forks = multiprocessing.get_context("fork")
    children = [forks.Process(target=reserve_often, args=(str(path), n, 100)) for n in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert read(path) == [(1.0, 0.05, 100), (2.0, 0.05, 100)]
    entries = ledger_at(path).entries()
    for own in range(2):
        numbers = [one.server_round for one in entries if one.run == f"process {own}"]
        assert numbers == list(range(100))
    assert len(lines_of(path)) == 201


def spend(path: str, wanted) -> None:
    while True:
        try:
            PrivacyLedger(path, data="digits/anna").reserve(ROUND, budget=Budget(5.0, DELTA))
        except BudgetExhaustedError:
            return
        wanted.release()


def test_processes_that_spend_one_budget_at_once_never_spend_it_twice(path):
    forks = multiprocessing.get_context("fork")
    taken = forks.Semaphore(0)
    children = [forks.Process(target=spend, args=(str(path), taken)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert taken.get_value() == len(ledger_at(path).entries())
    assert ledger_at(path).epsilon(DELTA) <= 5.0
    assert not ledger_at(path).admits(ROUND, Budget(5.0, DELTA))


def test_a_line_is_plain_json_that_anybody_can_read(path):
    written(path, 1)
    first, second = (json.loads(line) for line in lines_of(path))
    assert (first["kind"], first["format"], first["data"]) == ("open", 1, "digits/anna")
    assert first["unit"] == "one record, added or removed"
    assert second["events"] == [[1.0, 0.05, 1]]
    assert second["previous"] == first["checksum"]
