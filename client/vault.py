"""The vault: a site's resident object. It alone holds the records; an envelope comes in and an envelope goes out."""

from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Self

from client.ledger import Ledger
from client.policy import SitePolicy
from client.protection import Population, Protection, protected_units
from client.resident import resident
from client.round import SiteData, evaluate, project, train_round
from client.site_log import note
from client.state import SiteState
from client.training.crew import Crew
from common.config.manifest import Columns, Manifest
from common.data_files import clean_name, read_records
from common.errors import DataError, MessageError, PrivacyError, error_code
from common.messages import Envelope, Evaluate, Project, Refused, RoundStart, decode, encode
from common.records import Record
from common.tasks.task import Example

__all__ = ["Vault", "note", "read_site"]


class Vault:
    """One site under one manifest.

    `train` and `held_out` are files of records; the second may be missing. Errors are written to `log`, which stays
    at the site; what leaves is a fixed word. A manifest with privacy needs the `population` that the records belong to
    and the `ledger` that is charged. `rank` is the adapter rank that this site trains, where it is smaller than the
    manifest's. Records of `withdrawn` units are not read. With `require_budget` false a vault is made that can pay no
    further round, to finish what was paid for. A `crew` of further processes trains with this one.

    Raises:
        CoadaptError: of its tree the one that fits; without budget for a round no record is read.
    """

    def __init__(
        self,
        name: str,
        manifest: Manifest,
        *,
        train: Path,
        held_out: Path | None,
        log: Path,
        columns: Columns | None = None,
        population: Population | None = None,
        ledger: Ledger | None = None,
        rank: int | None = None,
        withdrawn: AbstractSet[str] = frozenset(),
        require_budget: bool = True,
        crew: Crew | None = None,
    ) -> None:
        self._manifest = manifest
        self._digest = manifest.digest()
        self._log = log
        self._rank = rank
        self._crew = crew
        self._protection: Protection | None = None
        if manifest.privacy is not None:
            if population is None or ledger is None:
                raise PrivacyError("the manifest asks for privacy: a site needs a population and a ledger to give it")
            self._protection = Protection(manifest, population, ledger)
            if require_budget:
                self._protection.require()
        self._site = read_site(
            name, manifest, train=train, held_out=held_out, columns=columns, withdrawn=withdrawn, rank=rank
        )

    @classmethod
    def of(
        cls,
        policy: SitePolicy,
        manifest: Manifest,
        *,
        log: Path,
        require_budget: bool = True,
        crew: Crew | None = None,
    ) -> Self:
        """The vault of a site, by its policy.

        Raises:
            PrivacyError: the manifest protects other units than the policy's population consists of.
            CoadaptError: as above.
        """
        private = manifest.privacy is not None
        policy.require_unit(manifest)
        return cls(
            policy.name,
            manifest,
            train=Path(policy.data.train),
            held_out=None if policy.data.held_out is None else Path(policy.data.held_out),
            log=log,
            columns=policy.data.columns,
            population=policy.account() if private else None,
            ledger=Ledger(Path(policy.ledger)) if private else None,
            rank=policy.training.rank,
            withdrawn=policy.withdrawn_units(),
            require_budget=require_budget,
            crew=crew,
        )

    def charged(self, run_id: str) -> list[int]:
        """The rounds of a run that were charged, in their order; none without privacy."""
        return self._protection.charged(run_id) if self._protection is not None else []

    def answer(self, data: bytes, state: SiteState, *, unreleased: bool = False) -> tuple[bytes, SiteState]:
        """Answer one envelope. Whatever goes wrong ends in a Refused, and the state stays as it was.

        `unreleased`: see `Protection.charge`.

        Raises:
            MessageError: what came is no envelope, so there is no request to answer.
        """
        request = decode(data)
        try:
            reply, state = self._reply(request, state, unreleased=unreleased)
        except Exception as error:
            note(self._log, error)
            header = request.header
            reply = Envelope(
                header=Refused(
                    manifest_sha256=self._digest,
                    run_id=header.run_id,
                    round=header.round,
                    adapter_sha256=header.adapter_sha256,
                    code=error_code(error),
                )
            )
        return encode(reply), state

    def _reply(self, request: Envelope, state: SiteState, *, unreleased: bool) -> tuple[Envelope, SiteState]:
        header = request.header
        if header.manifest_sha256 != self._digest:
            raise MessageError("the coordinator speaks of another manifest than the one this site agreed to")
        model = resident(self._manifest, self._rank)
        if isinstance(header, RoundStart):
            return train_round(
                request,
                header,
                self._manifest,
                self._site,
                model,
                state,
                self._protection,
                unreleased=unreleased,
                crew=self._crew,
            )
        if isinstance(header, Project):
            return project(request, header, self._manifest, state)
        if isinstance(header, Evaluate):
            return evaluate(request, header, self._manifest, self._site, model), state
        raise MessageError(f"a site does not answer {header.kind!r}")


def read_site(
    name: str,
    manifest: Manifest,
    *,
    train: Path,
    held_out: Path | None,
    columns: Columns | None = None,
    rank: int | None = None,
    withdrawn: AbstractSet[str] = frozenset(),
) -> SiteData:
    """A site's files as examples, with privacy also by unit; `columns` names the files' columns where they differ.

    Records of `withdrawn` units are left out: they are neither trained nor measured on.

    Raises:
        DataError: a file cannot be read, or a record is not what the task needs.
    """

    gone = {clean_name(unit, manifest.data.unicode) for unit in withdrawn}

    def read(path: Path) -> list[Record]:
        data = manifest.data if columns is None else manifest.data.model_copy(update={"columns": columns})
        records = read_records(path, task=manifest.task, data=data, need_unit=manifest.need_unit or bool(gone))[0]
        return [record for record in records if record.unit not in gone]

    task = resident(manifest, rank).task
    records = read(train)
    if not records:
        raise DataError(f"{train}: every record is of a withdrawn unit; nothing is left to train on")
    examples = task.encode(records).examples
    held_out_examples = task.encode(read(held_out)).examples if held_out else []
    units: dict[str, list[Example]] = {}
    if manifest.privacy is not None:
        by_record = {id(record): example for record, example in zip(records, examples, strict=True)}
        owned = protected_units(records, manifest.privacy.unit)
        units = {unit: [by_record[id(record)] for record in own] for unit, own in owned.items()}
    return SiteData(name, examples, held_out_examples[: manifest.evaluation.max_records], units)
