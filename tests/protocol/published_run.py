"""A federation of three with a finished run, and its gate, on loopback with TLS."""

import contextlib
import datetime
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from served_gate import Served

from client.audit_log import AuditLine, read_audit
from client.home import Agreement, SiteHome
from client.new_site import new_site
from common.durable import write_text
from common.enrolment import Enrolment
from common.release import Fetch, Listed, Listing, seal
from common.roster import Institution, Roster, SignedRoster
from server.enrolment import admit
from server.field_summary import FieldSummary
from server.home import CoordinatorHome
from server.publishing import publish
from server.releases import Releases

NAMES = ("north", "south", "east")
MANIFEST = "ab" * 32
RUN = "one"
FILES = {
    "adapter_model.safetensors": bytes(range(256)) * 40_000,  # more than one piece
    "adapter_config.json": b"{}",
    "coadapt.json": b'{"manifest": {}}',
}


class Published:
    """Coordinator, gate and three sites that have joined; the run is finished, and published by `publish()`."""

    def __init__(self, folder: Path, **served: Any) -> None:
        self.clock = 0.0  # the gate's is so many seconds ahead
        (folder / "gate").mkdir()
        self.served = Served(folder / "gate", releases=self._releases, **served)
        self.home: CoordinatorHome = self.served.home
        self.sites = {name: self._site(folder / name, name) for name in NAMES}
        self.stranger = self._site(folder / "stranger", "stranger")
        for name, site in self.sites.items():
            node = site.node_key.with_name("node.pub").read_text().split()
            admit(self.home, Enrolment.of(site.identity(), name, " ".join(node[:2])))
        self.roster = Roster(
            federation=bytes(range(16)),
            epoch=1,
            coordinator=self.home.identity().public,
            min_sites=3,
            max_colluding=0,
            institutions=tuple(
                Institution(site=number, name=name, public=self.sites[name].identity().public)
                for number, name in enumerate(NAMES)
            ),
        )
        self.join()
        self.finish(RUN)

    def _releases(self, home: CoordinatorHome) -> Releases:
        return Releases(home, clock=lambda: time.time() + self.clock)

    @staticmethod
    def _site(folder: Path, name: str) -> SiteHome:
        answers = {"train": "records.jsonl", "population": "patients", "units": "40", "epsilon": "10"}
        rest = dict.fromkeys(("held_out", "unit", "delta"), None)
        return new_site(folder, name=name, yes=True, **answers, **rest)

    def join(self) -> None:
        """Every site, and the stranger that is not in it, agrees to the roster."""
        signed = SignedRoster(
            roster=self.roster,
            signatures={n: self.roster.sign(site.identity()) for n, site in enumerate(self.sites.values())},
        )
        write_text(self.home.roster, signed.to_json())
        for site in (*self.sites.values(), self.stranger):
            site.federation.mkdir(exist_ok=True)
            write_text(site.roster, signed.to_json())
            shutil.copy(self.home.authority, site.certificate)
            site.agree(
                Agreement(
                    roster_sha256=self.roster.digest().hex(),
                    manifest_sha256=MANIFEST,
                    app_sha256=MANIFEST,
                    address=f"127.0.0.1:{self.served.port}",
                    joined=datetime.datetime.now(datetime.UTC).isoformat(),
                )
            )

    def finish(self, run_id: str, *, status: str = "finished", manifest: str = MANIFEST) -> Path:
        """A run's folder as `coadapt run` leaves it."""
        folder = self.home.runs / run_id
        adapter = folder / "adapter"
        adapter.mkdir(parents=True)
        for name, data in FILES.items():
            (adapter / name).write_bytes(data)
        values = {"status": status, "manifest_sha256": manifest, "roster_sha256": self.roster.digest().hex()}
        empty = {"first_line": "", "reason": "", "sites": [], "refusals": {}, "rounds": [], "selected_round": 1}
        summary = FieldSummary.model_validate({"run_id": run_id, "federation": "test", **values, **empty})
        (folder / "summary.json").write_text(summary.model_dump_json())
        return folder

    def compact(self, run_id: str = RUN, weights: bytes = b"weights") -> Path:
        """A compact model in the run's folder."""
        folder = self.home.runs / run_id / "compact"
        folder.mkdir()
        (folder / "coadapt.json").write_text(json.dumps({"format": 1}))
        (folder / "model.safetensors").write_bytes(weights)
        return folder

    def publish(self, run_id: str = RUN) -> Listing:
        return publish(self.home, run_id)

    def sign(self, **changes: Any) -> None:
        """Put another listing in the place of the published one: what a malicious coordinator could sign."""
        listing = Listing(
            federation=self.roster.federation.hex(),
            epoch=1,
            roster_sha256=self.roster.digest().hex(),
            manifest_sha256=MANIFEST,
            run_id=RUN,
            files=tuple(listed(f"adapter/{name}", data) for name, data in sorted(FILES.items())),
        ).model_copy(update=changes)
        (self.home.published / RUN / "listing.signed").write_bytes(seal(self.home.identity(), listing))

    def fetch_of(self, site: SiteHome, **changes: Any) -> Fetch:
        """A request as this site would make it, without the gate's number."""
        values = {"federation": self.roster.federation.hex(), "run_id": RUN, "gate": "", "time": 1}
        return Fetch.model_validate({**values, "public_key": site.identity().public.hex(), **changes})

    @contextlib.contextmanager
    def up(self) -> Iterator["Published"]:
        with self.served.up(upstream=False):
            yield self


def listed(path: str, data: bytes) -> Listed:
    return Listed(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def noted(site: SiteHome) -> AuditLine:
    """The newest line of the audit log, the chain verified."""
    return list(read_audit(site.audit))[-1]
