"""`coadapt site enroll`: the site's public keys as a file for the coordinator."""

from pathlib import Path

from client.home import SiteHome
from client.policy import load_policy
from client.site_keys import node_public, require_private_keys
from common.durable import write_text
from common.enrolment import Enrolment
from common.identity import fingerprint

__all__ = ["enroll"]


def enroll(home: SiteHome, into: Path) -> tuple[Path, str]:
    """Write NAME.enrolment.json; the file and the fingerprint that both sides compare by phone.

    Raises:
        EnrolmentError: the keys are missing, damaged or open to others.
        ManifestError: site.toml breaks a rule.
    """
    require_private_keys(home)
    name, identity = load_policy(home.policy).name, home.identity()
    path = into / f"{name}.enrolment.json"
    write_text(path, Enrolment.of(identity, name, node_public(home)).to_json())
    return path, fingerprint(identity.public)
