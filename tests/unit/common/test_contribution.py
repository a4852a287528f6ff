"""What trains and what is sent: a function of the manifest and of the number of accepted aggregations."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from common.codec.state import AdapterState
from common.config.manifest import Manifest
from common.contribution import (
    Phase,
    contribution,
    contribution_shapes,
    phase_of,
    products,
    projection,
    projection_shapes,
    sketch_columns,
    sketch_matrix,
    trained_names,
)
from common.errors import AdapterError
from common.factors import factor_of, scale, stacked
from common.randomness import seeded

Manifests = Callable[..., Manifest]
RANK, OUT, IN = 2, 30, 40
SHAPES: dict[str, tuple[int, ...]] = {
    "x.lora_A.weight": (RANK, IN),
    "x.lora_B.weight": (OUT, RANK),
    "y.lora_A.weight": (RANK, 5),
    "y.lora_B.weight": (6, RANK),
    "head.weight": (3, 4),
    "prompt_encoder.default.embedding.weight": (2, 4),
}


def state(seed: int, shapes: dict[str, tuple[int, ...]] | None = None) -> AdapterState:
    rng = seeded(seed, "state")
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in (shapes or SHAPES).items()}


def agreed(manifest_for: Manifests, method: str, **tables: Any) -> Manifest:
    return manifest_for(
        adapter={"rank": RANK, "method": "lora"},
        aggregation={"method": method},
        **{"training": {"rounds": 9}, "secure_sum": {"enabled": ":" not in method}, **tables},
    )


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("separate", "HEAD HEAD ALL ALL ALL ALL"),
        ("alternate", "HEAD HEAD B A B A"),
        ("ffa", "HEAD HEAD B B B B"),
        ("sketch", "HEAD HEAD ALL ALL ALL ALL"),
        ("dense", "HEAD HEAD ALL ALL ALL ALL"),
        ("some.module:function", "HEAD HEAD ALL ALL ALL ALL"),
    ],
)
def test_the_phase_follows_from_the_accepted_aggregations(manifest_for: Manifests, method: str, expected: str) -> None:
    manifest = agreed(manifest_for, method, training={"rounds": 9, "head_rounds": 2})
    assert [phase_of(manifest, accepted).name for accepted in range(6)] == expected.split()
    without = agreed(manifest_for, method)
    assert [phase_of(without, accepted).name for accepted in range(4)] == expected.split()[2:]


def test_a_phase_trains_its_tensors_and_always_the_others() -> None:
    others = ["head.weight", "prompt_encoder.default.embedding.weight"]
    assert trained_names(SHAPES, Phase.HEAD) == ["head.weight"]
    assert trained_names(SHAPES, Phase.ALL) == list(SHAPES)
    for phase in (Phase.A, Phase.B):
        names = trained_names(SHAPES, phase)
        assert [name for name in names if not factor_of(name)] == others
        assert {factor_of(name) for name in names} == {"", phase.name}
        assert len(names) == 4


@pytest.mark.parametrize("method", ["separate", "alternate", "ffa", "sketch", "dense"])
@pytest.mark.parametrize("accepted", [0, 1, 2, 3])
def test_what_is_sent_has_the_agreed_shapes_and_no_other_tensor(
    manifest_for: Manifests, method: str, accepted: int
) -> None:
    manifest = agreed(manifest_for, method, training={"rounds": 9, "head_rounds": 1})
    before, after = state(0), state(1)
    sent = contribution(manifest, before, after, accepted)
    assert {name: array.shape for name, array in sent.items()} == contribution_shapes(manifest, SHAPES, accepted)
    assert all(array.dtype == np.float32 for array in sent.values())
    for name in sent.keys() & SHAPES.keys():
        np.testing.assert_array_equal(sent[name], after[name] - before[name])
    if accepted == 0:
        assert set(sent) == {"head.weight"}
    else:
        assert {"head.weight", "prompt_encoder.default.embedding.weight"} <= set(sent)


def values(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes.values())


def test_the_values_that_travel_are_the_ones_that_are_promised(manifest_for: Manifests) -> None:
    pairs = {name: shape for name, shape in SHAPES.items() if factor_of(name)}
    b = OUT * RANK + 6 * RANK
    a = RANK * IN + RANK * 5

    def sent(method: str, accepted: int) -> int:
        return values(contribution_shapes(agreed(manifest_for, method), pairs, accepted))

    assert [sent("separate", n) for n in (0, 1)] == [a + b, a + b]
    assert [sent("alternate", n) for n in (0, 1, 2)] == [b, a, b]
    assert [sent("ffa", n) for n in (0, 1)] == [b, b]
    assert sent("dense", 0) == OUT * IN + 6 * 5
    columns = {"x": RANK + 8, "y": 5}  # the small layer is no wider than 5
    sketch = agreed(manifest_for, "sketch")
    assert sent("sketch", 0) == OUT * columns["x"] + 6 * columns["y"]
    assert values(projection_shapes(sketch, pairs, 0)) == columns["x"] * IN + columns["y"] * 5
    assert projection_shapes(agreed(manifest_for, "dense"), pairs, 0) == {}


def test_of_a_stack_only_the_newest_pair_is_looked_at(manifest_for: Manifests) -> None:
    manifest, top, after = agreed(manifest_for, "ffa"), state(0), state(1)
    pairs = {name: array for name, array in state(2).items() if factor_of(name)}
    plain = contribution(manifest, top, after, 0)
    deep = contribution(manifest, stacked(pairs, top), after, 0)
    assert plain.keys() == deep.keys()
    for name, array in plain.items():
        np.testing.assert_array_equal(deep[name], array)


def test_dense_sends_the_change_of_the_scaled_product(manifest_for: Manifests) -> None:
    manifest, before, after = agreed(manifest_for, "dense"), state(0), state(1)
    sent = contribution(manifest, before, after, 0)
    for layer in "xy":
        a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        wanted = 16 / RANK * (after[b].astype(float) @ after[a] - before[b].astype(float) @ before[a])
        np.testing.assert_allclose(sent[f"{layer}.lora_BA.weight"], wanted, rtol=1e-5, atol=1e-5)


def test_the_sketchs_two_parts_are_products_with_the_agreed_matrices(manifest_for: Manifests) -> None:
    manifest, before, after = agreed(manifest_for, "sketch"), state(0), state(1)
    first = contribution(manifest, before, after, 3)
    factor = scale(manifest.adapter)
    basis = {}
    for layer in "xy":
        a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        omega = sketch_matrix(manifest, a, before[a], len(before[b]), 3)
        assert omega.shape == (before[a].shape[1], sketch_columns(RANK, (len(before[b]), before[a].shape[1])))
        dense = factor * after[b].astype(float) @ after[a]
        np.testing.assert_allclose(first[f"{layer}.lora_Y.weight"], dense @ omega, rtol=1e-4, atol=1e-4)
        basis[f"{layer}.lora_Y.weight"] = np.linalg.qr(first[f"{layer}.lora_Y.weight"])[0].astype(np.float32)
    second = projection(factor, products(after), basis)
    shapes = {name: array.shape for name, array in second.items()}
    assert shapes == projection_shapes(manifest, SHAPES, 3)
    for layer in "xy":
        dense = factor * after[f"{layer}.lora_B.weight"].astype(float) @ after[f"{layer}.lora_A.weight"]
        wanted = basis[f"{layer}.lora_Y.weight"].T @ dense
        np.testing.assert_allclose(second[f"{layer}.lora_Z.weight"], wanted, rtol=1e-4, atol=1e-4)


def test_the_sketch_matrix_begins_with_the_adapter_and_is_the_same_everywhere(manifest_for: Manifests) -> None:
    manifest, a = agreed(manifest_for, "sketch"), state(0)["x.lora_A.weight"]
    omega = sketch_matrix(manifest, "x.lora_A.weight", a, OUT, 4)
    np.testing.assert_allclose(np.linalg.norm(omega, axis=0), 1.0)
    np.testing.assert_allclose(omega[:, :RANK], (a / np.linalg.norm(a, axis=1, keepdims=True)).T, rtol=1e-6)
    np.testing.assert_array_equal(sketch_matrix(manifest, "x.lora_A.weight", a, OUT, 4), omega)
    for name, accepted in (("x.lora_A.weight", 5), ("y.lora_A.weight", 4)):
        assert not np.allclose(sketch_matrix(manifest, name, a, OUT, accepted)[:, RANK:], omega[:, RANK:])
    zero = sketch_matrix(manifest, "x.lora_A.weight", np.zeros_like(a), OUT, 4)
    assert np.isfinite(zero).all()


@pytest.mark.parametrize("damage", ["missing", "other name", "other side", "flat"])
def test_a_basis_that_does_not_fit_is_refused(damage: str) -> None:
    basis = {"x.lora_Y.weight": np.zeros((OUT, 3), np.float32), "y.lora_Y.weight": np.zeros((6, 3), np.float32)}
    if damage == "missing":
        del basis["y.lora_Y.weight"]
    elif damage == "other name":
        basis["z.lora_Y.weight"] = basis.pop("y.lora_Y.weight")
    else:
        basis["y.lora_Y.weight"] = np.zeros((7, 3) if damage == "other side" else (6,), np.float32)
    with pytest.raises(AdapterError, match="one matrix for each low-rank pair"):
        projection(1.0, products(state(0)), basis)
