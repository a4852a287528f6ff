"""The page of `coadapt watch` as a small web application that can only be read: three files of ours, two of a run.

A browser opens anything that it is told to, so that an address is a loopback one protects nobody by itself: pages
from elsewhere may send it requests here. They cannot read the answers (no header allows it), they cannot frame the
page, and a name that was rebound to 127.0.0.1 is refused by the `Host` it comes with. What is served follows from
the run that the server was started for; no request names a file.
"""

import time
from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from common.errors import RunError, error_code
from server.watching.folder import RunFolder, Spent
from server.watching.tail import read_after

__all__ = ["watching_app"]

HOSTS = frozenset({"127.0.0.1", "localhost"})

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}

# What a browser asks for, the file of ours, and its kind.
FILES = {
    "/": ("watch.html", "text/html"),
    "/watch.js": ("watch.js", "text/javascript"),
    "/curves.js": ("curves.js", "text/javascript"),
    "/watch.css": ("watch.css", "text/css"),
}


def watching_app(run: RunFolder, spent: Spent | None = None) -> FastAPI:
    """The application for one run. `spent` tells what a simulated run's units have paid while it goes on."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        response = _refusal(request) or await answer(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(RunError)
    async def failed(_request: Request, error: RunError) -> Response:
        return JSONResponse({"error": error_code(error)}, status_code=500)  # by name alone: a path may tell of people

    @app.get("/events")
    def events(after: int = Query(0, ge=0)) -> Response:
        """Events after a place (`tail.py`), and whether the run goes on, which is found out first."""
        goes_on = run.goes_on()
        piece = read_after(run.events, after)
        return JSONResponse({**vars(piece), "goes_on": goes_on, "now": time.time()})

    @app.get("/run")
    def facts() -> Response:
        """What no event says: the run's kind, and what its privacy promises and has cost."""
        return JSONResponse(run_facts(run, spent))

    for path, (name, kind) in FILES.items():
        app.get(path)(_file(name, kind))
    return app


def run_facts(run: RunFolder, spent: Spent | None) -> dict[str, object]:
    """The answer to `/run`."""
    promise, paid = run.promise(), run.paid()
    if promise is not None and not paid and spent is not None:
        paid = dict(spent())
    return {"run": run.path.name, "simulated": run.simulated, "privacy": promise, "paid": paid}


def _refusal(request: Request) -> Response | None:
    host = request.headers.get("host", "").rpartition(":")
    if (host[0] or host[2]) not in HOSTS:
        return PlainTextResponse("this page answers to 127.0.0.1 and localhost alone\n", status_code=421)
    if request.method not in ("GET", "HEAD"):
        return PlainTextResponse("this page can only be read\n", status_code=405, headers={"Allow": "GET, HEAD"})
    return None


def _file(name: str, kind: str) -> Callable[[], Response]:
    def answer() -> Response:
        return Response(files("server.watching").joinpath("page", name).read_bytes(), media_type=kind)

    return answer
