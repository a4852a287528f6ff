import dataclasses
import hashlib
import json
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.vault import Vault
from common.codec.state import state_digest
from common.config.manifest import Manifest
from common.data_files import Cleaning, read_records
from common.errors import DataError, ExtensionError, RunError
from common.messages import Envelope, Evaluate, Evaluated, RoundDone, RoundStart, decode, encode
from common.records import InstructionRecord, Record, TextRecord, TokensRecord
from simulations.sites import POOLED, FederationData, label_counts, lay_out, read_federation, simulation_of

SECRET = "SECRET-Müller"
MakeManifest = Callable[..., Manifest]


def rows(count: int, *, start: int = 0, units: int | None = None, label: str | None = None) -> list[dict[str, Any]]:
    """Rows whose texts are all different; `units` units in turn, or each row one."""
    return [
        {
            "text": f"text number {number}",
            "label": label or "abc"[number % 3],
            "unit": f"u{number if units is None else start + number % units}",
            "group": f"g{number % 2}",
        }
        for number in range(start, start + count)
    ]


def write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")


def parts_of(data: FederationData) -> dict[str, list[Record]]:
    """All that must not share a unit: every site's training and held-out records, and the test records."""
    return {
        **{f"train {site}": records for site, records in data.train.items()},
        **{f"held out {site}": records for site, records in data.held_out.items()},
        "test": data.test,
    }


def require_whole_units(data: FederationData, given_texts: Iterable[str]) -> None:
    homes: dict[str, set[str]] = {}
    for part, records in parts_of(data).items():
        for record in records:
            homes.setdefault(record.unit, set()).add(part)
    assert all(len(parts) == 1 for parts in homes.values())
    found = [record.text for records in parts_of(data).values() for record in records if isinstance(record, TextRecord)]
    assert Counter(found) == Counter(given_texts)


@pytest.fixture
def federation(tmp_path: Path, manifest_for: MakeManifest) -> Callable[..., tuple[Manifest, FederationData]]:
    """Writes files and reads them: `federation({"train": rows(9)}, sites=2)`."""

    def make(
        files: dict[str, Sequence[dict[str, Any]]], holdout: float = 0.25, **simulation: Any
    ) -> tuple[Manifest, FederationData]:
        for split, lines in files.items():
            write(tmp_path / f"{split}.jsonl", lines)
        names = {split: f"{split}.jsonl" for split in files}
        section = {"sites": 3, **names, **simulation}
        manifest = manifest_for(simulation=section, evaluation={"holdout": holdout})
        return manifest, read_federation(manifest, [tmp_path])

    return make


def test_one_file_becomes_training_held_out_and_test_records(federation: Callable[..., Any]) -> None:
    _, data = federation({"train": rows(120, units=40)}, test_fraction=0.2)
    assert list(data.train) == ["site-1", "site-2", "site-3"]
    assert len({record.unit for record in data.test}) == 8  # 0.2 of 40
    for site in data.train:
        units = len({record.unit for record in data.train[site] + data.held_out[site]})
        assert len({record.unit for record in data.held_out[site]}) == round(0.25 * units)
    require_whole_units(data, [row["text"] for row in rows(120)])
    assert data.splits()["test"] == data.test
    assert sum(map(len, data.splits().values())) == 120
    assert data.cleaning == Cleaning()


def test_files_of_their_own_are_taken_as_they_are(federation: Callable[..., Any]) -> None:
    dev, test = rows(10, start=100), rows(11, start=200)
    _, data = federation({"train": rows(30), "dev": dev, "test": test}, test_fraction=0.5)
    assert [record.text for record in data.test] == [row["text"] for row in test]
    assert sorted(map(len, data.train.values())) == [10, 10, 10]  # nothing kept back: there are files for that
    assert sorted(map(len, data.held_out.values())) == [3, 3, 4]
    require_whole_units(data, [row["text"] for row in (*rows(30), *dev, *test)])


def test_a_dev_file_is_dealt_as_the_partition_is(federation: Callable[..., Any]) -> None:
    dev = rows(8, start=100)
    _, data = federation({"train": rows(30), "dev": dev}, sites=["g1", "g0"], partitioner="natural")
    for site in ("g0", "g1"):
        assert {record.group for record in data.train[site] + data.held_out[site]} == {site}
        assert len(data.held_out[site]) == 4


def test_nothing_is_held_out_where_nothing_shall_be(federation: Callable[..., Any]) -> None:
    _, data = federation({"train": rows(30)}, holdout=0.0, test_fraction=0.0)
    assert data.held_out == {"site-1": [], "site-2": [], "site-3": []}
    assert data.test == []
    require_whole_units(data, [row["text"] for row in rows(30)])


def test_equal_seeds_give_equal_federations(federation: Callable[..., Any]) -> None:
    _, one = federation({"train": rows(60)}, seed=4)
    _, same = federation({"train": rows(60)}, seed=4)
    _, other = federation({"train": rows(60)}, seed=5)
    assert one == same
    assert one != other


@pytest.mark.parametrize(("most", "units"), [(1, 1), (4, 1), (8, 2), (11, 2), (12, 3), (1000, 10)])
def test_most_records_are_whole_units_in_their_order(federation: Callable[..., Any], most: int, units: int) -> None:
    # Ten units of four records, one after the other in the file.
    lines = [row | {"unit": f"u{number // 4}"} for number, row in enumerate(rows(40))]
    _, data = federation({"train": lines}, sites=1, max_records=most, holdout=0.0, test_fraction=0.0)
    assert [record.text for record in data.train["site-1"]] == [f"text number {number}" for number in range(4 * units)]


def test_units_that_alternate_are_kept_whole_too(federation: Callable[..., Any]) -> None:
    _, data = federation({"train": rows(12, units=3)}, sites=1, max_records=9, holdout=0.0, test_fraction=0.0)
    assert Counter(record.unit for record in data.train["site-1"]) == {"u0": 4, "u1": 4}


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_unit_on_two_sides_of_a_split_is_refused(federation: Callable[..., Any], split: str) -> None:
    lines = {"train": rows(30), "dev": rows(5, start=100), "test": rows(5, start=200)}
    lines[split][2] = {"text": "another text", "label": "a", "unit": f"{SECRET}"}
    lines["train"][7]["unit"] = SECRET
    with pytest.raises(DataError, match=f"train and {split} share 1") as error:
        federation(lines)
    assert SECRET not in "".join(traceback.format_exception(error.value))


def test_dev_and_test_may_not_share_a_unit_either(federation: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="dev and test share 2"):
        federation({"train": rows(30), "dev": rows(5, start=100), "test": rows(5, start=103)})


UNIT_NUMBERS = st.lists(st.integers(0, 15), min_size=12, max_size=60).filter(lambda units: len(set(units)) >= 8)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    units=UNIT_NUMBERS,
    dev=st.lists(st.integers(16, 20), max_size=8),
    test=st.lists(st.integers(21, 25), max_size=8),
    partitioner=st.sampled_from(["iid", "dirichlet", "quantity"]),
    holdout=st.sampled_from([0.0, 0.2, 0.6]),
    test_fraction=st.sampled_from([0.0, 0.1, 0.3]),
    seed=st.integers(0, 3),
)
def test_no_unit_is_ever_in_two_parts_and_nothing_is_lost(
    tmp_path: Path,
    manifest_for: MakeManifest,
    units: list[int],
    dev: list[int],
    test: list[int],
    partitioner: str,
    holdout: float,
    test_fraction: float,
    seed: int,
) -> None:
    split = {"train": units, "dev": dev, "test": test}
    texts: list[str] = []
    section: dict[str, Any] = {"sites": 2, "partitioner": partitioner, "test_fraction": test_fraction, "seed": seed}
    for name, numbers in split.items():
        if numbers:
            lines = [
                {"text": f"{name} {place}", "label": "abc"[place % 3], "unit": f"u{unit}"}
                for place, unit in enumerate(numbers)
            ]
            write(tmp_path / f"{name}.jsonl", lines)
            section[name] = f"{name}.jsonl"
            texts += [line["text"] for line in lines]
    manifest = manifest_for(simulation=section, evaluation={"holdout": holdout})
    data = read_federation(manifest, [tmp_path])
    require_whole_units(data, texts)
    assert all(data.train.values())


def test_files_are_looked_for_in_the_data_folder_first(tmp_path: Path, manifest_for: MakeManifest) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", rows(20))
    write(tmp_path / "train.jsonl", rows(20, start=50))
    manifest = manifest_for(simulation={"sites": 2, "train": "train.jsonl"})
    first = read_federation(manifest, [tmp_path / "data", tmp_path])
    require_whole_units(first, [row["text"] for row in rows(20)])
    (tmp_path / "data" / "train.jsonl").unlink()
    second = read_federation(manifest, [tmp_path / "data", tmp_path])
    require_whole_units(second, [row["text"] for row in rows(20, start=50)])


def test_public_records_that_were_not_agreed_on_are_refused(tmp_path: Path, manifest_for: MakeManifest) -> None:
    for name in ("train", "public"):
        write(tmp_path / f"{name}.jsonl", rows(30))
    simulation = {"train": "train.jsonl", "sites": 3, "partitioner": "iid"}
    agreed = hashlib.sha256((tmp_path / "public.jsonl").read_bytes()).hexdigest()
    for digest, fits in ((agreed, True), (None, True), ("0" * 64, False)):
        evaluation = {"public": "public.jsonl", **({"public_sha256": digest} if digest else {})}
        manifest = manifest_for(simulation=simulation, evaluation=evaluation)
        if fits:
            assert len(read_federation(manifest, [tmp_path]).public) == 30
            continue
        with pytest.raises(DataError, match=r"evaluation.public: .* was agreed on"):
            read_federation(manifest, [tmp_path])


def test_a_missing_file_is_one_line_that_says_where_was_looked(tmp_path: Path, manifest_for: MakeManifest) -> None:
    manifest = manifest_for(simulation={"sites": 2, "train": "clauses.jsonl"})
    with pytest.raises(DataError) as error:
        read_federation(manifest, [tmp_path / "data", tmp_path])
    assert str(error.value) == (
        f"simulation.train: no file clauses.jsonl in {tmp_path / 'data'} nor in {tmp_path};"
        " say where the data is with --data DIR"
    )


def test_a_missing_test_file_is_not_taken_for_none(federation: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"simulation.test: no file gone.jsonl"):
        federation({"train": rows(20)}, test="gone.jsonl")


def test_a_site_without_training_records_is_refused(federation: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="3 sites but 2 units"):
        federation({"train": rows(2)}, test_fraction=0.0)


def test_a_label_that_is_not_agreed_on_is_refused_without_showing_it(federation: Callable[..., Any]) -> None:
    lines = [*rows(20), {"text": "x", "label": SECRET, "unit": "u"}]
    with pytest.raises(DataError, match=r"row 21, column 'label': not one of task.labels") as error:
        federation({"train": lines})
    assert SECRET not in "".join(traceback.format_exception(error.value))


def test_a_manifest_without_a_simulation_table_cannot_be_simulated(manifest_for: MakeManifest) -> None:
    with pytest.raises(RunError, match=r"no \[simulation\] table"):
        simulation_of(manifest_for())


def source(folder: Path, name: str, body: str) -> dict[str, Any]:
    """A simulation table with a data source of one's own, in a module of its own."""
    (folder / f"{name}.py").write_text(body, encoding="utf-8")
    return {"sites": 2, "source": f"{name}:records"}


GOOD_SOURCE = """
def records(split, seed):
    start = {"train": 0, "dev": 100, "test": 200}[split] + 1000 * seed
    count = {"train": 30, "dev": 8, "test": 9}[split]
    for number in range(start, start + count):
        yield {"text": f"text {number}", "label": "abc"[number % 3], "unit": f"u{number}"}
"""


def test_a_source_gives_the_splits_and_gets_the_seed(tmp_path: Path, manifest_for: MakeManifest) -> None:
    section = source(tmp_path, "sites_test_good_source", GOOD_SOURCE) | {"seed": 3}
    data = read_federation(manifest_for(simulation=section), [tmp_path])
    assert {split: len(records) for split, records in data.splits().items()} == {"train": 30, "dev": 8, "test": 9}
    assert [record.unit for record in data.test] == [f"u{number}" for number in range(3200, 3209)]


def test_a_source_without_dev_and_test_gets_them_cut_off(tmp_path: Path, manifest_for: MakeManifest) -> None:
    body = (
        GOOD_SOURCE + "\nwhole = records\ndef records(split, seed): return whole(split, 0) if split == 'train' else []"
    )
    data = read_federation(manifest_for(simulation=source(tmp_path, "sites_test_train_only", body)), [tmp_path])
    assert len(data.test) == 3
    assert all(data.held_out.values())
    require_whole_units(data, [f"text {number}" for number in range(30)])


@pytest.mark.parametrize(
    ("name", "body", "said"),
    [
        ("raises", f"def records(split, seed): raise ValueError('{SECRET}')", "raised ValueError for split 'train'"),
        (
            "midway",
            f"def records(split, seed):\n    yield dict(text='x', label='a')\n    raise KeyError('{SECRET}')",
            "KeyError",
        ),
        ("numbers", "def records(split, seed): return 7", "raised TypeError"),
        ("texts", f"def records(split, seed): return ['{SECRET}']", "raised ValueError"),
    ],
)
def test_a_source_that_misbehaves_is_told_without_its_text(
    tmp_path: Path, manifest_for: MakeManifest, name: str, body: str, said: str
) -> None:
    section = source(tmp_path, f"sites_test_{name}", body)
    with pytest.raises(ExtensionError, match=said) as error:
        read_federation(manifest_for(simulation=section), [tmp_path])
    assert SECRET not in str(error.value)
    assert "\n" not in str(error.value)
    assert "it must be a function of (split, seed)" in str(error.value)


def test_a_source_without_records_is_refused(tmp_path: Path, manifest_for: MakeManifest) -> None:
    section = source(tmp_path, "sites_test_empty", "def records(split, seed): return []")
    with pytest.raises(DataError, match="gave no training records"):
        read_federation(manifest_for(simulation=section), [tmp_path])


def test_cleaning_counts_all_files(federation: Callable[..., Any]) -> None:
    train = [*rows(20), rows(20)[4], {"text": " \t", "label": "a", "unit": "x"}]
    _, data = federation({"train": train, "test": [{"text": " padded ", "label": "b", "unit": "y"}]})
    assert data.cleaning == Cleaning(duplicates=1, empty=1, normalised=1)


RECORDS_OF: dict[str, list[Record]] = {
    "text-classification": [
        TextRecord(text='a \n line, and "quotes" ü', label="a", unit="u1", group="g"),
        TextRecord(text="no group", label="b", unit="u2"),
    ],
    "token-classification": [
        TokensRecord(tokens=("severe", "flu", "."), tags=("O", "B-Disease", "O"), unit="u1", group="g"),
        TokensRecord(tokens=("fine",), tags=("O",), unit="u1"),
    ],
    "causal-lm": [InstructionRecord(instruction="Why?", input="", output="So.\nYes.", unit="u1")],
}


@pytest.mark.parametrize("kind", RECORDS_OF)
def test_what_is_laid_out_is_read_back_the_same(tmp_path: Path, manifest_for: MakeManifest, kind: str) -> None:
    manifest = manifest_for(kind, data={"columns": {"unit": "person", "text": "body", "tokens": "words"}})
    records = RECORDS_OF[kind]
    own = [dataclasses.replace(records[0], unit="u9")]
    data = FederationData({"b": records, "a": own}, {"b": records[:1], "a": []}, records, Cleaning())
    folders = lay_out(tmp_path, manifest, data)
    assert list(folders) == ["b", "a", POOLED]
    assert Manifest.model_validate_json((tmp_path / "federation.json").read_bytes()) == manifest

    def back(path: Path) -> list[Record]:
        found, cleaning = read_records(path, task=manifest.task, data=manifest.data)
        assert cleaning == Cleaning()  # clean records are left alone, bit for bit
        return found

    assert back(folders["b"] / "train.jsonl") == records
    assert back(folders["b"] / "held_out.jsonl") == records[:1]
    assert not (folders["a"] / "held_out.jsonl").exists()
    assert back(folders[POOLED] / "train.jsonl") == [*records, *own]
    assert back(tmp_path / "test.jsonl") == records


def test_a_sites_folder_is_for_its_owner_only(tmp_path: Path, manifest_for: MakeManifest) -> None:
    data = FederationData({"a": RECORDS_OF["causal-lm"]}, {"a": []}, [], Cleaning())
    for folder in lay_out(tmp_path, manifest_for("causal-lm"), data).values():
        assert folder.stat().st_mode & 0o077 == 0


def test_a_vault_serves_what_was_laid_out(tmp_path: Path, manifest_for: MakeManifest) -> None:
    from client.resident import resident
    from client.state import SiteState
    from common.adapters import first_state

    section = {"sites": 2, "train": "train.jsonl"}
    manifest = manifest_for(simulation=section, training={"rounds": 1, "local_steps": 1, "batch_size": 2})
    write(tmp_path / "train.jsonl", rows(24))
    data = read_federation(manifest, [tmp_path])
    (tmp_path / "sites").mkdir()
    folders = lay_out(tmp_path / "sites", manifest, data)
    adapter = first_state(resident(manifest).model, 0)
    common = {"manifest_sha256": manifest.digest(), "run_id": "x", "adapter_sha256": state_digest(adapter)}
    for site, folder in list(folders.items())[:-1]:
        vault = Vault(
            site,
            manifest,
            train=folder / "train.jsonl",
            held_out=folder / "held_out.jsonl",
            log=tmp_path / "log",
        )
        start = Envelope(header=RoundStart(**common, round=1, evaluate=True, accepted=0), tensors=adapter)
        reply, _ = vault.answer(encode(start), SiteState())
        header = decode(reply).header
        assert isinstance(header, RoundDone)
        assert header.records == len(data.train[site])
        assert header.counts["records"] == len(data.held_out[site]) > 0
        measured, _ = vault.answer(encode(Envelope(header=Evaluate(**common, round=0), tensors=adapter)), SiteState())
        answer = decode(measured).header
        assert isinstance(answer, Evaluated)
        assert answer.counts == header.counts
    assert not (tmp_path / "log").exists()


def test_a_simulated_site_trains_the_rank_that_the_manifest_gives_it(
    tmp_path: Path, manifest_for: MakeManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    from client.resident import resident
    from client.state import SiteState
    from common.adapters import first_state
    from simulations import app

    manifest = manifest_for(
        simulation={"sites": 2, "train": "train.jsonl", "ranks": [2, 1]},
        training={"rounds": 1, "local_steps": 4, "batch_size": 8},
        adapter={"rank": 2},
        aggregation={"method": "dense"},
    )
    write(tmp_path / "train.jsonl", rows(24))
    (tmp_path / "sites").mkdir()
    folders = lay_out(tmp_path / "sites", manifest, read_federation(manifest, [tmp_path]))
    assert not (folders[POOLED] / "rank").exists()
    monkeypatch.setattr(app, "_manifest", lambda root: manifest)
    adapter = first_state(resident(manifest).model, 0)
    common = {"manifest_sha256": manifest.digest(), "run_id": "x", "adapter_sha256": state_digest(adapter)}
    start = Envelope(header=RoundStart(**common, round=1, evaluate=False, accepted=0), tensors=adapter)
    for site, rank in zip(list(folders)[:-1], [2, 1], strict=True):
        vault = app._vault.__wrapped__(site, str(folders[site]), str(tmp_path / "log"), "")
        reply, _ = vault.answer(encode(start), SiteState())
        sent = [array for name, array in decode(reply).tensors.items() if ".lora_BA" in name]
        assert {int(np.linalg.matrix_rank(array, rtol=1e-4)) for array in sent} == {rank}


def test_labels_are_counted() -> None:
    assert label_counts(RECORDS_OF["text-classification"] * 2) == {"a": 2, "b": 2}
    tags = ("B-Drug", "I-Drug", "B-Drug", "O", "I-Dose")  # an entity each time one begins
    record = TokensRecord(tokens=("a", "b", "c", "d", "e"), tags=tags, unit="u")
    assert label_counts([record, record]) == {"Drug": 4}
    assert label_counts(RECORDS_OF["causal-lm"]) == {}
    assert list(label_counts([TextRecord(text=x, label=x, unit=x) for x in "cab"])) == ["a", "b", "c"]
