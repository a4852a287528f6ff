"""The table of `coadapt distill` in a narrow terminal."""

import io

from rich.console import Console

from server.distillation.measuring import Measured
from simulations.distill import _table


def test_nothing_is_cut_in_eighty_columns() -> None:
    lines = [
        Measured(
            step=step,
            parameters=parameters,
            bytes=90_380_000,
            dev={"accuracy": 0.8933},
            test={"accuracy": 0.8932},
            agreement=1.0,
            latency_ms=116.41,
            seconds=1222.0,
        )
        for step, parameters in (("teacher", 122_595_021), ("terms tried at 1/10", 12_622_000), ("onnx-int8", None))
    ]
    file = io.StringIO()
    Console(file=file, width=80).print(_table(lines, "accuracy"))
    printed = file.getvalue()
    assert "\u2026" not in printed
    for word in ("terms tried at 1/10", "122,595,021", "onnx-int8", "parameters", "0.8933", "0.8932", "116.41", "1222"):
        assert word in printed
