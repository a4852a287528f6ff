"""Which room may import which, who may import Flower and torch, and where randomness comes from."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A room may import itself and these.
MAY_IMPORT: dict[str, set[str]] = {
    "common": set(),
    "client": {"common"},
    "server": {"common"},
    "simulations": {"common", "client", "server"},
}
ROOMS = set(MAY_IMPORT)
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]

MAY_IMPORT_FLOWER = {
    "common/flower.py",
    "common/app_bundle.py",
    "client/launcher.py",
    "client/node.py",
    "server/superlink.py",
    "simulations/starting.py",
}
MAY_DRAW_TORCH_NUMBERS = {"common/randomness.py", "simulations/benchmarks/plain_flower.py"}

# What must start and run where torch is not wanted: a manifest's reader, envelopes, and the relay beside the vault.
WITHOUT_TORCH = (
    "common.config.manifest",
    "common.config.loading",
    "common.messages",
    "common.errors",
    "common.codec.state",
    "common.contribution",
    "common.low_rank",
    "server.aggregation.methods",
    "common.codec.layout",
    "common.codec.fixed_point",
    "common.codec.packing",
    "common.codec.vector",
    "common.identity",
    "common.roster",
    "common.frames",
    "common.enrolment",
    "common.app_bundle",
    "client.home",
    "server.home",
    "common.secure_sum.site",
    "common.secure_sum.coordinator",
    "common.schedule",
    "common.summed",
    "client.secure_site",
    "server.secure_collection",
    "common.metrics",
    "client.relay",
    "client.check",
    "client.policy",
    "client.status",
    "client.vault_client",
    "client.audit_log",
    "client.hours",
    "client.run_folder",
    "client.site_run",
    "client.background",
    "client.units",
    "common.data_files",
    "common.release",
    "client.gate_client",
    "server.releases",
)
HEAVY = ("torch", "transformers", "peft", "opacus")


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file names in an import, wherever the import stands, and how many dots are before it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((name.name, 0) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


def test_the_rooms_are_found() -> None:
    assert len(FILES) > 30
    assert {name.split("/")[0] for name in NAMES} == ROOMS


@pytest.mark.parametrize("name", NAMES)
def test_rooms_import_one_way(name: str) -> None:
    room = name.split("/", maxsplit=1)[0]
    wanted = {module.split(".")[0] for module, dots in imported(ROOT / name) if not dots}
    assert wanted & ROOMS <= MAY_IMPORT[room] | {room}


@pytest.mark.parametrize("name", NAMES)
def test_imports_are_absolute(name: str) -> None:
    # A relative import could leave its room without naming the one that it enters.
    assert [module for module, dots in imported(ROOT / name) if dots] == []


@pytest.mark.parametrize("name", NAMES)
def test_rooms_are_not_imported_by_name_in_text(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    calls = re.findall(r"(?:import_module|__import__)\(\s*[\"'](\w+)", text)
    room = name.split("/", maxsplit=1)[0]
    assert set(calls) & ROOMS <= MAY_IMPORT[room] | {room}


@pytest.mark.parametrize("name", NAMES)
def test_flower_is_imported_in_few_places(name: str) -> None:
    takes_flower = any(module.split(".")[0] == "flwr" for module, _ in imported(ROOT / name))
    if takes_flower:
        assert name in MAY_IMPORT_FLOWER or name.startswith("simulations/benchmarks/")


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_it_is_imported_without_torch(module: str) -> None:
    code = f"import {module}, sys; print([name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


# A person waits for these; those that train, sum epsilon or look at a model may take their time.
QUICK_COMMANDS = (
    "--help",
    "--version",
    "run --help",
    "run --stop none",
    "site init --name quick --train records.jsonl --population patients --units 40 --epsilon 10 --yes",
    "site enroll",
    "site join none.json",
    "site log",
    "site stop",
    "site start",
    "site service",
    "coordinator init --address gate.example:9092 --home c",
    "coordinator admit quick.enrolment.json --yes --home c",
    "coordinator roster none.toml --home c",
    "coordinator consent none.json --home c",
    "coordinator status --home c",
    "coordinator service --into others --home c",
    "coordinator renew --home c",
    "coordinator revoke quick --yes --home c",
    "coordinator stop --home c",
    "runs",
    "runs compare none other",
    "runs clean none",
    "watch none",
)


def test_simple_commands_start_without_torch(tmp_path: Path) -> None:
    # One process for all: an import that one of them makes shows with it and with whatever comes after.
    code = f"""
import contextlib, io, sys
from simulations.commands import main
for line in {QUICK_COMMANDS!r}:
    sys.argv = ["coadapt", *line.split()]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            main()
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    if heavy:
        sys.exit(f"{{line}} imports {{heavy}}")
print("none")
"""
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (found.stdout.strip(), found.returncode) == ("none", 0), found.stderr
    assert (tmp_path / "services" / "coadapt-vault.service").exists()  # they did run
    assert [path.name.split(".")[0] for path in (tmp_path / "c" / "revoked").iterdir()] == ["quick"]


# The classes that make a generator from a seed are no hidden state; `seeded` in common/randomness.py is their one user.
GLOBAL_NUMPY = re.compile(r"\b(?:np|numpy)\.random\.(?!Generator\b)\w+")
GLOBAL_TORCH = re.compile(r"\btorch\.(?:manual_seed|seed|initial_seed|random\.|default_generator|set_rng_state)")
DRAWING_TORCH = re.compile(r"\btorch\.(?:rand|randn|randint|randperm|normal|bernoulli|multinomial|rand_like)\b")


def code_of(path: Path) -> str:
    """A file's code without comments and texts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.unparse(tree)


@pytest.mark.parametrize("name", NAMES)
def test_random_numbers_come_from_one_file(name: str) -> None:
    code, modules = code_of(ROOT / name), {module.split(".")[0] for module, _ in imported(ROOT / name)}
    assert "random" not in modules  # Python's module of that name has one hidden state for all
    if name != "common/randomness.py":
        assert GLOBAL_NUMPY.findall(code) == []
        assert GLOBAL_TORCH.findall(code) == []
    if name not in MAY_DRAW_TORCH_NUMBERS:
        assert DRAWING_TORCH.findall(code) == []


def test_the_rules_see_what_they_forbid(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import numpy as np\n\ndef f():\n    from ..server import channel\n    import client.vault, random\n"
        "    np.random.shuffle([]); np.random.default_rng(); torch.manual_seed(0); torch.randn(3)\n"
        "    x: np.random.Generator  # np.random.seed(0) in a comment\n    y = 'np.random.seed(0)'\n"
    )
    assert list(imported(bad)) == [("numpy", 0), ("server", 2), ("client.vault", 0), ("random", 0)]
    code = code_of(bad)
    assert GLOBAL_NUMPY.findall(code) == ["np.random.shuffle", "np.random.default_rng"]
    assert GLOBAL_TORCH.findall(code) == ["torch.manual_seed"]
    assert DRAWING_TORCH.findall(code) == ["torch.randn"]
