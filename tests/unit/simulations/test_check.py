import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from rich.console import Console

from client.protection import published
from common.adapters import first_state
from common.codec.state import state_digest
from common.config.loading import load_manifest
from common.errors import DataError, ExtensionError, ManifestError, ModelError, PolicyRefused, PrivacyError, RunError
from common.messages import Envelope, RoundDone, RoundStart, decode, encode
from common.privacy.accounting import calibrate
from simulations.check import print_check, training_bytes
from simulations.devices import EMULATED
from simulations.live import size_text
from simulations.pinning import pinned

# rank 3 on query, key, value, attention output (64 x 64 each), 64 x 128 and back, in two layers; the head 64 x 3 + 3.
TRAINABLE = 2 * (4 * 3 * (64 + 64) + 2 * 3 * (64 + 128)) + 3 * 64 + 3

Shown = Callable[..., dict[str, str]]


@pytest.fixture
def manifest_file(tmp_path: Path, encoder: Path) -> Callable[..., Path]:
    def make(**tables: Any) -> Path:
        values: dict[str, Any] = {
            "version": 1,
            "name": "clinics",
            "task": {"kind": "text-classification", "labels": ["a", "b", "c"]},
            "model": {"base": str(encoder)},
            "data": {"max_length": 32},
            "adapter": {"rank": 3},
            "training": {"rounds": 4, "local_steps": 5, "batch_size": 2, "precision": "fp32"},
            "simulation": {"train": "train.jsonl", "sites": ["north", "south"], "partitioner": "natural"},
            "secure_sum": {"enabled": False},
            **tables,
        }
        lines = [
            {"text": f"clause {number}", "label": "ab"[number % 2], "group": "north" if number < 40 else "south"}
            for number in range(60)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "train.jsonl").write_text(text, encoding="utf-8")
        path = tmp_path / "federation.toml"
        path.write_text(tomli_w.dumps({key: value for key, value in values.items() if value is not None}))
        return path

    return make


def said_by(path: Path, overrides: tuple[str, ...] = ()) -> str:
    console = Console(width=200, record=True, quiet=False, file=(path.parent / "printed").open("w"))
    with console.file:
        print_check(path, data=None, overrides=overrides, console=console)
        return console.export_text()


def facts_in(text: str) -> dict[str, str]:
    """The two-column part of the output."""
    pairs = (re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in text.split("\n\n", maxsplit=1)[0].splitlines())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def bytes_in(text: str) -> float:
    """`3.1 MB` as a number of bytes."""
    number, unit = text.split()[:2]
    return float(number.replace(",", "")) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def test_it_says_what_would_happen(manifest_file: Callable[..., Path]) -> None:
    path = manifest_file()
    text = said_by(path)
    facts = facts_in(text)
    agreed = pinned(load_manifest(path))
    assert facts["federation"] == "clinics"
    assert facts["manifest digest"] == agreed.digest()
    assert facts["weights digest"] == agreed.model.weights_sha256
    assert facts["rounds"] == "4 of 5 steps of 2 records"
    assert facts["each site sees"].startswith("40 examples")
    assert re.fullmatch(r"\d+ with (1 thread|\d+ threads) each", facts["workers"])
    # 60 records; a tenth of the units is kept for the test, a tenth of each site's for measuring.
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if re.match(r"(north|south)\s", line)}
    assert sorted(rows) == ["north", "south"]
    counted = [int(value) for row in rows.values() for value in row[:2]]
    assert sum(counted) == 54
    assert [row[2:] for row in rows.values()] == [["2", "of", "3"]] * 2
    assert "6 test records" in text


def test_it_counts_the_sites_that_a_round_invites(manifest_file: Callable[..., Path]) -> None:
    simulation = {"train": "train.jsonl", "sites": 6, "partitioner": "iid"}
    everyone, some = (
        facts_in(said_by(manifest_file(simulation=simulation, training={"rounds": 4, **training})))
        for training in ({}, {"participants": 2})
    )
    assert some["participants"] == "2 of 6 sites in a round"
    assert "participants" not in everyone
    assert some["each site sees"] == f"at most {everyone['each site sees']}"
    assert everyone["bytes of the run"].endswith("for 6 sites")
    assert some["bytes of the run"].endswith("for 2 sites a round")
    assert bytes_in(some["bytes of the run"]) == pytest.approx(bytes_in(everyone["bytes of the run"]) / 3, rel=0.05)


def test_it_shows_what_fits_on_which_card_and_what_would_need_less(
    manifest_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = manifest_file()
    monkeypatch.setenv(EMULATED, "8,8")
    text = said_by(path)
    facts = facts_in(text)
    assert facts["memory"].endswith("for a site that trains (an estimate)")
    assert re.fullmatch(r'by formula .* with adapter.method = "qlora" \(a base in 4 bit\); .*', facts["would need"])
    assert facts["workers"].startswith("2 with ")
    for place in range(2):
        assert re.search(rf"emulated GPU {place} \(8 GiB\): 1 worker, 2 records at once, \d+ MB of 8.6 GB", text)
    monkeypatch.setenv(EMULATED, "0.3")
    with pytest.raises(
        RunError, match=r"no device has memory for a worker: .* what would fit: a smaller base"
    ) as found:
        said_by(path)
    assert "\n" not in str(found.value)


def test_it_says_how_much_noise_privacy_needs(manifest_file: Callable[..., Path]) -> None:
    path = manifest_file(privacy={"epsilon": 3.0, "delta": 1e-3})
    text = said_by(path)
    said = facts_in(text)["privacy"]
    found = re.fullmatch(
        r"epsilon 3 at delta 0.001 for each record and site; noise over clip (\d+\.\d\d) to (\d+\.\d\d)", said
    )
    assert found is not None
    counts = [int(line.split()[1]) for line in text.splitlines() if re.match(r"(north|south)\s", line)]
    noise = [calibrate(3.0, 1e-3, sampling_rate=2 / published(count), steps=20) for count in counts]
    assert [float(found[1]), float(found[2])] == pytest.approx(sorted(noise), abs=0.006)
    assert "privacy" not in facts_in(said_by(manifest_file()))
    with pytest.raises(PrivacyError, match=r"below 1 / \d+ privacy units"):
        said_by(manifest_file(privacy={"epsilon": 3.0, "delta": 0.2}))


def test_the_trainable_parameters_are_the_true_number(manifest_file: Callable[..., Path]) -> None:
    from client.resident import resident

    path = manifest_file()
    facts = facts_in(said_by(path))
    model = resident(pinned(load_manifest(path))).model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == TRAINABLE
    assert facts["trainable"].split()[0] == f"{TRAINABLE:,}"
    base = sum(parameter.numel() for parameter in model.parameters()) - trained
    assert facts["task"] == "text-classification, 3 labels"
    assert f"{base:,} parameters" in facts["model base" if "model base" in facts else "base"]


def test_the_bytes_of_a_round_are_those_of_real_envelopes(manifest_file: Callable[..., Path]) -> None:
    from client.resident import resident

    path = manifest_file()
    manifest = pinned(load_manifest(path))
    state = first_state(resident(manifest).model, 0)
    about = {"manifest_sha256": manifest.digest(), "run_id": "clinics-20260301-101500-ab12", "round": 4}
    down = encode(
        Envelope(
            header=RoundStart(**about, adapter_sha256=state_digest(state), evaluate=True, accepted=3), tensors=state
        )
    )
    counts = {f"{kind}/{label}": 12.0 for kind in ("tp", "fp", "fn") for label in range(3)}
    done = RoundDone(
        **about,
        adapter_sha256="0" * 64,
        records=40,
        examples=10,
        loss=0.123456789,
        counts=counts,
        seconds=1.2345678,
        noise_multiplier=None,
        sampling_rate=None,
    )
    up = encode(Envelope(header=done, tensors=state))
    assert decode(up).tensors.keys() == state.keys()
    printed = re.fullmatch(
        r"(\S+ \S+) down and (\S+ \S+) up for each site", facts_in(said_by(path))["bytes of a round"]
    )
    assert printed is not None
    assert bytes_in(printed[1]) == pytest.approx(len(down), rel=0.05)
    assert bytes_in(printed[2]) == pytest.approx(len(up), rel=0.05)
    whole = bytes_in(facts_in(said_by(path))["bytes of the run"])
    assert whole == pytest.approx((len(down) + len(up)) * 2 * 4, rel=0.05)  # two sites, four rounds


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("auto", "separate (auto); needs 1 sum; exact: no: B and A are averaged apart"),
        ("ffa", "ffa; needs 1 sum; exact: yes"),
        ("sketch", "sketch; needs 2 sums; exact: nearly the best pair"),
        ("check_own:f", "check_own:f; needs each site's own change; exact: not known; ranks must be equal"),
    ],
)
def test_it_says_how_the_sites_are_combined(manifest_file: Callable[..., Path], method: str, said: str) -> None:
    path = manifest_file(aggregation={"method": method})
    (path.parent / "check_own.py").write_text("def f(changes, weights):\n    return changes[0]\n")
    assert facts_in(said_by(path))["aggregation"].startswith(said)


def test_the_bytes_up_are_those_of_the_method(manifest_file: Callable[..., Path]) -> None:
    def said(method: str, *overrides: str) -> list[float]:
        path = manifest_file(aggregation={"method": method})
        line = facts_in(said_by(path, overrides))["bytes of a round"]
        found = re.fullmatch(r"\S+ \S+ down and (\S+ \S+)(?: or (\S+ \S+))? up for each site", line)
        assert found is not None
        return [bytes_in(part) for part in found.groups() if part]

    (everything,) = said("separate")
    factor = 2 * (5 * 64 + 128) * 3 * 4  # bytes of all A, and of all B: rank 3, six layers in each of two blocks
    (ffa,) = said("ffa")
    assert everything - ffa == pytest.approx(factor, rel=0.25)  # names are left out too, in a base as small as this
    assert all(each == pytest.approx(ffa, rel=0.1) for each in said("alternate"))
    (dense,) = said("dense")
    assert dense - everything == pytest.approx(2 * (4 * 64 * 64 + 2 * 64 * 128) * 4 - 2 * factor, rel=0.1)
    (sketch,) = said("sketch")
    assert everything < sketch < dense
    alternate = manifest_file(aggregation={"method": "alternate"})
    whole = bytes_in(facts_in(said_by(alternate))["bytes of the run"])
    assert whole < 0.9 * bytes_in(facts_in(said_by(manifest_file()))["bytes of the run"])


def test_overrides_count(manifest_file: Callable[..., Path]) -> None:
    facts = facts_in(said_by(manifest_file(), ("training.rounds=9", "adapter.rank=6")))
    assert facts["rounds"].startswith("9 of 5")
    assert facts["trainable"].split()[0] == f"{2 * TRAINABLE - 195:,}"  # the head stays as it is


def test_a_manifest_without_a_simulation_is_checked_too(manifest_file: Callable[..., Path]) -> None:
    text = said_by(manifest_file(simulation=None))
    assert "bytes of the run" not in text
    assert "workers" not in text
    assert "bytes of a round" in text


def test_markup_in_names_is_shown_as_it_is(manifest_file: Callable[..., Path], encoder: Path) -> None:
    strange = manifest_file().parent / "[bold]base"
    shutil.copytree(encoder, strange)
    text = said_by(manifest_file(model={"base": str(strange)}))
    assert "[bold]base" in text


@pytest.mark.parametrize(
    ("tables", "error", "said"),
    [
        ({"simulation": {"train": "gone.jsonl"}}, DataError, "no file gone.jsonl"),
        ({"adapter": {"rnk": 3}}, ManifestError, "did you mean adapter.rank"),
        ({"model": {"base": "nowhere/at/all"}}, ModelError, "neither a directory here nor a hub id"),
        ({"evaluation": {"metrics": ["check_test_gone:f"]}}, ExtensionError, "no module 'check_test_gone'"),
        (
            {"aggregation": {"method": "check_test_gone:f"}, "secure_sum": {"enabled": False}},
            ExtensionError,
            "no module 'check_test_gone'",
        ),
        ({"adapter": {"method": "head"}, "aggregation": {"method": "ffa"}}, ManifestError, "low-rank pairs"),
    ],
)
def test_what_would_stop_a_run_stops_the_check(
    manifest_file: Callable[..., Path], tables: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        said_by(manifest_file(**tables))


def test_the_memory_estimate_grows_with_what_it_depends_on(manifest_file: Callable[..., Path]) -> None:
    from client.resident import resident

    def estimate(*overrides: str) -> int:
        manifest = pinned(load_manifest(manifest_file(), overrides))
        return training_bytes(manifest, resident(manifest))

    usual = estimate()
    parameters = 4 * 200_000  # the base is at least that large
    assert usual > parameters
    assert estimate("training.batch_size=8") > usual
    assert estimate("training.batch_size=8", "training.micro_batch_size=2") == usual
    assert estimate("data.max_length=64") > usual
    assert estimate("training.gradient_checkpointing=true") < usual
    private = estimate("privacy.epsilon=8")
    trained = sum(
        p.numel() for p in resident(pinned(load_manifest(manifest_file()))).model.parameters() if p.requires_grad
    )
    assert private - usual == 4 * trained * load_manifest(manifest_file()).training.batch_size
    assert size_text(usual).endswith("MB")


def test_it_says_what_a_secure_sum_needs_and_costs(manifest_file: Callable[..., Path]) -> None:
    four = {"train": "train.jsonl", "sites": 4, "partitioner": "iid"}
    facts = facts_in(said_by(manifest_file(secure_sum={"enabled": True}, simulation=four)))
    assert facts["secure sum"] == "over at least 3 of 4 sites; 16 bits and 2.67 bytes a value"
    (up,) = re.findall(r"down and (.*) up for each site", facts["bytes of a round"])
    assert bytes_in(up) == pytest.approx(TRAINABLE * 8 / 3, rel=0.01)
    assert facts_in(said_by(manifest_file()))["secure sum"] == "off: the coordinator sees every site's change"
    with pytest.raises(PolicyRefused, match=r"secure_sum\.min_sites = 3 sites or more, found 2"):
        said_by(manifest_file(secure_sum={"enabled": True}))
