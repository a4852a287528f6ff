"""No library reports to its makers, whatever the environment says: each has heard no when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# As a person's environment might be; a CI machine's would silence some of them by itself.
TALKATIVE = {
    "FLWR_TELEMETRY_ENABLED": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "",
    "RAY_USAGE_STATS_ENABLED": "1",
    "HF_HUB_DISABLE_TELEMETRY": "",
    "ORT_DISABLE_TELEMETRY": "",
}


def printed(code: str, home: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if "CI" not in name.split("_")} | TALKATIVE
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("code", "silent"),
    [
        ("import common.flower, flwr.supercore.telemetry as t; print(t.FLWR_TELEMETRY_ENABLED)", "0"),
        ("import common.flower, os; print(os.environ['FLWR_DISABLE_UPDATE_CHECK'])", "1"),
        ("import common, ray._common.usage.usage_lib as u; print(u.usage_stats_enabled())", "False"),
        ("import common.models, huggingface_hub.constants as c; print(c.HF_HUB_DISABLE_TELEMETRY)", "True"),
    ],
)
def test_each_library_heard_it(code: str, silent: str, tmp_path: Path) -> None:
    assert printed(code, tmp_path) == silent


def test_onnxruntime_leaves_no_device_number_in_the_home(tmp_path: Path) -> None:
    """With its reports on, it makes one, and a file of events to send, as soon as a session is opened."""
    code = """
import onnx
from onnx import TensorProto, helper
from pathlib import Path
from server.distillation.onnx_network import OnnxNetwork
from server.distillation.onnx_export import INPUTS, OUTPUT
values = [helper.make_tensor_value_info(name, TensorProto.INT64, [1, 1]) for name in (*INPUTS, OUTPUT)]
graph = helper.make_graph([helper.make_node("Add", list(INPUTS), [OUTPUT])], "g", values[:2], values[2:])
file = Path.home() / "model.onnx"
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), file)
OnnxNetwork(file)
print("opened")
"""
    assert printed(code, tmp_path) == "opened"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".onnx"] == []
