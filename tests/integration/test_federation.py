"""Four institutions and a coordinator, set up and run by the commands that a person types: what they get."""

from collections.abc import Callable, Iterator

import pytest
from deployment import SITES, Deployment, records, short_folder, until

from common.adapters import first_state, load_adapter, set_state
from common.config.manifest import Manifest
from common.evaluation import measure
from common.models import find_base, load_tokenizer
from common.tasks.task import make_task

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # supervisors outlive the command that starts them
]


@pytest.fixture(scope="module")
def federation(manifest_for: Callable[..., Manifest]) -> Iterator[Deployment]:
    """Enrolled, started, and stopped at the end; with privacy and secure sums."""
    manifest = manifest_for(
        data={"max_length": 16},
        adapter={"rank": 2},
        training={
            "rounds": 4,
            "local_steps": 4,
            "batch_size": 40,
            "learning_rate": 0.03,
            "adam_epsilon": 1e-3,
            "head_learning_rate": 0.1,
        },
        privacy={"epsilon": 50.0, "delta": 1e-3, "clip": 1.0},
        secure_sum={"enabled": True, "min_sites": 3},
    )
    with short_folder() as folder:
        it = Deployment(folder, manifest)
        it.enrol()
        with it.running():
            yield it


def test_four_institutions_train_together(federation: Deployment) -> None:
    it = federation
    for name in SITES:
        assert "problem" not in it.type("site", "check", "--home", name)
    printed = it.run("--run-id", "first")
    assert "The coordinator learned sums over the sites and nothing of a single one." in printed
    summary = it.summary("first")
    assert summary["status"] == "finished"
    assert [each["answered"] for each in summary["rounds"][1:]] == [sorted(SITES)] * 4
    # Each site paid for four rounds, once each, and the audit log holds what it was asked.
    for name in SITES:
        assert it.charged(name) == [1, 2, 3, 4]
        decisions = [line.decision for line in it.audit(name)]
        assert "answered" in decisions
        assert "refused" not in decisions
    # The adapter loads, and beats the untuned base on records of nobody's.
    base = find_base(it.manifest.model)
    model, manifest = load_adapter(it.coordinator / "runs" / "first" / "adapter", base)
    assert manifest.digest() == it.manifest.digest()
    task = make_task(manifest, load_tokenizer(base))
    examples = task.encode(records("nobody", 90)).examples
    tuned = measure(model, task, examples, batch_size=90, precision="fp32")
    set_state(model, first_state(model, manifest.training.seed))
    untuned = measure(model, task, examples, batch_size=90, precision="fp32")
    assert tuned["loss_sum"] < 0.9 * untuned["loss_sum"]


def test_a_run_is_not_begun_twice_and_a_finished_one_not_resumed(federation: Deployment) -> None:
    until((federation.coordinator / "runs" / "first" / "adapter").exists)
    assert "exists already" in federation.run("--run-id", "first", fails=True)
    assert "has finished" in federation.run("--resume", "first", fails=True)
    assert "no run other" in federation.run("--resume", "other", fails=True)
