"""Words in fewer dimensions: the best ones by a second formula, the same network where nothing is lost, whole files."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.config.manifest import Manifest
from common.errors import DistillationError
from common.models import find_base, load_task_model, load_tokenizer
from common.randomness import seeded
from server.distillation.domain_model import DomainModel, load_model, save_model
from server.distillation.embedding_rows import NarrowEmbedding, embedding_of
from server.distillation.exports import export
from server.distillation.extend import extend
from server.distillation.narrow_words import can_narrow, narrow_words
from server.distillation.pieces import encode_all
from server.distillation.planning import LEAST_RANK, RANK, RANK_STEP, WIDE_SHARE, narrow_rank
from tests.unit.server.test_student import KINDS, logits

TEXTS = ["The tenant pays the rent.", "The audit of the tenant ends.", "force majeure ends the rent"] * 4


@pytest.fixture(scope="module", params=KINDS[:2])
def model(request: pytest.FixtureRequest, manifest_for: Callable[..., Manifest]) -> DomainModel:
    manifest = manifest_for(request.param)
    base = find_base(manifest.model)
    return DomainModel(load_task_model(base, manifest).eval(), load_tokenizer(base), manifest)


def rows_of(model: DomainModel) -> np.ndarray:
    ids = torch.arange(embedding_of(model.network).num_embeddings)
    layer = model.network.get_submodule(name_of(model))
    with torch.inference_mode():
        return layer(ids).double().numpy()


def name_of(model: DomainModel) -> str:
    table = embedding_of(model.network)
    found = next(name for name, module in model.network.named_modules() if module is table)
    return found.removesuffix(".table")


def test_no_other_rank_keeps_more_of_what_the_texts_hold(model: DomainModel) -> None:
    before, rank = rows_of(model), 5
    counts = np.ones(len(before))
    for ids in encode_all(model.tokenizer, TEXTS):
        np.add.at(counts, ids, 1)
    found = counts @ np.square(before - rows_of(narrow_words(model, rank, TEXTS))).sum(axis=1)
    lost = np.square(np.linalg.svd(np.sqrt(counts)[:, None] * before, compute_uv=False)[rank:]).sum()
    assert found == pytest.approx(lost, rel=1e-4)


def test_rows_of_so_few_dimensions_lose_nothing(model: DomainModel) -> None:
    width = embedding_of(model.network).embedding_dim
    rng = seeded(3, "rows of a test")
    pieces = embedding_of(model.network).num_embeddings
    low = torch.tensor(rng.normal(size=(pieces, 4)) @ rng.normal(size=(4, width)), dtype=torch.float32)
    flat = narrow_words(model, 4, TEXTS)  # a copy to change
    flat.network.set_submodule(name_of(flat), torch.nn.Embedding.from_pretrained(low))
    made = narrow_words(flat, 4, TEXTS)
    torch.testing.assert_close(logits(made.network), logits(flat.network), atol=1e-4, rtol=1e-4)
    assert made.parameters == flat.parameters - pieces * width + 4 * (pieces + width)
    assert isinstance(embedding_of(model.network), torch.nn.Embedding)  # the one given stays as it was


def test_a_folder_and_an_onnx_file_say_the_same(model: DomainModel, tmp_path: Path) -> None:
    made = narrow_words(model, 6, TEXTS)
    save_model(tmp_path / "model", made, {})
    back = load_model(tmp_path / "model")
    assert isinstance(back.network.get_submodule(name_of(back)), NarrowEmbedding)
    assert torch.equal(logits(back.network), logits(made.network))
    done = export(made, tmp_path / "out", ("safetensors", "onnx", "onnx-int8"), sample=TEXTS, facts={})
    assert [one.format for one in done] == ["safetensors", "onnx", "onnx-int8"]
    assert done[1].agreement == 1
    assert "AutoModel" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_terms_can_be_added_later(model: DomainModel) -> None:
    made = narrow_words(model, 6, TEXTS)
    wide = made.network.get_submodule(name_of(made)).widen.weight.clone()
    after, facts = extend(made, ["force majeure"], TEXTS, epochs=1)
    assert facts["terms"] == ["force majeure"]
    layer = after.network.get_submodule(name_of(after))
    assert layer.table.num_embeddings == len(after.tokenizer)
    assert torch.equal(layer.widen.weight, wide)


def test_what_cannot_be_narrow_is_refused(model: DomainModel, manifest_for: Callable[..., Manifest]) -> None:
    manifest = manifest_for("causal-lm")
    base = find_base(manifest.model)
    writer = DomainModel(load_task_model(base, manifest).eval(), load_tokenizer(base), manifest)
    assert not can_narrow(writer.network)
    assert narrow_rank(writer, Fraction(1, 10), of=writer.parameters) is None
    with pytest.raises(DistillationError, match="does not write"):
        narrow_words(writer, 4, TEXTS)
    width = embedding_of(model.network).embedding_dim
    for rank in (0, width):
        with pytest.raises(DistillationError, match=f"1 to {width - 1} dimensions, found {rank}"):
            narrow_words(model, rank, TEXTS)


@given(pieces=st.integers(1000, 30_000), whole=st.integers(5_000_000, 400_000_000), parts=st.integers(2, 40))
def test_narrow_words_take_their_share_and_no_more(pieces: int, whole: int, parts: int) -> None:
    network = torch.nn.Module()
    with torch.device("meta"):
        network.words = torch.nn.Embedding(pieces, 384)
    network.get_input_embeddings = lambda: network.words
    ratio = Fraction(1, parts)
    rank = narrow_rank(DomainModel(network, None, None), ratio, of=whole)  # type: ignore[arg-type]
    if rank is None:
        assert pieces * 384 <= ratio * whole / 4
        return
    assert rank % RANK_STEP == 0
    assert LEAST_RANK <= rank <= RANK
    share = WIDE_SHARE * ratio * whole
    assert rank == LEAST_RANK or (pieces + 384) * rank <= share
    assert rank == RANK or share < (pieces + 384) * (rank + RANK_STEP)
