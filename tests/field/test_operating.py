"""What a person types from day to day: check, preview, service, status; and that two users are kept apart."""

import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import click
import pytest
import typer
from enrolled import ADDRESS, NAMES, Hospitals, run, said

from client.audit_log import AuditLog
from client.home import SiteHome
from client.isolation import find_users, isolate, isolated
from client.ledger import Account, Charge, Ledger
from client.service import site_programs
from client.status import _answers
from common.config.annotate import annotated
from common.config.manifest import Columns, Manifest
from common.data_files import write_records
from common.errors import EnrolmentError, ManifestError, RunError, ServiceError
from common.flower import Grid
from common.privacy.accounting import Steps, rdp_epsilon
from common.progress import EventLog, RoundFinished, RoundStarted, RunStarted, RunStopped, SiteFailed, SumOpened
from common.records import TextRecord
from common.supervise import Program, launch, stop
from server.field_run import prepared, run_field
from server.home import CoordinatorHome
from server.service import coordinator_programs
from server.submission import summary_of
from simulations.commands import app

RELAY, VAULT = 65001, 65002


def records(folder: Path, count: int = 40) -> None:
    rows = [TextRecord(text=f"clause {n} notice days", label="abc"[n % 3], unit=f"u{n}") for n in range(count)]
    write_records(folder / "records.jsonl", rows, Columns())


def test_check_names_every_problem_and_its_exit_status_says_so(hospitals: Hospitals) -> None:
    hospitals.join_all()
    north = hospitals.site("north")
    records(north)
    check = ("site", "check", "--home", north, "--offline")
    fine = said(*check)
    assert [line for line in fine.splitlines() if line.startswith("problem")] == []
    assert "40 records for text-classification" in fine
    assert "not isolated" in fine
    home = SiteHome(north)
    home.signing_key.chmod(0o644)
    (north / "records.jsonl").write_text('{"text": "a", "label": "z"}\n')
    text = home.manifest.read_text()
    home.manifest.write_text(text.replace("rounds = 2", "rounds = 3"))
    bad = run(*check, code=1).output
    problems = [line.split()[1] for line in bad.splitlines() if line.startswith("problem")]
    assert {"keys", "agreement", "data"} <= set(problems)


def test_preview_shows_five_messages_and_charges_nothing(hospitals: Hospitals) -> None:
    hospitals.join_all()
    north = hospitals.site("north")
    records(north)
    found = json.loads(said("site", "preview", "--home", north, "--json"))
    assert [sent["kind"] for sent in found["sent"]] == ["advertise", "shares", "masked", "confirm", "reveal"]
    assert all(sent["bytes"] > 100 for sent in found["sent"])
    # The grid is far finer than what was trained, and the others' zeros add their own rounding.
    assert 0 < found["error"] < 0.01
    assert "vector" in found["sent"][2]["masked"]
    assert not (north / "ledger").exists()
    assert list((north / "runs").iterdir()) == []


def test_preview_with_privacy_uses_a_ledger_of_its_own(
    hospitals: Hospitals, manifest_for: Callable[..., Manifest]
) -> None:
    hospitals.init()
    north = hospitals.site("north")
    records(north)
    manifest = manifest_for(
        data={"max_length": 16},
        adapter={"rank": 2},
        training={"rounds": 2, "local_steps": 2, "batch_size": 4},
        secure_sum={"enabled": True},
        privacy={"epsilon": 8.0, "delta": 1e-3},
    )
    home = SiteHome(north)
    home.policy.write_text(re.sub(r"(?m)^delta = .*", "delta = 1e-3", home.policy.read_text()))
    home.manifest.write_text(annotated(manifest))
    found = json.loads(said("site", "preview", "--home", north, "--json"))
    assert (found["private"], len(found["sent"])) == (True, 5)
    said_of_it = [sent["clear"].get("ledger", "")[:10] for sent in found["sent"]]
    assert said_of_it == ["0 charges,", "", "", "1 charges,", ""]
    assert "0 other sites" in found["sent"][0]["clear"]["seen"]
    assert not (north / "ledger").exists()


@pytest.fixture(params=[(), ("--log-json",)], ids=["words", "json"])
def services(request: pytest.FixtureRequest, hospitals: Hospitals, tmp_path: Path) -> tuple[Path, bool]:
    """The folder of both roles' units and container files, and whether they log JSON."""
    run("coordinator", "init", "--home", hospitals.coordinator, "--address", ADDRESS)
    hospitals.init_site("north")
    into = tmp_path / "units"
    run("site", "service", "--home", hospitals.site("north"), "--into", into, *request.param)
    run("coordinator", "service", "--home", hospitals.coordinator, "--into", into, *request.param)
    with pytest.raises(EnrolmentError, match="exists already"):
        run("site", "service", "--home", hospitals.site("north"), "--into", into)
    return into, bool(request.param)


def unit(path: Path) -> dict[str, list[str]]:
    """The [Service] section as systemd reads it: a key may come more than once."""
    section = path.read_text().split("[Service]")[1].split("[Install]")[0]
    found: dict[str, list[str]] = {}
    for line in section.strip().splitlines():
        key, _, value = line.partition("=")
        found.setdefault(key, []).append(value)
    return found


def words_of_unit(value: str) -> list[str]:
    """The words of a line: quotes as a shell has them, percent signs and dollars doubled."""
    return [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(value)]


def test_units_run_what_start_runs_as_two_users(hospitals: Hospitals, services: tuple[Path, bool]) -> None:
    into, as_json = services
    site = site_programs(SiteHome(hospitals.site("north").absolute()), None, log_json=as_json)
    coordinator = coordinator_programs(CoordinatorHome(hospitals.coordinator.absolute()), log_json=as_json)
    for program in (*site, *coordinator):
        found = unit(into / f"coadapt-{program.name}.service")
        (start,) = found["ExecStart"]
        assert tuple(words_of_unit(start)) == program.command
        given = dict(word.split("=", 1) for line in found["Environment"] for word in words_of_unit(line))
        assert given.items() >= program.environment.items()
        assert (program.command.count("common.framing") == 1) == as_json
        assert found["KillMode"][-1] == ("control-group" if as_json else "mixed")
    vault, relay = (unit(into / f"coadapt-{name}.service") for name in ("vault", "relay"))
    assert (vault["User"], vault["Group"]) == (["coadapt-vault"], ["coadapt-relay"])
    assert (relay["User"], relay["Group"]) == (["coadapt-relay"], ["coadapt-relay"])
    assert {"UMask", "NoNewPrivileges", "ProtectSystem", "PrivateTmp"} <= vault.keys() & relay.keys()
    assert vault["RestrictAddressFamilies"] == ["AF_UNIX"]


def verified(*units: Path) -> tuple[int, list[str]]:
    """What systemd itself says of units: its status, and its lines on ours."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    words = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *map(str, units)]
    found = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    return found.returncode, [line for line in found.stderr.splitlines() if "coadapt" in line]


def test_systemd_has_nothing_against_the_units(services: tuple[Path, bool], tmp_path: Path) -> None:
    assert verified(*sorted(services[0].glob("*.service"))) == (0, [])
    # And it would say so if it had.
    text = (services[0] / "coadapt-vault.service").read_text()
    broken = tmp_path / "coadapt-broken.service"
    for pattern, wrong in ((r"^ExecStart=\S+", "ExecStart=/no/such/program"), (r"^UMask=", "ProtectEverything=")):
        broken.write_text(re.sub(pattern, wrong, text, flags=re.MULTILINE))
        assert any(wrong.partition("=")[2 if "/" in wrong else 0] in line for line in verified(broken)[1])


INSTRUCTIONS = {"FROM", "COPY", "RUN", "ENV", "VOLUME", "EXPOSE", "USER", "ENTRYPOINT"}


def test_container_files_have_instructions_and_commands_that_there_are(services: tuple[Path, bool]) -> None:
    into, as_json = services
    for name in ("coordinator", "vault", "relay"):
        text = (into / f"Containerfile.{name}").read_text()
        lines = [line for line in text.replace("\\\n", "").splitlines() if line and not line.startswith("#")]
        found = [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]
        assert {word for word, _ in found} <= INSTRUCTIONS
        assert found[0][0] == "FROM"
        last = dict(found)
        assert last["USER"] in {f"coadapt-{name}"}
        assert json.loads(last["VOLUME"]) == ["/home/coadapt"]
        (command,) = (value for word, value in found if word == "RUN")
        assert subprocess.run(["bash", "-nc", command], check=False).returncode == 0
        for part in command.split("&&"):
            assert shutil.which(part.split()[0]), part
        entry = json.loads(last["ENTRYPOINT"])
        assert ("--log-json" in entry or "common.framing" in entry) == as_json
        if name == "coordinator":
            assert int(last["EXPOSE"]) == 19092 or int(last["EXPOSE"]) == 9092
            context = typer.main.get_command(app)
            role = context.get_command(click.Context(context), entry[1])  # type: ignore[attr-defined]
            start = role.get_command(click.Context(role), entry[2])
            start.parse_args(click.Context(start), entry[3:])
        else:
            modules = [word for before, word in itertools.pairwise(entry) if before == "-m"]
            assert modules
            assert all(importlib.util.find_spec(module) for module in modules)
            assert sys.executable not in entry


def test_site_status_says_what_runs_what_was_spent_and_what_was_refused(hospitals: Hospitals) -> None:
    with pytest.raises(ManifestError, match=r"site.toml: no such file"):
        run("site", "status", "--home", hospitals.folder / "nothing")
    hospitals.init()
    home = SiteHome(hospitals.site("north"))
    shown = said("site", "status", "--home", home.folder)
    assert "does not run" in shown
    assert "joined nothing yet" in shown
    assert "epsilon 0.000 of 10 spent" in shown
    assert not (home.folder / "ledger").exists()
    log = AuditLog(home.audit)
    for number in (1, 2):
        log.add("answered", kind="request", run_id="one", round_number=number)
        log.add("refused", kind="message", run_id="one", code=f"replay{number}", reason="adapter.rank: asked 8")
    log.add("answered", kind="poll", run_id="one")
    log.add("refused", kind="hello", run_id="two", code="context")
    log.close()
    account, steps = Account("patients", 10.0, 1e-5), Steps(2.0, 0.1, 10)
    Ledger(home.folder / "ledger").charge(account, Charge("patients", "record", "f", "0" * 64, "one", 1, steps), ["a"])
    found = json.loads(said("site", "status", "--home", home.folder, "--json"))
    assert (found["run"]["run_id"], found["run"]["round"], found["run"]["kind"]) == ("one", 2, "poll")
    assert found["spent"]["epsilon"] == pytest.approx(rdp_epsilon([steps], 1e-5))
    assert [each["code"] for each in found["refusals"]] == ["replay1", "replay2", "context"]
    assert (found["vault_answers"], found["connected"]) == ("no", "no")
    # A damaged log hides nothing else.
    home.audit.write_text(home.audit.read_text().replace("replay1", "replay3"))
    shown = said("site", "status", "--home", home.folder)
    assert "was changed" in shown
    assert "1 rounds paid" in shown


def test_site_status_knows_a_vault_that_answers_and_one_that_only_runs(hospitals: Hospitals) -> None:
    hospitals.init()
    home = SiteHome(hospitals.site("north").absolute())
    program = Program(name="vault", command=(sys.executable, "-c", "import time; time.sleep(1000)"))
    launch([program], home.folder / "run", home.folder / "run" / "log")
    try:
        shown = said("site", "status", "--home", home.folder)
        assert "runs since" in shown
        assert "does not take orders" in shown
    finally:
        stop(home.folder / "run")
    with tempfile.TemporaryDirectory(dir="/tmp") as short, socket.socket(socket.AF_UNIX) as vault:
        path = Path(short) / "vault.sock"
        assert _answers(path) == "no"
        vault.bind(str(path))
        assert _answers(path) == "no"
        vault.listen()
        assert _answers(path) == "yes"


def test_coordinator_status_where_there_is_none_is_one_line_and_an_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"coordinator.toml: no such file; `coadapt coordinator init` writes one"):
        run("coordinator", "status", "--home", tmp_path)


def test_status_counts_errors_by_name_from_the_events(hospitals: Hospitals) -> None:
    hospitals.init()
    hospitals.admit_all()
    hospitals.invite()
    assert "no run yet" in said("coordinator", "status", "--home", hospitals.coordinator)
    folder = hospitals.coordinator / "runs" / "one"
    folder.mkdir()
    log = EventLog(folder / "events.jsonl")
    log(RunStarted(run_id="one", federation="test", sites=NAMES, rounds=4, metrics=(), trainable_parameters=1))
    log(RoundStarted(round=1, sites=NAMES))
    for code in ("timeout", "timeout", "policy"):
        log(SiteFailed(round=1, site="west", code=code))
    log(SumOpened(round=1, survivors=("north", "south", "east"), dropped=("west",), threshold=3, transcript=""))
    log(RoundFinished(round=1, train_loss=None, answered=3, failed=1, bytes_up=7, bytes_down=9, seconds=1.0))
    log(RunStopped(status="failed", reason="too few sites"))
    log.close()
    shown = said("coordinator", "status", "--home", hospitals.coordinator)
    assert "run one: failed, round 1 of 4" in shown
    assert "policy x1, timeout x2" in shown
    found = json.loads(said("coordinator", "status", "--home", hospitals.coordinator, "--json"))
    assert (found["run"]["bytes_up"], found["run"]["bytes_down"], found["epoch"]) == (7, 9, 1)
    seen = {site["name"]: site["last_seen"] is not None for site in found["sites"]}
    assert seen == {"north": True, "south": True, "east": True, "west": False}


def test_no_run_begins_with_an_institution_that_was_revoked(hospitals: Hospitals) -> None:
    hospitals.join_all()
    home = CoordinatorHome(hospitals.coordinator)
    assert [entry.name for entry in prepared(home)[1].institutions] == sorted(NAMES)
    run("coordinator", "revoke", "west", "--home", hospitals.coordinator, "--yes")
    with pytest.raises(EnrolmentError, match="west is in the roster and not admitted any more"):
        prepared(home)


def test_a_run_whose_superlink_went_away_is_no_success(hospitals: Hospitals) -> None:
    class Gone:
        def get_node_ids(self) -> list[int]:
            raise ConnectionError("the SuperLink is gone")

    hospitals.join_all()
    home = CoordinatorHome(hospitals.coordinator)
    with pytest.raises(ConnectionError):
        run_field(cast(Grid, Gone()), home, "one")
    found = summary_of(home.runs / "one")
    assert found is not None
    assert (found.status, found.reason != "") == ("failed", True)


def test_the_log_is_shown_and_a_changed_one_is_refused(hospitals: Hospitals) -> None:
    hospitals.init()
    home = SiteHome(hospitals.site("north"))
    assert "nothing was asked" in said("site", "log", "--home", home.folder)
    log = AuditLog(home.audit)
    log.add("refused", kind="request", run_id="one", round_number=1, code="policy", reason="adapter.rank")
    log.add("answered", kind="poll", run_id="one", round_number=1)
    log.close()
    assert "policy adapter.rank" in said("site", "log", "--home", home.folder)
    home.audit.write_text(home.audit.read_text().replace("adapter.rank", "adapter.bank"))
    with pytest.raises(RunError, match="was changed"):
        run("site", "log", "--home", home.folder)


def test_start_asks_for_an_agreement_and_stop_says_that_nothing_ran(hospitals: Hospitals) -> None:
    hospitals.init()
    with pytest.raises(EnrolmentError, match="joined no federation"):
        run("site", "start", "--home", hospitals.site("north"))
    assert "nothing ran" in said("site", "stop", "--home", hospitals.site("north"))
    assert "nothing ran" in said("coordinator", "stop", "--home", hospitals.coordinator)


def test_two_users_must_be_two_and_the_relay_not_root() -> None:
    with pytest.raises(ServiceError, match="must be two users"):
        find_users("65001", "65001")
    with pytest.raises(ServiceError, match="must not run as root"):
        find_users("65001", "0")
    with pytest.raises(ServiceError, match="there is no user"):
        find_users("65001", "nobody-has-this-name")


def may(uid: int, gid: int, path: Path, flags: int) -> bool:
    """Whether a process of this user and group may open a file, asked of the kernel in a child."""
    child = os.fork()
    if child == 0:  # nothing of Python's must run in it but this
        code = 2
        try:
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
            os.close(os.open(path, flags))
            code = 0
        except PermissionError:
            code = 1
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 1), path
    return code == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be other users")
def test_the_relays_user_reads_its_own_folder_alone(hospitals: Hospitals, tmp_path: Path) -> None:
    hospitals.join_all()
    home = SiteHome(hospitals.site("north"))
    records(home.folder)
    (home.folder / "ledger").mkdir()
    ledger = home.folder / "ledger" / "ledger.key"
    ledger.write_bytes(b"secret")
    temporary = Path(tempfile.gettempdir())
    for above in (home.folder, *home.folder.parents):
        if above != temporary and above.is_relative_to(temporary):
            above.chmod(above.stat().st_mode | 0o011)
    stranger = tmp_path / "stranger"
    stranger.write_bytes(b"another's")
    (home.relay / "flower").mkdir()
    (home.relay / "flower" / "link").symlink_to(stranger)
    isolate(home, find_users(str(VAULT), str(RELAY)))
    assert isolated(home) == ""
    closed = (home.folder / "records.jsonl", home.signing_key, home.rounding_key, ledger, home.policy, home.roster)
    for path in closed:
        assert not may(RELAY, RELAY, path, os.O_RDONLY), path
        assert may(VAULT, RELAY, path, os.O_RDONLY), path
    for path in (home.node_key, home.certificate, home.relay / "agreement.json"):
        assert may(RELAY, RELAY, path, os.O_RDONLY), path
    # Nobody but the relay's group gets to the folder of the socket; the relay cannot put another socket there.
    assert not may(65003, 65003, home.relay / "node.pub", os.O_RDONLY)
    assert not may(RELAY, RELAY, home.relay / "vault.sock.new", os.O_RDWR | os.O_CREAT)
    assert may(RELAY, RELAY, home.relay / "flower" / "state", os.O_RDWR | os.O_CREAT)
    assert stranger.stat().st_uid == 0
    home.policy.chmod(0o644)
    assert "may read" in isolated(home)


def test_a_certificate_is_not_renewed_by_half_a_pair(hospitals: Hospitals) -> None:
    hospitals.init()
    home = CoordinatorHome(hospitals.coordinator)
    before = home.certificate.read_bytes()
    with pytest.raises(EnrolmentError, match="give --certificate and --key together"):
        run("coordinator", "renew", "--home", hospitals.coordinator, "--certificate", home.certificate)
    assert home.certificate.read_bytes() == before
