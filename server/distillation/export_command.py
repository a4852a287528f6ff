"""`coadapt export`: what a person types; the work is done elsewhere."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["export"]


def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A run's folder, or that of a compact model.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the files.")],
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="safetensors, adapter, onnx, onnx-int8, onnx-int4, gguf (Q8_0), gguf-f16, gguf-f32 or triton; may be"
            " repeated. Default: what the manifest's [distillation] names.",
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Texts to compare exports on, one a line; default: made of the vocabulary."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The base of a run, if not where its manifest says.")
    ] = None,
    license_name: Annotated[
        str | None, typer.Option("--license", metavar="NAME", help="SPDX name for the model card.")
    ] = None,
) -> None:
    """Write a model in other formats, each compared with its source, with a model card."""
    from server.distillation.exporting import export_path

    console = Console()

    def say(name: str) -> None:
        console.print(f"writing {name} ...", highlight=False, soft_wrap=True)

    done = export_path(model, out, formats or (), texts=texts, base=base, license_name=license_name, on_format=say)
    for item in done:
        console.print(
            f"{item.format}: {item.path}, {item.bytes:,} bytes, mean distance from its source {item.difference:.1e},"
            f" same first answer {100 * item.agreement:.1f} %",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"model card: {out / 'README.md'}", highlight=False, soft_wrap=True)
