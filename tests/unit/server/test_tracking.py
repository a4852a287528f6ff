"""`--log-to`: what of a run's events reaches a tracking tool, as its interface documents it, and what never does."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from watched_run import BEGAN, SITES, a_round, beginning, ending, figures, whole, write

from common.errors import RunError
from common.progress import BaselineFinished, ResourcesUsed, RoundFinished, RoundStarted, RoundValidated
from server.tracking.mlflow import Mlflow
from server.tracking.scalars import Scalar, Scalars
from server.tracking.sink import Tracking, open_tracker, to_all
from server.tracking.tensorboard import TensorBoard
from server.watching.folder import RunFolder


class Recorder:
    """A tool that keeps what it is told; from call `fails` on it is away."""

    def __init__(self, fails: int = 10**9) -> None:
        self.told: list[tuple[str, Any]] = []
        self.scalars: list[Scalar] = []
        self._left = fails

    def _tell(self, what: str, value: Any) -> None:
        self._left -= 1
        if self._left < 0:
            raise RunError("the tool is away")
        self.told.append((what, value))

    def start(self, run_id: str, settings: Mapping[str, str], time: float, /) -> None:
        self._tell("start", (run_id, dict(settings), time))

    def log(self, scalars: Sequence[Scalar], /) -> None:
        self._tell("log", len(scalars))
        self.scalars += scalars

    def stop(self, status: str, time: float, /) -> None:
        self._tell("stop", (status, time))


def curves(scalars: Sequence[Scalar]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for each in scalars:
        found.setdefault(each.name, []).append((each.step, each.value))
    return found


def test_a_runs_figures_become_curves() -> None:
    tool = Recorder()
    sink = Tracking(tool, lambda run_id: {"name": run_id})
    for event in whole(3):
        sink(event)
    assert sink.trouble == ""
    assert [what for what, _ in tool.told] == ["start", "log", "log", "log", "log", "stop"]
    assert tool.told[0] == ("start", ("one", {"name": "one"}, BEGAN))
    assert tool.told[-1] == ("stop", ("finished", BEGAN + 9 + 60 + 4))
    found = curves(tool.scalars)
    assert found["train/loss"] == [(1, 2.0), (2, 1.0), (3, pytest.approx(2 / 3))]
    assert found["validation/accuracy"] == [(number, figures(number)["accuracy"]) for number in range(4)]
    assert found["round/sites_failed"] == [(1, 0), (2, 1), (3, 0)]
    assert found["round/bytes_down"] == [(1, 6000), (2, 6000), (3, 6000)]
    assert found["secure_sum/vector_seconds"] == [(1, 14), (2, 14), (3, 14)]
    assert found["rejected/max_norm"] == [(2, 3.5)]
    assert found["test/federated/accuracy"] == [(0, 0.875)]
    assert found["phase/start-up_seconds"] == [(0, 9)]
    assert found["phase/rounds_seconds"] == [(0, 60)]
    assert found["phase/test_seconds"] == [(0, 4)]
    assert {each.time for each in tool.scalars if each.name == "train/loss"} == {BEGAN + 9 + 20 * n for n in (1, 2, 3)}


def test_what_the_machine_does_becomes_curves_by_round() -> None:
    scalars = Scalars()
    used = ResourcesUsed(processors=0.5, memory=3, gpus=(0.25,), gpu_memory=(7,))
    found = [each for event in (used, RoundStarted(round=2, sites=()), used) for each in scalars(event)]
    assert curves(found) == {
        "machine/processors": [(0, 0.5), (2, 0.5)],
        "machine/memory": [(0, 3), (2, 3)],
        "machine/gpu_0": [(0, 0.25), (2, 0.25)],
        "machine/gpu_0_memory": [(0, 7), (2, 7)],
    }


def test_no_name_of_an_institution_leaves() -> None:
    tool = Recorder()
    sink = Tracking(tool, lambda _: {})
    for event in [
        *whole(2)[:-1],
        BaselineFinished(baseline=f"local:{SITES[2]}", figures={"accuracy": 1.0}),
        whole(2)[-1],
    ]:
        sink(event)
    text = json.dumps([tool.told, [vars(each) for each in tool.scalars]])
    assert not [site for site in SITES if json.dumps(site)[1:-1] in text]


def test_what_is_no_number_is_left_out_and_names_are_plain() -> None:
    scalars = Scalars()
    strange = RoundValidated(round=1, figures={"my.module:f1/ä$": 0.5, "loss": math.nan, "macro_f1": math.inf})
    assert [(each.name, each.value) for each in scalars(strange)] == [
        ("validation/my.module:f1/__".replace(":", "_"), 0.5)
    ]
    without = RoundFinished(round=1, train_loss=None, answered=1, failed=0, bytes_up=0, bytes_down=0, seconds=1.0)
    assert "train/loss" not in {each.name for each in scalars(without)}


@pytest.mark.parametrize("fails", range(6))
def test_a_tool_that_goes_away_stops_nothing(fails: int) -> None:
    tool, seen = Recorder(fails), []
    sink = Tracking(tool, lambda _: {})
    everyone = to_all(seen.append, sink)
    for event in whole(3):
        everyone(event)
    assert seen == whole(3)
    assert sink.trouble == "the tool is away"
    assert len(tool.told) == fails  # asked once more, then left alone


class FakeMlflow:
    """Answers as the documentation of MLflow's REST API 2.0 says, and refuses what it does not allow."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.headers: list[httpx.Headers] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.headers.append(request.headers)
        assert request.url.path.startswith("/api/2.0/mlflow/")
        path = request.url.path.removeprefix("/api/2.0/mlflow/")
        body = json.loads(request.content) if request.content else dict(request.url.params)
        answer = getattr(self, path.replace("/", "_").replace("-", "_"))(body)
        return httpx.Response(200, json=answer) if answer is not None else httpx.Response(
            404, json={"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no"}
        )  # fmt: skip

    def experiments_get_by_name(self, body: dict[str, Any]) -> Any:
        number = self.experiments.get(body["experiment_name"])
        return None if number is None else {"experiment": {"experiment_id": number}}

    def experiments_create(self, body: dict[str, Any]) -> Any:
        self.experiments[body["name"]] = "7"
        return {"experiment_id": "7"}

    def runs_search(self, body: dict[str, Any]) -> Any:
        assert body["experiment_ids"] == ["7"]
        wanted = body["filter"].removeprefix("tags.`coadapt.run_id` = '").removesuffix("'")
        found = [{"info": {"run_id": key}} for key, run in self.runs.items() if run["run_name"] == wanted]
        return {"runs": found} if found else {}

    def runs_create(self, body: dict[str, Any]) -> Any:
        key = f"run{len(self.runs)}"
        self.runs[key] = {**body, "metrics": [], "params": [], "status": "RUNNING"}
        return {"run": {"info": {"run_id": key}}}

    def runs_log_batch(self, body: dict[str, Any]) -> Any:
        run = self.runs[body["run_id"]]
        assert len(body.get("metrics", [])) <= 1000
        assert len(body.get("params", [])) <= 100
        assert all(len(param["value"]) <= 500 for param in body.get("params", []))
        run["metrics"] += body.get("metrics", [])
        run["params"] += body.get("params", [])
        return {}

    def runs_update(self, body: dict[str, Any]) -> Any:
        self.runs[body["run_id"]].update(body)
        return {"run_info": {}}


def test_mlflow_gets_experiment_run_settings_and_metrics() -> None:
    server = FakeMlflow()
    settings = {f"key{number}": "x" * number * 10 for number in range(130)}
    sink = Tracking(Mlflow("http://tracking:5000/", transport=httpx.MockTransport(server)), lambda _: settings)
    for event in whole(3):
        sink(event)
    assert sink.trouble == ""
    (run,) = server.runs.values()
    assert (run["experiment_id"], run["run_name"], run["start_time"]) == ("7", "one", int(BEGAN * 1000))
    assert run["tags"] == [{"key": "coadapt.run_id", "value": "one"}]
    assert {each["key"] for each in run["params"]} == set(settings)
    expected = {"key": "validation/accuracy", "value": 0.625, "timestamp": int((BEGAN + 69) * 1000), "step": 3}
    assert expected in run["metrics"]
    assert (run["status"], run["end_time"]) == ("FINISHED", int((BEGAN + 73) * 1000))


def test_a_resumed_run_goes_on_in_mlflow_too() -> None:
    server = FakeMlflow()
    first = [*beginning(), *a_round(1), *ending(1, "interrupted")]
    for events in (first, [*beginning(), *a_round(2), *ending(2)]):
        sink = Tracking(Mlflow("http://tracking:5000", transport=httpx.MockTransport(server)), lambda _: {})
        for event in events:
            sink(event)
        assert sink.trouble == ""
        assert next(iter(server.runs.values()))["status"] == ("KILLED" if events is first else "FINISHED")
    (run,) = server.runs.values()
    assert [each["step"] for each in run["metrics"] if each["key"] == "train/loss"] == [1, 2]


def test_mlflow_is_told_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeMlflow()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    Mlflow("https://tracking", transport=httpx.MockTransport(server))
    assert server.headers[-1]["authorization"] == "Basic YW5uOnNlY3JldA=="
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token")
    Mlflow("https://tracking", transport=httpx.MockTransport(server))
    assert server.headers[-1]["authorization"] == "Bearer token"


def test_a_server_that_is_none_is_one_line() -> None:
    def away(_request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no route")

    answers = {
        "does not answer: ConnectError": away,
        "is not JSON": lambda _: httpx.Response(200, text="<html>"),
        "refused experiments/get-by-name: 403 PERMISSION_DENIED": lambda _: httpx.Response(
            403, json={"error_code": "PERMISSION_DENIED"}
        ),
    }
    for words, answer in answers.items():
        with pytest.raises(RunError, match=words) as error:
            Mlflow("http://tracking:5000", transport=httpx.MockTransport(answer))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["tensorboard", "tensorboard:", "mlflow:", "wandb:x", "mlflow:file:///x", "", ":x"])
def test_a_target_that_is_none_is_one_line(target: str) -> None:
    with pytest.raises(RunError, match="must be"):
        open_tracker(target)


def test_a_missing_tensorboardx_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(RunError, match=r"needs the package tensorboardX.*pip install 'coadapt\[tensorboard\]'"):
        open_tracker(f"tensorboard:{tmp_path / 'board'}")
    assert not (tmp_path / "board").exists()


def test_tensorboard_is_given_every_scalar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Writer:
        def __init__(self, folder: str, *, write_to_disk: bool) -> None:
            self.folder, self.scalars, self.texts, self.ended = folder, list[Any](), list[Any](), 0
            made.append(self)

        def add_scalar(self, name: str, value: float, step: int, *, walltime: float) -> None:
            self.scalars.append(Scalar(name, value, step, walltime))

        def add_text(self, name: str, text: str, _step: int) -> None:
            self.texts.append((name, text))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            self.ended += 1

    monkeypatch.setitem(sys.modules, "tensorboardX", type("Module", (), {"SummaryWriter": Writer}))
    recorder = Recorder()
    sink = to_all(
        Tracking(open_tracker(f"tensorboard:{tmp_path}"), lambda _: {"training.rounds": "3"}),
        Tracking(recorder, lambda _: {}),
    )
    for event in whole(3):
        sink(event)
    (writer,) = made
    assert writer.folder == str(tmp_path / "one")
    assert writer.scalars == recorder.scalars
    assert "| training.rounds | `3` |" in writer.texts[0][1]
    assert writer.ended == 1


def test_the_files_are_tensorboards(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    tool = Tracking(TensorBoard(tmp_path), lambda _: {"name": '"x"'})
    for event in whole(3):
        tool(event)
    assert tool.trouble == ""
    (path,) = (tmp_path / "one").iterdir()
    data, found = path.read_bytes(), []
    while data:
        # TFRecord: a length of 8 bytes and its checksum, the record and its checksum.
        length = int.from_bytes(data[:8], "little")
        record = data[12 : 12 + length]
        assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
        assert int.from_bytes(data[12 + length : 16 + length], "little") == masked_crc32c(record)
        event = Event.FromString(record)
        found += [(value.tag, event.step, round(value.simple_value, 5)) for value in event.summary.value]
        data = data[16 + length :]
    assert ("train/loss", 3, 0.66667) in found
    assert ("validation/accuracy", 0, 0.25) in found
    assert ("test/federated/accuracy", 0, 0.875) in found


def test_settings_are_the_manifests(tmp_path: Path) -> None:
    write(tmp_path, [], manifest='name = "x"\n[training]\nrounds = 3\n')
    assert RunFolder(tmp_path).settings() == {"name": '"x"', "training.rounds": "3"}
