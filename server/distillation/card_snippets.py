"""Code blocks of a model card: how to load the model with Coadapt, with transformers, and with onnxruntime alone.

Each block runs as it stands in the model's folder.
"""

import json
from collections.abc import Collection

from server.distillation.domain_model import DomainModel
from server.distillation.plain import is_plain

__all__ = ["with_coadapt", "with_onnxruntime", "with_transformers"]

TEXT = {
    "text-classification": "The tenant pays the rent.",
    "token-classification": "The tenant pays the rent.",
    "causal-lm": "Question: What does the tenant pay?\\nAnswer: ",
}
_ONNX = ("model.int8.onnx", "model.onnx", "model.int4.onnx")


def with_coadapt(model: DomainModel, files: Collection[str]) -> str:
    """Open a file as whatever Coadapt works with."""
    file = next((name for name in (*_ONNX, *sorted(files)) if name in files and not name.endswith("adapter")), ".")
    opened = "." if file in ("model.safetensors", "triton") else file
    kind = model.manifest.task.kind
    answer = {
        "text-classification": "print(model.manifest.task.labels[int(output.argmax())])",
        "token-classification": "print([model.manifest.task.tags[tag] for tag in output.logits[0].argmax(-1)])",
        "causal-lm": "print(model.tokenizer.decode(int(output.logits[0, -1].argmax())))",
    }[kind]
    return f"""from pathlib import Path

import torch
from server.assessment.opening import open_model

model = open_model(Path("{opened}"))
inputs = model.tokenizer(["{TEXT[kind]}"], return_tensors="pt")
with torch.inference_mode():
    output = model.network(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
{answer}
"""


def with_transformers(model: DomainModel, files: Collection[str]) -> str | None:
    """Load with the transformers library; None where it cannot build the network or its weights are not here."""
    kind = model.manifest.task.kind
    gguf = next((name for name in sorted(files) if name.endswith(".gguf")), None)
    stored = "model.safetensors" in files and is_plain(model.network, kind)
    match kind:
        case "text-classification" if stored:
            return _classifier(str(getattr(model.network, "pooling", "mean")), TEXT[kind])
        case "token-classification" if stored:
            return f"""from transformers import pipeline

tag = pipeline("token-classification", model=".", tokenizer=".")
print(tag("{TEXT[kind]}"))
"""
        case "causal-lm" if stored or gguf:
            option = "" if stored else f', gguf_file="{gguf}"'
            return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained("."{option})
inputs = tokenizer("{TEXT[kind]}", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]))
"""
    return None


def _classifier(pooling: str, text: str) -> str:
    vector = {
        "mean": "(hidden * mask).sum(1) / mask.sum(1)",
        "cls": "hidden[:, 0]",
        "last": 'hidden[torch.arange(len(hidden)), inputs["attention_mask"].sum(1) - 1]',
    }[pooling]
    return f"""import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
encoder = AutoModel.from_pretrained(".").eval()
head = load_file("head.safetensors")
inputs = tokenizer(["{text}"], return_tensors="pt", return_token_type_ids=False)
with torch.inference_mode():
    hidden = encoder(**inputs).last_hidden_state
mask = inputs["attention_mask"].unsqueeze(-1)
logits = ({vector}) @ head["weight"].T + head["bias"]
labels = json.loads(Path("coadapt.json").read_text(encoding="utf-8"))["manifest"]["task"]["labels"]
print(labels[int(logits.argmax())])
"""


def with_onnxruntime(model: DomainModel, files: Collection[str]) -> str | None:
    """Run with onnxruntime, tokenizers and numpy alone; None where there is no ONNX file."""
    file = next((name for name in _ONNX if name in files), None)
    if file is None:
        return None
    return (_writer if model.manifest.task.kind == "causal-lm" else _reader)(model, file)


def _reader(model: DomainModel, file: str) -> str:
    kind, tokenizer = model.manifest.task.kind, model.tokenizer
    names, answer = {
        "text-classification": (
            'json.loads(Path("coadapt.json").read_text(encoding="utf-8"))["manifest"]["task"]["labels"]',
            "print([labels[best] for best in logits.argmax(-1)])",
        ),
        "token-classification": (
            "[" + ", ".join(json.dumps(tag) for tag in model.manifest.task.tags) + "]",
            "print([(piece, labels[best]) for piece, best in zip(rows[0].tokens, logits[0].argmax(-1))])",
        ),
    }[kind]
    start = "import json\nimport os\nfrom pathlib import Path\n" if "json." in names else "import os\n"
    return f"""{start}
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # else onnxruntime reports to its makers

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation(max_length={model.manifest.data.max_length})
tokenizer.enable_padding(pad_id={tokenizer.pad_token_id}, pad_token={json.dumps(tokenizer.pad_token)})
session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])
labels = {names}
rows = tokenizer.encode_batch(["{TEXT[kind]}", "It is paid each month."])
ids = np.array([row.ids for row in rows], dtype=np.int64)
mask = np.array([row.attention_mask for row in rows], dtype=np.int64)
logits = session.run(["logits"], {{"input_ids": ids, "attention_mask": mask}})[0]
{answer}
"""


def _writer(model: DomainModel, file: str) -> str:
    return f"""import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # else onnxruntime reports to its makers

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])
ids = tokenizer.encode("{TEXT["causal-lm"]}").ids
for _ in range(20):
    given = np.array([ids], dtype=np.int64)
    logits = session.run(["logits"], {{"input_ids": given, "attention_mask": np.ones_like(given)}})[0]
    ids.append(int(logits[0, -1].argmax()))
    if ids[-1] == {model.tokenizer.eos_token_id}:
        break
print(tokenizer.decode(ids))
"""
