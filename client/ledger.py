"""Privacy spent at a site: one account for each population, over every federation, run and file. No torch.

A charge is on the disk before training begins and is never refunded. Entries lie in a SQLite database, whose
transactions survive `kill -9` at any instruction; each carries a keyed digest of itself and the one before, so an
edit shows, and their number stands in a second file, so a shortened ledger shows. Someone who may read the key file
can forge all of it: it protects against accident and haste, not against the site itself.

Budgets belong to privacy units, not to files. The ledger keeps a keyed digest of every unit that an account was
charged for, and no unit may be in two accounts.
"""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from common.durable import write_text
from common.errors import BudgetError, LedgerError, RunError, SnapshotRefused
from common.privacy.accounting import Steps, merged, rdp_epsilon

__all__ = ["Account", "Charge", "Entry", "Ledger"]

# A clock may be set back by less than this between two charges; entries are ordered by number, never by time.
CLOCK_TOLERANCE_SECONDS = 300.0
BUSY_SECONDS = 60.0

# A process that is killed between an entry and the note of its number leaves the note behind by one.
HEAD_MAY_LAG = 2

SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (number INTEGER PRIMARY KEY, content TEXT NOT NULL, digest TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS units (tag BLOB PRIMARY KEY, population TEXT NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Account:
    """What may be spent on one population's units altogether: (epsilon, delta), from the site's policy."""

    population: str
    epsilon: float
    delta: float


@dataclass(frozen=True)
class Charge:
    """The cost of one round: noised steps on units of a population, in a run of a federation."""

    population: str
    unit: str
    federation: str
    manifest_sha256: str
    run_id: str
    round: int
    steps: Steps


@dataclass(frozen=True)
class Entry:
    """A charge as it stands in the ledger; `time` in seconds since 1970, `simulated` if no person is behind it."""

    number: int
    time: float
    simulated: bool
    charge: Charge


class Ledger:
    """The ledger in a folder, made when it is first opened. Two processes may use it at the same time.

    Every method raises LedgerError if the ledger cannot be read or written, is damaged, edited or shortened.
    """

    def __init__(self, folder: Path, *, simulated: bool = False) -> None:
        self._folder = folder
        self._simulated = simulated
        self._key = b""
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._key = self._read_key()
        except OSError as error:
            raise LedgerError(f"the ledger in {folder} cannot be opened: {error.strerror}") from error
        with self._transaction():
            pass

    def entries(self) -> list[Entry]:
        """All entries in their order, their chain verified."""
        with self._transaction() as database:
            return self._verified(database)

    def head(self) -> tuple[int, str]:
        """How many entries there are, and the keyed digest of the last (hex, empty where there is none).

        It may leave: without the key it tells nothing of what stands in the entries.
        """
        with self._transaction() as database:
            self._verified(database)
            return self._head(database)

    def require_at_least(self, number: int, digest: str) -> None:
        """Refuse to be older than what others have seen: `head` as it was once told to them.

        Raises:
            SnapshotRefused: there are fewer entries, or the one that was last then is another. A copy from before was
                put back, and what was spent since would be spent again.
        """
        with self._transaction() as database:
            entries = self._verified(database)
            row = database.execute("SELECT digest FROM entries WHERE number = ?", (number,)).fetchone()
        if number and (row is None or not hmac.compare_digest(row[0], digest)):
            raise SnapshotRefused(
                f"the ledger in {self._folder} has {len(entries)} entries and is not the one of which others have seen"
                f" {number}: an older copy was put back; restore the newest, nothing is trained without it"
            )

    def seal(self, federation: bytes, number: int, digest: str) -> bytes:
        """32 bytes that tie an end (see `head`) to this ledger, in statements for a federation."""
        said = f"end\x1f{federation.hex()}\x1f{number}\x1f{digest}"
        return hmac.digest(self._key, said.encode(), hashlib.sha256)

    def rounds_of(self, manifest_sha256: str, run_id: str) -> list[int]:
        """The rounds of a run that were charged, in the order of their entries."""
        charges = (entry.charge for entry in self.entries())
        return [each.round for each in charges if (each.manifest_sha256, each.run_id) == (manifest_sha256, run_id)]

    def spent(self, population: str) -> list[Steps]:
        """What the population's units have paid for so far."""
        return merged(entry.charge.steps for entry in self.entries() if entry.charge.population == population)

    def require(self, account: Account, steps: Steps) -> None:
        """Refuse steps that the account cannot pay; nothing is charged.

        Raises:
            BudgetError: the account would be overdrawn.
        """
        self._require(account, self.entries(), steps)

    def charge(self, account: Account, charge: Charge, units: Iterable[str]) -> Entry:
        """Put a round's cost on the disk. `units` are the names of all units that may be sampled.

        Raises:
            BudgetError: the account would be overdrawn; nothing is charged.
            LedgerError: a unit is in another account, or the clock runs backwards; nothing is charged.
        """
        with self._transaction() as database:
            entries = self._verified(database)
            self._require(account, entries, charge.steps)
            self._register(database, charge.population, units)
            last = entries[-1].time if entries else 0.0
            now = time.time()
            if now < last - CLOCK_TOLERANCE_SECONDS:
                raise LedgerError(
                    f"the clock runs backwards: it is {_when(now)}, and the ledger's last entry is of {_when(last)};"
                    " set the clock"
                )
            entry = Entry(len(entries) + 1, max(now, last), self._simulated, charge)
            content = json.dumps(asdict(entry), sort_keys=True)
            digest = self._digest(self._head(database)[1], content)
            database.execute("INSERT INTO entries VALUES (?, ?, ?)", (entry.number, content, digest))
        self._note_length()
        return entry

    def _require(self, account: Account, entries: list[Entry], steps: Steps) -> None:
        before = [entry.charge.steps for entry in entries if entry.charge.population == account.population]
        after = rdp_epsilon([*before, steps], account.delta)
        if after > account.epsilon:
            raise BudgetError(
                f"population {account.population!r}: {steps.count} more steps would bring epsilon from"
                f" {rdp_epsilon(before, account.delta):.3f} to {after:.3f} at delta {account.delta:g}, its cap is"
                f" {account.epsilon:g}; nothing was charged and nothing trained"
            )

    def _register(self, database: sqlite3.Connection, population: str, units: Iterable[str]) -> None:
        for unit in units:
            tag = hmac.digest(self._key, f"unit\x1f{unit}".encode(), "sha256")
            database.execute("INSERT OR IGNORE INTO units VALUES (?, ?)", (tag, population))
            (owner,) = database.execute("SELECT population FROM units WHERE tag = ?", (tag,)).fetchone()
            if owner != population:
                raise LedgerError(
                    f"a unit of population {population!r} was charged under population {owner!r} before; a person's"
                    " budget is one, so give both files one population"
                )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        path = self._folder / "ledger.sqlite"
        try:
            database = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
            with contextlib.closing(database):
                database.execute("PRAGMA synchronous = EXTRA")
                database.executescript(SCHEMA)
                path.chmod(0o600)
                database.execute("BEGIN IMMEDIATE")
                try:
                    yield database
                except BaseException:
                    if database.in_transaction:  # a full disk has rolled it back already
                        database.execute("ROLLBACK")
                    raise
                database.execute("COMMIT")
        except sqlite3.Error as error:
            raise LedgerError(f"the ledger {path} cannot be used: {error}; nothing was charged") from error
        except OSError as error:
            raise LedgerError(f"the ledger {path} cannot be used: {error.strerror}; nothing was charged") from error

    def _verified(self, database: sqlite3.Connection) -> list[Entry]:
        entries, digest = [], ""
        known, known_digest = self._length()
        rows = database.execute("SELECT number, content, digest FROM entries ORDER BY number").fetchall()
        for place, (number, content, written) in enumerate(rows, start=1):
            digest = self._digest(digest, content)
            if number != place or not hmac.compare_digest(digest, written):
                raise LedgerError(
                    f"the ledger in {self._folder} was changed: entry {place} does not follow from the one before;"
                    " restore it from a backup, nothing is trained without it"
                )
            if place == known and digest != known_digest:
                raise LedgerError(f"the ledger in {self._folder} is not the one that ledger.head speaks of")
            entries.append(_entry(content))
        if len(rows) > HEAD_MAY_LAG and not known:
            raise LedgerError(
                f"{self._folder / 'ledger.head'} is gone, so it would not show if entries were; restore it"
            )
        if len(rows) < known:
            raise LedgerError(
                f"the ledger in {self._folder} was shortened: it holds {len(rows)} entries and had {known};"
                " restore it from a backup, nothing is trained without it"
            )
        return entries

    def _head(self, database: sqlite3.Connection) -> tuple[int, str]:
        row = database.execute("SELECT number, digest FROM entries ORDER BY number DESC LIMIT 1").fetchone()
        return row if row else (0, "")

    def _note_length(self) -> None:
        """Write the number of entries and the last digest beside the database: shorter it may never be again."""
        with self._transaction() as database:  # so that of two processes the later one writes the larger number
            number, digest = self._head(database)
            try:
                write_text(self._folder / "ledger.head", json.dumps([number, digest]) + "\n")
            except RunError as error:
                raise LedgerError(f"{error}; the round is charged, but not trained") from error

    def _length(self) -> tuple[int, str]:
        try:
            number, digest = json.loads((self._folder / "ledger.head").read_text(encoding="utf-8"))
            return int(number), str(digest)
        except FileNotFoundError:
            return 0, ""
        except ValueError as error:
            raise LedgerError(f"{self._folder / 'ledger.head'} is damaged; restore it from a backup") from error

    def _digest(self, before: str, content: str) -> str:
        return hmac.digest(self._key, f"entry\x1f{before}\x1f{content}".encode(), hashlib.sha256).hex()

    def _read_key(self) -> bytes:
        path = self._folder / "ledger.key"
        with contextlib.suppress(FileExistsError):
            # Written whole beside its place and linked to it: of two processes one wins, and nobody reads half a key.
            beside = path.with_name(f".ledger.key.{secrets.token_hex(8)}")
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.write(descriptor, secrets.token_bytes(32))
                os.fsync(descriptor)
                if not (self._folder / "ledger.sqlite").exists():
                    os.link(beside, path)
            finally:
                os.close(descriptor)
                beside.unlink()
        if not path.exists():
            raise LedgerError(f"the ledger's key {path} is gone, so its entries cannot be trusted; restore it")
        key = path.read_bytes()
        if len(key) != 32:
            raise LedgerError(f"the ledger's key {path} is damaged; restore it from a backup")
        return key


def _entry(content: str) -> Entry:
    values = json.loads(content)
    charge = values.pop("charge")
    return Entry(**values, charge=Charge(**{**charge, "steps": Steps(**charge["steps"])}))


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
