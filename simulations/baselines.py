"""What federated training is compared with: untuned, each site alone, and all records in one place.

Each baseline starts from the run's first adapter and is trained by the same loop with the same settings. A site
alone takes the steps that it takes in the federation; centralised training takes those of all sites together, so
both see as many examples as the federation.
"""

from functools import lru_cache
from pathlib import Path

from client.records import read_records
from client.resident import Resident, resident
from client.sampling import batches
from client.training.loop import train
from common.adapters import set_state
from common.codec.state import AdapterState
from common.config.manifest import Manifest
from common.evaluation import measure
from common.messages import Envelope, Evaluated
from common.metrics import Counts
from common.randomness import seed_dropout
from common.tasks.task import Example

__all__ = ["test_counts", "train_alone"]


def train_alone(request: Envelope, manifest: Manifest, site: str, folder: Path, *, steps: int) -> Envelope:
    """Take `steps` steps on the folder's records from the request's adapter; counts on the test records."""
    model = resident(manifest)
    set_state(model.model, request.tensors)
    examples = _examples(folder / "train.jsonl", manifest, model)
    section = manifest.training
    seed_dropout(section.seed, site, "alone")
    train(
        model.model,
        model.task,
        examples,
        batches(len(examples), section.batch_size, seed=section.seed, site=site, cursor=0),
        section,
        first_step=0,
        steps=steps,
        total_steps=steps,
        precision=model.precision,
    )
    values = request.header.model_dump(include={"manifest_sha256", "run_id", "round", "adapter_sha256"})
    return Envelope(header=Evaluated(**values, counts=_measured(manifest, model, folder.parent / "test.jsonl")))


def test_counts(manifest: Manifest, adapter: AdapterState, root: Path) -> Counts:
    """Counts of an adapter on the test records."""
    model = resident(manifest)
    set_state(model.model, adapter)
    return _measured(manifest, model, root / "test.jsonl")


def _measured(manifest: Manifest, model: Resident, test: Path) -> Counts:
    return measure(
        model.model,
        model.task,
        _test_examples(test, manifest),
        batch_size=manifest.evaluation.batch_size,
        precision=model.precision,
        metrics=manifest.metrics,
    )


@lru_cache(maxsize=1)
def _test_examples(path: Path, manifest: Manifest) -> list[Example]:
    return _examples(path, manifest, resident(manifest))


def _examples(path: Path, manifest: Manifest, model: Resident) -> list[Example]:
    return model.task.encode(read_records(path, task=manifest.task, data=manifest.data)[0]).examples
