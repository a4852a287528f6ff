import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from common.durable import new_file, new_folder, write_bytes, write_text
from common.errors import RunError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestFile:
    def test_a_file_is_written_and_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        for data in (b"one", b"a longer second", b""):
            write_bytes(path, data)
            assert path.read_bytes() == data
        write_text(path, "Müller\n")
        assert path.read_bytes() == "Müller\n".encode()
        assert names(tmp_path) == ["file"]

    @pytest.mark.parametrize("old", [b"old", None])
    @pytest.mark.parametrize("broken", ["fsync", "write", "rename"])
    def test_a_failure_leaves_the_old_file_or_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bytes | None, broken: str
    ) -> None:
        path = tmp_path / "file"
        if old is not None:
            path.write_bytes(old)
        target, name = {"fsync": (os, "fsync"), "write": (Path, "open"), "rename": (Path, "replace")}[broken]
        with monkeypatch.context() as patch:
            patch.setattr(target, name, full_disk)
            with pytest.raises(RunError) as error:
                write_bytes(path, b"new")
        assert str(error.value) == f"cannot write {path}: No space left on device; nothing was changed there"
        assert (path.read_bytes() if path.exists() else None) == old
        assert names(tmp_path) == (["file"] if old is not None else [])

    def test_data_are_on_the_disk_before_the_old_file_goes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"old")
        seen: list[bytes] = []
        flush = os.fsync

        def fsync(descriptor: int) -> None:
            seen.append(path.read_bytes())
            flush(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        write_bytes(path, b"new")
        assert seen == [b"old", b"new"]  # the file is flushed, then renamed, then the folder is flushed

    def test_a_missing_folder_is_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match=r"cannot write .*No such file or directory") as error:
            write_text(tmp_path / "nothing" / "file", "x")
        assert "\n" not in str(error.value)


class TestFolder:
    def test_a_folder_appears_when_it_is_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "folder"
        with new_folder(path) as made:
            (made / "sub").mkdir()
            (made / "sub" / "file").write_text("x")
            assert not path.exists()
            assert made.parent == path.parent  # on the same disk, so that it can be renamed
        assert (path / "sub" / "file").read_text() == "x"
        assert names(tmp_path) == ["deep", "file", "folder", "sub"]

    def fill(self, path: Path, fail: Callable[[], None] = lambda: None) -> None:
        with new_folder(path) as made:
            (made / "file").write_text("x")
            fail()

    @pytest.mark.parametrize("broken", [(os, "fsync"), (Path, "rename"), (Path, "mkdir")])
    def test_a_full_disk_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: tuple[object, str]
    ) -> None:
        path = tmp_path / "folder"
        with monkeypatch.context() as patch:
            patch.setattr(*broken, full_disk)
            with pytest.raises(RunError) as error:
                self.fill(path)
        assert str(error.value) == f"cannot write {path}: No space left on device; nothing was left there"
        assert names(tmp_path) == []

    @pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), RunError("inner")])
    def test_a_failure_in_the_block_leaves_nothing_and_goes_on(self, tmp_path: Path, error: BaseException) -> None:
        def fail() -> None:
            raise error

        with pytest.raises(type(error)) as raised:
            self.fill(tmp_path / "folder", fail)
        assert raised.value is error
        assert names(tmp_path) == []

    def test_every_file_is_flushed_before_the_folder_appears(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "folder"
        seen: list[tuple[str, bool]] = []
        flush = os.fsync

        def fsync(descriptor: int) -> None:
            seen.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, path.exists()))
            flush(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        self.fill(path)
        assert ("file", False) in seen
        assert seen[-1] == (tmp_path.name, True)

    @pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
    def test_what_exists_is_never_overwritten(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "there"
        if kind == "file":
            path.write_text("old")
        else:
            path.mkdir()
        if kind == "folder":
            (path / "old").write_text("old")
        before = names(tmp_path)
        with pytest.raises(RunError, match="exists already; finished files are never overwritten"):
            self.fill(path)
        assert names(tmp_path) == before


class TestNewFile:
    def test_it_appears_when_it_is_whole_and_never_over_another(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        with new_file(path) as file:
            file.write(b"one ")
            assert not path.exists()
            file.write(b"two")
        assert path.read_bytes() == b"one two"
        with pytest.raises(RunError, match="exists already"), new_file(path):
            pass
        assert (names(tmp_path), path.read_bytes()) == (["file"], b"one two")

    @pytest.mark.parametrize("error", [ValueError("a problem"), KeyboardInterrupt()])
    def test_what_breaks_off_leaves_nothing(self, tmp_path: Path, error: BaseException) -> None:
        def broken() -> None:
            with new_file(tmp_path / "file") as file:
                file.write(b"half")
                raise error

        with pytest.raises(type(error)):
            broken()
        assert names(tmp_path) == []

    def test_a_full_disk_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(RunError, match="No space left on device; nothing was left"), new_file(tmp_path / "file"):
            pass
        assert names(tmp_path) == []
