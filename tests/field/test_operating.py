"""What a person types from day to day: check, preview, service, status; and that two users are kept apart."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from enrolled import NAMES, Hospitals, run, said

from client.audit_log import AuditLog
from client.home import SiteHome
from client.isolation import find_users, isolate, isolated
from common.config.annotate import annotated
from common.config.manifest import Columns, Manifest
from common.data_files import write_records
from common.errors import EnrolmentError, RunError, ServiceError
from common.flower import Grid
from common.progress import EventLog, RoundFinished, RoundStarted, RunStarted, RunStopped, SiteFailed, SumOpened
from common.records import TextRecord
from server.field_run import prepared, run_field
from server.home import CoordinatorHome
from server.submission import summary_of

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


def test_services_name_two_users_and_systemd_accepts_them(hospitals: Hospitals, tmp_path: Path) -> None:
    hospitals.init()
    run("site", "service", "--home", hospitals.site("north"), "--into", tmp_path / "units")
    run("coordinator", "service", "--home", hospitals.coordinator, "--into", tmp_path / "units")
    with pytest.raises(EnrolmentError, match="exists already"):
        run("site", "service", "--home", hospitals.site("north"), "--into", tmp_path / "units")
    vault = (tmp_path / "units" / "coadapt-vault.service").read_text().splitlines()
    relay = (tmp_path / "units" / "coadapt-relay.service").read_text().splitlines()
    assert {"User=coadapt-vault", "Group=coadapt-relay", "UMask=0077", "NoNewPrivileges=yes"} <= set(vault)
    assert {"User=coadapt-relay", "ProtectSystem=strict", "PrivateTmp=yes"} <= set(relay)
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    units = sorted(map(str, (tmp_path / "units").glob("*.service")))
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, timeout=60, check=False
    )
    ours = [line for line in found.stderr.splitlines() if "coadapt" in line and "Unknown" in line]
    assert ours == []


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
