"""`coadapt site init`: an annotated site.toml, the keys and the folders of a site; nothing is overwritten."""

import json
import tempfile
from pathlib import Path

import tomli_w

from client.home import SiteHome
from client.policy import SitePolicy, load_policy
from client.site_keys import make_folders, make_keys
from common.config.annotate import annotated_document
from common.durable import write_text
from common.errors import EnrolmentError
from common.private_files import private_folder
from common.questions import answer

__all__ = ["new_site"]

HEADER = """\
What this institution allows, and where its data is. No other side sees this file, and none can loosen it.
A key that is left out has its default. An optional key without a value is written behind a '#':
take the '#' away and put the value in to set it. Files and folders count from this file's own folder."""


def new_site(
    folder: Path,
    *,
    name: str | None,
    train: str | None,
    held_out: str | None,
    population: str | None,
    unit: str | None,
    units: str | None,
    epsilon: str | None,
    delta: str | None,
    yes: bool,
) -> SiteHome:
    """Make a site in `folder`. What is None is asked for on a terminal; with `yes` it has its default.

    Raises:
        EnrolmentError: there is a site already, or something is missing and nobody can be asked.
        ManifestError: the answers break a rule of the policy; nothing was written.
    """
    home = SiteHome(folder)
    for path in (home.policy, home.signing_key, home.node_key, home.rounding_key):
        if path.exists():
            raise EnrolmentError(f"{path} exists already: {folder} holds a site; name another folder with --home")
    name = answer("Name of the site", name, flag="--name", default=folder.resolve().name, yes=yes)
    values = {
        "version": 1,
        "name": name,
        "data": {
            "train": answer("File of the records", train, flag="--train", default="records.jsonl", yes=yes),
            **({"held_out": held_out} if held_out else {}),
        },
        "population": {
            "name": answer("Name of the population", population, flag="--population", default="patients", yes=yes),
            "unit": answer("What is protected", unit, flag="--unit", default="record", yes=yes),
            # These two have no default: a number that nobody chose would be enforced for years.
            "units": _number(answer("Number of units, rounded, as it may be published", units, flag="--units")),
            "epsilon": _number(answer("Most epsilon that all federations may spend", epsilon, flag="--epsilon")),
            "delta": _number(answer("Delta of that bound", delta, flag="--delta", default="1e-5", yes=yes)),
        },
    }
    policy = _validated(values)
    private_folder(home.folder)
    make_folders(home)
    make_keys(home)
    write_text(home.policy, annotated_document(policy, HEADER))
    home.policy.chmod(0o600)
    return home


def _number(text: str) -> object:
    """The text as a number where it is one; else the policy's own rule says what it must be."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _validated(values: dict[str, object]) -> SitePolicy:
    """The answers as a policy, checked by the loader itself so that errors read as they always do."""
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "site.toml"
        draft.write_text(tomli_w.dumps(values), encoding="utf-8")
        policy, data = load_policy(draft), values["data"]
    assert isinstance(data, dict)  # noqa: S101 - made above
    files = policy.data.model_copy(update={"train": data["train"], "held_out": data.get("held_out")})
    return policy.model_copy(update={"ledger": "ledger", "data": files})
