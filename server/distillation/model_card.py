"""The model card: `README.md` of a model in Hugging Face's format (https://huggingface.co/docs/hub/model-cards).

Facts that it reads, all of them JSON and all optional:

license      an SPDX name; "unknown" where nobody has chosen one
federation   what `federation_facts` gives
steps        list of {name, parameters, bytes, figures, latency_ms}: every step from the teacher on, on one test set
vocabulary   {pieces, occurrences, unknown, length_factor, identical}: `vocabulary.Coverage` as a dictionary
made         list of sentences on how the model was made
corpus       one sentence on the text that it was distilled on
exports      list of {format, file, bytes, difference, tolerance, agreement}, which `exports.export` adds
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from server.distillation.card_snippets import with_coadapt, with_onnxruntime, with_transformers
from server.distillation.domain_model import DomainModel

__all__ = ["model_card"]

PIPELINES = {
    "text-classification": "text-classification",
    "token-classification": "token-classification",
    "causal-lm": "text-generation",
}
# The hub's names of our metrics, where it has one.
METRICS = {"accuracy": "accuracy", "macro_f1": "f1", "entity_f1": "seqeval", "perplexity": "perplexity"}


def model_card(model: DomainModel, facts: Mapping[str, Any]) -> str:
    """The whole card; what no fact tells is said to be unknown, never left to a guess."""
    name = model.manifest.name
    parts = [
        _front_matter(model, facts),
        f"# {name}",
        _what(model, facts),
        _federation(facts.get("federation")),
        _privacy(facts.get("federation")),
        _data(facts),
        _steps(facts.get("steps") or []),
        _exports(facts.get("exports") or []),
        _vocabulary(facts.get("vocabulary")),
        _made(facts),
        _limitations(model, facts),
        _loading(model, facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(model: DomainModel, facts: Mapping[str, Any]) -> str:
    federation = facts.get("federation") or {}
    formats = [entry["format"] for entry in facts.get("exports") or []]
    tags = ["coadapt", "federated-learning"]
    tags += ["differential-privacy"] if federation.get("privacy") else []
    tags += [name for name in ("onnx", "gguf") if any(found.startswith(name) for found in formats)]
    figures: Mapping[str, float] = next(
        (step["figures"] for step in reversed(facts.get("steps") or []) if step.get("figures")), {}
    )
    metrics = [METRICS[metric] for metric in figures if metric in METRICS]
    lines = [f"license: {json.dumps(facts.get('license') or 'unknown')}"]
    if _on_hub(model):
        lines.append(f"base_model: {json.dumps(model.manifest.model.base)}")
    lines.append(f"pipeline_tag: {PIPELINES[model.manifest.task.kind]}")
    for key, values in (("tags", tags), ("metrics", metrics)):
        if values:
            lines += [f"{key}:", *(f"- {value}" for value in values)]
    return "\n".join(["---", *lines, "---"])


def _on_hub(model: DomainModel) -> bool:
    return model.manifest.model.revision is not None


def _base(model: DomainModel) -> str:
    """The base's name; of a local folder the last part alone, since a path tells of the machine."""
    base = model.manifest.model.base
    return f"`{base}`" if _on_hub(model) else f"`{PurePath(base).name}` (a local folder)"


def _what(model: DomainModel, facts: Mapping[str, Any]) -> str:
    task = model.manifest.task
    does = {
        "text-classification": f"gives a text one of {len(task.labels)} labels",
        "token-classification": f"marks entities of {len(task.labels)} kinds in a sentence",
        "causal-lm": "answers instructions",
    }[task.kind]
    description = f" {model.manifest.description.removesuffix('.')}." if model.manifest.description else ""
    count = facts.get("parameters") or model.parameters
    return (
        f"This model {does}. It has {count:,} parameters, reads at most {model.manifest.data.max_length} pieces of text"
        f" and comes from {_base(model)}, fine-tuned in a federation with Coadapt.{description}"
    )


def _federation(federation: Mapping[str, Any] | None) -> str:
    if federation is None:
        return "## Federation\n\nNo run's summary was given, so this card does not know who took part."
    sites = federation["sites"]
    kind = "Simulated on one machine" if federation["simulated"] else "A run between institutions"
    summed = {True: " Changes were summed by secure sums.", False: " Secure sums were off.", None: ""}
    return (
        f"## Federation\n\n{kind}: federation `{federation['name']}`, run `{federation['run']}`, {len(sites)} sites"
        f" ({', '.join(sites)}), {federation['rounds']} rounds; the adapter is that of round"
        f" {federation['selected_round']}.{summed[federation['secure_sum']]}"
    )


def _privacy(federation: Mapping[str, Any] | None) -> str:
    privacy = (federation or {}).get("privacy")
    if federation is None:
        return "## Privacy\n\nUnknown: no run's summary was given."
    if privacy is None:
        told = federation.get("said") or "There was no differential privacy."
        return f"## Privacy\n\n{told} The run's summary tells no epsilon of single sites."
    rows = [(site["name"], _figure(site["epsilon"]), f"{privacy['delta']:g}") for site in privacy["sites"]]
    warning = "" if privacy["protects"] else "\n\n**Its noise came from a known seed: it protects nobody.**"
    return (
        f"## Privacy\n\nWhat each {privacy['unit']}'s records cost at its site, over the whole run (Renyi accounting)."
        f" What was done with the model since read no private record and costs nothing.\n\n"
        f"{_table(('site', 'epsilon', 'delta'), rows)}{warning}"
    )


def _data(facts: Mapping[str, Any]) -> str:
    federation = facts.get("federation") or {}
    privacy = federation.get("privacy")
    lines = []
    if privacy is not None:
        rows = [(site["name"], f"{site['units']:,}") for site in privacy["sites"]]
        lines.append(f"Units ({privacy['unit']}) as each site's policy publishes them, rounded:")
        lines.append(_table(("site", "units"), rows))
    elif federation and not federation["simulated"]:
        lines.append("The sites publish no counts of their records.")
    if federation.get("simulated"):
        counts = ", ".join(f"{count:,} {split}" for split, count in federation["records"].items())
        lines.append(f"The simulation's records on one machine: {counts}.")
    if facts.get("corpus"):
        lines.append(str(facts["corpus"]))
    return "## Data\n\n" + ("\n\n".join(lines) or "Unknown.")


def _steps(steps: Sequence[Mapping[str, Any]]) -> str:
    if not steps:
        return ""
    metrics = list(dict.fromkeys(metric for step in steps for metric in step.get("figures") or {}))
    first = steps[0].get("figures") or {}
    rows = []
    for step in steps:
        figures = step.get("figures") or {}
        loss = [
            f"{figures[metric] - first[metric]:+.4f}" if metric in figures and metric in first else "-"
            for metric in metrics[:1]
        ]
        rows.append(
            (
                step["name"],
                f"{step['parameters']:,}" if step.get("parameters") else "-",
                f"{step['bytes']:,}" if step.get("bytes") else "-",
                *(_figure(figures.get(metric)) for metric in metrics),
                *loss,
                _figure(step.get("latency_ms")),
            )
        )
    change = [f"change of {metric}" for metric in metrics[:1]]
    header = ("step", "parameters", "bytes", *metrics, *change, "latency, ms")
    return (
        "## Steps\n\nEvery step on the same test set, from the model that the run gave; latency is CPU time for one"
        f" text on one thread.\n\n{_table(header, rows)}"
    )


def _exports(exports: Sequence[Mapping[str, Any]]) -> str:
    if not exports:
        return ""
    rows = [
        (
            entry["format"],
            f"`{entry['file']}`",
            f"{entry['bytes']:,}",
            f"{entry['difference']:.1e}",
            f"{entry['tolerance']:g}",
            f"{100 * entry['agreement']:.1f} %",
        )
        for entry in exports
    ]
    header = ("format", "file", "bytes", "distance", "at most", "same answer")
    return (
        "## Files\n\nEach was opened again and compared with its source on sample texts: the mean total variation"
        " between their answers, the most that counts as the format's rounding, and how often the first answer is"
        " the same.\n\n"
        f"{_table(header, rows)}"
    )


def _vocabulary(vocabulary: Mapping[str, Any] | None) -> str:
    if not vocabulary:
        return ""
    words = {
        "pieces": ("pieces", "{:,}"),
        "occurrences": ("occurrences of held-out text that are kept", "{:.2%}"),
        "unknown": ("occurrences that became the unknown piece", "{:.2%}"),
        "length_factor": ("length of held-out text, as a factor", "{:.3f}"),
        "identical": ("held-out texts that are cut as before", "{:.1%}"),
    }
    rows = [(words[key][0], words[key][1].format(value)) for key, value in vocabulary.items() if key in words]
    return f"## Vocabulary\n\n{_table(('what', 'value'), rows)}"


def _made(facts: Mapping[str, Any]) -> str:
    sentences = facts.get("made") or []
    if not sentences:
        return "## How it was made\n\nUnknown: nothing of it was stored with the model."
    return "## How it was made\n\n" + "\n".join(f"{number}. {text}" for number, text in enumerate(sentences, start=1))


def _limitations(model: DomainModel, facts: Mapping[str, Any]) -> str:
    formats = [entry["format"] for entry in facts.get("exports") or []]
    lines = ["It knows the domain that it was trained on and has been measured on nothing else than this card tells."]
    lines.append("Its answers are no advice: a person who knows the subject must stand between it and a decision.")
    if facts.get("vocabulary"):
        lines.append(
            "Its vocabulary is the domain's; other text still encodes, in more pieces and with poorer answers."
        )
    if any(step.get("figures") for step in facts.get("steps") or []):
        lines.append("Figures come from one seed unless a step says otherwise.")
    if "onnx-int8" in formats:
        lines.append(
            "The int8 file is fast where the processor has 8-bit dot products (AVX512-VNNI); on older x86 processors it"
            " is slower, and sums of products may saturate: measure it there before you trust it."
        )
    if "onnx-int4" in formats:
        lines.append("The 4-bit file is the smallest, not the fastest: weights are unpacked to compute.")
    if any(name.startswith("gguf") for name in formats):
        lines.append("The GGUF file was read back by transformers; llama.cpp itself was not run.")
    if "triton" in formats:
        lines.append("Triton and TensorRT were not run; `triton/README.md` says what was.")
    return "## Limitations\n\n" + "\n".join(f"- {line}" for line in lines)


def _loading(model: DomainModel, facts: Mapping[str, Any]) -> str:
    files = [entry["file"] for entry in facts.get("exports") or []]
    blocks = {
        "Coadapt": with_coadapt(model, files),
        "the transformers library": with_transformers(model, files),
        "onnxruntime, tokenizers and numpy alone": with_onnxruntime(model, files),
    }
    parts = ["## How to load it\n\nThe code runs as it stands in this folder."]
    parts += [f"With {what}:\n\n```python\n{code}```" for what, code in blocks.items() if code]
    return "\n\n".join(parts)


def _figure(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
