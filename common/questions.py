"""Questions to a person at a terminal; each has a flag that answers it, which is named where nobody can be asked."""

import sys

import typer

from common.errors import EnrolmentError

__all__ = ["answer", "confirm", "interactive", "require_read_out"]


def interactive() -> bool:
    """Whether a person sits at the other end."""
    return sys.stdin.isatty()


def answer(question: str, given: str | None, *, flag: str, default: str | None = None, yes: bool = False) -> str:
    """What the flag says, else what the person says; with `yes` the default, where there is one.

    Raises:
        EnrolmentError: there is no flag and nobody to ask.
    """
    if given is not None:
        return given
    if yes and default is not None:
        return default
    if not interactive():
        raise EnrolmentError(f"{question.lower()} is not given and nobody can be asked here: give {flag}")
    return str(typer.prompt(question, default=default))


def confirm(question: str, *, yes: bool, refused: str, flag: str = "--yes") -> None:
    """Go on only if the person says yes.

    Raises:
        EnrolmentError: the answer is no (`refused` says what follows), or nobody can be asked.
    """
    if yes:
        return
    if not interactive():
        raise EnrolmentError(f"{question} Nobody can be asked here: give {flag}")
    if not typer.confirm(question):
        raise EnrolmentError(refused)


def require_read_out(heard: str, shown: str, *, what: str) -> None:
    """Compare what was heard on the phone with what this side has; blanks and case do not count.

    Raises:
        EnrolmentError: they differ.
    """
    if "".join(heard.lower().split()) != "".join(shown.split()):
        raise EnrolmentError(
            f"{what} is {shown}, and what was read out is {heard.strip()!r}: somebody changed it on the way, or it is"
            " another one; nothing was accepted"
        )
