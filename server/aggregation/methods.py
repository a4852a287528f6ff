"""Which class a manifest's `aggregation.method` stands for."""

from collections.abc import Mapping

from common.config.manifest import Manifest
from common.extensions import load
from server.aggregation.alternate import Alternate
from server.aggregation.dense import Dense
from server.aggregation.ffa import Ffa
from server.aggregation.method import Facts, Method
from server.aggregation.own import Own
from server.aggregation.separate import Separate
from server.aggregation.sketch import Sketch

__all__ = ["BUILT_IN", "method_for"]

# What the built-in methods declare, in the order of the documents.
BUILT_IN: tuple[Facts, ...] = (Separate.facts, Alternate.facts, Ffa.facts, Sketch.facts, Dense.facts)


def method_for(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> Method:
    """The method of aggregation for an adapter with tensors of `shapes`.

    Raises:
        AdapterError: the method is not for adapters as large.
        ExtensionError: a person's own cannot be loaded.
    """
    match manifest.aggregation_method:
        case "separate":
            return Separate()
        case "alternate":
            return Alternate()
        case "ffa":
            return Ffa(manifest)
        case "sketch":
            return Sketch(manifest)
        case "dense":
            return Dense(manifest, shapes)
        case path:
            return Own(path, load(path, "aggregation.method"))
