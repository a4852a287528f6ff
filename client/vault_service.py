"""The vault as a process: it holds records, model, keys and ledger, and answers orders on a Unix socket.

    python -m client.vault_service HOME [--log-json]

One vault serves a home. The socket's folder admits owner and group (0750) and nobody else, so the relay's user reaches
the socket by its group and can open nothing beside it. The base model is loaded once, before the socket is there.
SIGTERM ends the process at once: it finishes nothing and loses nothing, since all that counts is on the disk already.
"""

import argparse
import contextlib
import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import grpc

from client.admission import breaches
from client.audit_log import AuditLog
from client.background import Trains
from client.home import SiteHome
from client.ledger import Ledger
from client.policy import SitePolicy, load_policy
from client.session import Session, SiteParts
from client.site_log import note
from client.vault_client import METHOD, OVERSIZED, REFUSED, SERVICE
from common.config.loading import load_manifest
from common.config.manifest import Manifest
from common.errors import CoadaptError, EnrolmentError, ManifestError, ServiceError
from common.log_lines import json_line
from common.roster import SignedRoster, verify_roster
from common.secure_sum.primitives import KEY_BYTES

__all__ = ["main", "open_session", "serve"]

# A Unix socket's path is 107 bytes at most, or 103 on some systems.
MOST_SOCKET_PATH = 103
THREADS = 4  # orders are answered one by one; a second one may wait in line, a flood may not
Log = Callable[..., None]


def serve(home: SiteHome, log: Log) -> None:
    """Answer orders until SIGTERM or SIGINT.

    Raises:
        CoadaptError: of its tree the one that fits; another vault serves this home, or something of it is missing.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with _only_one(home):
        executor = ThreadPoolExecutor(1, thread_name_prefix="training")
        session = open_session(home, executor, log)
        server = _listening(home, session, load_policy(home.policy))
        log("ready", socket=str(home.socket))
        stop.wait()
        log("stopping")
        server.stop(grace=None)
        with contextlib.suppress(OSError):
            home.socket.unlink()
    # A thread that trains would be waited for otherwise, for hours.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def open_session(home: SiteHome, executor: Executor, log: Log) -> Session:
    """The session of a home: everything read and verified, the base model loaded by the executor's thread.

    Raises:
        EnrolmentError: the site has joined nothing, or a key is missing.
        RosterRefused, ManifestError: roster or manifest are not those that were agreed to.
        CoadaptError: records, base model or ledger cannot be used.
    """
    agreement, identity, policy = home.agreement(), home.identity(), load_policy(home.policy)
    manifest = load_manifest(home.manifest)
    if manifest.digest() != agreement.manifest_sha256:
        raise ManifestError(
            [f"{home.manifest} is not the manifest that was agreed to; join again with `coadapt site join`"]
        )
    signed = SignedRoster.from_json(_read(home.roster))
    roster = verify_roster(signed, own_key=identity.public, pinned=bytes.fromhex(agreement.roster_sha256))
    found = breaches(manifest, policy, sites=len(roster.institutions))
    for line in found:
        log("policy_breach", breach=line)
    private = manifest.privacy is not None
    parts = SiteParts(
        identity=identity,
        roster=roster,
        manifest=manifest,
        policy=policy,
        rounding_key=_rounding_key(home),
        runs=home.runs,
        log=home.log,
        vault=None if found else executor.submit(_vault, policy, manifest, home, log).result(),
        ledger=Ledger(Path(policy.ledger)) if private else None,
        executor=executor,
    )
    return Session(parts, AuditLog(home.audit))


def _vault(policy: SitePolicy, manifest: Manifest, home: SiteHome, log: Log) -> Trains:
    """Read the records and load the base model, in the thread that trains; further cards load it in their processes."""
    import torch

    from client.cards import devices
    from client.training.crew import Crew
    from client.vault import Vault

    found, memory = devices(policy.training.gpus), policy.limits.gpu_memory
    crew = None
    if len(found) > 1:
        crew = Crew(manifest, found, home.runs / ".cards", rank=policy.training.rank, gpu_memory=memory)
        crew.start()
        log("cards", computing=len(found))
    if torch.cuda.is_available() and memory < 1:
        torch.cuda.set_per_process_memory_fraction(memory)
    return Vault.of(policy, manifest, log=home.log, require_budget=False, crew=crew)


def _listening(home: SiteHome, session: Session, policy: SitePolicy) -> grpc.Server:
    path = home.socket.absolute()
    if len(os.fsencode(path)) > MOST_SOCKET_PATH:
        raise ServiceError(f"the socket's path {path} is longer than {MOST_SOCKET_PATH} bytes; put the home elsewhere")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o750)
        path.unlink(missing_ok=True)  # of a vault that was killed; `_only_one` knows that none is alive
    except OSError as error:
        raise ServiceError(f"the socket's folder {path.parent} cannot be used: {error.strerror}") from error
    # A frame that is a little too large reaches the session, whose refusal says so and is logged. Of a larger one the
    # relay tells the size alone.
    most = policy.limits.message_bytes + (1 << 20)
    server = grpc.server(
        ThreadPoolExecutor(THREADS, thread_name_prefix="orders"),
        options=(
            ("grpc.max_receive_message_length", min(most, 2**31 - 1)),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ),
        maximum_concurrent_rpcs=2 * THREADS,
    )
    handler = grpc.unary_unary_rpc_method_handler(lambda data, _: session.answer(data))
    noted = grpc.unary_unary_rpc_method_handler(lambda data, _: session.app_refused(data))
    sized = grpc.unary_unary_rpc_method_handler(lambda data, _: session.oversized(data))
    handlers = {METHOD: handler, REFUSED: noted, OVERSIZED: sized}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    before = os.umask(0o117)
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise ServiceError(f"the vault cannot listen at {path}; see that the folder can be written") from error
    finally:
        os.umask(before)
    path.chmod(0o660)
    server.start()
    return server


@contextlib.contextmanager
def _only_one(home: SiteHome) -> Iterator[None]:
    """Hold the home's lock; the system drops it with the process, however that ends."""
    home.runs.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home.runs / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ServiceError(f"another vault serves {home.folder}; stop it first with `coadapt site stop`") from error
        yield


def _rounding_key(home: SiteHome) -> bytes:
    text = _read(home.rounding_key)
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise EnrolmentError(f"{home.rounding_key} is damaged; it must hold {2 * KEY_BYTES} hexadecimal digits")
    return key


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EnrolmentError(
            f"{path} cannot be read ({type(error).__name__}); `coadapt site init` and `join` write it"
        ) from error


def _logger(*, as_json: bool) -> Log:
    """Lines on standard error: JSON objects fit for syslog, or words."""

    def log(event: str, **facts: object) -> None:
        if as_json:
            line = json_line("vault", event, **facts)
        else:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = " ".join([now, "vault", event, *(f"{name}={value}" for name, value in facts.items())])
        print(line, file=sys.stderr, flush=True)

    return log


def main(arguments: Sequence[str] | None = None) -> int:
    """The process; its exit status is 0 after SIGTERM, 1 where it could not serve."""
    parser = argparse.ArgumentParser(prog="python -m client.vault_service", description=__doc__.splitlines()[0])
    parser.add_argument("home", type=Path, help="the site's folder, which holds site.toml")
    parser.add_argument("--log-json", action="store_true", help="log JSON lines")
    chosen = parser.parse_args(arguments)
    log = _logger(as_json=chosen.log_json)
    began = time.monotonic()
    try:
        serve(SiteHome(chosen.home.absolute()), log)
    except CoadaptError as error:
        # The text of an error may quote a record, and JSON lines may travel: they have its name alone.
        home = SiteHome(chosen.home.absolute())
        note(home.log, error)
        words = {"see": str(home.log)} if chosen.log_json else {"error": str(error)}
        log("failed", code=error.code, **words, seconds=round(time.monotonic() - began, 1))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
