import math
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from client.resident import Resident, resident
from client.training.loop import Outcome, new_optimizer, set_learning_rates, train
from common.adapters import first_state, get_state, set_state, trained_parameters
from common.codec.state import AdapterState, state_digest
from common.config.manifest import Manifest
from common.config.training import TrainingSection
from common.errors import NotFiniteLoss
from common.evaluation import measure
from common.metrics import figures
from common.randomness import seeded
from common.records import InstructionRecord, Record, TextRecord, TokensRecord
from common.schedule import learning_rate
from common.tasks.task import Example

# PEFT 0.21 asks Transformers 5.23 in a way that Transformers will drop in its version 6.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Manifests = Callable[..., Manifest]
KINDS = ["text-classification", "token-classification", "causal-lm"]


@pytest.fixture(autouse=True)
def _no_resident(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.resident._loaded", {})


def examples_of(kind: str, ready: Resident, count: int = 24) -> list[Example]:
    """Learnable records of many lengths: a word says the label, every 'shall' is a B-Disease, all answers are equal."""
    rng = seeded(0, "loop")
    records: list[Record] = []
    for place in range(count):
        words = rng.choice(["the", "of", "and", "to"], place % 9 + 1).tolist()
        words.insert(place % len(words), ["shall", "tenant", "rent"][place % 3])
        tags = tuple("B-Disease" if word == "shall" else "O" for word in words)
        made: dict[str, Record] = {
            "text-classification": TextRecord(unit="u", text=" ".join(words), label="abc"[place % 3]),
            "token-classification": TokensRecord(unit="u", tokens=tuple(words), tags=tags),
            "causal-lm": InstructionRecord(
                unit="u", instruction=" ".join(words), input="", output="shall pay " * (place % 4 + 1)
            ),
        }
        records.append(made[kind])
    return ready.task.encode(records).examples


def in_turn(size: int, count: int = 24) -> Iterator[list[int]]:
    stream = cycle(range(count))
    while True:
        yield [next(stream) for _ in range(size)]


def start_of(ready: Resident) -> AdapterState:
    """A start with gradients everywhere: with the first adapter's B = 0, those of A vanish."""
    rng = seeded(1, "start")
    return {name: rng.normal(0, 0.1, a.shape).astype(np.float32) for name, a in get_state(ready.model).items()}


def run(
    ready: Resident, kind: str, section: TrainingSection, start: AdapterState, *, steps: int, total: int = 100
) -> tuple[AdapterState, Outcome]:
    set_state(ready.model, start)
    outcome = train(
        ready.model,
        ready.task,
        examples_of(kind, ready),
        in_turn(section.batch_size),
        section,
        first_step=0,
        steps=steps,
        total_steps=total,
        precision=ready.precision,
    )
    return get_state(ready.model), outcome


def apart(one: AdapterState, other: AdapterState) -> float:
    """Root mean square of the differences. AdamW blows the rounding of a vanishing gradient up, in single values."""
    squares = [np.square(one[name] - other[name]).ravel() for name in one]
    return math.sqrt(float(np.concatenate(squares).mean(dtype=np.float64)))


class TestLearningRate:
    def section(self, schedule: str, warmup: int = 4) -> TrainingSection:
        return TrainingSection.model_validate({"learning_rate": 0.5, "warmup_steps": warmup, "schedule": schedule})

    @pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
    def test_warm_up_is_a_line_to_the_peak(self, schedule: str) -> None:
        found = [learning_rate(self.section(schedule), step, 14) for step in range(5)]
        assert found == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])

    def test_without_warm_up_it_begins_at_the_peak(self) -> None:
        assert learning_rate(self.section("linear", 0), 0, 14) == 0.5

    @pytest.mark.parametrize(
        ("schedule", "quarter", "middle", "end"),
        [("constant", 0.5, 0.5, 0.5), ("linear", 0.375, 0.25, 0.0), ("cosine", 0.4267767, 0.25, 0.0)],
    )
    def test_then_the_schedule_leads_to_its_end(self, schedule: str, quarter: float, middle: float, end: float) -> None:
        section = self.section(schedule)
        # 16 steps after 4 of warm-up: step 8 is a quarter, step 12 the middle, step 20 would be the end.
        found = [learning_rate(section, step, 20) for step in (8, 12, 20, 25)]
        assert found == pytest.approx([quarter, middle, end, found[3]], abs=1e-7)
        assert all(learning_rate(section, step, 20) > 0 for step in range(20))
        assert 0 <= learning_rate(section, 21, 20) <= 0.5

    def test_a_run_shorter_than_its_warm_up(self) -> None:
        found = [learning_rate(self.section("cosine", 10), step, 3) for step in range(3)]
        assert found == pytest.approx([0.05, 0.1, 0.15])


def slow_train(
    ready: Resident, kind: str, section: TrainingSection, start: AdapterState, *, first: int, steps: int, total: int
) -> AdapterState:
    """Training record by record, with FedProx's term in the loss and AdamW written out (Loshchilov, Hutter 2019)."""
    set_state(ready.model, start)
    ready.model.train()
    parameters = [p for p in ready.model.parameters() if p.requires_grad]
    anchor = [p.detach().clone() for p in parameters]
    means = [torch.zeros_like(p) for p in parameters]
    squares = [torch.zeros_like(p) for p in parameters]
    examples, batches = examples_of(kind, ready), in_turn(section.batch_size)
    for step in range(1, steps + 1):
        loss = torch.zeros(())
        for index in next(batches):
            batch = ready.task.collate([examples[index]], ready.device)
            loss = loss + ready.task.losses(ready.model(**batch.inputs()), batch)[0] / section.batch_size
        pull = sum(((p - a) ** 2).sum() for p, a in zip(parameters, anchor, strict=True))
        gradients = torch.autograd.grad(loss + section.proximal_mu / 2 * pull, parameters)
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        rate = learning_rate(section, first + step - 1, total)
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, means, squares, strict=True):
                clipped = g * min(1.0, section.max_grad_norm / norm)
                m.mul_(0.9).add_(0.1 * clipped)
                v.mul_(0.999).add_(0.001 * clipped**2)
                p.mul_(1 - rate * section.weight_decay)
                p.sub_(rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + section.adam_epsilon))
    return get_state(ready.model)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"max_grad_norm": 100.0, "weight_decay": 0.0},
    "clipped": {"max_grad_norm": 0.01, "weight_decay": 0.0},
    "decayed": {"weight_decay": 0.5},
    "gentle": {"adam_epsilon": 1e-3},
    "proximal": {"proximal_mu": 3.0, "max_grad_norm": 100.0},
    "warm": {"warmup_steps": 6, "schedule": "cosine"},
}


class TestTrain:
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_it_equals_a_slow_loop(self, manifest_for: Manifests, setting: str) -> None:
        manifest = manifest_for(
            training={"batch_size": 6, "micro_batch_size": 3, "learning_rate": 1e-3, **SETTINGS[setting]}
        )
        ready = resident(manifest)
        start, kind = start_of(ready), "text-classification"
        slow = slow_train(ready, kind, manifest.training, start, first=4, steps=3, total=20)
        set_state(ready.model, start)
        train(
            ready.model,
            ready.task,
            examples_of(kind, ready),
            in_turn(6),
            manifest.training,
            first_step=4,
            steps=3,
            total_steps=20,
            precision="fp32",
        )
        found = get_state(ready.model)
        assert apart(found, start) > 1e-4
        assert apart(found, slow) < 1e-6

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_size_of_micro_batches_changes_nothing(self, manifest_for: Manifests, kind: str) -> None:
        ready = resident(manifest_for(kind))
        start = start_of(ready)
        found = {}
        for size in (None, 1, 2, 4, 8):
            section = TrainingSection(batch_size=8, micro_batch_size=size, warmup_steps=0, max_grad_norm=1e6)
            found[size] = run(ready, kind, section, start, steps=3)
        whole, outcome = found[None]
        assert apart(whole, start) > 1e-4
        for state, other in found.values():
            assert apart(state, whole) < 1e-6
            assert other.loss == pytest.approx(outcome.loss, rel=1e-5)

    def test_the_pull_to_the_start_grows_with_mu(self, manifest_for: Manifests) -> None:
        ready = resident(manifest_for())
        start = start_of(ready)
        found = []
        for mu in (0.0, 1.0, 30.0):
            section = TrainingSection(batch_size=4, warmup_steps=0, schedule="constant", proximal_mu=mu)
            found.append(apart(run(ready, "text-classification", section, start, steps=12)[0], start))
        assert found[0] > 1.1 * found[1] > 1.1 * found[2]

    @pytest.mark.parametrize("bound", [0.05, 1e6])
    def test_a_gradient_is_never_longer_than_its_bound(self, manifest_for: Manifests, bound: float) -> None:
        ready = resident(manifest_for())
        norms: list[float] = []

        def watch(optimizer: torch.optim.Optimizer, *_: object) -> None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            norms.append(math.sqrt(sum(float((g**2).sum()) for g in gradients)))

        handle = register_optimizer_step_pre_hook(watch)
        section = TrainingSection(batch_size=4, max_grad_norm=bound)
        run(ready, "text-classification", section, start_of(ready), steps=4)
        handle.remove()
        assert len(norms) == 4
        if bound == 0.05:
            assert norms == pytest.approx([0.05] * 4, rel=1e-3)
        else:
            assert all(0.1 < norm < 100 for norm in norms)

    def test_a_loss_that_is_no_number_ends_it(self, manifest_for: Manifests) -> None:
        ready = resident(manifest_for())
        start = start_of(ready)
        name = next(name for name in start if "lora_B" in name)
        start[name][0, 0] = math.nan
        with pytest.raises(NotFiniteLoss, match="became nan in step 1; try a lower learning rate"):
            run(ready, "text-classification", TrainingSection(batch_size=4), start, steps=3)
        assert state_digest(get_state(ready.model)) == state_digest(start)

    def test_a_training_that_failed_leaves_nothing_for_the_next(self, manifest_for: Manifests) -> None:
        ready = resident(manifest_for())
        start, section = start_of(ready), TrainingSection(batch_size=4, warmup_steps=0)
        expected, _ = run(ready, "text-classification", section, start, steps=2)
        broken = {name: np.full_like(array, np.nan) for name, array in start.items()}
        with pytest.raises(NotFiniteLoss):
            run(ready, "text-classification", section, broken, steps=2)
        assert apart(run(ready, "text-classification", section, start, steps=2)[0], expected) < 1e-6

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_loss_falls_on_what_can_be_learnt(self, manifest_for: Manifests, kind: str) -> None:
        ready = resident(manifest_for(kind))
        first = first_state(ready.model, 0)
        section = TrainingSection(batch_size=8, learning_rate=0.01, warmup_steps=2)
        _, short = run(ready, kind, section, first, steps=3)
        examples = examples_of(kind, ready)
        before = figures(kind, measure(ready.model, ready.task, examples, batch_size=24, precision="fp32"), ["loss"])
        _, long = run(ready, kind, section, first, steps=60, total=60)
        after = figures(kind, measure(ready.model, ready.task, examples, batch_size=24, precision="fp32"), ["loss"])
        # An untrained causal base with tied, small embeddings cannot say anything with confidence.
        assert after["loss"] < (0.95 if kind == "causal-lm" else 0.3) * before["loss"]
        assert long.loss < (0.97 if kind == "causal-lm" else 0.8) * short.loss

    def test_the_outcome(self, manifest_for: Manifests) -> None:
        ready = resident(manifest_for())
        start = start_of(ready)
        section = TrainingSection(batch_size=4, warmup_steps=0, learning_rate=1e-12)
        _, outcome = run(ready, "text-classification", section, start, steps=6)
        assert outcome.examples == 24
        assert outcome.seconds > 0
        # With next to no learning, the mean over six batches of four is that over the 24 records.
        set_state(ready.model, start)
        counts = measure(
            ready.model, ready.task, examples_of("text-classification", ready), batch_size=24, precision="fp32"
        )
        assert outcome.loss == pytest.approx(counts["loss_sum"] / 24, rel=1e-5)

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_base_stays_as_it_is_and_everything_else_moves(self, manifest_for: Manifests, kind: str) -> None:
        ready = resident(manifest_for(kind))
        frozen = {name: p.clone() for name, p in ready.model.named_parameters() if not p.requires_grad}
        start = start_of(ready)
        after, _ = run(ready, kind, TrainingSection(batch_size=4, warmup_steps=0), start, steps=2)
        parameters = dict(ready.model.named_parameters())
        assert len(frozen) >= 20
        assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
        assert [name for name in start if np.array_equal(after[name], start[name])] == []

    def test_the_dropout_of_the_adapter_is_on(self, manifest_for: Manifests) -> None:
        ready = resident(manifest_for(adapter={"dropout": 0.5}))
        start, section = start_of(ready), TrainingSection(batch_size=4, learning_rate=1e-12)
        losses = []
        for seed in (1, 1, 2):
            ready.model.eval()  # as measuring may leave it
            torch.manual_seed(seed)
            losses.append(run(ready, "text-classification", section, start, steps=1)[1].loss)
        assert losses[0] == losses[1] != losses[2]

    def test_bf16_is_close_and_leaves_float32(self, manifest_for: Manifests) -> None:
        ready = resident(manifest_for())
        start, kinds = start_of(ready), []
        hook = ready.model.register_forward_hook(lambda _, __, output: kinds.append(output.dtype))
        losses = []
        for precision in ("bf16", "fp32"):
            set_state(ready.model, start)
            outcome = train(
                ready.model,
                ready.task,
                examples_of("text-classification", ready),
                in_turn(4),
                TrainingSection(batch_size=4),
                first_step=0,
                steps=1,
                total_steps=1,
                precision=precision,
            )
            losses.append(outcome.loss)
        hook.remove()
        assert kinds == [torch.bfloat16, torch.float32]
        assert losses[0] == pytest.approx(losses[1], rel=0.05)
        assert losses[0] != losses[1]
        assert {p.dtype for p in ready.model.parameters()} == {torch.float32}


class TestResident:
    @pytest.mark.parametrize("kind", KINDS)
    def test_gradient_checkpointing_recomputes_the_same_gradients(self, manifest_for: Manifests, kind: str) -> None:
        found: list[tuple[dict[str, torch.Tensor], int]] = []
        start: AdapterState = {}
        for checkpointing in (False, True):
            ready = resident(manifest_for(kind, training={"gradient_checkpointing": checkpointing}))
            start = start or start_of(ready)
            set_state(ready.model, start)
            calls: list[nn.Module] = []
            layer: Any = next(module for module in ready.model.modules() if type(module).__name__.endswith("Layer"))
            for module in layer.modules():
                if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
                    module.register_forward_hook(lambda module, *_, calls=calls: calls.append(module))
            ready.model.train()
            batch = ready.task.collate(examples_of(kind, ready)[:8], ready.device)
            ready.task.losses(ready.model(**batch.inputs()), batch).mean().backward()
            gradients = {n: p.grad.clone() for n, p in ready.model.named_parameters() if p.grad is not None}
            found.append((gradients, len(calls)))
        (plain, once), (recomputed, twice) = found
        assert twice > once > 0  # it was really on: layers were run again
        assert plain.keys() == recomputed.keys()
        assert len(plain) == len(start)
        for name, gradient in plain.items():
            assert gradient.abs().max() > 0
            torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)

    def test_one_base_stays_in_memory(self, manifest_for: Manifests) -> None:
        manifest = manifest_for()
        ready = resident(manifest)
        assert resident(manifest_for()) is ready
        other = resident(manifest_for(adapter={"rank": 2}))
        assert other is not ready
        assert other.model.peft_config["default"].r == 2
        assert resident(manifest) is not ready


def test_the_head_has_a_rate_of_its_own_where_the_manifest_gives_one(manifest_for: Manifests) -> None:
    model = resident(manifest_for()).model
    section = TrainingSection(learning_rate=0.1, head_learning_rate=0.5, warmup_steps=2, schedule="linear")
    optimizer = new_optimizer(model, section)
    set_learning_rates(optimizer, section, 0, 10)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in trained_parameters(model).items():
        assert rates[id(parameter)] == pytest.approx(0.25 if ".head." in name else 0.05)
    plain = new_optimizer(model, section.model_copy(update={"head_learning_rate": None}))
    set_learning_rates(plain, section, 2, 10)
    (group,) = plain.param_groups
    assert group["lr"] == pytest.approx(0.1)
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters() if p.requires_grad]
