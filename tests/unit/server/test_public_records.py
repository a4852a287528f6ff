"""Public records at the coordinator: the file that was agreed on and no other, measured as an obvious loop would."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.adapters import attach, first_state, get_state
from common.config.manifest import Columns, Manifest
from common.data_files import read_records, write_records
from common.errors import DataError, ManifestError
from common.metrics import figures
from common.models import find_base, load_task_model, load_tokenizer
from common.randomness import seeded
from common.records import TextRecord
from common.tasks.task import make_task
from server.public_records import PublicRecords, public_file

# PEFT 0.21 asks Transformers 5.23 in a way that Transformers will drop in its version 6.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MANY = [TextRecord(unit=f"u{n}", text=f"clause {n} of {'abc'[n % 3] * 3}", label="abc"[n % 3]) for n in range(40)]


@pytest.fixture
def agreed(tmp_path: Path, manifest_for: Callable[..., Manifest]) -> Manifest:
    write_records(tmp_path / "public.jsonl", MANY, Columns())
    digest = hashlib.sha256((tmp_path / "public.jsonl").read_bytes()).hexdigest()
    return manifest_for(
        evaluation={"public": "public.jsonl", "public_sha256": digest, "max_records": 30, "batch_size": 7}
    )


def test_the_agreed_file_is_found_and_any_other_is_refused(tmp_path: Path, agreed: Manifest) -> None:
    path = tmp_path / "public.jsonl"
    assert public_file(agreed, tmp_path) == path
    data = path.read_bytes()
    path.write_bytes(data + b"\n")
    with pytest.raises(DataError, match=r"evaluation.public: .* has the SHA-256 .* was agreed on"):
        public_file(agreed, tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"evaluation.public: .* cannot be read"):
        public_file(agreed, tmp_path)


def test_without_a_digest_there_is_no_agreement(manifest_for: Callable[..., Manifest], tmp_path: Path) -> None:
    assert public_file(manifest_for(), tmp_path) is None
    with pytest.raises(DataError, match="public_sha256"):
        public_file(manifest_for(evaluation={"public": "public.jsonl"}), tmp_path)
    with pytest.raises((ManifestError, ValueError), match="public names none"):
        manifest_for(evaluation={"public_sha256": "0" * 64})


def test_two_files_are_two_manifests(agreed: Manifest) -> None:
    other = agreed.evaluation.model_copy(update={"public_sha256": "0" * 64})
    assert agreed.model_copy(update={"evaluation": other}).digest() != agreed.digest()


def test_counts_are_those_of_one_record_after_another(tmp_path: Path, agreed: Manifest) -> None:
    base = find_base(agreed.model)
    model = attach(load_task_model(base, agreed), agreed.adapter)
    first = first_state(model, 0)
    moved = {
        name: array + seeded(1, name).normal(0, 0.3, array.shape).astype("float32") for name, array in first.items()
    }
    public = PublicRecords(tmp_path / "public.jsonl", agreed, model, base)
    task = make_task(agreed, load_tokenizer(base))
    records, _ = read_records(tmp_path / "public.jsonl", task=agreed.task, data=agreed.data)
    examples = task.encode(records[:30]).examples
    found = []
    for adapter in (first, moved, first):
        counts = public.measure(adapter)
        assert {name: array.tobytes() for name, array in get_state(model).items()} == {
            name: array.tobytes() for name, array in adapter.items()
        }
        right = 0
        model.eval()
        with torch.inference_mode():
            for example, record in zip(examples, records, strict=False):
                logits = model(**task.collate([example], torch.device("cpu")).inputs())
                right += int("abc"[int(torch.as_tensor(logits).reshape(-1).argmax())] == record.label)
        values = figures(agreed.task.kind, counts, ("accuracy", "loss"))
        assert values["accuracy"] == pytest.approx(right / 30)
        found.append(values["loss"])
    assert found[0] == found[2] != found[1]
