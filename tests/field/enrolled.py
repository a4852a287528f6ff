"""A coordinator and four sites as the commands make them, in folders of a test."""

from pathlib import Path

from typer.testing import CliRunner, Result

from common.config.annotate import annotated
from common.config.manifest import Manifest
from common.identity import fingerprint
from common.models import find_base
from simulations.commands import app

NAMES = ("north", "south", "east", "west")
ADDRESS = "127.0.0.1:19092"


def run(*words: object, code: int = 0) -> Result:
    """A `coadapt` command; its errors come out as exceptions, as `main` sees them."""
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "160"}, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def said(*words: object) -> str:
    """What a command printed."""
    return run(*words).output


class Hospitals:
    """Four sites and a coordinator under one folder; every step is a command."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.coordinator = folder / "coordinator"
        self.papers = folder / "papers"
        self.papers.mkdir()
        base = find_base(manifest.model)
        pins = {"weights_sha256": base.weights_sha256, "tokenizer_sha256": base.tokenizer_sha256}
        manifest = manifest.model_copy(update={"model": manifest.model.model_copy(update=pins)})
        self.manifest = folder / "federation.toml"
        self.manifest.write_text(annotated(manifest))

    def site(self, name: str) -> Path:
        return self.folder / name

    def init(self) -> None:
        run("coordinator", "init", "--home", self.coordinator, "--address", ADDRESS)
        for name in NAMES:
            self.init_site(name)

    def init_site(self, name: str) -> None:
        run(
            *("site", "init", "--home", self.site(name), "--name", name, "--train", "records.jsonl"),
            *("--population", "patients", "--units", "40", "--epsilon", "10", "--yes"),
        )

    def enroll(self, name: str) -> Path:
        run("site", "enroll", "--home", self.site(name), "--into", self.papers)
        return self.papers / f"{name}.enrolment.json"

    def admit_all(self) -> None:
        for name in NAMES:
            run("coordinator", "admit", self.enroll(name), "--home", self.coordinator, "--yes")

    def invite(self) -> Path:
        run("coordinator", "roster", self.manifest, "--home", self.coordinator)
        return self.coordinator / "invitation.json"

    def join(self, name: str, *words: object) -> str:
        invitation = self.coordinator / "invitation.json"
        return said("site", "join", invitation, "--home", self.site(name), "--into", self.papers, "--yes", *words)

    def consent(self, *names: str) -> str:
        files = [self.papers / f"{name}.consent.json" for name in names]
        return said("coordinator", "consent", *files, "--home", self.coordinator)

    def join_all(self) -> None:
        """Everything, up to four sites that have joined."""
        self.init()
        self.admit_all()
        self.invite()
        for name in NAMES:
            self.join(name)
        self.consent(*NAMES)
        for name in NAMES:
            self.join(name)


def words_of(public_hex: str) -> str:
    """The fingerprint as a site reads it out."""
    return fingerprint(bytes.fromhex(public_hex))
