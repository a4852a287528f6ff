"""Files for NVIDIA's servers: a Triton model repository, and the command that makes a TensorRT engine.

<triton>/<name>/config.pbtxt   what Triton must know
<triton>/<name>/1/model.onnx   the model in float32, version 1
<triton>/README.md             the exact commands, and what of them was tried
"""

import re
import shutil
from pathlib import Path
from typing import Any, cast

from server.distillation.domain_model import DomainModel
from server.distillation.onnx_export import INPUTS, OUTPUT

__all__ = ["IMAGE", "write_repository"]

# Pinned, since a newer server may bring an onnxruntime that reads other versions of ONNX; README.md says how to change.
IMAGE = "nvcr.io/nvidia/tritonserver:25.06-py3"

BATCH = 32


def write_repository(model: DomainModel, graph: Path, folder: Path) -> None:
    """Write the repository around the ONNX file `graph`, which is copied, to a new `folder`."""
    name = _name(model.manifest.name)
    version = folder / name / "1"
    version.mkdir(parents=True)
    shutil.copyfile(graph, version / "model.onnx")
    (folder / name / "config.pbtxt").write_text(_config(model, name), encoding="utf-8")
    (folder / "README.md").write_text(_readme(model, name), encoding="utf-8")


def _name(federation: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", federation)


def _answers(model: DomainModel) -> int:
    """Width of the logits."""
    task = model.manifest.task
    sizes = {"text-classification": len(task.labels), "token-classification": len(task.tags)}
    return sizes.get(task.kind) or len(cast(Any, model.network).get_output_embeddings().weight)


def _config(model: DomainModel, name: str) -> str:
    """The configuration as Triton's `ModelConfig` message in text form; the batch is the first axis and not named."""
    inputs = ",\n".join(f'  {{ name: "{what}", data_type: TYPE_INT64, dims: [ -1 ] }}' for what in INPUTS)
    each = (
        f"[ {_answers(model)} ]" if model.manifest.task.kind == "text-classification" else f"[ -1, {_answers(model)} ]"
    )
    return f"""name: "{name}"
platform: "onnxruntime_onnx"
max_batch_size: {BATCH}
input [
{inputs}
]
output [
  {{ name: "{OUTPUT}", data_type: TYPE_FP32, dims: {each} }}
]
dynamic_batching {{ max_queue_delay_microseconds: 1000 }}
instance_group [ {{ count: 1, kind: KIND_AUTO }} ]
"""


def _readme(model: DomainModel, name: str) -> str:
    longest = model.manifest.data.max_length

    def shapes(batch: int, length: int) -> str:
        return ",".join(f"{what}:{batch}x{length}" for what in INPUTS)

    return f"""# Serving {name} with Triton or TensorRT

**What was tried, and what was not.** The ONNX file in this folder was run by onnxruntime on a CPU and compared with the
model that it was made from. Neither Triton nor TensorRT was run: `config.pbtxt` and the commands below follow NVIDIA's
documentation, and whoever uses them should compare a few answers first.

## Triton

From the folder that holds `triton/`:

```sh
docker run --rm --gpus all -p 8000:8000 -p 8001:8001 -v "$PWD/triton:/models:ro" \\
  {IMAGE} tritonserver --model-repository=/models
```

Without a GPU leave out `--gpus all`. `curl localhost:8000/v2/models/{name}/config` answers when it is up. Triton takes
token ids: cut texts into pieces with the `tokenizer.json` beside this folder, at most {longest} of them, and send
`{INPUTS[0]}` and `{INPUTS[1]}` as INT64 [texts, pieces]. Texts of one request have one length, padded where needed.

## TensorRT

On a machine with TensorRT and the GPU that will serve (an engine fits one kind of GPU and one version):

```sh
trtexec --onnx=triton/{name}/1/model.onnx --saveEngine=model.plan --fp16 \\
  --minShapes={shapes(1, 1)} \\
  --optShapes={shapes(8, min(64, longest))} \\
  --maxShapes={shapes(BATCH, longest)}
```

To let Triton serve the engine, replace `model.onnx` by `model.plan` and the platform by `tensorrt_plan`. TensorRT
before version 10 has no INT64 inputs and takes INT32 instead. The int8 and 4-bit ONNX files use onnxruntime's own
operators, which TensorRT does not know.
"""
