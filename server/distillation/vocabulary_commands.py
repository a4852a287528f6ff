"""`coadapt vocabulary ...`: what changes the vocabulary of a finished model; the work is done elsewhere."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["vocabulary"]

vocabulary = typer.Typer(no_args_is_help=True, help="Change the vocabulary of a compact model.")


@vocabulary.callback()
def _vocabulary() -> None:
    pass


@vocabulary.command()
def extend(
    model: Annotated[Path, typer.Argument(help="Folder of a compact model.")],
    terms: Annotated[Path, typer.Argument(help="The new terms, one a line, in UTF-8.")],
    corpus: Annotated[
        list[Path],
        typer.Option("--corpus", metavar="FILE", help="Public text with the terms: .txt or a data file."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the model with the terms.")],
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the texts that hold a term.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of texts.")] = 0,
) -> None:
    """Make terms single tokens of a finished model; only their rows are trained, all else stays bit for bit."""
    from common.errors import DistillationError
    from server.distillation.corpus import read_public, texts_in
    from server.distillation.domain_model import load_model, save_model, stored_facts
    from server.distillation.extend import extend as extended
    from server.distillation.terms import read_terms

    if out.exists():
        raise DistillationError(f"{out} exists already; a model never replaces another: choose another folder")
    wanted, old = read_terms(terms), load_model(model)
    texts = texts_in(read_public(corpus, old.manifest)[0])
    made, facts = extended(old, wanted, texts, epochs=epochs, seed=seed)
    before = stored_facts(model)
    save_model(out, made, {**before, "extended": [*before.get("extended", []), facts]})
    console = Console()
    lines = [
        f"terms: {len(facts['terms'])} added, {len(facts['whole_already'])} were whole already,"
        f" {len(facts['not_in_corpus'])} are not in the corpus",
        f"texts with terms: {facts['texts_with_terms']}, {facts['held_out']} of them held out",
        f"tokens of such a text: {facts['tokens']['before']:.1f} before, {facts['tokens']['after']:.1f} after",
        f"agreement with the model before, held out: {facts['agreement']['start']:.1%} at the start,"
        f" {facts['agreement']['end']:.1%} in the end",
        f"divergence: {facts['divergence']['start']:.4f} at the start, {facts['divergence']['end']:.4f} in the end",
        f"greatest change on texts without terms: {facts['change_elsewhere']:g}",
        f"model: {out}",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
