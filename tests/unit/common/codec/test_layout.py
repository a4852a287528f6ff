import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.codec.layout import Layout, chosen
from common.errors import AdapterError
from common.randomness import seeded

SHAPES = st.dictionaries(st.text(max_size=5), st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=5)


def state_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {name: seeded(0, name).normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@given(SHAPES)
def test_flatten_and_back(shapes: dict[str, tuple[int, ...]]) -> None:
    state = state_of(shapes)
    layout = Layout.of(dict(reversed(list(state.items()))))
    vector = layout.flatten(state)
    assert vector.tobytes() == b"".join(state[name].tobytes() for name in sorted(state))
    back = layout.unflatten(vector)
    assert back.keys() == state.keys()
    for name, array in state.items():
        assert np.array_equal(back[name], array)
        assert back[name].shape == array.shape


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda state: state.pop("a"), "lacks 'a'"),
        (lambda state: state.update(c=state["a"]), "has 'c'"),
        (lambda state: state.update(a=state["a"].T), "float32 \\[3, 2\\] and must be float32 \\[2, 3\\]"),
        (lambda state: state.update(a=state["a"].astype(np.float64)), "float64"),
    ],
)
def test_another_state_is_refused(change: object, word: str) -> None:
    state = state_of({"a": (2, 3), "b": (4,)})
    layout = Layout.of(state)
    change(state)  # type: ignore[operator]
    with pytest.raises(AdapterError, match=word):
        layout.flatten(state)


def test_a_part_of_a_state_can_be_chosen() -> None:
    state = state_of({"a.A": (2, 3), "a.B": (3, 2), "b.B": (1,)})
    part = chosen(state, [name for name in state if name.endswith("B")])
    assert list(part) == ["a.B", "b.B"]
    assert Layout.of(part).size == 7
    with pytest.raises(AdapterError, match="lacks 'c'"):
        chosen(state, ["c"])


@pytest.mark.parametrize("tensors", [(("b", (1,)), ("a", (1,))), (("a", (1,)), ("a", (2,))), (("a", (-1,)),)])
def test_a_layout_that_is_none_is_refused(tensors: tuple[tuple[str, tuple[int, ...]], ...]) -> None:
    with pytest.raises(AdapterError):
        Layout(tensors)


def test_the_vector_must_fit() -> None:
    with pytest.raises(AdapterError, match="6 values"):
        Layout((("a", (2, 3)),)).unflatten(np.zeros(7))


def test_names_and_shapes_are_told_apart() -> None:
    layouts = [(("a", (2, 3)),), (("a", (3, 2)),), (("a", (6,)),), (("b", (2, 3)),), (("a", (2,)), ("b", (3,)))]
    assert len({Layout(tensors).canonical() for tensors in layouts}) == len(layouts)
