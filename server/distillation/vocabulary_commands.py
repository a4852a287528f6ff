"""`coadapt vocabulary ...`: what changes the vocabulary of a finished model; the work is done elsewhere."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from common.config.manifest import Manifest
    from server.distillation.pieces import Text

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
    from server.distillation.domain_model import load_model, save_model, stored_facts
    from server.distillation.extend import extend as extended
    from server.distillation.terms import read_terms

    if out.exists():
        raise DistillationError(f"{out} exists already; a model never replaces another: choose another folder")
    wanted, old = read_terms(terms), load_model(model)
    texts = [text for path in corpus for text in _texts(path, old.manifest)]
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


def _texts(path: Path, manifest: "Manifest") -> list["Text"]:
    """The texts of a file as the manifest's task reads them; labels and answers' places do not matter."""
    from common.data_files import read_rows
    from common.errors import DataError

    if path.suffix == ".txt":
        try:
            return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as UTF-8 text ({type(error).__name__}); check the path") from error
    columns = manifest.data.columns
    names = {
        "text-classification": (columns.text,),
        "token-classification": (columns.tokens,),
        "causal-lm": (columns.instruction, columns.input, columns.output),
    }[manifest.task.kind]
    texts: list[Text] = []
    for number, row in enumerate(read_rows(path), start=1):
        values = [row[name] for name in names if row.get(name)]
        if not values and number == 1:
            raise DataError(f"{path}: no column {names[0]!r}; map it in [data.columns], or give a .txt file")
        if manifest.task.kind == "token-classification":
            texts += [[str(word) for word in value] for value in values if isinstance(value, list)]
        elif values:
            texts.append("\n".join(str(value) for value in values))
    return texts
