import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config.loading import load_manifest
from common.config.manifest import DEFAULT_BASE, DEFAULT_REVISION, DEFAULT_WEIGHTS_SHA256, Manifest
from common.errors import ManifestError

MINIMAL = """\
version = 1
name = "notes"

[task]
kind = "text-classification"
labels = ["yes", "no"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property."""
    return tmp_path_factory.mktemp("manifests")


def write(folder: Path, text: str) -> Path:
    path = folder / "federation.toml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        load_manifest(write(folder, text), overrides)
    return caught.value.problems


def test_a_minimal_file_has_all_the_defaults(tmp_path: Path) -> None:
    manifest = load_manifest(write(tmp_path, MINIMAL))
    assert manifest == Manifest(version=1, name="notes", task={"kind": "text-classification", "labels": ("yes", "no")})
    assert manifest.task.labels == ("yes", "no")
    assert manifest.model.revision == DEFAULT_REVISION


@pytest.mark.parametrize(
    "encode", [lambda text: text.encode("utf-8-sig"), lambda text: text.replace("\n", "\r\n").encode()]
)
def test_files_of_other_editors_are_read(tmp_path: Path, encode: Callable[[str], bytes]) -> None:
    path = tmp_path / "federation.toml"
    path.write_bytes(encode(MINIMAL))
    assert load_manifest(path).name == "notes"
    path.write_bytes(encode(MINIMAL + "[training]\nrounds = 0\n"))
    with pytest.raises(ManifestError, match=r"^federation\.toml:8: training\.rounds "):
        load_manifest(path)


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ("[training]\nrounds = 0", "8: training.rounds must be an integer from 1 to 10000, found 0"),
        ("[training]\nrounds = true", "8: training.rounds must be an integer from 1 to 10000, found true"),
        ("[training]\nrounds = '3'", "8: training.rounds must be an integer from 1 to 10000, found '3'"),
        ("[training]\nrounds = 3.0", "8: training.rounds must be an integer from 1 to 10000, found 3.0"),
        ("[training]\nmicro_batch_size = 0", "8: training.micro_batch_size must be an integer of at least 1, found 0"),
        ("[training]\nmax_grad_norm = nan", "8: training.max_grad_norm must be a finite number above 0, found nan"),
        (
            "[training]\nlearning_rate = 2",
            "8: training.learning_rate must be a number above 0 and of at most 1, found 2",
        ),
        ("[training]\ngradient_checkpointing = 1", "8: training.gradient_checkpointing must be true or false, found 1"),
        ("[aggregation]\nweighting = 1", "8: aggregation.weighting must be 'records' or 'uniform', found 1"),
        ("[evaluation]\nholdout = 1", "8: evaluation.holdout must be a number of at least 0 and below 1, found 1"),
        ("[evaluation]\nmetrics = 'loss'", "8: evaluation.metrics must be a list of texts, found 'loss'"),
        ("[adapter]\ntargets = 3", "8: adapter.targets must be 'auto' or a list of texts, found 3"),
        ("[adapter]\ntargets = ['q', 3]", "8: adapter.targets must be 'auto' or a list of texts, found 3 as item 2"),
        ("[adapter]\ntargets = []", "8: adapter.targets must name at least one layer, or be 'auto'"),
        ("[model]\nbase = ''", "8: model.base must be text that is not empty, found ''"),
        (
            "[model]\nweights_sha256 = '00'",
            "8: model.weights_sha256 must be text of 64 hex digits in lower case, found '00'",
        ),
        ("[model]\nrevision = 'main'", "8: model.revision must be text of 40 hex digits in lower case, found 'main'"),
        ("[data]\ncolumns = 'text'", "8: data.columns must be a table, found 'text'"),
        ("[[training]]\nrounds = 3", "7: training must be a table, found [{'rounds': 3}]"),
        (
            "[simulation]\ntrain = 'a'\nworkers = 0",
            "9: simulation.workers must be 'auto' or an integer of at least 1, found 0",
        ),
        (
            "[simulation]\nsource = 'records'",
            "8: simulation.source must be text 'module:function', an import path, found 'records'",
        ),
        (
            "[simulation]\nsites = ['a', '!']",
            "8: simulation.sites must be an integer or a list, each item text of 1 to 64 letters, digits, '.', '_' or"
            " '-' that begins with a letter or digit, found '!' as item 2",
        ),
        (
            "[simulation]\nseed = 1",
            "7: simulation: exactly one of train (a file) and source (an import path) must be given",
        ),
        (
            "[evaluation]\nmetrics = ['f1']",
            "8: evaluation.metrics: 'f1' is no metric of text-classification;"
            " known: accuracy, macro_f1, loss, or 'module:function'",
        ),
        ("[training]\nrouns = 3", "8: training.rouns is not a known key; did you mean training.rounds?"),
        ("[training]\nrank = 3", "8: training.rank is not a known key; did you mean adapter.rank?"),
        ("[trainings]\nrounds = 3", "7: trainings is not a known key; did you mean training?"),
        (
            "[evaluation]\nseed = 3",
            "8: evaluation.seed is not a known key;"
            " did you mean training.seed or distillation.seed or simulation.seed?",
        ),
        (
            "[aggregation]\n'to do' = 3",
            "8: aggregation.'to do' is not a known key; known keys of aggregation: method, refresh_every,"
            " weighting, server_optimizer, server_learning_rate, server_momentum, server_beta1, server_beta2,"
            " server_tau, max_norm, accept_drop, max_rejected, average_last, min_sites",
        ),
    ],
)  # fmt: skip
def test_a_broken_rule_is_told_with_line_key_rule_and_value(tmp_path: Path, added: str, expected: str) -> None:
    assert problems(tmp_path, MINIMAL + added) == [f"federation.toml:{expected}"]


def test_a_key_outside_its_table_is_found_in_it(tmp_path: Path) -> None:
    assert problems(tmp_path, "rounds = 3\n" + MINIMAL) == [
        "federation.toml:1: rounds is not a known key; did you mean training.rounds?"
    ]


def test_missing_keys_are_named_even_where_their_table_is_missing(tmp_path: Path) -> None:
    found = problems(tmp_path, 'name = "a"\n')
    assert [problem.partition(":")[2].partition(":")[0] for problem in found] == [
        " version is missing",
        " task.kind is missing",
    ]
    assert problems(tmp_path, 'version = 1\nname = "a"\n[task]\n')[0].startswith("federation.toml:3: task.kind is miss")


def test_long_values_are_shortened(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, MINIMAL + f"[training]\nrounds = {list(range(1000))}\n")
    assert problem.endswith("...")
    assert len(problem) < 160


def test_a_rule_between_two_keys_is_told_at_one_of_them(tmp_path: Path) -> None:
    text = MINIMAL + "[training]\nbatch_size = 16\nmicro_batch_size = 5\n"
    assert problems(tmp_path, text) == [
        "federation.toml:9: training.micro_batch_size must divide batch_size 16, found 5"
    ]
    assert problems(tmp_path, MINIMAL.replace('"no"', '"yes"')) == [
        "federation.toml:6: task.labels must differ from each other, found 'yes' twice"
    ]


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "read"),
        [
            ("training.rounds=3", lambda manifest: manifest.training.rounds == 3),
            (" training . rounds =3", lambda manifest: manifest.training.rounds == 3),
            ("training.learning_rate=1e-5", lambda manifest: manifest.training.learning_rate == 1e-5),
            ("training.gradient_checkpointing=true", lambda manifest: manifest.training.gradient_checkpointing),
            ("task.labels=['a', 'b', 'c']", lambda manifest: manifest.task.labels == ("a", "b", "c")),
            ("data.columns.text=note", lambda manifest: manifest.data.columns.text == "note"),
            ("description=a = b # c", lambda manifest: manifest.description == "a = b # c"),
            ("description='5'", lambda manifest: manifest.description == "5"),
            ("description=1\nx = 2", lambda manifest: manifest.description == "1\nx = 2"),
            ("description=", lambda manifest: manifest.description == ""),
            ("simulation.train=data/train.jsonl", lambda manifest: manifest.simulation.train == "data/train.jsonl"),
            ("training={rounds = 3}", lambda manifest: manifest.training.rounds == 3),
            ("model.base=org/name", lambda manifest: manifest.model.base == "org/name"),
        ],
    )
    def test_they_stand_for_what_the_file_says(
        self, tmp_path: Path, override: str, read: Callable[[Manifest], Any]
    ) -> None:
        assert read(load_manifest(write(tmp_path, MINIMAL), [override]))

    def test_the_last_one_holds(self, tmp_path: Path) -> None:
        manifest = load_manifest(write(tmp_path, MINIMAL), ["training.rounds=3", "training.rounds=4"])
        assert manifest.training.rounds == 4

    def test_they_mend_a_wrong_file(self, tmp_path: Path) -> None:
        path = write(tmp_path, MINIMAL + "[training]\nrounds = 0\n")
        assert load_manifest(path, ["training.rounds=3"]).training.rounds == 3

    def test_they_are_the_place_of_their_problems(self, tmp_path: Path) -> None:
        text = MINIMAL + "[training]\nrounds = 3\nseed = -1\n"
        overrides = ["training.rounds=0", "adapter.rnk=2", "data=5", "simulation.seed=1"]
        assert sorted(problems(tmp_path, text, *overrides)) == [
            "--set adapter.rnk=2: adapter.rnk is not a known key; did you mean adapter.rank?",
            "--set data=5: data must be a table, found 5",
            "--set simulation.seed=1: simulation: exactly one of train (a file) and source (an import path)"
            " must be given",
            "--set training.rounds=0: training.rounds must be an integer from 1 to 10000, found 0",
            "federation.toml:9: training.seed must be an integer from 0 to 2147483647, found -1",
        ]

    def test_a_table_in_place_of_the_files_hides_its_lines(self, tmp_path: Path) -> None:
        text = MINIMAL + "[training]\nrounds = 3\n"
        assert problems(tmp_path, text, "training={rounds = 0}") == [
            "--set training={rounds = 0}: training.rounds must be an integer from 1 to 10000, found 0"
        ]

    @pytest.mark.parametrize("override", ["training.rounds", "=3", "training.=3", ".rounds=3", "a b=3", '"\\q"=3', ""])
    def test_a_malformed_one_is_told_beside_the_rest(self, tmp_path: Path, override: str) -> None:
        assert problems(tmp_path, MINIMAL + "[training]\nrounds = 0\n", override) == [
            f"--set {override}: must be KEY=VALUE with a dotted key, such as training.rounds=3",
            "federation.toml:8: training.rounds must be an integer from 1 to 10000, found 0",
        ]

    def test_one_through_a_value_is_refused(self, tmp_path: Path) -> None:
        assert problems(tmp_path, MINIMAL, "name.short=x") == [
            "--set name.short=x: name must be a table to hold short, found 'notes'"
        ]

    @given(overrides=st.lists(st.text() | st.from_regex(r"(task|name|model)(\.\w*)*=.*", fullmatch=True), max_size=3))
    def test_whatever_they_are_only_lines_come_back(self, folder: Path, overrides: list[str]) -> None:
        check_only_lines_come_back(write(folder, MINIMAL), overrides)


class TestBase:
    PINS = f'revision = "{"a" * 40}"\nweights_sha256 = "{"b" * 64}"\ntokenizer_sha256 = "{"c" * 64}"\n'
    PINNED = MINIMAL + f'prompt_sha256 = "{"d" * 64}"\n[model]\nbase = "org/name"\npooling = "cls"\n' + PINS

    def test_another_base_drops_what_the_file_pinned(self, tmp_path: Path) -> None:
        manifest = load_manifest(write(tmp_path, self.PINNED), ["model.base=org/other"])
        assert manifest.model.base == "org/other"
        assert manifest.model.revision is None
        assert manifest.model.weights_sha256 is None
        assert manifest.model.tokenizer_sha256 is None
        assert manifest.task.prompt_sha256 is None
        assert manifest.model.pooling == "cls"

    def test_the_default_base_brings_its_own_pins(self, tmp_path: Path) -> None:
        manifest = load_manifest(write(tmp_path, self.PINNED), [f"model.base={DEFAULT_BASE}"])
        assert (manifest.model.revision, manifest.model.weights_sha256) == (DEFAULT_REVISION, DEFAULT_WEIGHTS_SHA256)

    def test_pins_given_with_the_base_are_kept(self, tmp_path: Path) -> None:
        digest = "e" * 64
        path = write(tmp_path, self.PINNED)
        manifest = load_manifest(path, [f"model.weights_sha256={digest!r}", "model.base=org/other"])
        assert manifest.model.weights_sha256 == digest
        assert manifest.model.revision is None
        manifest = load_manifest(path, [f"model={{base = 'org/other', weights_sha256 = {digest!r}}}"])
        assert manifest.model.weights_sha256 == digest
        assert manifest.task.prompt_sha256 is None

    def test_the_same_base_keeps_its_pins(self, tmp_path: Path) -> None:
        path = write(tmp_path, self.PINNED)
        assert load_manifest(path, ["model.base=org/name"]) == load_manifest(path)

    def test_a_wrong_pin_of_the_old_base_is_no_problem_of_the_new(self, tmp_path: Path) -> None:
        path = write(tmp_path, MINIMAL + "[model]\nbase = 'org/name'\nrevision = 'main'\n")
        assert load_manifest(path, ["model.base=org/other"]).model.revision is None

    def test_a_folder_counts_from_the_file_or_from_here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        there, here = tmp_path / "there", tmp_path / "here"
        for place in (there, here):
            (place / "models" / "base").mkdir(parents=True)
        (here / "org" / "name").mkdir(parents=True)
        monkeypatch.chdir(here)
        path = write(there, MINIMAL + "[model]\nbase = 'models/base'\n")
        assert load_manifest(path).model.base == str(there / "models" / "base")
        assert load_manifest(path, ["model.base=models/base"]).model.base == str(here / "models" / "base")
        assert load_manifest(path, [f"model.base={there}/models/base"]).model.base == str(there / "models" / "base")
        assert load_manifest(Path("../there/federation.toml")).model.base == str(there / "models" / "base")
        # A hub id of the file is not taken for a folder that the current one happens to hold.
        assert load_manifest(write(there, MINIMAL + "[model]\nbase = 'org/name'\n")).model.base == "org/name"


class TestUnreadable:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ManifestError, match=r"/federation\.toml: no such file; `coadapt init` writes a manifest$"):
            load_manifest(tmp_path / "federation.toml")

    def test_directory(self, tmp_path: Path) -> None:
        with pytest.raises(ManifestError, match="is a directory; name the file in it"):
            load_manifest(tmp_path)

    def test_through_a_file(self, tmp_path: Path) -> None:
        with pytest.raises(ManifestError, match="cannot be read: Not a directory"):
            load_manifest(write(tmp_path, MINIMAL) / "federation.toml")

    def test_forbidden(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Tests may run as root, who may read everything.
        monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
        with pytest.raises(ManifestError, match=r"/federation\.toml: cannot be read: Permission denied$"):
            load_manifest(tmp_path / "federation.toml")

    def test_not_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "federation.toml"
        path.write_bytes(MINIMAL.encode() + 'description = "Köln"'.encode("latin-1"))
        with pytest.raises(
            ManifestError, match=r"^federation\.toml:7: must be UTF-8 text, found byte 0xf6; save it as"
        ):
            load_manifest(path)

    @pytest.mark.parametrize(
        ("added", "expected"),
        [
            ("base = org/name", "7: not valid TOML: Invalid value at column 8; text stands in quotes, a list in [ ]"),
            ("labels = ['a']", "7: not valid TOML: Cannot overwrite a value; a key may be given only once"),
            ("[model\n", "7: not valid TOML: Expected ']' at the end of a table declaration at column 7"),
            ("x = '''a\nb", "8: not valid TOML: Expected \"'''\""),
        ],
    )
    def test_not_toml(self, tmp_path: Path, added: str, expected: str) -> None:
        assert problems(tmp_path, MINIMAL + added) == [f"federation.toml:{expected}"]

    @pytest.mark.parametrize("value", ["9" * 5000, "0x" + "f" * 5000, "[" * 3000 + "]" * 3000, "[" * 250 + "]" * 250])
    def test_a_value_that_no_reader_holds(self, tmp_path: Path, value: str) -> None:
        (problem,) = problems(tmp_path, MINIMAL + f"[training]\nrounds = {value}\n")
        assert problem.startswith("federation.toml:")

    @given(noise=st.text() | st.text(alphabet="[]{}=.\"'\\#\n ab1"))
    def test_whatever_the_text_is_only_lines_come_back(self, folder: Path, noise: str) -> None:
        check_only_lines_come_back(write(folder, MINIMAL + noise), [])


def check_only_lines_come_back(path: Path, overrides: list[str]) -> None:
    try:
        load_manifest(path, overrides)
    except ManifestError as error:
        found = error.problems
    else:
        return
    assert found
    assert all(len(problem.splitlines()) == 1 for problem in found)


# Lines that a scanner of lines may stumble over, all in order.
NOISE = ["", "   ", "# [training]", "# rounds = 0 ] \" '''", '  #"""']
RIGHT = {
    "": ["description = '''\n[training]\nrounds = 0\n\"\"\" '''", 'description = "# \\" ]"'],
    "task": ["prompt_sha256='''\n" + "a" * 64 + "'''"],
    "training": ["local_steps = 3 # [", "schedule='linear' # '''"],
    "adapter": ["method = 'lora'"],
    "data.columns": ['"label" = """\\"" \ntext = 1\\\n  """', 'tags = """a"""""', "tokens = ''"],
    "evaluation": ["metrics = [\n  # max_records = 0\n 'loss', '''perplexity''' ]"],
    "simulation": ['partitioner = "iid"', "train = ''''a'''"],
}
# Values that break the rule of their own key; a rule between keys runs only when every key keeps its own.
WRONG = {
    "version": ["2", '"1"'],
    "name": ['"!"', "5", '"""\na\nb = [\n"""'],
    "bogus": ["1", "'''\n[task]\nbogus = 2'''"],
    "task.labels": ["3", '["a", 3]', "[\n  1, # ] = [\n  2,\n]"],
    "task.prompt": ["1", "[]"],
    "data.max_length": ["7", "1.5", '"x"'],
    "data.columns.text": ["1", "{ text = 1 }"],
    "adapter.rank": ["0", "1025", "1e3"],
    "adapter.alpha": ["0", "inf", "nan", '"1"'],
    "adapter.targets": ["1", "[1]", "[1, 2, [3]]", '"all"'],
    "training.rounds": ["0", "true", "[1]"],
    "training.rouns": ["1"],
    "training.micro_batch_size": ["0", '"auto"'],
    "evaluation.holdout": ["1.0", "-0.1"],
    "simulation.sites": ["1.5", '["!", "?"]', '"a"'],
    "simulation.workers": ["0", '"all"', "[]"],
    "simulation.bogus": ["1"],
}
NEEDED = {"version": "1", "name": "'n'", "task.kind": "'causal-lm'"}


@given(data=st.data())
def test_no_problem_is_lost_and_every_line_is_right(folder: Path, data: st.DataObject) -> None:
    wrong = data.draw(st.lists(st.sampled_from(sorted(WRONG)), min_size=1, unique=True), label="wrong")
    keys = NEEDED | {key: data.draw(st.sampled_from(WRONG[key])) for key in wrong}
    tables = data.draw(st.permutations(sorted({key.rpartition(".")[0] for key in keys} - {""})))
    lines: list[str] = []
    expected: dict[str, int] = {}
    for table in ["", *tables]:
        if table:
            lines.append(data.draw(st.sampled_from([f"[{table}]", f"  [ {table} ] # ]["])))
        entries = [("", text) for text in data.draw(st.lists(st.sampled_from(NOISE), max_size=3))]
        entries += [("", data.draw(st.sampled_from(RIGHT[table])))] if table in RIGHT else []
        for key, value in keys.items():
            if key.rpartition(".")[0] == table:
                name = data.draw(st.sampled_from(["{}", '"{}"', " '{}' "])).format(key.rpartition(".")[2])
                entries.append((key, f"{name}={value}"))
        for key, text in data.draw(st.permutations(entries)):
            expected |= {key: len(lines) + 1} if key in wrong else {}
            lines += text.split("\n")
    found = problems(folder, "\n".join(lines) + "\n")
    assert len(found) == len(wrong)
    for key, line in expected.items():
        assert [problem for problem in found if problem.startswith(f"federation.toml:{line}: {key} ")], (key, line)
    assert not any(tag in problem for problem in found for tag in ("literal[", "tuple[", "constrained"))


@pytest.mark.parametrize(
    "text",
    [
        "version = 1\nname = 'n'\ntask.kind = 'causal-lm'\n\ntraining.rounds = 0\n",
        "version = 1\nname = 'n'\n'task' . \"kind\" = 'causal-lm'\n\n'training' . \"r\\u006funds\" = 0\n",
        "version = 1\nname = 'n'\ntask = { kind = 'causal-lm' }\n\ntraining = { seed = 1, rounds = 0 }\n",
    ],
)
def test_all_ways_to_write_a_key_have_a_line(tmp_path: Path, text: str) -> None:
    assert problems(tmp_path, text) == [
        "federation.toml:5: training.rounds must be an integer from 1 to 10000, found 0"
    ]


PRIVATE = (
    MINIMAL
    + """
[training]
batch_size = 8
rounds = 9

[privacy]
epsilon = 8.0

[privacy.settings]
training.batch_size = 400
adapter.method = "bitfit"
data.columns.text = "clause"
"""
)


def test_settings_for_privacy_hold_while_it_is_on(tmp_path: Path) -> None:
    private = load_manifest(write(tmp_path, PRIVATE))
    assert private.privacy is not None
    assert (private.training.batch_size, private.training.rounds) == (400, 9)
    assert (private.adapter.method, private.data.columns.text) == ("bitfit", "clause")
    plain = load_manifest(write(tmp_path, PRIVATE), ["privacy.epsilon=inf"])
    assert plain == load_manifest(write(tmp_path, PRIVATE[: PRIVATE.index("[privacy]")]))
    assert load_manifest(write(tmp_path, PRIVATE.replace("8.0", "inf"))) == plain
    # A person's own word comes last, and a file without them agrees with one that spells the values out.
    assert load_manifest(write(tmp_path, PRIVATE), ["training.batch_size=50"]).training.batch_size == 50
    assert load_manifest(write(tmp_path, PRIVATE.replace("8.0", "inf")), ["privacy.epsilon=8.0"]) == private


def test_what_may_not_differ_with_privacy_is_refused_with_its_line(tmp_path: Path) -> None:
    extra = 'training.batchsize = 1\ntask.kind = "causal-lm"\nprivacy.clip = 2.0\ntraining.rounds = 0\n'
    text = PRIVATE + extra
    line = PRIVATE.count("\n")
    found = problems(tmp_path, text)
    assert len(found) == 4
    assert found[0].startswith(f"federation.toml:{line + 1}: privacy.settings.training.batchsize is no setting")
    assert found[0].endswith("did you mean training.batch_size?")
    assert found[1].startswith(f"federation.toml:{line + 2}: privacy.settings.task.kind is no setting")
    assert found[2].startswith(f"federation.toml:{line + 3}: privacy.settings.privacy.clip is no setting")
    assert found[3].startswith(f"federation.toml:{line + 4}: training.rounds must be an integer")
    # Without privacy a misspelt one is found all the same.
    assert "batchsize" in problems(tmp_path, text, "privacy.epsilon=inf")[0]
    for wrong in ("3", '"training"', "[1]"):
        (only,) = problems(tmp_path, MINIMAL + f"[privacy]\nepsilon = 8.0\nsettings = {wrong}\n")
        assert "privacy.settings is no setting that may differ with privacy; write, say," in only
