"""What `coadapt distill` reads: files that a person names, else text that a causal teacher writes, else none."""

from collections.abc import Callable
from pathlib import Path

import pytest

from common.config.manifest import Manifest
from common.errors import DistillationError
from common.models import find_base, load_task_model, load_tokenizer
from common.records import InstructionRecord
from server.distillation.domain_model import DomainModel
from simulations.distill import _data


def _teacher(manifest: Manifest) -> DomainModel:
    base = find_base(manifest.model)
    return DomainModel(load_task_model(base, manifest).eval(), load_tokenizer(base), manifest)


def test_a_causal_teacher_writes_where_no_text_is_named(manifest_for: Callable[..., Manifest], tmp_path: Path) -> None:
    teacher = _teacher(manifest_for("causal-lm", distillation={"written": 60}, data={"max_length": 24}))
    found = _data(teacher, [], None, None, None, tmp_path).corpus
    assert len(found.train) + len(found.held_out) == 60
    assert all(isinstance(record, InstructionRecord) and not record.instruction for record in found.train)
    assert not found.labelled
    (tmp_path / "own.txt").write_text("".join(f"The tenant pays rent number {n}.\n" for n in range(55)))
    named = _data(teacher, [tmp_path / "own.txt"], None, None, None, tmp_path).corpus
    assert len(named.train) + len(named.held_out) == 55  # what is named comes first


def test_without_text_it_says_what_to_do(manifest_for: Callable[..., Manifest], tmp_path: Path) -> None:
    with pytest.raises(DistillationError, match="--corpus FILE"):
        _data(_teacher(manifest_for("causal-lm")), [], None, None, None, tmp_path)
    with pytest.raises(DistillationError, match="writes no text"):
        _data(_teacher(manifest_for(distillation={"written": 60})), [], None, None, None, tmp_path)
