"""An aggregation of one's own, by import path."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config.manifest import Manifest
from common.errors import AdapterError, ExtensionError
from server.aggregation.methods import method_for
from server.aggregation.optimiser import optimiser_for

SHAPES = {"a": (2,), "b": (1, 2)}
CODE = """
import numpy as np
def median(changes, weights):
    assert len(changes) == len(weights)
    return {name: np.median([change[name] for change in changes], axis=0) for name in changes[0]}
def heaviest(changes, weights):
    return changes[int(np.argmax(weights))]
def fails(changes, weights):
    raise ValueError("no\\nidea")
def nothing(changes, weights):
    return None
def other_shape(changes, weights):
    return {"a": np.zeros(3), "b": np.zeros((1, 2))}
def other_name(changes, weights):
    return {**changes[0], "c": np.zeros(1)}
def lacks(changes, weights):
    return {"a": np.zeros(2)}
def nan(changes, weights):
    return {"a": np.array([1.0, np.nan]), "b": np.zeros((1, 2))}
def words(changes, weights):
    return {"a": "many words", "b": np.zeros((1, 2))}
"""


@pytest.fixture
def own(tmp_path: Path, manifest_for: Callable[..., Manifest]) -> Iterator[Callable[[str], Any]]:
    (tmp_path / "own_aggregation_of_a_test.py").write_text(CODE)
    sys.path.append(str(tmp_path))

    def make(name: str) -> Any:
        method = {"method": f"own_aggregation_of_a_test:{name}"}
        manifest = manifest_for(aggregation=method, secure_sum={"enabled": False})
        return method_for(manifest, SHAPES)

    yield make
    sys.path.remove(str(tmp_path))
    sys.modules.pop("own_aggregation_of_a_test", None)


def change(first: float) -> dict[str, Any]:
    return {"a": np.float32([first, 0.0]), "b": np.float32([[1.0, first]])}


def gathered(method: Any, *changes: tuple[float, float]) -> Any:
    collector = method.collector(SHAPES)
    for first, weight in changes:
        collector.add(change(first), weight)
    return collector.result()


def test_it_gets_every_change_and_its_weight(own: Callable[[str], Any]) -> None:
    assert own("median").facts.needs == "individual"
    found = gathered(own("median"), (1.0, 1.0), (100.0, 1.0), (2.0, 1.0))
    np.testing.assert_array_equal(found["a"], [2.0, 0.0])
    np.testing.assert_array_equal(gathered(own("heaviest"), (1.0, 2.0), (5.0, 9.0), (3.0, 4.0))["b"], [[1.0, 5.0]])


def test_the_servers_step_follows(own: Callable[[str], Any], manifest_for: Callable[..., Manifest]) -> None:
    method = own("median")
    mean = gathered(method, (2.0, 1.0))
    step = optimiser_for(manifest_for(aggregation={"server_learning_rate": 3.0}).aggregation)
    after = method.after({"a": np.float32([1.0, 1.0]), "b": np.float32([[0.0, 0.0]])}, mean, 0, step)
    np.testing.assert_array_equal(after["a"], np.float32([7.0, 1.0]))
    assert method.length({}, mean) == pytest.approx(np.sqrt(4 + 1 + 4))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fails", "failed with ValueError: no idea"),
        ("nothing", "must return a dictionary from names to arrays, found NoneType"),
        ("words", "must return a dictionary from names to arrays"),
        ("other_shape", r"for a wanted \(2,\), found \(3,\)"),
        ("other_name", "for c wanted none"),
        ("lacks", r"for b wanted \(1, 2\), found none"),
        ("nan", "must return finite arrays"),
    ],
)
def test_what_it_returns_is_checked(own: Callable[[str], Any], name: str, said: str) -> None:
    with pytest.raises(ExtensionError, match=said) as error:
        gathered(own(name), (1.0, 1.0))
    assert "\n" not in str(error.value)
    assert f"own_aggregation_of_a_test:{name}" in str(error.value)


def test_a_change_that_does_not_fit_is_not_given_to_it(own: Callable[[str], Any]) -> None:
    collector = own("median").collector(SHAPES)
    with pytest.raises(AdapterError, match="tensors of the round"):
        collector.add({"a": np.float32([1.0, 2.0])}, 1.0)
    with pytest.raises(AdapterError, match="nothing to average"):
        collector.result()


def test_one_that_is_not_there_is_told(own: Callable[[str], Any]) -> None:
    with pytest.raises(ExtensionError, match="has no 'gone'"):
        own("gone")
