"""A unit that withdrew: its records are read no more; what was spent on it, and the published count, stay."""

from collections.abc import Callable
from pathlib import Path

import pytest

from client.ledger import Ledger
from client.policy import load_policy
from client.state import SiteState
from client.vault import Vault
from common.adapters import first_state
from common.codec.state import state_digest
from common.config.manifest import Columns, Manifest
from common.data_files import write_records
from common.errors import DataError
from common.messages import Envelope, RoundDone, RoundStart, decode, encode
from common.records import TextRecord

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

POLICY = """\
version = 1
name = "st-anna"
[data]
train = "train.jsonl"
withdrawn = "withdrawn.txt"
[population]
name = "patients"
unit = "patient"
units = 24
epsilon = 1000.0
delta = 1e-3
"""
NAME = "Müller"


@pytest.fixture
def vault(tmp_path: Path, manifest_for: Callable[..., Manifest]) -> Callable[[str], Vault]:
    manifest = manifest_for(
        training={"rounds": 3, "local_steps": 2, "batch_size": 4},
        privacy={"epsilon": 50.0, "delta": 1e-3, "unit": "patient"},
    )
    units = [NAME, *(f"u{number}" for number in range(23))]
    records = [TextRecord(text=f"clause {n} of {unit}", label="abc"[n % 3], unit=unit) for n, unit in enumerate(units)]
    write_records(tmp_path / "train.jsonl", [*records, TextRecord(text="more", label="a", unit=NAME)], Columns())
    (tmp_path / "site.toml").write_text(POLICY)

    def make(withdrawn: str) -> Vault:
        (tmp_path / "withdrawn.txt").write_text(withdrawn)
        return Vault.of(load_policy(tmp_path / "site.toml"), manifest, log=tmp_path / "log")

    return make


def train(vault: Vault, number: int, state: SiteState) -> tuple[RoundDone, SiteState]:
    from client.resident import resident

    adapter = first_state(resident(vault._manifest).model, 0)
    header = RoundStart(
        manifest_sha256=vault._manifest.digest(),
        run_id="run",
        round=number,
        adapter_sha256=state_digest(adapter),
        evaluate=False,
        accepted=0,
    )
    answer, state = vault.answer(encode(Envelope(header=header, tensors=adapter)), state)
    done = decode(answer).header
    assert isinstance(done, RoundDone)
    return done, state


def test_its_records_are_read_no_more_and_its_spend_stays(vault: Callable[[str], Vault], tmp_path: Path) -> None:
    before, ledger = vault(""), Ledger(tmp_path / "ledger")
    assert set(before._site.units) == {NAME, *(f"u{number}" for number in range(23))}
    first, state = train(before, 1, SiteState())
    spent = ledger.spent("patients")
    after = vault("u3\n\n  Mu\u0308ller \n")  # as another keyboard writes it
    assert set(after._site.units) == {f"u{number}" for number in range(23) if number != 3}
    assert len(after._site.train) == 22
    assert ledger.spent("patients") == spent
    second, _ = train(after, 2, state)
    assert first.records == second.records == 24  # as it is published
    assert first.sampling_rate == second.sampling_rate
    assert [steps.count for steps in ledger.spent("patients")] == [4]


def test_a_list_that_cannot_be_read_stops_the_vault(vault: Callable[[str], Vault], tmp_path: Path) -> None:
    vault("")
    (tmp_path / "withdrawn.txt").write_bytes(b"\xff\xfe\x00")
    policy = load_policy(tmp_path / "site.toml")
    with pytest.raises(DataError, match=r"withdrawn.txt of data.withdrawn cannot be read \(UnicodeDecodeError\)"):
        policy.withdrawn_units()
    (tmp_path / "withdrawn.txt").unlink()
    with pytest.raises(DataError, match=r"FileNotFoundError"):
        policy.withdrawn_units()


def test_where_everybody_withdrew_there_is_nothing_to_train_on(vault: Callable[[str], Vault]) -> None:
    with pytest.raises(DataError, match="every record is of a withdrawn unit") as error:
        vault("\n".join([NAME, *(f"u{number}" for number in range(23))]))
    assert NAME not in str(error.value)
