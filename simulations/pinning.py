"""Fills in what a manifest leaves open on this machine: digests of base, tokenizer and prompt, and its own code."""

from pathlib import Path

from common.config.manifest import Manifest
from common.extensions import load
from common.models import find_base, load_tokenizer
from common.tasks.causal_lm import prompt_digest

__all__ = ["find_metrics", "pinned"]


def pinned(manifest: Manifest, *, pinning: bool = False) -> Manifest:
    """The manifest with the digests of the base, tokenizer and prompt that are used, and the base's full path.

    `pinning` accepts a hub id without pins, as for `coadapt init`.

    Raises:
        ModelError: the base cannot be found, or is not the one that the manifest pins.
    """
    base = find_base(manifest.model, pinning=pinning)
    local = Path(manifest.model.base).expanduser()
    model = manifest.model.model_copy(
        update={
            "base": str(local.resolve()) if local.is_dir() else manifest.model.base,
            "revision": base.revision,
            "weights_sha256": base.weights_sha256,
            "tokenizer_sha256": base.tokenizer_sha256,
        }
    )
    task = manifest.task
    if task.kind == "causal-lm":
        # Digest of what is here: make_task has compared it with the manifest's when the resident was loaded.
        digest = task.prompt_sha256 or prompt_digest(task, load_tokenizer(base))
        task = task.model_copy(update={"prompt_sha256": digest})
    return manifest.model_copy(update={"model": model, "task": task})


def find_metrics(manifest: Manifest, search: Path) -> None:
    """Import own metrics and an own aggregation, with `search` as a last place to look; workers are then told of it.

    Raises:
        ExtensionError: one of them cannot be imported.
    """
    for metric in manifest.metrics:
        if ":" in metric:
            load(metric, "metric", search=search)
    if ":" in manifest.aggregation.method:
        load(manifest.aggregation.method, "aggregation.method", search=search)
