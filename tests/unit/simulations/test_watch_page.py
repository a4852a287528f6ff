"""The page of `coadapt watch` in a real browser, and the command as a process."""

import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
import uvicorn
from watched_run import BEGAN, SITES, a_round, beginning, ending, whole, write

from client.ledger import Account, Charge, Ledger
from common.privacy.accounting import Steps, rdp_epsilon
from common.progress import ResourcesUsed, WorkersPlanned
from server.watching.app import watching_app
from server.watching.folder import RunFolder
from simulations.spent import spent_in

ROOT = Path(__file__).parents[3]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 240  # seconds, for a machine that does much else
needs_browser = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no chromium, chromium-browser or google-chrome on PATH; test_watching.py asks the same server without one",
)


@contextmanager
def served(run: RunFolder, spent: Callable[[], Mapping[str, float]] | None = None) -> Iterator[str]:
    """The address of a run's page, served by a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(watching_app(run, spent), log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(PATIENCE)


def browse(address: str, folder: Path, *options: str) -> tuple[str, list[str]]:
    """The page's document after some seconds of the page's own time, and what the browser complained about."""
    assert CHROMIUM is not None
    ended = subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}",
            "--no-first-run", "--enable-logging=stderr", "--virtual-time-budget=9000", *options, "--dump-dom", address,
        ],
        capture_output=True, text=True, timeout=PATIENCE, check=True,
    )  # fmt: skip
    return ended.stdout, [line for line in ended.stderr.splitlines() if "CONSOLE" in line]


class Texts(HTMLParser):
    """The text of every element that has an id, with what lies in it; and whether it is hidden."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self, document: str) -> None:
        super().__init__()
        self._open: list[tuple[str, str | None]] = []
        self.text: dict[str, str] = {}
        self.hidden: set[str] = set()
        self.labels: list[str] = []
        self.tags: list[str] = []
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        if values.get("aria-label"):
            self.labels.append(str(values["aria-label"]))
        if tag not in self.VOID:
            self._open.append((tag, values.get("id")))
        if values.get("id") and "hidden" in values:
            self.hidden.add(str(values["id"]))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for _, name in self._open:
            if name:
                self.text[name] = f"{self.text.get(name, '')} {data.strip()}".strip()


@needs_browser
def test_the_page_draws_a_run_and_follows_it(tmp_path: Path) -> None:
    used = ResourcesUsed(
        time=BEGAN + 9, processors=0.94, memory=3_100_000_000, gpus=(0.5,), gpu_memory=(5_000_000_000,)
    )
    planned = WorkersPlanned(time=BEGAN + 9, workers=2, plan=("GPU 0: 2 workers",))
    folder = write(tmp_path / "one", [*beginning(), planned, used, *a_round(1)])
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    rest = [a_round(2), [*a_round(3), *a_round(4)], ending(4)]

    def spent() -> Mapping[str, float]:
        # The page asks for it after every piece of events: then the run goes on.
        if rest:
            write(folder, rest.pop(0))
        return {"mercy": 1.25}

    with served(RunFolder(folder), spent) as address:
        document, complaints = browse(address, tmp_path)
    os.close(lock)
    assert complaints == []
    assert rest == []
    page = Texts(document)
    assert page.text["title"] == "city-hospitals"
    assert page.text["status"] == "finished"
    assert "4 of 4 rounds" in page.text["progress"]
    assert "took 1 m 33 s" in page.text["progress"]  # 9 + 4 * 20 + 4
    assert page.text["result"] == "accuracy 0.750 after round 4"
    assert "trouble" in page.hidden
    # Curves: words for who does not see them, and all numbers in a table.
    curves = [label for label in page.labels if "over rounds" in label]
    assert curves == [
        "Loss over rounds 0 to 4: last training 0.500 in round 4, held-out records 1.000 in round 4.",
        "accuracy over rounds 0 to 4: last accuracy 0.750 in round 4.",
        "Seconds of each round over rounds 1 to 4: last seconds 20.00 in round 4.",
    ]
    assert page.tags.count("polyline") == 4
    assert "4 0.500 0.750 1.000 3 of 3 20 s" in page.text["rounds"]
    assert "2 rejected 1.000 0.500 1.500 2 of 3 20 s" in page.text["rounds"]
    # Sites: a name is text, whatever stands in it.
    assert "b" not in page.tags
    assert f"{SITES[1]} done 0.500 96 33 s 9.0 kB 1 -" in page.text["sites"]
    assert "mercy done 0.500 128 44 s 12.0 kB 0 1.250" in page.text["sites"]
    assert page.text["sites"].startswith("3 sites: 3 done")
    assert "start-up 9.0 s 10 %" in page.text["phases"]
    assert "rounds 1 m 20 s 86 %" in page.text["phases"]
    assert "test 4.0 s 4 %" in page.text["phases"]
    assert "vector 14 s 14 s 56 s" in page.text["stages"]
    assert page.text["plan"] == "2 workers; GPU 0: 2 workers"
    assert page.text["used"] == "Last: processors 94 %, memory 3.1 GB, GPU 0 50 %, 5.0 GB"
    assert page.text["privacy"] == (
        "Allowed for the whole run: epsilon 8 at delta 1e-5 for each patient at each site. Spent so far: epsilon 1.250"
        " at the site that paid most of 1 whose ledgers were read."
    )
    assert f"2 {SITES[1]} timeout -" in page.text["errors"]
    assert "2 all rejected max_norm allows 2.000, found 3.500" in page.text["errors"]
    assert "federated 0.875 0.500" in page.text["test"]


@needs_browser
@pytest.mark.parametrize("size", ["1280,1600", "390,2400"])
def test_the_page_has_screenshots_of_any_width(tmp_path: Path, size: str) -> None:
    folder = write(tmp_path / "one", [*beginning(), *a_round(1), *a_round(2)])
    with served(RunFolder(folder)) as address:
        picture = tmp_path / "page.png"
        document, complaints = browse(address, tmp_path, f"--window-size={size}", f"--screenshot={picture}")
    assert complaints == []
    page = Texts(document)
    assert page.text["status"] == "stopped"
    assert "ended without a word" in page.text["reason"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000  # an empty page takes a tenth of it


class Watching:
    """`coadapt watch` as a process."""

    def __init__(self, *arguments: str, folder: Path) -> None:
        code = "from simulations.commands import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "watch", *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self, *, by: signal.Signals | None = None) -> tuple[int, str, str]:
        if by is not None:
            self.process.send_signal(by)
        output, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, output, errors


def test_the_command_says_where_and_ends_on_ctrl_c(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "one", whole())
    watching = Watching("one", "--port", "0", folder=tmp_path)
    found = re.fullmatch(r"one: (http://127\.0\.0\.1:(\d+)/)\n", watching.line())
    assert found is not None
    assert f"ssh -L {found[2]}:127.0.0.1:{found[2]}" in watching.line()
    answer = httpx.get(f"{found[1]}events", timeout=PATIENCE).json()
    assert len(answer["events"]) == len(whole())
    # Not for other addresses of this machine.
    with socket.socket() as other:
        assert other.connect_ex(("127.0.0.2", int(found[2]))) != 0
    second = Watching("one", "--port", found[2], folder=tmp_path)
    taken = f"error: port {found[2]} of 127.0.0.1 is in use; --port 0 takes a free one\n"
    assert second.end() == (1, "", taken)
    assert watching.end(by=signal.SIGINT) == (0, "no longer watching; the run is as it was\n", "")


def test_what_a_simulated_run_has_paid_is_read_from_its_ledgers(tmp_path: Path) -> None:
    folder = write(tmp_path / "one", beginning())
    spent = spent_in(RunFolder(folder))
    assert spent() == {}
    assert not (folder / "ledgers").exists()  # looking makes none
    account, steps = Account("patients", 100.0, 1e-5), Steps(1.1, 0.05, 20)
    for number, rounds in ((1, 1), (3, 2)):
        ledger = Ledger(folder / "ledgers" / str(number), simulated=True)
        for each in range(rounds):
            ledger.charge(account, Charge("patients", "patient", "f", "0" * 64, "one", each + 1, steps), ["a"])
    expected = {SITES[0]: rdp_epsilon([steps], 1e-5), SITES[2]: rdp_epsilon([Steps(1.1, 0.05, 40)], 1e-5)}
    assert spent() == pytest.approx(expected)
    assert expected[SITES[0]] < expected[SITES[2]]
