"""The ledger: what it says is what was spent, whatever happens to the process, the disk or the file."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from client.ledger import Account, Charge, Ledger
from common.errors import BudgetError, LedgerError, SnapshotRefused
from common.privacy.accounting import Steps, rdp_epsilon

ACCOUNT = Account("patients", 8.0, 1e-5)
RICH = Account("patients", 1e9, 1e-5)
STEPS = Steps(1.0, 0.1, 20)


def charge(number: int = 1, *, population: str = "patients", steps: Steps = STEPS) -> Charge:
    return Charge(population, "patient", "study", "0" * 64, "run", number, steps)


def charged(folder: Path, count: int) -> Ledger:
    ledger = Ledger(folder)
    for number in range(1, count + 1):
        ledger.charge(ACCOUNT, charge(number), ["anna", "ben"])
    return ledger


class TestCharges:
    def test_they_are_there_for_the_next_process(self, tmp_path: Path) -> None:
        charged(tmp_path / "ledger", 3)
        entries = Ledger(tmp_path / "ledger").entries()
        assert [entry.number for entry in entries] == [1, 2, 3]
        assert [entry.charge for entry in entries] == [charge(number) for number in (1, 2, 3)]
        assert Ledger(tmp_path / "ledger").spent("patients") == [Steps(1.0, 0.1, 60)]
        assert Ledger(tmp_path / "ledger").spent("others") == []

    def test_a_cap_is_kept_to_the_last_step(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        with pytest.raises(BudgetError, match="its cap is 8; nothing was charged and nothing trained"):
            _charge_often(tmp_path, 0, 100, ACCOUNT)
        spent = ledger.spent("patients")
        assert rdp_epsilon(spent, 1e-5) <= 8.0 < rdp_epsilon([*spent, STEPS], 1e-5)
        assert [entry.number for entry in ledger.entries()] == list(range(1, spent[0].count // STEPS.count + 1))
        with pytest.raises(BudgetError):
            ledger.require(ACCOUNT, STEPS)
        ledger.require(Account("others", 8.0, 1e-5), STEPS)

    def test_populations_have_accounts_of_their_own_but_no_unit_has_two(self, tmp_path: Path) -> None:
        ledger = charged(tmp_path, 1)
        other = Account("staff", 8.0, 1e-5)
        with pytest.raises(LedgerError, match="a unit of population 'staff' was charged under population 'patients'"):
            ledger.charge(other, charge(population="staff"), ["carl", "anna"])
        assert ledger.spent("staff") == []
        ledger.charge(other, charge(population="staff"), ["carl"])
        with pytest.raises(LedgerError, match="budget is one"):
            ledger.charge(ACCOUNT, charge(2), ["carl"])
        names = (tmp_path / "ledger.sqlite").read_bytes()
        assert b"anna" not in names
        assert b"carl" not in names

    def test_only_the_owner_may_read_it(self, tmp_path: Path) -> None:
        charged(tmp_path / "ledger", 1)
        assert (tmp_path / "ledger").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "ledger" / "ledger.key").stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "ledger" / "ledger.sqlite").stat().st_mode & 0o777 == 0o600

    def test_a_simulation_marks_its_entries(self, tmp_path: Path) -> None:
        assert Ledger(tmp_path, simulated=True).charge(ACCOUNT, charge(), []).simulated
        assert not Ledger(tmp_path).charge(ACCOUNT, charge(2), []).simulated

    def test_a_clock_that_runs_backwards_stops_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ledger = charged(tmp_path, 1)
        now = time.time()
        monkeypatch.setattr("client.ledger.time.time", lambda: now - 3600)
        with pytest.raises(LedgerError, match="the clock runs backwards"):
            ledger.charge(ACCOUNT, charge(2), [])
        monkeypatch.setattr("client.ledger.time.time", lambda: now - 60)  # the network set it right
        entry = ledger.charge(ACCOUNT, charge(2), [])
        assert entry.time >= ledger.entries()[0].time
        assert len(ledger.entries()) == 2


def edit(folder: Path, statement: str) -> None:
    with sqlite3.connect(folder / "ledger.sqlite") as database:
        database.execute(statement)
    database.close()


class TestDamage:
    @pytest.mark.parametrize(
        ("statement", "message"),
        [
            (
                "UPDATE entries SET content = replace(content, ': 20', ': 2') WHERE number = 2",
                "entry 2 does not follow",
            ),
            ("DELETE FROM entries WHERE number = 2", "entry 2 does not follow"),
            ("DELETE FROM entries WHERE number = 3", "was shortened: it holds 2 entries and had 3"),
            ("DELETE FROM entries", "was shortened: it holds 0 entries and had 3"),
            ("UPDATE entries SET number = number + 1 WHERE number = 3", "entry 3 does not follow"),
            ("UPDATE entries SET digest = 'x' WHERE number = 3", "entry 3 does not follow"),
        ],
    )
    def test_an_edit_shows(self, tmp_path: Path, statement: str, message: str) -> None:
        ledger = charged(tmp_path, 3)
        edit(tmp_path, statement)
        for use in (ledger.entries, lambda: ledger.charge(ACCOUNT, charge(4), [])):
            with pytest.raises(LedgerError, match=message):
                use()

    def test_a_ledger_of_another_site_is_not_taken(self, tmp_path: Path) -> None:
        charged(tmp_path / "one", 2)
        charged(tmp_path / "two", 2)
        shutil.copy(tmp_path / "one" / "ledger.sqlite", tmp_path / "two" / "ledger.sqlite")
        with pytest.raises(LedgerError, match="was changed"):
            Ledger(tmp_path / "two").entries()

    @pytest.mark.parametrize("name", ["ledger.sqlite", "ledger.head", "ledger.key"])
    def test_a_file_that_holds_nonsense_or_is_cut_is_refused(self, tmp_path: Path, name: str) -> None:
        charged(tmp_path, 2)
        whole = (tmp_path / name).read_bytes()
        for data in (b"nonsense" * 1000, whole[: len(whole) // 2]):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(LedgerError):
                Ledger(tmp_path).entries()

    @pytest.mark.parametrize("name", ["ledger.sqlite", "ledger.head", "ledger.key"])
    def test_a_file_that_is_gone_is_missed(self, tmp_path: Path, name: str) -> None:
        charged(tmp_path, 4)
        (tmp_path / name).unlink()
        with pytest.raises(LedgerError):
            Ledger(tmp_path).entries()

    def test_a_folder_that_cannot_be_made_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(LedgerError, match="cannot be opened") as error:
            Ledger(tmp_path / "file" / "ledger")
        assert "\n" not in str(error.value)

    def test_a_full_disk_charges_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ledger = charged(tmp_path, 1)
        connect = sqlite3.connect

        def full(*arguments: Any, **options: Any) -> sqlite3.Connection:
            database = connect(*arguments, **options)
            (pages,) = database.execute("PRAGMA page_count").fetchone()
            database.execute(f"PRAGMA max_page_count = {pages}")  # what SQLite meets where no page can be added
            return database

        monkeypatch.setattr("client.ledger.sqlite3.connect", full)
        with pytest.raises(LedgerError, match="full; nothing was charged"):
            ledger.charge(ACCOUNT, charge(2), [f"unit {number}" for number in range(5000)])
        monkeypatch.undo()
        assert len(ledger.entries()) == 1


def _charge_often(folder: Path, worker: int, count: int, account: Account = RICH) -> None:
    ledger = Ledger(folder)
    for number in range(count):
        ledger.charge(account, charge(worker * count + number + 1), ["anna"])


class TestProcesses:
    def test_two_processes_lose_nothing(self, tmp_path: Path) -> None:
        context = multiprocessing.get_context("spawn")
        workers = [context.Process(target=_charge_often, args=(tmp_path, worker, 6)) for worker in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        entries = Ledger(tmp_path).entries()
        assert [worker.exitcode for worker in workers] == [0, 0, 0]
        assert sorted(entry.charge.round for entry in entries) == list(range(1, 19))

    def test_two_processes_cannot_overdraw_it_together(self, tmp_path: Path) -> None:
        _charge_often(tmp_path, 0, 1)
        cap = rdp_epsilon([Steps(1.0, 0.1, 60)], 1e-5) + 1e-9
        ledgers = [Ledger(tmp_path), Ledger(tmp_path)]
        account = Account("patients", cap, 1e-5)
        ledgers[0].charge(account, charge(2), [])
        ledgers[1].charge(account, charge(3), [])
        for ledger in ledgers:
            with pytest.raises(BudgetError):
                ledger.charge(account, charge(4), [])

    def test_kill_at_any_moment_never_loses_what_was_released(self, tmp_path: Path) -> None:
        """A child charges and only then releases; it is killed at twenty moments."""
        fork = multiprocessing.get_context("fork")
        total = 0
        for moment in range(20):
            receiver, sender = fork.Pipe(duplex=False)
            child = fork.Process(target=_charge_and_release, args=(tmp_path, sender))
            child.start()
            sender.close()
            assert receiver.recv() == total
            released = total
            for _ in range(moment % 3):
                released = receiver.recv()
            time.sleep(0.0037 * moment % 0.019)  # somewhere within the next charge
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            with contextlib.suppress(EOFError):
                while True:
                    released = receiver.recv()
            entries = Ledger(tmp_path).entries()
            assert len(entries) >= released
            assert [entry.charge.round for entry in entries] == list(range(1, len(entries) + 1))
            total = len(entries)
        assert total > 10
        number, _ = json.loads((tmp_path / "ledger.head").read_text())
        assert total - 1 <= number <= total


def _charge_and_release(folder: Path, sender: Any) -> None:
    ledger = Ledger(folder)
    number = len(ledger.entries())
    sender.send(number)
    while True:
        number += 1
        ledger.charge(RICH, charge(number), ["anna", str(number)])
        sender.send(number)


class TestHead:
    def test_it_is_the_number_of_entries_and_the_last_digest(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path / "ledger")
        assert ledger.head() == (0, "")
        heads = []
        for number in (1, 2, 3):
            ledger.charge(RICH, charge(number), ["anna"])
            heads.append(ledger.head())
        assert [number for number, _ in heads] == [1, 2, 3]
        assert len({digest for _, digest in heads}) == 3
        for head in [(0, ""), *heads]:
            ledger.require_at_least(*head)

    def test_an_older_copy_and_another_ledger_are_refused(self, tmp_path: Path) -> None:
        ledger = charged(tmp_path / "ledger", 2)
        number, digest = ledger.head()
        other = charged(tmp_path / "other", 2)
        for wrong in ((number + 1, "0" * 64), (number, "0" * 64), (number, other.head()[1]), (number - 1, digest)):
            with pytest.raises(SnapshotRefused, match="has 2 entries and is not the one of which others have seen"):
                ledger.require_at_least(*wrong)

    def test_rounds_are_those_of_one_run_under_one_manifest(self, tmp_path: Path) -> None:
        ledger = charged(tmp_path / "ledger", 2)
        assert ledger.rounds_of("0" * 64, "run") == [1, 2]
        assert ledger.rounds_of("1" * 64, "run") == []
        assert ledger.rounds_of("0" * 64, "other") == []
