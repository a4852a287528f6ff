"""An offline bundle of tiny wheels: what is in it installs without an index, and a changed byte is found."""

import base64
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub.constants
import pytest
from typer.testing import CliRunner

from common.config.manifest import ModelSection
from common.errors import BundleError, ModelError, RunError
from common.models import find_base
from simulations.bundle import make_bundle
from simulations.bundle_format import Facts, check_bundle, machine
from simulations.commands import app

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def wheel(folder: Path, name: str, version: str, *requires: str, code: str = "") -> Path:
    """A wheel of one module, made by hand (PEP 427)."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {each}" for each in requires] + ["Provides-Extra: more"]
    files = {
        f"{name}/__init__.py": code,
        f"{info}/METADATA": "\n".join(lines) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{place},sha256={_digest(text)},{len(text)}\n" for place, text in files.items())
    with zipfile.ZipFile(path, "w") as archive:
        for place, text in {**files, f"{info}/RECORD": record + f"{info}/RECORD,,\n"}.items():
            archive.writestr(place, text)
    return path


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


@dataclass
class House:
    """A wheelhouse that stands for an index, and what a bundle is made from."""

    folder: Path
    own: Path
    constraints: Path
    base: Path

    def make(self, out: Path, **changes: object) -> tuple[Facts, str]:
        values = {"base": str(self.base), "wheel": self.own, "constraints": self.constraints, **changes}
        return make_bundle(out, **values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> House:
    folder = tmp_path_factory.mktemp("house")
    wheelhouse = folder / "wheelhouse"
    own = wheel(folder / "own", "coadapt", "9.9", "dependency>=1", "further; extra == 'more'", code="import dependency")
    for version in ("1.0", "1.1", "1.2"):
        wheel(wheelhouse, "dependency", version)
    wheel(wheelhouse, "further", "3.0")
    constraints = folder / "constraints.txt"
    constraints.write_text("dependency==1.1\nfurther==3.0\nnever-wanted==1.0\n")
    base = folder / "tiny"
    shutil.copytree(encoder, base)
    (base / "pytorch_model.bin").write_bytes(b"pickled")
    return House(folder, own, constraints, base)


@pytest.fixture(autouse=True)
def no_index(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip sees the wheelhouse alone, whatever this machine's settings say."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(house.folder / "wheelhouse"))


@pytest.fixture(scope="module")
def made(house: House, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A bundle and the digest that its maker was told."""
    path = tmp_path_factory.mktemp("made") / "coadapt.tar"
    with pytest.MonkeyPatch.context() as patch:
        no_index.__wrapped__(house, patch)  # type: ignore[attr-defined]
        _, digest = house.make(path)
    return path, digest


def extracted(bundle: Path, into: Path) -> Path:
    with tarfile.open(bundle) as tar:
        tar.extractall(into, filter="data")
    return into / "coadapt-9.9"


def test_it_holds_pinned_wheels_and_the_base_and_installs_without_an_index(
    house: House, made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, digest = made
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    facts, again = check_bundle(path)
    assert (again, facts.coadapt, (facts.python, facts.platform)) == (digest, "9.9", machine())
    wheels = sorted(name for name in facts.files if name.startswith("wheels/"))
    assert wheels == ["wheels/coadapt-9.9-py3-none-any.whl", "wheels/dependency-1.1-py3-none-any.whl"]
    # Only what is read of a base: no pickle.
    assert "base/tiny/model.safetensors" in facts.files
    assert not any(name.endswith(".bin") for name in facts.files)
    found = find_base(ModelSection(base=str(house.base)))
    assert (facts.base.weights_sha256, facts.base.tokenizer_sha256) == (found.weights_sha256, found.tokenizer_sha256)

    folder = extracted(path, tmp_path)
    subprocess.run(["sha256sum", "--quiet", "--strict", "-c", "SHA256SUMS"], cwd=folder, check=True, timeout=60)
    everything = {place.relative_to(folder).as_posix() for place in folder.rglob("*") if place.is_file()}
    assert everything == set(facts.files) | {"bundle.json", "SHA256SUMS"}
    moved = find_base(ModelSection(base=str(folder / facts.base.folder), weights_sha256=found.weights_sha256))
    assert moved.tokenizer_sha256 == found.tokenizer_sha256

    monkeypatch.delenv("PIP_FIND_LINKS")
    (line,) = [line for line in (folder / "README.txt").read_text().splitlines() if "bin/pip install" in line]
    install = [sys.executable, "-m", "pip", *line.split()[1:], "--quiet", "--target", str(tmp_path / "target")]
    assert {"--no-index", "--require-hashes"} <= set(install)
    subprocess.run(install, cwd=folder, check=True, timeout=120)
    code = "import coadapt, importlib.metadata as m; print(coadapt.__file__, m.version('dependency'))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "target")}
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment, timeout=60)
    assert printed.split() == [str(tmp_path / "target" / "coadapt" / "__init__.py"), "1.1"]

    # pip itself refuses a wheel that is another.
    wheel(folder / "wheels", "dependency", "1.1", code="evil = True")
    refused = subprocess.run([*install, "--upgrade"], cwd=folder, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "DO NOT MATCH THE HASHES" in refused.stderr


def test_the_same_content_is_the_same_file(house: House, made: tuple[Path, str], tmp_path: Path) -> None:
    assert house.make(tmp_path / "again.tar")[1] == made[1]
    facts, digest = house.make(tmp_path / "more.tar", extras=["more"])
    assert "wheels/further-3.0-py3-none-any.whl" in facts.files
    assert digest != made[1]


def test_the_command_makes_and_checks(house: House, made: tuple[Path, str], tmp_path: Path) -> None:
    def said(*words: object, code: int = 0) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "160"}, catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result.output

    words = ("--base", house.base, "--wheel", house.own, "--constraints", house.constraints)
    first = said("bundle", "--out", tmp_path / "b.tar", *words)
    assert f"SHA-256 of the file, to compare by phone: {made[1]}" in first
    assert said("bundle", "check", tmp_path / "b.tar") == first
    with pytest.raises(BundleError, match="--out"):
        said("bundle")


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], list[tuple[str, bytes]]]) -> Path:
    """The bundle with each member replaced by what `change` makes of it."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            file = old.extractfile(member)
            assert file is not None
            for name, data in change(member.name, file.read()):
                other = tarfile.TarInfo(name)
                other.size = len(data)
                new.addfile(other, io.BytesIO(data))
    return target


def test_what_was_changed_is_refused(made: tuple[Path, str], tmp_path: Path) -> None:
    path, _ = made
    with tarfile.open(path) as tar:
        names = tar.getnames()
    assert names[0] == "coadapt-9.9/bundle.json"
    cases = {
        "flip": ("was changed", lambda target: lambda n, d: [(n, d[:-1] + bytes([d[-1] ^ 1]) if n == target else d)]),
        "gone": ("is missing|no bundle", lambda target: lambda n, d: [] if n == target else [(n, d)]),
        "twice": ("there twice", lambda target: lambda n, d: [(n, d), (n, d)] if n == target else [(n, d)]),
    }
    for target in names[1:]:
        for what, (words, change) in cases.items():
            with pytest.raises(BundleError, match=words):
                check_bundle(rewritten(path, tmp_path / what, change(target)))
    extra = ("coadapt-9.9/wheels/../../x", b"")
    with pytest.raises(BundleError, match="not listed"):
        check_bundle(rewritten(path, tmp_path / "x", lambda n, d: [(n, d), extra] if n == names[1] else [(n, d)]))
    with pytest.raises(BundleError, match="of its own"):
        check_bundle(rewritten(path, tmp_path / "x", lambda n, d: [] if n == names[0] else [(n, d)]))


def test_what_is_no_whole_tar_is_refused(made: tuple[Path, str], tmp_path: Path) -> None:
    data = made[0].read_bytes()
    for what in (b"", b"nonsense", bytes(20_480), data[:700], data[: len(data) // 2], data[: len(data) // 2 + 300]):
        (tmp_path / "cut.tar").write_bytes(what)
        with pytest.raises(BundleError):
            check_bundle(tmp_path / "cut.tar")
    with pytest.raises(BundleError, match="cannot be read"):
        check_bundle(tmp_path / "none.tar")
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        link = tarfile.TarInfo("coadapt-9.9/bundle.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(BundleError, match="no plain file"):
        check_bundle(tmp_path / "link.tar")


def test_nothing_is_left_where_it_fails(house: House, tmp_path: Path) -> None:
    house.constraints.with_name("other.txt").write_text("dependency==7.7\n")
    with pytest.raises(BundleError, match=r"pip download failed: .*constraint.* dependency==7\.7; nothing"):
        house.make(tmp_path / "b.tar", constraints=house.constraints.with_name("other.txt"))
    with pytest.raises(ModelError):
        house.make(tmp_path / "b.tar", base="/no/such/base")
    with pytest.raises(BundleError, match="a directory has none"):
        house.make(tmp_path / "b.tar", revision=COMMIT)
    with pytest.raises(BundleError, match="make it first"):
        house.make(tmp_path / "none" / "b.tar")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "b.tar").write_bytes(b"mine")
    with pytest.raises(RunError, match="exists already"):
        house.make(tmp_path / "b.tar")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("b.tar", b"mine")]


def test_a_base_of_the_hub_is_found_where_the_bundle_puts_it(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "cache" / "models--owner--tiny" / "snapshots" / COMMIT
    shutil.copytree(house.base, snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    facts, _ = house.make(tmp_path / "b.tar", base="owner/tiny", revision=COMMIT)
    assert (facts.base.name, facts.base.revision) == ("owner/tiny", COMMIT)
    folder = extracted(tmp_path / "b.tar", tmp_path)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
    pinned = ModelSection(base="owner/tiny", revision=COMMIT, weights_sha256=facts.base.weights_sha256)
    found = find_base(pinned)
    assert (found.folder, found.tokenizer_sha256) == (folder / facts.base.folder, facts.base.tokenizer_sha256)
