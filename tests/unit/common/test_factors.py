import numpy as np
import pytest

from common.codec.state import AdapterState
from common.config.manifest import AdapterSection
from common.errors import AdapterError
from common.factors import below, depth, factor_of, is_head, newest, pairs_of, scale, stacked, turned
from common.randomness import seeded

# PEFT's own name, the place in a model with a prompt before it, and what belongs to no pair.
A, B = "base_model.model.encoder.layer.0.query.lora_A.weight", "base_model.model.encoder.layer.0.query.lora_B.weight"
PLACED = "encoder.prompted.base_model.layer.1.key.lora_A.default.weight"
OTHERS = ("head.weight", "layer.0.query.lora_magnitude_vector", "prompt_encoder.default.embedding.weight")


def adapter(rank: int, seed: int = 0) -> AdapterState:
    rng = seeded(seed, "adapter of a test")
    shapes = {"x.lora_A.weight": (rank, 7), "x.lora_B.weight": (5, rank), "y.lora_A.weight": (rank, 3)}
    shapes |= {"y.lora_B.weight": (4, rank), "head.bias": (2,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def shapes_of(state: AdapterState) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in state.items()}


def test_names_say_what_a_tensor_is() -> None:
    assert [factor_of(name) for name in (A, B, PLACED, *OTHERS)] == ["A", "B", "A", "", "", ""]
    assert [is_head(name) for name in (A, B, PLACED, *OTHERS)] == [False] * 3 + [True, False, False]


def test_pairs_are_found_and_name_what_is_made_of_them() -> None:
    names = [B, OTHERS[0], PLACED, A, PLACED.replace("lora_A", "lora_B")]
    first, second = pairs_of(names)
    assert (first.a, first.b) == (A, B)
    assert second.a == PLACED
    assert first.name("BA") == A.replace("lora_A", "lora_BA")
    assert second.name("Z") == PLACED.replace("lora_A", "lora_Z")
    assert pairs_of(OTHERS) == ()


def test_a_factor_alone_is_refused() -> None:
    with pytest.raises(AdapterError, match="belong together"):
        pairs_of([A])


def test_the_scale_is_that_of_the_method() -> None:
    assert scale(AdapterSection(rank=4, alpha=16.0)) == 4.0
    assert scale(AdapterSection(rank=4, alpha=16.0, method="rslora")) == 8.0


def test_a_stack_computes_the_sum_of_its_parts_and_comes_apart_again() -> None:
    one, two, three = adapter(2, 1), adapter(2, 2), adapter(2, 3)
    both = stacked(one, two)
    whole = stacked(both, three)
    assert [depth(shapes_of(state), 2) for state in (one, both, whole)] == [1, 2, 3]
    for name in three:
        np.testing.assert_array_equal(newest(whole, 2)[name], three[name])
        np.testing.assert_array_equal(newest(one, 2)[name], one[name])
    under = below(whole, 2)
    assert below(one, 2) == {}
    assert set(under) == {name for name in whole if "lora" in name}
    for pair in pairs_of(whole):
        np.testing.assert_array_equal(under[pair.a], both[pair.a])
        product = sum(part[pair.b] @ part[pair.a] for part in (one, two, three))
        np.testing.assert_allclose(whole[pair.b] @ whole[pair.a], product, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(whole["head.bias"], three["head.bias"])


@pytest.mark.parametrize(
    "change",
    [
        {"x.lora_A.weight": (3, 7)},
        {"x.lora_A.weight": (14,)},
        {"x.lora_B.weight": (10,)},
        {"x.lora_A.weight": (4, 7), "x.lora_B.weight": (5, 4)},  # one layer deeper than the other
        {"x.lora_A.weight": (0, 7), "x.lora_B.weight": (5, 0), "y.lora_A.weight": (0, 3), "y.lora_B.weight": (4, 0)},
    ],
)
def test_stacks_of_unlike_depth_are_refused(change: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(AdapterError, match="must have one rank"):
        depth(shapes_of(adapter(2)) | change, 2)


def test_without_pairs_there_is_one_part() -> None:
    assert depth({"head.weight": (3, 4)}, 8) == 1


@pytest.mark.parametrize("first", [1, 2, 3])
def test_turning_moves_the_first_part_to_the_end_and_keeps_the_product(first: int) -> None:
    state = adapter(3)
    there = turned(state, first)
    np.testing.assert_array_equal(newest(there, first)["x.lora_A.weight"], state["x.lora_A.weight"][:first])
    np.testing.assert_array_equal(newest(there, first)["x.lora_B.weight"], state["x.lora_B.weight"][:, :first])
    np.testing.assert_array_equal(there["head.bias"], state["head.bias"])
    product, same = (each["x.lora_B.weight"] @ each["x.lora_A.weight"] for each in (state, there))
    np.testing.assert_allclose(same, product, rtol=1e-5, atol=1e-6)
    back = stacked(below(there, first), newest(there, first))
    assert all(np.array_equal(back[name], there[name]) for name in there)
