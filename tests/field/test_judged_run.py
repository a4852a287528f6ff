"""A whole run of `server/field_run.py` over sessions of real vaults in this process, judged on public records."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
from enrolled import NAMES, Hospitals
from flwr.supercore.task_identity import TaskIdentity

from client.home import SiteHome
from client.session import Session
from client.vault_service import open_session
from common.adapters import load_adapter
from common.config.manifest import Columns, Manifest
from common.data_files import write_records
from common.errors import DataError, RunError
from common.evaluation import measure
from common.flower import Grid, Message, pack, unpack
from common.ledger_statement import LedgerStatement
from common.metrics import figures
from common.models import find_base, load_tokenizer
from common.progress import RoundStarted, RoundValidated, SumOpened, read_events
from common.records import TextRecord
from common.tasks.task import make_task
from server import field_channel
from server.field_run import prepared, run_field
from server.home import CoordinatorHome

# PEFT 0.21 asks Transformers 5.23 in a way that Transformers will drop in its version 6.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class SessionsGrid:
    """Nodes that are sessions; `lives` counts down the messages until the coordinator's process dies."""

    def __init__(self, sessions: dict[int, Session]) -> None:
        self.sessions, self.waiting, self.lives = sessions, list[Message](), 10**9
        self.count = 0

    def get_node_ids(self) -> Iterable[int]:
        return self.sessions

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            self.count += 1
            if self.count == self.lives:
                raise ConnectionError("the SuperLink is gone")
            message.metadata.__dict__["_message_id"] = name = f"message-{self.count}"
            message.metadata.__dict__["_src_node_id"] = 1
            answer = self.sessions[message.metadata.dst_node_id].answer(unpack(message.content))
            self.waiting.append(Message(pack(answer), reply_to=message))
            yield name

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        found = [each for each in self.waiting if each.metadata.reply_to_message_id in wanted]
        self.waiting = [each for each in self.waiting if each not in found]
        return found


def made_up(count: int, spread: int) -> list[TextRecord]:
    return [
        TextRecord(text=f"{['notice', 'renewal', 'fee'][n % 3]} days {n * spread}", label="abc"[n % 3], unit=f"u{n}")
        for n in range(count)
    ]


@pytest.fixture
def agreed(tmp_path: Path, manifest_for: Callable[..., Manifest]) -> Hospitals:
    public = tmp_path / "public.jsonl"
    write_records(public, made_up(30, 7), Columns())
    manifest = manifest_for(
        data={"max_length": 16},
        adapter={"rank": 2},
        training={"rounds": 3, "local_steps": 2, "batch_size": 8, "learning_rate": 0.02, "head_learning_rate": 0.1},
        aggregation={"accept_drop": 0.9, "method": "separate"},
        secure_sum={"enabled": True},
        privacy={"epsilon": 1000.0, "delta": 1e-3},
        evaluation={
            "metrics": ["accuracy", "loss"],
            "select": "best",
            "public": "public.jsonl",
            "public_sha256": hashlib.sha256(public.read_bytes()).hexdigest(),
        },
    )
    found = Hospitals(tmp_path, manifest)
    found.init()
    for name in NAMES:
        home = SiteHome(found.site(name))
        write_records(home.folder / "records.jsonl", made_up(40, 3), Columns())
        text = home.policy.read_text().replace("epsilon = 10", "epsilon = 5000")
        home.policy.write_text(
            "\n".join("delta = 1e-3" if ln.startswith("delta =") else ln for ln in text.splitlines())
        )
    found.admit_all()
    found.invite()
    for name in NAMES:
        found.join(name)
    found.consent(*NAMES)
    for name in NAMES:
        found.join(name)
    return found


@pytest.fixture
def sessions(agreed: Hospitals, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, Session]]:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    for name, value in {"AGAIN": 0.02, "LOOK": 0.002, "NODES": 0.01}.items():
        monkeypatch.setattr(field_channel, f"{name}_SECONDS", value)
    with ThreadPoolExecutor(1) as executor:
        yield {
            100 + n: open_session(SiteHome(agreed.site(name)), executor, lambda *_, **__: None)
            for n, name in enumerate(NAMES)
        }


def test_a_run_is_judged_on_the_agreed_file_and_on_no_other(agreed: Hospitals, sessions: dict[int, Session]) -> None:
    home = CoordinatorHome(agreed.coordinator)
    settings = home.settings_file.read_text()
    home.settings_file.write_text(settings.replace("poll_seconds = 1.0", "poll_seconds = 0.02"))
    public = home.folder / "public.jsonl"
    with pytest.raises(DataError, match="cannot be read"):
        prepared(home)
    write_records(public, made_up(30, 8), Columns())
    with pytest.raises(DataError, match="was agreed on"):
        prepared(home)
    shutil.copy(agreed.folder / "public.jsonl", public)
    # 1. The coordinator dies in the second round, and goes on.
    grid = SessionsGrid(sessions)
    grid.lives = 55
    with pytest.raises(ConnectionError):
        run_field(cast(Grid, grid), home, "first")
    grid = SessionsGrid(sessions)
    run_field(cast(Grid, grid), home, "first")
    with pytest.raises(RunError, match="is finished"):
        run_field(cast(Grid, grid), home, "first")
    # 2. Every adapter has figures on the public records, and those of the result are what anybody measures.
    summary = json.loads((home.runs / "first" / "summary.json").read_text())
    rounds: list[dict[str, Any]] = summary["rounds"]
    assert [sorted(each["figures"]) for each in rounds] == [["accuracy", "loss"]] * 4
    best = max(rounds, key=lambda each: each["figures"]["accuracy"])
    assert summary["selected_round"] == best["number"]
    model, manifest = load_adapter(home.runs / "first" / "adapter", find_base(prepared(home)[0].model))
    task = make_task(manifest, load_tokenizer(find_base(manifest.model)))
    counts = measure(model, task, task.encode(made_up(30, 7)).examples, batch_size=30, precision="fp32")
    for metric, value in figures(manifest.task.kind, counts, ("accuracy", "loss")).items():
        assert value == pytest.approx(best["figures"][metric], rel=1e-4)
    # 3. Nobody was asked to measure; each fact is told once; ledgers and numbers are kept.
    events = list(read_events(home.runs / "first" / "events.jsonl"))
    assert [event.round for event in events if isinstance(event, SumOpened)] == [1, 2, 3]
    assert [event.round for event in events if isinstance(event, RoundValidated)] == [0, 1, 2, 3]
    assert len([event for event in events if isinstance(event, RoundStarted)]) == 4
    kept = json.loads((home.folder / "ledger-heads.json").read_text())
    assert {name: LedgerStatement.parse(bytes.fromhex(text)).number for name, text in kept.items()} == dict.fromkeys(
        NAMES, 3
    )
    assert int((home.folder / "order-number.txt").read_text()) > 10**18
    for name in NAMES:
        with contextlib.closing((SiteHome(agreed.site(name)).audit).open()) as lines:
            refused = [json.loads(line)["code"] for line in lines if json.loads(line)["decision"] == "refused"]
        assert set(refused) <= {"context"}  # greetings that were meant for others
