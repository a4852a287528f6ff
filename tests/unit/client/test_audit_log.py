"""The audit log: every line follows from the one before, whatever happens to the file."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from client.audit_log import AuditLog, read_audit
from common.errors import RunError


def written(path: Path, count: int = 4) -> AuditLog:
    log = AuditLog(path)
    for number in range(count):
        log.add("answered", kind="request", run_id="run", round_number=number, payload="a" * 64, size=number)
    return log


def test_lines_are_there_for_the_next_process_and_form_a_chain(tmp_path: Path) -> None:
    path = tmp_path / "log" / "audit.jsonl"
    written(path).close()
    log = AuditLog(path)
    log.add("refused", kind="message", code="policy", reason="limits.rank: asked 9, allowed 8")
    log.close()
    lines = list(read_audit(path))
    assert [line.number for line in lines] == [1, 2, 3, 4, 5]
    assert [line.round for line in lines] == [0, 1, 2, 3, None]
    assert (lines[-1].decision, lines[-1].reason) == ("refused", "limits.rank: asked 9, allowed 8")
    raw = path.read_bytes().splitlines(keepends=True)
    for before, line in zip([b"", *raw], lines, strict=False):
        assert line.before == (hashlib.sha256(before).hexdigest() if before else "")
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_torn_is_cut_off_and_noted(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    written(path).close()
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in (1, 20, last - 1):
        path.write_bytes(whole[:-cut])
        assert len(list(read_audit(path))) == 3  # a reader beside a vault that writes
        AuditLog(path).close()
        lines = list(read_audit(path))
        assert [line.number for line in lines] == [1, 2, 3, 4]
        assert (lines[-1].decision, lines[-1].code, lines[-1].size) == ("note", "torn_line", last - cut)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_line_that_is_changed_or_taken_out_shows(tmp_path: Path, place: int) -> None:
    path = tmp_path / "audit.jsonl"
    written(path).close()
    lines = path.read_bytes().splitlines(keepends=True)
    changed = json.loads(lines[place])
    changed["code"] = "other"
    edited = [*lines[:place], json.dumps(changed).encode() + b"\n", *lines[place + 1 :]]
    taken_out = [*lines[:place], *lines[place + 1 :]]
    garbage = [*lines[:place], b"{}\n", *lines[place + 1 :]]
    for wrong in (edited, taken_out, garbage):
        path.write_bytes(b"".join(wrong))
        with pytest.raises(RunError, match="was changed: line"):
            list(read_audit(path))
        with pytest.raises(RunError, match="was changed: line"):
            AuditLog(path)


def test_a_line_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = written(tmp_path / "audit.jsonl")

    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("client.audit_log.os.write", full)
    with pytest.raises(RunError, match="cannot be written: No space left on device"):
        log.add("answered")


def test_there_is_nothing_to_read_before_the_first_order(tmp_path: Path) -> None:
    assert list(read_audit(tmp_path / "audit.jsonl")) == []


def test_half_a_line_on_a_full_disk_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.add("answered", kind="hello")
    write = os.write
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda file, data: write(file, data[:20]))
        with pytest.raises(RunError, match="the disk is full"):
            log.add("answered", kind="poll")
    log.add("refused", kind="request")
    log.close()
    assert [(line.number, line.kind) for line in read_audit(path)] == [(1, "hello"), (2, "request")]
