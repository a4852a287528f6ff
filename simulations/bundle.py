"""`coadapt bundle`: everything that an institution installs, in one file, for where nothing can be downloaded.

pip fetches the wheels of Coadapt's requirements, held to the pinned versions, for this Python and this machine; the
base model comes from where `find_base` finds it. `simulations/bundle_format.py` says what the file is.
"""

import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from common.config.manifest import DEFAULT_BASE, ModelSection
from common.durable import new_file
from common.errors import BundleError
from common.models import HUB_FILES, Base, find_base
from simulations.bundle_format import FACTS, SUMS, BundledBase, BundledFile, Facts, Hashed, machine, sums_of

__all__ = ["make_bundle"]

ROOMS = ("client", "common", "server", "simulations")
_SOURCE = ("pyproject.toml", "README.md", "LICENSE", *ROOMS)
# A wheel is a zip, whose years begin in 1980; with it two builds of one source are one file.
_ZIP_EPOCH = "315532800"


def make_bundle(
    out: Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    extras: Sequence[str] = (),
    wheel: Path | None = None,
    constraints: Path | None = None,
) -> tuple[Facts, str]:
    """Write a bundle, whole or not at all; what it holds, and the SHA-256 of the file.

    `base` is a hub id (at `revision`, else its present commit) or a directory; None: the default base. `wheel` is
    Coadapt's own, `constraints` the pinned versions; None: built from, and read from, the source that this runs from.

    Raises:
        BundleError: pip cannot fetch a wheel, or there is no source and no `wheel`.
        ModelError: the base is not found.
        RunError: `out` exists or cannot be written.
    """
    source = Path(__file__).resolve().parents[1]
    constraints = _constraints(source) if constraints is None else constraints
    model = _base(base, revision)
    if not out.absolute().parent.is_dir():
        raise BundleError(f"there is no folder {out.absolute().parent} to write {out.name} into; make it first")
    with tempfile.TemporaryDirectory(prefix=".coadapt-bundle-", dir=out.absolute().parent) as name, new_file(out) as to:
        folder = Path(name)
        own = _built(source, folder) if wheel is None else wheel
        wheels = folder / "wheels"
        _download(own, extras, constraints, wheels)
        hub = f"hub/models--{model.name.replace('/', '--')}/snapshots/{model.revision}"
        placed = f"base/{model.folder.resolve().name}" if model.revision is None else hub
        content = {f"wheels/{path.name}": path for path in sorted(wheels.iterdir())}
        content |= {f"{placed}/{name}": path for name, path in _model_files(model)}
        facts = _facts(own, model, placed, content, folder)
        file = Hashed(to)
        with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
            for place, path in content.items():
                _add(tar, f"{facts.top}/{place}", path)
        return facts, file.hexdigest()


def _base(base: str | None, revision: str | None) -> Base:
    if base is None:
        return find_base(ModelSection.model_validate({}))
    if Path(base).expanduser().is_dir() and revision is not None:
        raise BundleError("--revision is a hub repository's commit; a directory has none")
    values = {"base": base} if revision is None else {"base": base, "revision": revision}
    return find_base(ModelSection.model_validate(values), pinning=base != DEFAULT_BASE)


def _model_files(model: Base) -> Iterator[tuple[str, Path]]:
    """The files that Coadapt reads of a base, with their places in its folder; other weights stay away."""
    for path in sorted(model.folder.rglob("*")):
        name = path.relative_to(model.folder).as_posix()
        if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in HUB_FILES):
            yield name, path


def _constraints(source: Path) -> Path:
    path = source / "constraints.txt"
    if not path.is_file():
        raise BundleError(
            "Coadapt runs without its source here, so its pinned versions are not known: give --wheel and --constraints"
        )
    return path


def _built(source: Path, folder: Path) -> Path:
    """Coadapt's own wheel, of a copy of the source: what an older build left there would be in it."""
    if not (source / "pyproject.toml").is_file():
        raise BundleError("Coadapt runs without its source here, so its own wheel cannot be built: give --wheel")
    copy, built = folder / "source", folder / "built"
    copy.mkdir()
    for name in _SOURCE:
        if (source / name).is_dir():
            shutil.copytree(source / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source / name, copy / name)
    _pip("wheel", "--no-deps", "--wheel-dir", str(built), str(copy))
    (wheel,) = built.glob("*.whl")
    return wheel


def _download(own: Path, extras: Sequence[str], constraints: Path, wheels: Path) -> None:
    what = str(own.resolve()) + (f"[{','.join(extras)}]" if extras else "")
    _pip(
        *("download", "--only-binary", ":all:", "--dest", str(wheels), "--constraint", str(constraints.resolve())),
        what,
    )


def _pip(*words: str) -> None:
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "SOURCE_DATE_EPOCH": _ZIP_EPOCH}
    found = subprocess.run(
        [sys.executable, "-m", "pip", *words], capture_output=True, text=True, env=environment, check=False
    )
    if found.returncode:
        lines = [line for line in found.stderr.splitlines() if line.strip()] or ["it gave no reason"]
        reasons = [line for line in lines if line.startswith("ERROR:")] or lines[-1:]
        # Which pin stands against which wish is not among pip's errors but in what it tells.
        conflict = re.search(r"The conflict is caused by:\n((?: +\S.*\n)+)", found.stdout + found.stderr)
        reasons += [line.strip() for line in conflict[1].splitlines()] if conflict else []
        raise BundleError(f"pip {words[0]} failed: {'; '.join(reasons)}; nothing was written")


def _facts(own: Path, model: Base, placed: str, content: dict[str, Path], folder: Path) -> Facts:
    """Hash everything, and write the bundle's texts; `content` gets them, first what is to be read first."""
    try:
        packages = {path.name: parse_wheel_filename(path.name) for path in content.values() if path.suffix == ".whl"}
        version = str(parse_wheel_filename(own.name)[1])
    except InvalidWheelFilename as error:
        raise BundleError(f"{error}; give a wheel under the name with which it was built") from error
    files = {place: _bundled(path) for place, path in content.items()}
    pins = [
        f"{name}=={release} --hash=sha256:{files[f'wheels/{wheel}'].sha256}\n"
        for wheel, (name, release, _, _) in sorted(packages.items())
    ]
    python, platform = machine()
    base = BundledBase(
        name=model.name,
        revision=model.revision,
        weights_sha256=model.weights_sha256,
        tokenizer_sha256=model.tokenizer_sha256,
        folder=placed,
    )
    facts = Facts(coadapt=version, python=python, platform=platform, base=base, files={})
    texts = {"README.txt": _readme(facts), "requirements.txt": "".join(pins)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        files[name] = _bundled(folder / name)
    facts = facts.model_copy(update={"files": files})
    (folder / FACTS).write_text(json.dumps(facts.model_dump(), indent=1) + "\n", encoding="utf-8")
    digests = {name: file.sha256 for name, file in files.items()} | {FACTS: _bundled(folder / FACTS).sha256}
    (folder / SUMS).write_text(sums_of(digests), encoding="utf-8")
    rest = dict(content)
    content.clear()
    content |= {name: folder / name for name in (FACTS, SUMS, *texts)} | rest
    return facts


def _bundled(path: Path) -> BundledFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return BundledFile(size=file.tell(), sha256=digest)


def _add(tar: tarfile.TarFile, place: str, path: Path) -> None:
    """Stream a file into the tar, of nobody and from no time, so that the same content is the same bundle."""
    member = tarfile.TarInfo(place)
    member.size = path.stat().st_size
    with path.open("rb") as file:
        tar.addfile(member, file)


def _readme(facts: Facts) -> str:
    base = facts.base
    if base.revision is None:
        placing = f"Put {base.folder} at the path that federation.toml names (model.base)."
    else:
        placing = (
            "As the user that runs the vault:\n\n"
            "   mkdir -p ~/.cache/huggingface/hub && cp -r hub/* ~/.cache/huggingface/hub/\n\n"
            "or set HF_HUB_CACHE to the folder hub. With HF_HUB_OFFLINE=1 nothing is looked for elsewhere."
        )
    return f"""\
Coadapt {facts.coadapt} with all that it needs, for Python {facts.python} on {facts.platform}. Nothing is downloaded.

1. Compare the SHA-256 of the tar file with what its maker reads out (sha256sum FILE). Then, in this folder:

   sha256sum --quiet -c SHA256SUMS

2. Install, into a folder of your choice:

   python{facts.python} -m venv /opt/coadapt
   /opt/coadapt/bin/pip install --no-index --find-links wheels --require-hashes -r requirements.txt

3. The base model {base.name}. {placing}

   weights SHA-256    {base.weights_sha256}
   tokenizer SHA-256  {base.tokenizer_sha256}
"""
