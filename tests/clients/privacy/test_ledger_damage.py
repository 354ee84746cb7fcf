"""What was altered in a ledger is found: each byte, each line, another data set's file."""

import json
import os
from pathlib import Path

import pytest

from metabloom import ledger_file
from metabloom.errors import ConfigError, LedgerError
from metabloom.files import seal_json, unseal_json
from metabloom.ledger import PrivacyLedger
from metabloom.ledger import _entry as entry_of
from tests.clients.privacy.ledgers import (
    ROUND,
    count_of,
    full,
    ledger_at,
    lines_of,
    read,
    written,
)

# --- what was altered -----------------------------------------------------------------------------


def test_every_flipped_byte_is_found(path):
    check_every_flip(path)


def check_every_flip(path):
    head = written(path).head
    content = path.read_bytes()
    assert content.count(b"\n") == 5
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(bytes(flipped))
        with pytest.raises(LedgerError, match="restore the file"):
            read(path)
        with pytest.raises(LedgerError):
            read(path, head)
    path.write_bytes(content)
    assert len(read(path, head)) == 4


@pytest.mark.parametrize("byte", [b"\n", b"\r", b" ", b"\x00", b"9", b"}", b"\x85", b"\x0c"])
def test_a_byte_that_becomes_another_one_is_found_wherever_it_is(path, byte):
    written(path, 2)
    content = path.read_bytes()
    for position in range(len(content)):
        if content[position : position + 1] != byte:
            path.write_bytes(content[:position] + byte + content[position + 1 :])
            with pytest.raises(LedgerError):
                read(path)


def test_a_file_that_was_cut_off_is_a_shorter_ledger_which_a_kept_head_finds(path):
    """Of itself the file can only say that its lines are whole: that is what the mirror is for."""
    head = written(path).head
    content = path.read_bytes()
    ends = [position + 1 for position, byte in enumerate(content) if byte == ord("\n")]
    whole = [read_of(path, content[:end]) for end in (0, *ends)]
    for size in range(len(content)):
        path.write_bytes(content[:size])
        if size + 1 in ends:  # a line's end alone is gone: the line was whole, and paid for
            with pytest.raises(LedgerError, match="last byte"):
                read(path)
            continue
        lines = sum(end <= size for end in ends)
        assert read(path) == whole[lines]  # only the line that was cut, and those after, are gone
        with pytest.raises(LedgerError, match=f"has {lines} lines and had 5 before"):
            ledger_at(path).check_not_behind(head)
    path.unlink()
    with pytest.raises(LedgerError, match="has 0 lines and had 5"):
        ledger_at(path).check_not_behind(head)


def read_of(path: Path, content: bytes) -> list:
    path.write_bytes(content)
    return read(path)


def without_first(lines):
    return lines[1:]


def without_second(lines):
    return [lines[0], *lines[2:]]


def without_middle(lines):
    return [*lines[:2], *lines[3:]]


def swapped(lines):
    return [*lines[:2], lines[3], lines[2], *lines[4:]]


def first_swapped(lines):
    return [lines[1], lines[0], *lines[2:]]


def duplicated(lines):
    return [*lines[:3], lines[2], *lines[3:]]


def first_duplicated(lines):
    return [lines[0], *lines]


def last_duplicated(lines):
    return [*lines, lines[-1]]


def with_empty_line(lines):
    return [*lines[:2], b"\n", *lines[2:]]


def with_empty_end(lines):
    return [*lines, b"\n"]


def with_windows_ends(lines):
    return [line[:-1] + b"\r\n" for line in lines]


REARRANGED = (
    without_first,
    without_second,
    without_middle,
    swapped,
    first_swapped,
    duplicated,
    first_duplicated,
    last_duplicated,
    with_empty_line,
    with_empty_end,
    with_windows_ends,
)


def check_rearranged(path, change):
    written(path)
    path.write_bytes(b"".join(change(lines_of(path))))
    with pytest.raises(LedgerError):
        read(path)


def check_torn_line(path):
    written(path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole + lines_of(path)[-1][:40])
    ledger_at(path).reserve(ROUND)
    assert count_of(path) == 1 + 2 + 3 + 20


def check_full_disk(path, monkeypatch):
    ledger = written(path, 2)
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(ledger_file.os, "fsync", full)
        with pytest.raises(ConfigError):
            ledger.reserve(ROUND)
    assert path.read_bytes() == before


# Wrong ledgers, which the checks must refuse.


def trusts_every_line(monkeypatch):
    def check(self, line, number, before):
        told = json.loads(line)
        return None if number == 1 else entry_of(told)

    monkeypatch.setattr(PrivacyLedger, "_checked", check)


def sees_no_order(monkeypatch):
    def check(self, line, number, before):
        try:
            return entry_of(unseal_json(line))
        except ValueError as err:
            raise LedgerError("altered: restore the file") from err

    monkeypatch.setattr(PrivacyLedger, "_checked", check)


def forgets_the_last_byte(monkeypatch):
    monkeypatch.setattr("metabloom.ledger._is_sealed", lambda line: False)


def appends_to_what_is_torn(monkeypatch):
    def append(handle, content, size, path):
        os.pwrite(handle, content, os.fstat(handle).st_size)

    monkeypatch.setattr("metabloom.ledger.append", append)


def leaves_what_failed(monkeypatch):
    def append(handle, content, size, path):
        try:
            os.pwrite(handle, content, size)
            ledger_file.os.fsync(handle)
        except OSError as err:
            raise ConfigError("no space") from err

    monkeypatch.setattr("metabloom.ledger.append", append)


WRONG = [
    (trusts_every_line, check_every_flip),
    (forgets_the_last_byte, check_every_flip),
    (sees_no_order, lambda path: check_rearranged(path, swapped)),
    (sees_no_order, lambda path: check_rearranged(path, without_first)),
    (sees_no_order, lambda path: check_rearranged(path, last_duplicated)),
    (appends_to_what_is_torn, check_torn_line),
]


@pytest.mark.parametrize(("plant", "check"), WRONG)
def test_the_checks_refuse_wrong_ledgers(path, monkeypatch, plant, check):
    check(path.with_name("right.jsonl"))
    plant(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception, LedgerError, KeyError, ValueError)):
        check(path)


def test_the_check_of_a_full_disk_refuses_a_ledger_that_leaves_half_a_reservation(
    path, monkeypatch
):
    check_full_disk(path.with_name("right.jsonl"), monkeypatch)
    leaves_what_failed(monkeypatch)
    with pytest.raises(AssertionError):
        check_full_disk(path, monkeypatch)


@pytest.mark.parametrize("change", REARRANGED, ids=lambda change: change.__name__)
def test_lines_that_are_missing_or_moved_or_doubled_are_found(path, change):
    head = written(path).head
    path.write_bytes(b"".join(change(lines_of(path))))
    with pytest.raises(LedgerError, match="line"):
        read(path)
    with pytest.raises(LedgerError):
        ledger_at(path).check_not_behind(head)
    with pytest.raises(LedgerError):
        ledger_at(path).reserve(ROUND)


def test_an_open_ledger_finds_what_was_altered_under_it(path):
    ledger = written(path)
    path.write_bytes(b"".join(swapped(lines_of(path))))
    with pytest.raises(LedgerError):
        ledger.reserve(ROUND)


@pytest.mark.parametrize("missing", ["previous", "kind", "format", "data", "events", "run"])
def test_a_sealed_line_that_lacks_a_member_is_refused_as_such(path, missing):
    """A checksum is no signature: whoever writes one can seal anything."""
    written(path)
    lines = lines_of(path)
    told = [unseal_json(line) for line in lines]
    for number, one in enumerate(told):
        if missing in one:
            left = {key: value for key, value in one.items() if key not in (missing, "checksum")}
            path.write_bytes(b"".join([*lines[:number], seal_json(left), *lines[number + 1 :]]))
            with pytest.raises(LedgerError, match=f"line {number + 1}"):
                read(path)


@pytest.mark.parametrize("events", [[[0.0, 0.05, 1]], [[1.0, 0.05, -3]], [[1.0]], 7, [["a", 1, 1]]])
def test_a_sealed_line_with_impossible_events_is_refused(path, events):
    written(path, 1)
    first, second = lines_of(path)
    told = {key: value for key, value in unseal_json(second).items() if key != "checksum"}
    path.write_bytes(first + seal_json({**told, "events": events}))
    with pytest.raises(LedgerError, match="line 2"):
        read(path)


def test_the_ledger_of_other_data_is_refused(path):
    written(path)
    with pytest.raises(LedgerError, match=r"that of 'digits/anna', the data are 'digits/bert'"):
        PrivacyLedger(path, data="digits/bert").reserve(ROUND)
    assert PrivacyLedger(path).events == read(path)  # one that is only read takes any


def test_a_format_that_is_not_known_is_refused(path):
    told = {"kind": "open", "format": 2, "data": "digits/anna", "unit": "x", "previous": ""}
    path.parent.mkdir(parents=True)
    path.write_bytes(seal_json(told))
    with pytest.raises(LedgerError, match="format is 2, known is 1"):
        read(path)


def test_a_head_of_another_history_is_found(path):
    ledger = written(path)
    other = written(path.with_name("bert.jsonl"), 3)
    with pytest.raises(LedgerError, match=r"line 4 .* is not the one"):
        ledger.check_not_behind(other.head._replace(checksum="0" * 64))


def test_a_ledger_that_went_on_is_not_behind(path):
    heads = [written(path).head]
    for _ in range(3):
        ledger_at(path).reserve(ROUND)
        heads.append(ledger_at(path).head)
    for head in heads:
        ledger_at(path).check_not_behind(head)
