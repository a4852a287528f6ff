"""What federated training is compared with: untuned, each site alone, and all records in one place.

Each baseline starts from the run's first adapter and is trained by the same loop with the same settings. A site
alone takes the steps that it takes in the federation; centralised training takes those of all sites together, so
both see as many examples as the federation.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from client.resident import Resident, resident
from client.sampling import batches
from client.training.loop import train
from common.adapters import set_state, train_head_alone
from common.config.manifest import Manifest
from common.data_files import read_records
from common.evaluation import measure
from common.messages import Envelope, Evaluated
from common.metrics import Counts
from common.randomness import seed_dropout
from common.tasks.task import Example

__all__ = ["HELD_OUT", "TEST", "part_of", "train_alone"]

# Marks in front of the keys of a baseline's counts.
TEST, HELD_OUT = "test/", "held_out/"


def train_alone(request: Envelope, manifest: Manifest, site: str, folder: Path, *, steps: int) -> Envelope:
    """Take `steps` steps (0: none) on the folder's records from the request's adapter, and measure.

    The answer's counts are those on the test records and, where the folder has any, on its held-out records; `part_of`
    tells them apart.
    """
    model = resident(manifest)
    set_state(model.model, request.tensors)
    if steps:
        examples = _examples(folder / "train.jsonl", manifest, model)
        section = manifest.training
        seed_dropout(section.seed, site, "alone")
        head_steps = steps * section.head_rounds // section.rounds
        for first, last, head_alone in ((0, head_steps, True), (head_steps, steps, False)):
            if first == last:
                continue
            train_head_alone(model.model, head_alone)
            shuffled = batches(
                len(examples), section.batch_size, seed=section.seed, site=site, cursor=first * section.batch_size
            )
            train(
                model.model,
                model.task,
                examples,
                shuffled,
                section,
                first_step=first,
                steps=last - first,
                total_steps=steps,
                precision=model.precision,
            )
    counts = _marked(TEST, _measured(manifest, model, _test_examples(folder.parent / "test.jsonl", manifest)))
    held_out = folder / "held_out.jsonl"
    if held_out.exists():
        own = _examples(held_out, manifest, model)[: manifest.evaluation.max_records]
        counts |= _marked(HELD_OUT, _measured(manifest, model, own))
    return Envelope(header=Evaluated(**request.header.spoken_of(), counts=counts))


def _marked(part: str, counts: Counts) -> Counts:
    return {part + key: value for key, value in counts.items()}


def part_of(counts: Counts, part: str) -> Counts:
    """The counts of one part, TEST or HELD_OUT, of a baseline's answer."""
    return {key.removeprefix(part): value for key, value in counts.items() if key.startswith(part)}


def _measured(manifest: Manifest, model: Resident, examples: Sequence[Example]) -> Counts:
    return measure(
        model.model,
        model.task,
        examples,
        batch_size=manifest.evaluation.batch_size,
        precision=model.precision,
        metrics=manifest.metrics,
    )


@lru_cache(maxsize=1)
def _test_examples(path: Path, manifest: Manifest) -> list[Example]:
    return _examples(path, manifest, resident(manifest))


def _examples(path: Path, manifest: Manifest, model: Resident) -> list[Example]:
    return model.task.encode(read_records(path, task=manifest.task, data=manifest.data)[0]).examples
