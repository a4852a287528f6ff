"""The commands of docs/operations.md, and a record of what was really run, to hold the one against the other."""

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from typer.core import TyperCommand
from typer.main import get_command

from simulations.commands import app

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "operations.md").read_text(encoding="utf-8")

# A command and the options that it was given. Where a person stands in the folder, or is asked, a test gives these.
Shape = tuple[str, frozenset[str]]
OF_TESTS = frozenset({"home", "into", "yes"})


def lines() -> list[str]:
    """Every command of a block that is to be typed, in its order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines() if line.strip()]


def in_passing() -> list[str]:
    """Our commands that a sentence names, with options or without; the list of what does not exist is left out."""
    text = TEXT[: TEXT.index("## What it does not do yet")]
    return re.findall(r"`(coadapt [^`]+)`", re.sub(r"\s+", " ", text))


def shape(line: str) -> Shape:
    """What a line runs; its arguments may be missing, and nothing is run.

    Raises:
        click.UsageError: there is no such command or option.
    """
    context = _parsed(line, whole=False)
    known = {option for parameter in context.command.params for option in parameter.opts}
    for word in shlex.split(line):
        if word.startswith("-") and word.partition("=")[0] not in known:
            raise click.UsageError(f"{line}: there is no option {word}")
    return _shape(context)


def required(line: str) -> None:
    """Refuse a line whose arguments are not all there.

    Raises:
        click.UsageError: one is missing, or one too many.
    """
    _parsed(line, whole=True)


def _parsed(line: str, *, whole: bool) -> click.Context:
    command, words = get_command(app), shlex.split(line)[1:]
    context = click.Context(command, info_name="coadapt", resilient_parsing=not whole)
    while isinstance(command, click.Group):
        name, found, words = command.resolve_command(context, words)
        if found is None:
            raise click.UsageError(f"{line}: there is no such command")
        command = found
        context = click.Context(command, info_name=name, parent=context, resilient_parsing=not whole)
    command.parse_args(context, words)
    return context


def _shape(context: click.Context) -> Shape:
    names = [parameter.name or "" for parameter in context.command.params if isinstance(parameter, click.Option)]
    given = {name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    return " ".join(["coadapt", *context.command_path.split()[1:]]), frozenset(given - OF_TESTS)


class Typed:
    """The commands that ran to their end, without an error."""

    def __init__(self) -> None:
        self.shapes: set[Shape] = set()

    def covers(self, wanted: Shape) -> bool:
        """Whether such a command ran, with these options and perhaps others."""
        return any(command == wanted[0] and options >= wanted[1] for command, options in self.shapes)


@contextlib.contextmanager
def recording() -> Iterator[Typed]:
    """Note every command of ours that ends well in this process."""
    typed, invoke = Typed(), TyperCommand.invoke

    def noted(command: TyperCommand, context: click.Context) -> Any:
        done = invoke(command, context)
        typed.shapes.add(_shape(context))
        return done

    TyperCommand.invoke = noted  # type: ignore[method-assign]
    try:
        yield typed
    finally:
        TyperCommand.invoke = invoke  # type: ignore[method-assign]
