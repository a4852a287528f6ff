"""The vault as a process, killed at every stage: it comes back, and releases at most one vector for a round."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from sum_attempts import Attempt
from vault_field import Field

from client.home import Agreement, SiteHome
from client.ledger import Ledger
from client.resident import resident
from client.run_folder import RunFolder
from client.vault_client import call_vault
from client.vault_service import open_session
from common.adapters import first_state
from common.bounds import bounds
from common.config.annotate import annotated
from common.config.manifest import Columns, Manifest
from common.data_files import write_records
from common.errors import CoadaptError, ServiceError
from common.frames import payload_digest
from common.randomness import system_bytes
from common.records import TextRecord
from common.secure_sum.messages import Masked, read

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

ROOT = Path(__file__).parents[2]
SECRET = "Zanzibar"  # in every record, and in nothing that a vault writes
LONGEST_START = 120  # seconds; about eight on an idle machine
_one_thread = ThreadPoolExecutor(1)  # the sites that are not killed share a process, and so a model


class HomeHere:
    """A site's folder as enrolment leaves it, and its vault: a process, or for the others a session in this one."""

    def __init__(self, folder: Path, number: int, field: Field, policy: Any) -> None:
        self.home, self.number, self.process = SiteHome(folder), number, None
        home = self.home
        for each in (home.keys, home.federation, home.relay):
            each.mkdir(parents=True, mode=0o700)
        home.signing_key.write_text(field.keys[number].private_bytes().hex() + "\n")
        home.rounding_key.write_text(system_bytes(32).hex() + "\n")
        home.roster.write_text(field.signed.to_json())
        home.manifest.write_text(annotated(field.manifest))
        values = policy.model_dump(mode="json", exclude_none=True)
        home.policy.write_text(tomli_w.dumps(values))
        records = [TextRecord(unit=f"u {n}", text=f"clause {n} {SECRET}", label="abc"[n % 3]) for n in range(100)]
        write_records(folder / "train.jsonl", records, Columns())
        agreement = {
            "roster_sha256": field.roster.digest().hex(),
            "manifest_sha256": field.manifest.digest(),
            "app_sha256": "0" * 64,
            "address": "127.0.0.1:1",
            "joined": "2026-11-25T12:00:00Z",
        }
        home.agree(Agreement(**agreement))
        self.session: Any = self
        if number:
            self.session = open_session(home, _one_thread, lambda *_, **__: None)
        else:
            self.start()

    def answer(self, frame: bytes) -> bytes:
        return call_vault(self.home.socket, frame)

    def start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        with (self.home.folder / "stderr").open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "client.vault_service", str(self.home.folder), "--log-json"],
                stderr=errors,
                env=environment,
                cwd=ROOT,
            )
        deadline = time.monotonic() + LONGEST_START
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(ServiceError):
                call_vault(self.home.socket, b"", timeout=1)
                return
            time.sleep(0.1)
        raise AssertionError((self.home.folder / "stderr").read_text())

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=20)

    def folder(self, field: Field) -> RunFolder:
        return RunFolder(self.home.runs / field.run_id, field.roster.federation)


@pytest.fixture
def field(manifest_for: Callable[..., Manifest]) -> Iterator[Callable[..., Field]]:
    above = Path(tempfile.mkdtemp(prefix="cv", dir="/tmp"))  # a socket's path is short
    made: list[Field] = []

    def make(*, private: bool) -> Field:
        manifest = manifest_for(
            data={"max_length": 16},
            training={"rounds": 5, "local_steps": 60, "batch_size": 4, "learning_rate": 0.01},
            adapter={"rank": 2},
            aggregation={"method": "separate"},
            secure_sum={"enabled": True},
            **({"privacy": {"epsilon": 50.0, "delta": 1e-3}} if private else {}),
        )
        it = Field(above, manifest, make=HomeHere)
        it.adapter = first_state(resident(manifest).model, 0)
        made.append(it)
        return it

    yield make
    for it in made:
        if it.sites[0].process.poll() is None:
            it.sites[0].kill()
    shutil.rmtree(above)


def begun(it: Field, number: int, attempt: int = 0) -> Attempt:
    ranges = bounds(it.manifest, it.adapter, number)
    return Attempt(it, it.header(number, ranges={name: ranges[name] for name in it.adapter}), attempt)


def up_to_vectors(it: Field, number: int, attempt: int = 0) -> Attempt:
    found = begun(it, number, attempt)
    for _ in range(2):
        found.ask()
        found.go_on()
    return found


@pytest.mark.parametrize("private", [False, True])
def test_a_killed_vault_comes_back_and_releases_nothing_twice(field: Callable[..., Field], private: bool) -> None:
    it = field(private=private)
    killed = it.sites[0]
    ledger = Ledger(killed.home.folder / "ledger") if private else None

    def charged() -> list[int]:
        return ledger.rounds_of(it.manifest.digest(), it.run_id) if ledger else []

    # In training.
    attempt = up_to_vectors(it, 1)
    digest = payload_digest(attempt.out[0])
    answer, _ = it.say(0, "message", attempt.out[0])
    while answer.kind == "working" and answer.progress == 0:
        answer, _ = it.say(0, "poll", about=digest)
    assert answer.kind == "working"
    killed.kill()
    assert killed.folder(it).load_work().stage == "begun"
    with pytest.raises(ServiceError, match=r"did not answer \(UNAVAILABLE\); start it with `coadapt site start`"):
        it.say(0, "hello")
    killed.start()
    assert it.say(0, "poll", about=digest)[0].code == "unknown_order"
    assert it.say(0, "message", attempt.out[0])[0].code == "unknown_attempt"
    begun(it, 1, 1).to_the_end()
    assert charged() == ([1] if private else [])
    # After training, before its vector was asked for.
    attempt = begun(it, 2)
    attempt.ask()
    deadline = time.monotonic() + 60
    while killed.folder(it).load_work().stage != "done" and time.monotonic() < deadline:
        time.sleep(0.05)
    work = killed.folder(it).load_work()
    assert (work.stage, work.last_round) == ("done", 2)
    killed.kill()
    killed.start()
    begun(it, 2, 1).to_the_end()
    assert killed.folder(it).load_work().reply == work.reply
    assert charged() == ([1, 2] if private else [])
    # After its vector left.
    attempt = up_to_vectors(it, 3)
    attempt.ask(0)
    body = killed.folder(it).load_body()
    released = killed.folder(it).load()
    assert released.released_in == (1, 9)
    killed.kill()
    killed.start()
    again = begun(it, 3, 1)
    if private:
        found = again.to_the_end()
        assert found.state
        after = killed.folder(it).load_body()
        assert body is not None
        assert after is not None
        assert (after.words == body.words).all()
        assert killed.folder(it).load().released == released.released
    else:
        assert it.say(0, "request", again.out[0])[0].code == "rerun"
    assert charged() == ([1, 2, 3] if private else [])
    # It goes on, and never begins an attempt twice.
    begun(it, 4).to_the_end()
    for number, old in ((1, 0), (1, 1), (2, 1), (3, 0), (4, 0)):
        answer, _ = it.say(0, "request", begun(it, number, old).out[0])
        assert answer.kind == "refused" or (number, old) == (4, 0)
    turns = [turn for turn, _ in vectors(it)]
    assert len(set(turns)) == len(turns)
    assert sorted(turns) == [(3, 1), (6, 1), (9, 0), *([(9, 1)] if private else []), (12, 0)]
    for path in (killed.home.audit, killed.home.folder / "stderr"):
        assert SECRET not in path.read_text()


def test_one_vault_serves_a_home_and_stops_at_once(field: Callable[..., Field]) -> None:
    it = field(private=True)
    site = it.sites[0]
    assert site.home.relay.stat().st_mode & 0o777 == 0o750
    assert site.home.socket.stat().st_mode & 0o777 == 0o660
    second = subprocess.run(
        [sys.executable, "-m", "client.vault_service", str(site.home.folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=LONGEST_START,
        cwd=ROOT,
    )
    assert second.returncode == 1
    assert "another vault serves" in second.stderr
    assert it.say(0, "hello")[0].kind == "done"
    attempt = begun(it, 1)
    attempt.ask()  # it trains now
    began = time.monotonic()
    site.process.send_signal(signal.SIGTERM)
    assert site.process.wait(timeout=20) == 0
    assert time.monotonic() - began < 5
    assert not site.home.socket.exists()
    lines = (site.home.folder / "stderr").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines if line.startswith("{")] == ["ready", "stopping"]
    site.start()
    begun(it, 1, 1).to_the_end()
    assert Ledger(site.home.folder / "ledger").rounds_of(it.manifest.digest(), it.run_id) == [1]
    with pytest.raises(CoadaptError, match="did not answer"):
        call_vault(site.home.relay / "no.sock", b"", timeout=2)


def test_the_vaults_client_is_imported_without_torch() -> None:
    code = "import client.vault_client, sys; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def vectors(it: Field) -> list[tuple[tuple[int, int], bytes]]:
    """(sum, attempt) and vector of everything that left site 0, each once."""
    found = {}
    for said in it.heard:
        with contextlib.suppress(CoadaptError):
            message = read(said, it.roster.public_key_of)
            if isinstance(message.body, Masked) and message.sender == 0:
                found[message.body.vector] = (message.turn.round, message.turn.attempt)
    return [(turn, vector) for vector, turn in found.items()]
