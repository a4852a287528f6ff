import sys
from pathlib import Path

import pytest

from common.errors import ExtensionError
from common.extensions import load


@pytest.fixture(autouse=True)
def _restore_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_an_installed_function_is_loaded() -> None:
    assert load("os.path:join", "metric")("a", "b") == str(Path("a/b"))


def test_a_module_beside_the_manifest_is_found_last(tmp_path: Path) -> None:
    (tmp_path / "ext_mine.py").write_text("def f():\n    from ext_helper import value\n    return value\n")
    (tmp_path / "ext_helper.py").write_text("value = 7\n")
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "__init__.py").write_text("raise RuntimeError('shadowed')\n")
    function = load("ext_mine:f", "partitioner", search=tmp_path)
    load("ext_mine:f", "partitioner", search=tmp_path)
    assert function() == 7
    assert sys.path[-1] == str(tmp_path.resolve())
    assert sys.path.count(str(tmp_path.resolve())) == 1
    assert load("client.units:units_of", "metric", search=tmp_path).__module__ == "client.units"


SOURCES = {
    "ext_syntax": "def f(:\n",
    "ext_raises": "raise RuntimeError('line one\\nline two')\n",
    "ext_exits": "import sys\nsys.exit('bye')\n",
    "ext_nested": "import ext_no_such_library\n",
    "ext_value": "f = 3\n",
    "ext_empty": "",
}


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("ext_none:f", "no module 'ext_none' in "),
        ("ext_none.sub:f", "no module 'ext_none.sub'"),
        ("ext_syntax:f", "importing 'ext_syntax' failed with SyntaxError"),
        ("ext_raises:f", "failed with RuntimeError: line one line two"),
        ("ext_exits:f", "failed with SystemExit"),
        ("ext_nested:f", "failed with ModuleNotFoundError: No module named 'ext_no_such_library'"),
        ("ext_value:f", "must be a function, found int"),
        ("ext_empty:f", "ext_empty.py) has no 'f'"),
        ("random:f", "random.py) has no 'f'"),
        ("sys:f", "(built into Python) has no 'f'"),
        ("ext_empty", "must be 'module:function'"),
        (":f", "must be 'module:function'"),
        ("..x:f", "failed with TypeError"),
    ],
)
def test_what_cannot_be_loaded_is_named_in_one_line(tmp_path: Path, path: str, problem: str) -> None:
    for name, source in SOURCES.items():
        (tmp_path / f"{name}.py").write_text(source)
    with pytest.raises(ExtensionError) as error:
        load(path, "data source", search=tmp_path)
    assert str(error.value).startswith(f"data source {path!r}")
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_without_a_folder_only_the_installed_are_searched(tmp_path: Path) -> None:
    before = list(sys.path)
    with pytest.raises(ExtensionError, match="no module 'ext_unknown' among the installed"):
        load("ext_unknown:f", "metric")
    assert sys.path == before
