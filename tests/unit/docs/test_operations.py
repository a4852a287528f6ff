"""docs/operations.md: every command in it is one, with options that there are."""

import re
import shlex
from pathlib import Path

import click
import pytest
from typer.main import get_command

from simulations.commands import app

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "operations.md").read_text(encoding="utf-8")
LINES = [
    line
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("coadapt ")
]


def parse(line: str) -> str:
    """The command's name, its words parsed as they would be; nothing is run.

    Raises:
        click.UsageError: there is no such command, option or argument.
    """
    command, words = get_command(app), shlex.split(line)[1:]
    context = click.Context(command, info_name="coadapt")
    while isinstance(command, click.Group):
        name, found, words = command.resolve_command(context, words)
        assert found is not None
        command = found
        context = click.Context(command, info_name=name, parent=context)
    command.parse_args(context, words)
    return context.command_path


@pytest.mark.parametrize("line", LINES)
def test_every_command_of_the_document_can_be_typed(line: str) -> None:
    assert line.startswith(parse(line))


def test_what_cannot_be_typed_is_seen() -> None:
    for wrong in ("coadapt site jion x", "coadapt site join", "coadapt site check --fast"):
        with pytest.raises(click.UsageError):
            parse(wrong)


def test_every_command_of_both_roles_is_in_the_document() -> None:
    root = get_command(app)
    assert isinstance(root, click.Group)
    for role in ("site", "coordinator"):
        group = root.commands[role]
        assert isinstance(group, click.Group)
        missing = [name for name in group.commands if f"coadapt {role} {name}" not in TEXT]
        assert missing == [name for name in missing if name == "audit"]  # docs say it where privacy is explained
