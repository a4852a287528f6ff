"""What `coadapt watch` serves, asked without a browser: events as they come, nothing written, nobody else let in."""

import fcntl
import json
import math
import os
import socket
from importlib.resources import files
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from watched_run import SITES, a_round, beginning, ending, whole, write

from common.errors import RunError, ServiceError
from common.progress import Event, EventLog, RoundFinished, read_events
from server.watching.app import watching_app
from server.watching.folder import RunFolder, Spent, find_run
from server.watching.serve import serve
from server.watching.tail import read_after


class Client:
    """Asks the application without a socket."""

    def __init__(self, run: RunFolder, spent: Spent | None = None, *, host: str = "127.0.0.1:8790") -> None:
        self._transport = httpx.ASGITransport(watching_app(run, spent), raise_app_exceptions=False)
        self._base = f"http://{host}"

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=self._transport, base_url=self._base) as client:
                return await client.request(method, path, **options)

        return anyio.run(ask)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "runs" / "one", beginning() + a_round(1))


@pytest.fixture
def client(folder: Path) -> Client:
    return Client(RunFolder(folder))


def test_events_come_once_each_as_they_are_written(folder: Path, client: Client) -> None:
    first = client.get("/events").json()
    written = [event.name() for event in beginning() + a_round(1)]
    assert [event["event"] for event in first["events"]] == written
    assert (first["more"], first["anew"], first["damaged"], first["goes_on"]) == (False, False, 0, False)
    nothing = client.get("/events", params={"after": first["next"]}).json()
    assert (nothing["events"], nothing["next"]) == ([], first["next"])
    write(folder, a_round(2))
    second = client.get("/events", params={"after": first["next"]}).json()
    assert [event["event"] for event in second["events"]] == [event.name() for event in a_round(2)]
    failed = {"event": "site_failed", "round": 2, "site": SITES[1], "code": "timeout", "reason": ""}
    assert second["events"][2] == {**failed, "time": a_round(2)[2].time}


def test_a_run_goes_on_while_a_process_holds_its_folder(folder: Path, client: Client) -> None:
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert client.get("/events").json()["goes_on"] is True
    os.close(lock)
    assert client.get("/events").json()["goes_on"] is False


def test_a_torn_line_is_left_until_it_is_whole(folder: Path, client: Client) -> None:
    place = client.get("/events").json()["next"]
    line = json.dumps({"time": 1.0, "event": "phase_started", "phase": "tést"}, ensure_ascii=False).encode()
    for cut in (line[:5], line[5:47]):  # the second cut parts the two bytes of a letter
        with (folder / "events.jsonl").open("ab") as file:
            file.write(cut)
        answer = client.get("/events", params={"after": place}).json()
        assert (answer["events"], answer["next"], answer["damaged"]) == ([], place, 0)
    with (folder / "events.jsonl").open("ab") as file:
        file.write(line[47:] + b"\n")
    assert [event["phase"] for event in client.get("/events", params={"after": place}).json()["events"]] == ["tést"]


def test_what_is_no_number_and_what_is_no_event_reach_a_browser_as_json(folder: Path, client: Client) -> None:
    log = EventLog(folder / "events.jsonl")
    place = client.get("/events").json()["next"]
    log(RoundFinished(round=1, train_loss=math.nan, answered=1, failed=0, bytes_up=0, bytes_down=0, seconds=math.inf))
    log.close()
    with (folder / "events.jsonl").open("ab") as file:
        file.write(b'\xff broken\n[1]\n{"time": 1}\n')

    def refuse(name: str) -> float:
        raise ValueError(name)

    answer = json.loads(client.get("/events", params={"after": place}).text, parse_constant=refuse)
    assert [(event["train_loss"], event["seconds"]) for event in answer["events"]] == [("NaN", "Infinity")]
    assert answer["damaged"] == 3


@given(sizes=st.lists(st.integers(0, 60), max_size=12), most=st.integers(1, 200))
def test_pieces_of_any_size_are_the_whole_stream(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], most: int
) -> None:
    path = tmp_path_factory.mktemp("stream") / "events.jsonl"
    lines = [{"event": "e", "number": number, "text": "ä" * size} for number, size in enumerate(sizes)]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    found, place, more = [], 0, True
    while more:
        piece = read_after(path, place, most_bytes=most)
        found += piece.events
        more = piece.more
        assert piece.next > place or not more
        place = piece.next
    assert found == lines
    assert place == path.stat().st_size


@pytest.mark.parametrize("place", [1, 5, 10**12])
def test_a_place_that_is_none_reads_from_the_beginning(folder: Path, client: Client, place: int) -> None:
    answer = client.get("/events", params={"after": place}).json()
    assert answer["anew"] is True
    assert len(answer["events"]) == len(list(read_events(folder / "events.jsonl")))


def test_a_run_without_events_yet_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "rounds").mkdir()
    answer = Client(find_run(tmp_path)).get("/events").json()
    assert (answer["events"], answer["next"], answer["anew"]) == ([], 0, False)


def test_the_facts_of_privacy(folder: Path, client: Client) -> None:
    promise = {"unit": "patient", "epsilon": 8.0, "delta": 1e-5, "protects": True}
    assert client.get("/run").json() == {"run": "one", "simulated": True, "privacy": promise, "paid": {}}
    going = Client(RunFolder(folder), lambda: {"mercy": 1.5})
    assert going.get("/run").json()["paid"] == {"mercy": 1.5}
    (folder / "summary.json").write_text(json.dumps({"privacy": {"sites": [{"name": "mercy", "epsilon": 2.5}]}}))
    assert going.get("/run").json()["paid"] == {"mercy": 2.5}
    for text in ("[privacy]\nepsilon = inf\n", "name = 'x'\n", "= damaged"):
        (folder / "federation.toml").write_text(text)
        assert client.get("/run").json()["privacy"] is None


def test_a_run_between_institutions_is_known_by_its_home(folder: Path, client: Client) -> None:
    (folder.parent.parent / "coordinator.toml").write_text("")
    assert client.get("/run").json()["simulated"] is False


@pytest.mark.parametrize("path", ["/", "/watch.js", "/curves.js", "/watch.css", "/run", "/events", "/none"])
def test_every_answer_forbids_what_the_page_does_not_need(client: Client, path: str) -> None:
    headers = client.get(path).headers
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert (policy["script-src"], policy["style-src"], policy["connect-src"]) == ("'self'", "'self'", "'self'")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8790", "[::1]:8790", "0.0.0.0:8790", ""])
def test_a_rebound_name_is_refused(client: Client, host: str) -> None:
    for path in ("/", "/events", "/run"):
        answer = client.get(path, headers={"Host": host})
        assert answer.status_code == 421
        assert "hospital" not in answer.text


@pytest.mark.parametrize("host", ["localhost", "localhost:9999", "127.0.0.1:8790"])  # a tunnel may have another port
def test_the_own_names_are_let_in(client: Client, host: str) -> None:
    assert client.get("/run", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_it_can_only_be_read(folder: Path, client: Client, method: str) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path in ("/", "/events", "/run"):
        assert client.request(method, path, content=b"{}").status_code == 405
        client.get(path)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "path",
    [
        "/../federation.toml", "/%2e%2e/federation.toml", "/page/watch.html", "/federation.toml", "/rounds",
        "/events/../federation.toml", "//etc/passwd", "/watch.js/../../app.py", "/docs", "/openapi.json",
    ],
)  # fmt: skip
def test_no_address_names_another_file(client: Client, path: str) -> None:
    assert client.get(path).status_code == 404


@pytest.mark.parametrize("after", ["-1", "x", "1.5", "../one"])
def test_a_place_is_a_number(client: Client, after: str) -> None:
    assert client.get("/events", params={"after": after}).status_code == 422


def test_an_error_is_told_by_name(folder: Path, client: Client) -> None:
    (folder / "events.jsonl").unlink()
    (folder / "events.jsonl").mkdir()
    answer = client.get("/events")
    assert (answer.status_code, answer.json()) == (500, {"error": "run"})


def test_the_page_loads_nothing_from_elsewhere_and_writes_no_html() -> None:
    page = files("server.watching").joinpath("page")
    texts = {file.name: file.read_text(encoding="utf-8") for file in page.iterdir()}
    assert set(texts) == {"watch.html", "watch.js", "curves.js", "watch.css"}
    for name, text in texts.items():
        elsewhere = text.replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in elsewhere, name
        assert "https:" not in elsewhere, name
        for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "@import"):
            assert forbidden not in text, name
    assert "style=" not in texts["watch.html"]
    assert texts["watch.html"].count("<table") == texts["watch.html"].count("<caption>")


def test_every_kind_of_event_is_drawn_or_known_to_need_no_drawing() -> None:
    script = files("server.watching").joinpath("page", "watch.js").read_text(encoding="utf-8")
    missing = {name for name in Event.kinds if f"  {name}(event)" not in script}
    assert missing == set()


def test_what_is_not_a_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"there is no run .*nothing; `coadapt runs` lists"):
        find_run(tmp_path / "nothing")
    with pytest.raises(RunError, match=r"is not a run; a run's folder holds events.jsonl"):
        find_run(tmp_path)
    write(tmp_path / "runs" / "two", whole())
    with pytest.raises(RunError, match=r"is not a run; the newest in it is .*two"):
        find_run(tmp_path / "runs")
    assert find_run(Path("two"), runs=tmp_path / "runs").path == tmp_path / "runs" / "two"


def test_a_port_in_use_is_one_line(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServiceError, match=f"port {port} of 127.0.0.1 is in use; --port 0 takes a free one"):
            serve(RunFolder(folder), port=port, spent=None, ready=lambda _: pytest.fail("it cannot be ready"))


def test_an_interrupted_run_says_why(tmp_path: Path) -> None:
    write(tmp_path, beginning() + a_round(1) + ending(1, "interrupted", "stopped by the person"))
    events = Client(RunFolder(tmp_path)).get("/events").json()["events"]
    assert (events[-1]["status"], events[-1]["reason"]) == ("interrupted", "stopped by the person")
