"""Which methods of aggregation go with what, and what `auto` means."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from common.config.loading import load_manifest
from common.config.manifest import PAIRED, AdapterMethod, Manifest
from common.errors import ManifestError

Manifests = Callable[..., Manifest]
PRIVACY = {"epsilon": 8.0}


@pytest.mark.parametrize("adapter", get_args(AdapterMethod))
def test_auto_alternates_with_privacy_where_there_are_pairs(manifest_for: Manifests, adapter: str) -> None:
    plain = manifest_for(adapter={"method": adapter})
    private = manifest_for(adapter={"method": adapter}, privacy=PRIVACY)
    assert plain.aggregation_method == "separate"
    paired = adapter in ("lora", "qlora", "rslora", "lora+prompt")
    assert private.aggregation_method == ("alternate" if paired else "separate")
    assert (adapter in PAIRED) == paired


def test_what_is_named_is_meant(manifest_for: Manifests) -> None:
    for method in ("separate", "alternate", "ffa", "sketch", "dense", "mine.of:it"):
        for privacy in (None, PRIVACY):
            tables = {"aggregation": {"method": method}, "privacy": privacy, "secure_sum": {"enabled": False}}
            assert manifest_for(**tables).aggregation_method == method


@pytest.mark.parametrize("method", ["alternate", "ffa", "sketch", "dense"])
@pytest.mark.parametrize("adapter", sorted(set(get_args(AdapterMethod)) - set(PAIRED)))
def test_products_need_pairs(manifest_for: Manifests, adapter: str, method: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(f"adapter.method {adapter!r}, found {method!r}")):
        manifest_for(adapter={"method": adapter}, aggregation={"method": method})


def problems(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "federation.toml").write_text(
        'version = 1\nname = "a"\n[task]\nkind = "text-classification"\nlabels = ["x", "y"]\n' + text
    )
    try:
        load_manifest(tmp_path / "federation.toml")
    except ManifestError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[adapter]\nmethod = 'dora'\n[aggregation]\nmethod = 'dense'",
            "9: aggregation.method must be 'auto', 'separate' or 'module:function' with adapter.method 'dora', found"
            " 'dense': it averages products of low-rank pairs; such pairs have lora, qlora, rslora, lora+prompt",
        ),
        (
            "[aggregation]\nmethod = 'my.own:median'\n[secure_sum]\nenabled = true",
            "7: aggregation.method must be one of the built-in ones with secure_sum.enabled, found 'my.own:median': it"
            " needs every site's change, and the coordinator learns their sum alone; choose 'auto', or turn the secure"
            " sum off",
        ),
        (
            "[aggregation]\nmethod = 'mean'",
            "7: aggregation.method must be 'auto', 'separate', 'alternate', 'ffa', 'sketch' or 'dense' or text"
            " 'module:function', an import path, found 'mean'",
        ),
        (
            "[aggregation]\nrefresh_every = 2",
            "7: aggregation.refresh_every must be left out with method 'auto': it is a setting of ffa",
        ),
        (
            "[aggregation]\nserver_momentum = 0.5\nserver_optimizer = 'yogi'",
            "7: aggregation.server_momentum must be 0 with server_optimizer 'yogi', whose momentum is server_beta1;"
            " found 0.5",
        ),
        (
            "[aggregation]\nserver_optimizer = 'yogi'",
            "6: aggregation.server_learning_rate must be below 1 with server_optimizer 'yogi', which moves all values"
            " by about as much; 0.01 is usual; found 1",
        ),
        (
            "[aggregation]\nmethod = 'sketch'\nserver_optimizer = 'adam'",
            "7: aggregation.method must be another than 'sketch' with server_momentum, adam or yogi: what they"
            " remember is as large as the layers, which a sketch is there to avoid; take 'dense', or leave them out",
        ),
        (
            "[aggregation]\naccept_drop = 0.1",
            "7: aggregation.accept_drop: needs evaluation.public, a file of public records to measure a round's adapter"
            " on; without one, aggregation.max_norm guards",
        ),
    ],
)  # fmt: skip
def test_impossible_pairs_are_refused_with_reason_and_alternatives(tmp_path: Path, text: str, said: str) -> None:
    assert problems(tmp_path, text) == [f"federation.toml:{said}"]


@pytest.mark.parametrize(
    "text",
    [
        "[aggregation]\nmethod = 'ffa'\nrefresh_every = 3",
        "[aggregation]\nmethod = 'my.own:median'\n[secure_sum]\nenabled = false",
        "[secure_sum]\nenabled = true",
        "[aggregation]\naccept_drop = 0.1\n[evaluation]\npublic = 'public.jsonl'",
        "[aggregation]\nmethod = 'dense'\nserver_optimizer = 'adam'\nserver_learning_rate = 0.01",
        "[adapter]\nmethod = 'lora+prompt'\n[aggregation]\nmethod = 'sketch'",
    ],
)
def test_possible_pairs_are_not(tmp_path: Path, text: str) -> None:
    assert problems(tmp_path, text) == []


def test_the_method_is_agreed(manifest_for: Manifests) -> None:
    plain = {"secure_sum": {"enabled": False}}
    methods = ("auto", "separate", "ffa", "a:b")
    digests: set[Any] = {manifest_for(aggregation={"method": m}, **plain).digest() for m in methods}
    assert len(digests | {manifest_for(secure_sum={"enabled": True}).digest()}) == 5
    assert json.loads(manifest_for().model_dump_json())["secure_sum"]["enabled"] is False
    assert Manifest.model_fields["secure_sum"].get_default(call_default_factory=True).enabled  # where nothing is said


@pytest.mark.parametrize(
    ("ranks", "method", "problem"),
    [
        ([4, 2], "separate", "simulation.ranks must be at most adapter.rank = 4, with aggregation.method"),
        ([4, 8], "sketch", r"found \[4, 8\]"),
        ([4], "dense", "ranks must be one for each of the 2 sites, found 1"),
        ([4, 0], "dense", "ranks"),
    ],
)
def test_ranks_that_cannot_be_are_refused(
    manifest_for: Callable[..., Manifest], ranks: list[int], method: str, problem: str
) -> None:
    with pytest.raises(ValidationError, match=problem):
        manifest_for(
            adapter={"rank": 4},
            aggregation={"method": method},
            simulation={"sites": 2, "train": "x.jsonl", "ranks": ranks},
        )
