"""One run between institutions, at the coordinator: everything is read and checked, the rounds run, the result is kept.

A run folder that is there already is resumed. What stops a run is written into its `summary.json`, so that whoever
submitted it can be told, and the folder stays as it is, to be resumed.
"""

import contextlib
import threading
import traceback
from pathlib import Path
from typing import Literal

from common.adapters import attach, first_state, save_adapter
from common.codec.state import AdapterState
from common.config.annotate import annotated
from common.config.loading import load_manifest
from common.config.manifest import Manifest
from common.errors import CoadaptError
from common.flower import Grid, quiet
from common.models import find_base, load_task_model
from common.progress import EventLog, PhaseStarted, RunStarted, RunStopped, read_events
from common.roster import Roster
from server.coordinator import Coordinator
from server.enrolment import require_roster
from server.field_channel import FieldChannel, Heads
from server.field_summary import write_summary
from server.home import CoordinatorHome, load_settings
from server.order_numbers import OrderNumbers
from server.public_records import PublicRecords, public_file
from server.publishing import publish
from server.resumed_events import OnlyNew
from server.run_store import RunStore
from server.secure_collection import SecureCollection

__all__ = ["prepared", "run_field"]


def prepared(home: CoordinatorHome) -> tuple[Manifest, Roster]:
    """The manifest and the roster that every institution has signed, and whose institutions are all admitted still.

    Raises:
        CoadaptError: something is missing or does not fit, in one line.
    """
    manifest = load_manifest(home.manifest)
    roster = require_roster(home, manifest)
    public_file(manifest, home.manifest.parent)
    return manifest, roster


def run_field(grid: Grid, home: CoordinatorHome, run_id: str) -> None:
    """Run or resume a run over a Flower grid.

    Raises:
        CoadaptError: what stopped it, which stands in the run's summary too.
    """
    quiet()
    manifest, roster = prepared(home)
    settings = load_settings(home)
    base = find_base(manifest.model)
    model = attach(load_task_model(base, manifest), manifest.adapter)
    first = first_state(model, manifest.training.seed)
    path = public_file(manifest, home.manifest.parent)
    public = PublicRecords(path, manifest, model, base) if path is not None else None

    def write_adapter(folder: Path, adapter: AdapterState) -> None:
        save_adapter(folder, model, adapter, base, manifest)

    folder = home.runs / run_id
    resumes = folder.exists()
    store = RunStore.reopen(folder, write_adapter) if resumes else RunStore(folder, write_adapter)
    if not resumes:
        store.write("federation.toml", annotated(manifest))
    names = [entry.name for entry in roster.institutions]
    with contextlib.ExitStack() as stack:
        events = folder / "events.jsonl"
        written = EventLog(events)
        stack.callback(written.close)
        log = OnlyNew(list(read_events(events)), written)
        log(
            RunStarted(
                run_id=run_id,
                federation=manifest.name,
                sites=tuple(names),
                rounds=manifest.training.rounds,
                metrics=manifest.metrics,
                trainable_parameters=sum(array.size for array in first.values()),
            )
        )
        channel = FieldChannel(
            grid,
            identity=home.identity(),
            roster=roster,
            manifest_sha256=manifest.digest(),
            run_id=run_id,
            heads=Heads(home.folder / "ledger-heads.json"),
            orders=OrderNumbers(home.folder / "order-number.txt"),
            stop=threading.Event(),
            phase_seconds=settings.phase_seconds,
            poll_seconds=settings.poll_seconds,
        )
        sums = None
        if manifest.secure_sum.enabled:
            sums = SecureCollection(
                manifest,
                identity=home.identity(),
                roster=roster,
                sites=names,
                shapes={name: array.shape for name, array in first.items()},
                channel=channel,
                report=log,
                attempts=settings.attempts,
                journals=store.journals,
            )
        coordinator = Coordinator(
            manifest,
            run_id=run_id,
            sites=names,
            first=first,
            channel=channel,
            sums=sums,
            store=store,
            report=log,
            public=public.measure if public is not None else None,
            public_meanwhile=True,
            lost_rounds=settings.attempts,
        )
        log(PhaseStarted(phase="rounds"))
        # What no error of ours ends, such as a SuperLink that went away, is no success: the run can be resumed.
        status: Literal["finished", "interrupted", "failed"] = "failed"
        reason = "the coordinator's app ended unexpectedly; log/app.log says how"
        try:
            store.save_result(coordinator.run())
            status, reason = "finished", ""
        except (KeyboardInterrupt, SystemExit):
            status, reason = "interrupted", "stopped by the person, or with the SuperLink"
            raise
        except CoadaptError as error:
            reason = str(error)
            raise
        except Exception as error:  # Flower shows its app's output to nobody
            _note(home.logs / "app.log", error)
            raise
        finally:
            write_summary(store, manifest, roster, coordinator, status, reason, channel.reasons)
            if status == "finished":
                _publish(home, run_id)
            log(RunStopped(status=status, reason=reason))


def _publish(home: CoordinatorHome, run_id: str) -> None:
    """Let the sites fetch the result. What fails is noted, and a person can publish it: the run has finished."""
    try:
        publish(home, run_id)
    except Exception as error:
        _note(home.logs / "app.log", error)


def _note(path: Path, error: Exception) -> None:
    with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
        file.write("".join(traceback.format_exception(error)) + "\n")
