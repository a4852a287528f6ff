"""A site fetches a finished run through the gate: what arrives is what was signed, and nothing else gets in or out."""

import dataclasses
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from proxy import Proxy
from published_run import FILES, MANIFEST, RUN, Published, listed, noted
from typer.testing import CliRunner

from client.audit_log import AuditLog, read_audit
from client.fetching import fetch
from client.gate_client import GateClient
from client.home import SiteHome
from client.run_folder import Claim
from common.errors import (
    CoadaptError,
    ContentRefused,
    EnrolmentError,
    MalformedMessage,
    PolicyBreach,
    ReleaseError,
    RosterRefused,
    RunError,
    ServiceError,
    SignatureRefused,
    WrongContext,
)
from common.identity import Identity
from common.release import MOST_FETCH_BYTES, RELEASE_PATH, Refusal, open_listing, seal
from common.tls import new_authority
from server.enrolment import revoke
from server.publishing import publish
from simulations.commands import app


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Published]:
    """A gate that is up; the run is published."""
    federation = Published(tmp_path)
    federation.publish()
    with federation.up():
        yield federation


def said(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "160"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(site: SiteHome, error: type[CoadaptError], words: str, run: str = RUN) -> None:
    """The command ends in one line, nothing of a part is there, and the audit log has the fixed word."""
    with pytest.raises(error, match=words) as caught:
        fetch(site, run)
    assert "\n" not in str(caught.value)
    assert [path for path in site.fetched.glob("*/*") if path.name != "listing.signed"] == []
    line = noted(site)
    assert (line.decision, line.kind, line.run_id, line.code) == ("refused", "fetch", run, error.code)


def test_a_site_brings_the_adapter_and_later_the_compact_model_with_the_commands(tmp_path: Path) -> None:
    it = Published(tmp_path)
    north = it.sites["north"]
    assert "published 3 files" in said("coordinator", "publish", RUN, "--home", it.home.folder)
    with it.up():
        first = said("site", "fetch", RUN, "--home", north.folder)
        assert first.startswith(f"adapter: {north.fetched / RUN / 'adapter'} (fetched, ")
        assert files(north.fetched / RUN / "adapter") == FILES
        line = noted(north)
        assert (line.decision, line.kind, line.code) == ("note", "fetch", "adapter")
        assert line.size == sum(map(len, FILES.values()))
        sums = "".join(f"{hashlib.sha256(FILES[name]).hexdigest()}  adapter/{name}\n" for name in sorted(FILES))
        assert line.payload == hashlib.sha256(sums.encode()).hexdigest()
        again = said("site", "fetch", RUN, "--home", north.folder)
        assert "here already, and as the coordinator signed it" in again
        assert (noted(north).payload, noted(north).size) == (line.payload, 0)
        assert (north.fetched.stat().st_mode & 0o777, north.fetched.stat().st_uid) == (
            0o700,
            north.folder.stat().st_uid,
        )
        it.compact()
        assert "published 5 files" in said("coordinator", "publish", RUN, "--home", it.home.folder)
        both = said("site", "fetch", RUN, "--home", north.folder).splitlines()
        assert ["here already" in both[0], "fetched, " in both[1]] == [True, True]
        assert (north.fetched / RUN / "compact" / "model.safetensors").read_bytes() == b"weights"
        # What is kept beside them shows for ever whose files these are.
        kept = open_listing(it.roster.coordinator, (north.fetched / RUN / "listing.signed").read_bytes())
        assert (kept.run_id, kept.manifest_sha256, len(kept.files)) == (RUN, MANIFEST, 5)
        (north.fetched / RUN / "compact" / "model.safetensors").write_bytes(b"other")
        with pytest.raises(ContentRefused, match="is not what the coordinator signed"):
            fetch(north, RUN)


def test_only_finished_runs_are_published_and_what_is_published_stays(tmp_path: Path) -> None:
    it = Published(tmp_path)
    it.finish("stopped", status="interrupted")
    for run, words in (("stopped", "has not finished"), ("none", "no finished run"), ("../one", "no finished run")):
        with pytest.raises(RunError, match=words):
            it.publish(run)
    assert list(it.home.folder.glob("published/*")) == []
    before = it.publish()
    assert it.publish() == before
    with pytest.raises(RunError, match="holds no compact of Coadapt"):
        publish(it.home, RUN, compact=tmp_path)
    elsewhere = it.compact().rename(tmp_path / "elsewhere")
    with_compact = publish(it.home, RUN, compact=elsewhere)
    assert [file.path for file in with_compact.part("compact")] == ["compact/coadapt.json", "compact/model.safetensors"]
    assert it.publish() == with_compact
    (it.home.runs / RUN / "adapter" / "adapter_config.json").write_bytes(b"[]")
    with pytest.raises(RunError, match="never replaced"):
        it.publish()
    for run, name, kind in (("a", "run.py", "must end in one of"), ("b", "ö.json", "must be adapter/NAME")):
        folder = it.finish(run)
        (folder / "adapter" / name).write_bytes(b"")
        with pytest.raises(RunError, match=kind):
            it.publish(folder.name)
    folder = it.finish("linked")
    (folder / "adapter" / "more.json").symlink_to(it.home.signing_key)
    with pytest.raises(RunError, match="it is a link"):
        it.publish("linked")
    it.finish("old")
    it.roster = dataclasses.replace(it.roster, epoch=2)
    it.join()
    with pytest.raises(RosterRefused, match="not the present one"):
        it.publish("old")


def test_what_is_not_there_or_not_for_this_site_is_said_in_a_line(it: Published) -> None:
    north = it.sites["north"]
    refused(north, ReleaseError, "not published: it has not finished", "another")
    it.finish("stopped", status="failed")
    refused(north, ReleaseError, "not published: it has not finished", "stopped")
    with pytest.raises(ReleaseError, match="no run's name"):
        fetch(north, "../one")
    refused(it.stranger, EnrolmentError, "gives nothing to this site's key")
    revoke(it.home, "south")
    refused(it.sites["south"], EnrolmentError, "gives nothing to this site's key")
    fetch(north, RUN)


def test_a_run_of_a_roster_without_the_site_is_not_for_it(tmp_path: Path) -> None:
    it = Published(tmp_path)
    signed = it.home.roster.read_text()
    east = it.roster.institutions[2]
    it.roster = dataclasses.replace(it.roster, institutions=it.roster.institutions[:2])
    it.finish("two")
    it.home.roster.write_text(json.dumps(json.loads(signed) | {"institutions": json.loads(signed)["institutions"][:2]}))
    it.publish("two")
    with it.up():
        refused(it.sites[east.name], ReleaseError, "roster without this institution", "two")
        fetch(it.sites["north"], "two")


class Lying(GateClient):
    """A gate that hands out something else; ours would not even serve it."""

    lie = b""

    def listing(self) -> bytes:
        super().listing()
        return self.lie


def test_what_the_coordinator_did_not_sign_is_not_kept(it: Published) -> None:
    north, listing = it.sites["north"], it.home.published / RUN / "listing.signed"
    signed = listing.read_bytes()

    def lied(data: bytes, error: type[CoadaptError], words: str) -> None:
        Lying.lie = data
        with pytest.raises(error, match=words):
            fetch(north, RUN, gates=Lying)
        assert not north.fetched.exists()
        assert noted(north).code == error.code

    for place in (0, len(signed) // 2, len(signed) - 1):
        lied(signed[:place] + bytes([signed[place] ^ 1]) + signed[place + 1 :], SignatureRefused, "does not verify")
    lied(seal(Identity.generate(), open_listing(it.roster.coordinator, signed)), SignatureRefused, "does not verify")
    lied(seal(it.sites["south"].identity(), it.fetch_of(north)), SignatureRefused, "does not verify")
    lied(b"", MalformedMessage, "at most")
    lied(bytes((1 << 20) + 1), MalformedMessage, "at most")
    listing.write_bytes(signed[:-1] + bytes([signed[-1] ^ 1]))
    refused(north, ReleaseError, "not published")


def test_a_changed_file_is_not_kept(it: Published) -> None:
    north, path = it.sites["north"], it.home.published / RUN / "adapter" / "adapter_model.safetensors"
    whole = path.read_bytes()
    for place in (0, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        refused(north, ContentRefused, "has SHA-256 .* the coordinator signed .* nothing of this part was kept")
    path.unlink()
    refused(north, ContentRefused, "has no adapter/adapter_model.safetensors")
    path.write_bytes(whole)
    fetch(north, RUN)
    assert files(north.fetched / RUN / "adapter") == FILES


def test_a_file_that_became_shorter_ends_in_a_line(it: Published) -> None:
    north, path = it.sites["north"], it.home.published / RUN / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ServiceError, match="gives no answer"):
        fetch(north, RUN, gates=lambda *words, **more: GateClient(*words, **more, wait=lambda _: None))
    assert [path.name for path in (north.fetched / RUN).iterdir()] == []


TRAVERSALS = [
    "adapter/../../keys/signing.key",
    "../adapter/a.json",
    "/etc/passwd.json",
    "adapter//a.json",
    "adapter/./a.json",
    "adapter/a.json/",
    "adapter\\..\\a.json",
    "adapter/a\n.json",
    "adapter/.hidden.json",
    "adapter",
    "other/a.json",
    "adapter/a/b/c/d.json",
    "adapter/model.bin",
    "adapter/run.py",
    "adapter/" + "a" * 120 + ".json",
]


def test_no_name_leads_out_of_the_folder_even_signed(it: Published) -> None:
    for path in TRAVERSALS:
        bad = listed("adapter/a.json", b"{}").model_copy(update={"path": path})
        it.sign(files=(bad,))
        # Our gate does not serve such a listing, and the site would not take it from another.
        refused(it.sites["north"], ReleaseError, "not published")
        data = (it.home.published / RUN / "listing.signed").read_bytes()
        with pytest.raises(MalformedMessage, match=r"listing cannot be read: files\.0\.path"):
            open_listing(it.roster.coordinator, data)


def test_two_files_of_one_name_are_refused(it: Published) -> None:
    one = listed("adapter/a.json", b"{}")
    for other in ("adapter/A.json", "adapter/a.json", "adapter/a.json/b.json"):
        it.sign(files=(one, one.model_copy(update={"path": other})))
        with pytest.raises(MalformedMessage, match="one path, or one file is another's folder"):
            open_listing(it.roster.coordinator, (it.home.published / RUN / "listing.signed").read_bytes())


def test_another_federation_run_epoch_or_manifest_is_refused(it: Published) -> None:
    north = it.sites["north"]
    for changes, words in (
        ({"federation": "00" * 16}, "another federation"),
        ({"run_id": "two"}, "signed a list of run two"),
        ({"epoch": 2}, "join with the newest invitation"),
        ({"manifest_sha256": "cd" * 32}, "neither agreed to nor trained under"),
    ):
        it.sign(**changes)
        refused(north, WrongContext, words)
    # Under an earlier manifest it may fetch what it took part in.
    claim = Claim(federation=it.roster.federation.hex(), epoch=1, manifest_sha256="cd" * 32)
    (north.runs / RUN).mkdir(parents=True)
    (north.runs / RUN / "run.json").write_text(claim.model_dump_json())
    assert [each.part for each in fetch(north, RUN)] == ["adapter"]


def test_a_site_of_another_federation_gets_nothing(it: Published) -> None:
    it.home.published.joinpath(RUN, "roster.json").write_text(
        it.home.roster.read_text().replace(it.roster.federation.hex(), "00" * 16)
    )
    refused(it.sites["north"], WrongContext, "another federation")


def test_more_than_the_policy_allows_is_not_brought(it: Published) -> None:
    north = it.sites["north"]
    size = sum(map(len, FILES.values()))
    text = north.policy.read_text()
    assert "fetch_bytes = 8589934592" in text
    north.policy.write_text(text.replace("fetch_bytes = 8589934592", f"fetch_bytes = {size - 1}"))
    refused(north, PolicyBreach, f"limits.fetch_bytes: asked {size}, allowed {size - 1}")
    north.policy.write_text(text.replace("fetch_bytes = 8589934592", f"fetch_bytes = {size}"))
    fetch(north, RUN)


# The gate, asked directly.


def ask(it: Published, body: bytes) -> tuple[int, Refusal | bytes]:
    status, _, answer = it.served.ask(body, RELEASE_PATH)
    return status, Refusal.model_validate_json(answer) if status in (403, 409) else answer


def number(it: Published) -> str:
    """The gate's number, which it tells to whoever signs."""
    north = it.sites["north"]
    status, refusal = ask(it, seal(north.identity(), it.fetch_of(north)))
    assert isinstance(refusal, Refusal)
    assert (status, refusal.code) == (409, "gate")
    return refusal.gate


def test_a_request_serves_once_and_for_this_gate_alone(it: Published, tmp_path: Path) -> None:
    north, gate = it.sites["north"], number(it)
    now = time.time_ns()
    request = seal(north.identity(), it.fetch_of(north, gate=gate, time=now))
    status, listing = ask(it, request)
    assert (status, listing) == (200, (it.home.published / RUN / "listing.signed").read_bytes())
    for late in (request, seal(north.identity(), it.fetch_of(north, gate=gate, time=now - 1))):
        status, refusal = ask(it, late)
        assert isinstance(refusal, Refusal)
        assert (status, refusal.code) == (409, "replay")
    # Another site's time is its own; another gate, or this one started again, has another number.
    south = it.sites["south"]
    assert ask(it, seal(south.identity(), it.fetch_of(south, gate=gate, time=now)))[0] == 200
    status, refusal = ask(it, seal(north.identity(), it.fetch_of(north, gate="0" * 32, time=now + 1)))
    assert isinstance(refusal, Refusal)
    assert (status, refusal.code) == (409, "gate")
    for apart in (-301, 301):
        it.clock = apart
        status, refusal = ask(it, seal(north.identity(), it.fetch_of(north, gate=gate, time=time.time_ns())))
        assert isinstance(refusal, Refusal)
        assert (status, refusal.code) == (409, "clock")
    refused(north, ReleaseError, "clock is -301 s from the gate's|clock is -30[012] s from the gate's")


def test_strangers_get_nothing_and_no_reason(it: Published) -> None:
    north, gate = it.sites["north"], number(it)
    good = it.fetch_of(north, gate=gate, time=time.time_ns())
    of_another = seal(it.sites["south"].identity(), good)  # names north's key
    own = it.fetch_of(it.stranger, gate=gate, time=time.time_ns())
    whole = seal(north.identity(), good)
    bodies = {
        "another site's signature": of_another,
        "a key that is not admitted": seal(it.stranger.identity(), own),
        "a changed letter": whole.replace(b'"run_id":"one"', b'"run_id":"two"'),
        "no signature": whole[:-64],
        "a listing": (it.home.published / RUN / "listing.signed").read_bytes(),
        "nothing": b"",
        "nonsense": bytes(1000),
    }
    for what, body in bodies.items():
        assert it.served.ask(body, RELEASE_PATH)[::2] == (404, b""), what
    assert it.served.ask(bytes(MOST_FETCH_BYTES + 1), RELEASE_PATH)[0] == 413
    for line in (f"GET {RELEASE_PATH}", f"POST {RELEASE_PATH}/", f"POST {RELEASE_PATH}?a=1", "POST /coadapt/v1/other"):
        answer = it.served.said(f"{line} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 404"), line
    assert ask(it, whole)[0] == 200
    assert it.served.upstream.requests == []


def test_a_signed_request_gets_listed_files_alone(it: Published) -> None:
    north, gate = it.sites["north"], number(it)
    keys = "adapter/../../../keys/signing.key"
    for path in ("listing.signed", "roster.json", "adapter/../roster.json", keys, f"/{keys}", "adapter"):
        asked = it.fetch_of(north, gate=gate, time=time.time_ns(), path=path)
        status, answer = ask(it, seal(north.identity(), asked))
        assert isinstance(answer, bytes)
        assert (status, json.loads(answer)["code"]) == (404, "file")


def test_pieces_are_what_was_asked_for(it: Published) -> None:
    north, gate = it.sites["north"], number(it)
    path, data = "adapter/adapter_model.safetensors", FILES["adapter_model.safetensors"]
    for offset in (0, 1, 8 << 20, len(data) - 1, len(data)):
        asked = it.fetch_of(north, gate=gate, time=time.time_ns(), path=path, offset=offset)
        assert ask(it, seal(north.identity(), asked)) == (200, data[offset : offset + (8 << 20)])
    asked = it.fetch_of(north, gate=gate, time=time.time_ns(), path=path, offset=len(data) + 1)
    assert ask(it, seal(north.identity(), asked))[0] == 404


def test_whoever_asks_too_often_waits_and_gets_it(tmp_path: Path) -> None:
    it = Published(tmp_path, rate=1.0)
    it.publish()
    waits: list[float] = []

    def gates(*words: Any, **more: Any) -> GateClient:
        def wait(seconds: float) -> None:
            waits.append(seconds)
            time.sleep(seconds)

        return GateClient(*words, **more, wait=wait)

    with it.up():
        fetch(it.sites["north"], RUN, gates=gates)
    assert files(it.sites["north"].fetched / RUN / "adapter") == FILES
    assert waits != []


def test_a_gate_that_is_away_or_another_ends_in_a_line(tmp_path: Path) -> None:
    it = Published(tmp_path)
    it.publish()
    north = it.sites["north"]

    def gates(*words: Any, **more: Any) -> GateClient:
        return GateClient(*words, **more, wait=lambda _: None)

    with pytest.raises(ServiceError, match="gives no answer"):
        fetch(north, RUN, gates=gates)
    north.certificate.write_bytes(new_authority("another").certificate)
    with it.up(), pytest.raises(ServiceError, match="certificate that was not agreed on"):
        fetch(north, RUN, gates=gates)
    north.certificate.write_text("nonsense")
    with pytest.raises(EnrolmentError, match="certificate is damaged"):
        fetch(north, RUN)
    assert not north.fetched.exists()


def test_a_proxy_carries_it(it: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    with Proxy() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        fetch(it.sites["north"], RUN)
    assert [line.rpartition(" ")[0] for line in proxy.asked] == [f"CONNECT 127.0.0.1:{it.served.port}"]
    assert files(it.sites["north"].fetched / RUN / "adapter") == FILES


def test_the_vault_and_a_command_share_the_audit_log(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    logs = [AuditLog(path) for _ in range(3)]

    def write(log: AuditLog, name: str) -> None:
        for number in range(20):
            log.add("note", kind=name, round_number=number)

    threads = [threading.Thread(target=write, args=(log, f"w{n}")) for n, log in enumerate(logs)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    lines = list(read_audit(path))
    assert [line.number for line in lines] == list(range(1, 61))
    for name in ("w0", "w1", "w2"):
        assert [line.round for line in lines if line.kind == name] == list(range(20))
    with path.open("ab") as file:
        file.write(b'{"torn')  # another process died at it
    logs[0].add("note", kind="after")
    assert [line.kind for line in read_audit(path)][-1] == "after"
