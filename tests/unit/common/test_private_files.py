"""Keys are closed from the first byte and never overwritten."""

import os
from pathlib import Path

import pytest

from common.errors import EnrolmentError
from common.private_files import private_folder, require_private, write_key


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_modes_do_not_hang_on_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        private_folder(tmp_path / "keys")
        private_folder(tmp_path / "relay", mode=0o750)
        write_key(tmp_path / "keys" / "a.key", b"secret")
        write_key(tmp_path / "relay" / "a.pub", b"public", mode=0o644)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"keys": 0o700, "relay": 0o750, "a.key": 0o600, "a.pub": 0o644}


def test_a_key_is_never_overwritten_nor_written_through_a_link(tmp_path: Path) -> None:
    write_key(tmp_path / "a.key", b"first")
    with pytest.raises(EnrolmentError, match="exists already"):
        write_key(tmp_path / "a.key", b"second")
    assert (tmp_path / "a.key").read_bytes() == b"first"
    (tmp_path / "b.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EnrolmentError, match="exists already"):
        write_key(tmp_path / "b.key", b"second")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(("mode", "most", "fine"), [(0o600, 0o600, True), (0o400, 0o600, True), (0o640, 0o600, False)])
def test_a_looser_mode_is_refused(tmp_path: Path, mode: int, most: int, fine: bool) -> None:
    path = tmp_path / "a.key"
    write_key(path, b"secret", mode=mode)
    if fine:
        require_private(path, most=most)
        return
    with pytest.raises(EnrolmentError, match=rf"has mode 0640 and may have at most 0600: chmod 600 {path}"):
        require_private(path, most=most)


def test_what_is_missing_or_a_link_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EnrolmentError, match="No such file"):
        require_private(tmp_path / "a.key")
    write_key(tmp_path / "a.key", b"secret")
    (tmp_path / "b.key").symlink_to(tmp_path / "a.key")
    with pytest.raises(EnrolmentError, match="is a link"):
        require_private(tmp_path / "b.key")
