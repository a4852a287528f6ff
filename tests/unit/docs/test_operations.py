"""docs/operations.md: every command in it is one, with options that there are. The federation test runs them."""

import click
import pytest
from document import TEXT, in_passing, lines, required, shape
from typer.main import get_command

from simulations.commands import app


@pytest.mark.parametrize("line", [line for line in lines() if line.startswith("coadapt ")])
def test_every_command_of_the_document_can_be_typed(line: str) -> None:
    assert line.startswith(shape(line)[0])
    required(line)


@pytest.mark.parametrize("line", in_passing())
def test_every_command_that_a_sentence_names_is_one(line: str) -> None:
    assert line.startswith(shape(line)[0])


def test_what_cannot_be_typed_is_seen() -> None:
    for wrong in ("coadapt site jion x", "coadapt site check --fast", "coadapt site nothing"):
        with pytest.raises(click.UsageError):
            shape(wrong)
    with pytest.raises(click.UsageError):
        required("coadapt site join")


def test_the_document_is_read_whole() -> None:
    assert len(lines()) == sum(
        bool(line.strip()) for block in TEXT.split("```sh\n")[1:] for line in block.split("```")[0].splitlines()
    )
    assert ("coadapt site start", frozenset({"relay_user"})) in map(shape, in_passing())
    assert ("coadapt site log", frozenset({"last"})) in map(shape, lines())


def test_every_command_of_both_roles_is_in_the_document() -> None:
    root = get_command(app)
    assert isinstance(root, click.Group)
    for role in ("site", "coordinator"):
        group = root.commands[role]
        assert isinstance(group, click.Group)
        missing = [name for name in group.commands if f"coadapt {role} {name}" not in TEXT]
        assert missing == [name for name in missing if name == "audit"]  # docs say it where privacy is explained
