"""How many cards a site computes on: its setting, what it may not say, and what `check` and the services make of it."""

from pathlib import Path

import pytest
import torch

from client.cards import cards
from client.check import check_site
from client.home import SiteHome
from client.policy import load_policy
from client.service import write_services
from common.errors import ManifestError
from common.findings import Finding


def test_as_many_cards_compute_as_the_site_says() -> None:
    assert [cards("auto", there) for there in (0, 1, 4)] == [0, 1, 4]
    assert [cards(wanted, 4) for wanted in (1, 2, 4)] == [1, 2, 4]
    for there, said in ((0, "no GPUs"), (1, "1 GPU "), (2, "2 GPUs")):
        with pytest.raises(ManifestError, match=f"training.gpus of site.toml is 3, and this machine shows {said}") as e:
            cards(3, there)
        assert len(e.value.problems) == 1


POLICY = """version = 1
name = "north"
[data]
train = "records.jsonl"
[population]
name = "patients"
units = 40
epsilon = 8.0
delta = 1e-3
[training]
gpus = {gpus}
"""


def test_the_setting_is_auto_or_a_number(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    for text, value in (('"auto"', "auto"), ("2", 2)):
        path.write_text(POLICY.format(gpus=text))
        assert load_policy(path).training.gpus == value
    for text in ("0", '"all"', "[0, 1]", "1.5"):
        path.write_text(POLICY.format(gpus=text))
        with pytest.raises(ManifestError, match=r"training\.gpus") as caught:
            load_policy(path)
        assert len(caught.value.problems) == 1, caught.value.problems


def found(home: Path) -> Finding:
    (finding,) = [finding for finding in check_site(SiteHome(home), offline=True) if finding.what == "cards"]
    return finding


def test_check_says_how_many_cards_will_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, there, level, said in (
        ('"auto"', 0, "ok", "no GPU is seen: the processor will compute"),
        ('"auto"', 1, "ok", "1 of 1 GPUs will compute"),
        ("1", 4, "ok", "1 of 4 GPUs will compute"),
        ("2", 4, "ok", "2 of 4 GPUs will compute, each in a process of its own"),
        ("3", 2, "problem", "training.gpus of site.toml is 3, and this machine shows 2 GPUs to the vault"),
    ):
        (tmp_path / "site.toml").write_text(POLICY.format(gpus=gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        finding = found(tmp_path)
        assert finding.level == level
        assert finding.text.startswith(said)


def test_a_service_with_several_cards_may_speak_to_its_own_machine_and_no_other(tmp_path: Path) -> None:
    for gpus, families, allowed in (("1", "AF_UNIX", False), ("2", "AF_UNIX AF_INET AF_NETLINK", True)):
        (tmp_path / "site.toml").write_text(POLICY.format(gpus=gpus))
        write_services(SiteHome(tmp_path), tmp_path / gpus)
        lines = (tmp_path / gpus / "coadapt-vault.service").read_text().splitlines()
        assert f"RestrictAddressFamilies={families}" in lines
        assert "IPAddressDeny=any" in lines
        assert ("IPAddressAllow=localhost" in lines) == allowed
