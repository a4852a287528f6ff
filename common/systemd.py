"""Units of systemd and container files as text, for the services of both roles."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.durable import write_text
from common.errors import EnrolmentError, RunError

__all__ = ["HARDENED", "container_file", "quoted", "service_unit", "write_files"]

# What none of our processes needs; `systemd.exec(5)` says what each takes away.
HARDENED: tuple[tuple[str, str], ...] = (
    ("NoNewPrivileges", "yes"),
    ("ProtectSystem", "strict"),
    ("ProtectHome", "read-only"),
    ("PrivateTmp", "yes"),
    ("ProtectKernelTunables", "yes"),
    ("ProtectKernelModules", "yes"),
    ("ProtectKernelLogs", "yes"),
    ("ProtectControlGroups", "yes"),
    ("ProtectClock", "yes"),
    ("ProtectHostname", "yes"),
    ("RestrictSUIDSGID", "yes"),
    ("RestrictRealtime", "yes"),
    ("RestrictNamespaces", "yes"),
    ("LockPersonality", "yes"),
    ("CapabilityBoundingSet", ""),
    ("AmbientCapabilities", ""),
    ("SystemCallArchitectures", "native"),
    ("UMask", "0077"),
)


def service_unit(
    description: str,
    command: Sequence[str],
    *,
    settings: Sequence[tuple[str, str]],
    after: Sequence[str] = ("network-online.target",),
    wanted: Sequence[str] = ("network-online.target",),
    environment: Mapping[str, str] | None = None,
) -> str:
    """A unit that runs a program for ever, restarts it, and takes away what it does not need."""
    lines = ["[Unit]", f"Description={description}"]
    lines += [f"After={' '.join(after)}", f"Wants={' '.join(wanted)}", "StartLimitIntervalSec=0"]
    lines += ["", "[Service]", "Type=exec", f"ExecStart={' '.join(quoted(word) for word in command)}"]
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1"}
    lines += [f"Environment={quoted(f'{key}={value}')}" for key, value in {**quiet, **(environment or {})}.items()]
    lines += ["Restart=always", "RestartSec=5", "KillMode=mixed", "TimeoutStopSec=40"]
    # The own settings come last: they add to what was emptied before.
    lines += [f"{key}={value}" for key, value in (*HARDENED, *settings)]
    lines += ["", "[Install]", "WantedBy=multi-user.target", ""]
    return "\n".join(lines)


def quoted(word: str) -> str:
    """A word for a unit's line: systemd reads `%` as a specifier and `$` as a variable.

    Raises:
        EnrolmentError: it holds a line's end, which no unit can.
    """
    if "\n" in word or "\r" in word:
        raise EnrolmentError(f"{word!r} holds a line's end and cannot stand in a unit; rename the folder")
    word = word.replace("%", "%%").replace("$", "$$")
    if word and not set(word) & set(" \t\"'\\;"):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'


def container_file(entry: Sequence[str], *, users: Sequence[str], note: str, port: int | None = None) -> str:
    """A container's build file: the installed package, its users, no root at the end."""
    made = " \\\n && ".join(f"useradd --system --no-create-home --user-group {user}" for user in users)
    exposed = f"EXPOSE {port}\n" if port is not None else ""
    words = ", ".join(f'"{word}"' for word in entry)
    return f"""\
# {note}
# Build from a folder that holds the wheel of Coadapt and constraints.txt; nothing is fetched at run time.
FROM python:{sys.version_info.major}.{sys.version_info.minor}-slim
COPY constraints.txt *.whl /install/
RUN python -m pip install --no-cache-dir -c /install/constraints.txt /install/*.whl && rm -r /install \\
 && {made}
ENV FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
VOLUME ["/home/coadapt"]
{exposed}USER {users[0]}
ENTRYPOINT [{words}]
"""


def write_files(into: Path, files: Mapping[str, str]) -> list[Path]:
    """Write the files to a folder; none that is there already is touched.

    Raises:
        EnrolmentError: one is there, and nothing was written.
        RunError: the disk refuses.
    """
    there = [name for name in files if (into / name).exists()]
    if there:
        raise EnrolmentError(f"{into / there[0]} exists already; remove it or name another folder with --into")
    try:
        into.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make {into}: {error.strerror}") from error
    for name, text in files.items():
        write_text(into / name, text)
    return [into / name for name in files]
