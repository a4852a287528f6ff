"""Private training against an oracle that is written out record by record, and its own promises."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from client.protection import Mechanism
from client.resident import Resident, resident
from client.training.loop import learning_rate
from client.training.per_sample import per_sample_gradients
from client.training.preflight import check_gradients, check_moved, check_randomness
from client.training.private import train_private, unit_gradients
from common.adapters import get_state, is_head, set_state, train_head_alone
from common.codec.state import AdapterState
from common.config.manifest import Manifest
from common.config.training import TrainingSection
from common.errors import PrivacyError
from common.randomness import SystemRandomness
from common.records import TextRecord
from common.tasks.task import Example

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Manifests = Callable[..., Manifest]
HOW = Mechanism(noise_multiplier=0.8, clip=0.5, sampling_rate=0.3, expected_units=3.0, records_per_unit=2)


@pytest.fixture
def ready(manifest_for: Manifests) -> Resident:
    model = resident(manifest_for())
    rng = np.random.Generator(np.random.PCG64(3))
    state = get_state(model.model)
    set_state(model.model, {n: rng.normal(0, 0.2, a.shape).astype(np.float32) for n, a in state.items()})
    return model


def units_of(ready: Resident, sizes: Sequence[int]) -> list[list[Example]]:
    units = []
    for number, size in enumerate(sizes):
        texts = [f"clause {number} " + "of the term " * (1 + (number + place) % 4) for place in range(size)]
        records = [TextRecord(text=text, label="abc"[number % 3], unit=str(number)) for text in texts]
        units.append(list(ready.task.encode(records).examples))
    return units


def run(ready: Resident, units: Any, section: TrainingSection, how: Mechanism, seed: int, steps: int) -> AdapterState:
    train_private(
        ready.model,
        ready.task,
        units,
        section,
        how,
        SystemRandomness(unsafe_seed=seed),
        first_step=2,
        steps=steps,
        total_steps=20,
        precision="fp32",
    )
    return get_state(ready.model)


def slow(
    ready: Resident, units: Any, section: TrainingSection, how: Mechanism, seed: int, steps: int
) -> dict[str, np.ndarray]:
    """DP-SGD as Abadi et al. write it, with AdamW written out and one backward pass for each record."""
    randomness = SystemRandomness(unsafe_seed=seed)
    named = {n: p for n, p in ready.model.named_parameters() if p.requires_grad}
    values = {n: p.detach().clone() for n, p in named.items()}
    means = {n: torch.zeros_like(p) for n, p in values.items()}
    squares = {n: torch.zeros_like(p) for n, p in values.items()}
    for step in range(1, steps + 1):
        with torch.no_grad():
            for n, p in named.items():
                p.copy_(values[n])
        total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in values.items()}
        chosen = randomness.chosen(len(units), how.sampling_rate)
        drawn = [[units[u][r] for r in randomness.some_of(len(units[u]), how.records_per_unit)] for u in chosen]
        for unit in drawn:
            mean = {n: torch.zeros_like(p) for n, p in values.items()}
            for example in unit:
                batch = ready.task.collate([example], ready.device)
                loss = ready.task.losses(ready.model(**batch.inputs()), batch)[0]
                for n, g in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
                    mean[n] += g / len(unit)
            parts, bounds = [list(mean)], [how.clip]
            if how.head_clip is not None:
                parts = [[n for n in mean if is_head(n)], [n for n in mean if not is_head(n)]]
                bounds = [how.head_clip, math.sqrt(how.clip**2 - how.head_clip**2)]
            for part, bound in zip(parts, bounds, strict=True):
                norm = math.sqrt(sum(float((mean[n].double() ** 2).sum()) for n in part))
                for n in part:
                    total[n] += mean[n].double() * min(1.0, bound / norm)
        noise = torch.from_numpy(randomness.normal(sum(p.numel() for p in values.values())))
        place, rate = 0, learning_rate(section, 2 + step - 1, 20)
        for n, p in values.items():
            drawn_noise = noise[place : place + p.numel()].view(p.shape)
            place += p.numel()
            g = ((total[n] + how.noise_multiplier * how.clip * drawn_noise) / how.expected_units).float()
            means[n] = 0.9 * means[n] + 0.1 * g
            squares[n] = 0.999 * squares[n] + 0.001 * g**2
            p.mul_(1 - rate * section.weight_decay)
            p.sub_(
                rate * (means[n] / (1 - 0.9**step)) / ((squares[n] / (1 - 0.999**step)).sqrt() + section.adam_epsilon)
            )
    return {n: p.numpy() for n, p in values.items()}


def by_parameter(ready: Resident) -> dict[str, np.ndarray]:
    return {n: p.detach().numpy().copy() for n, p in ready.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("sizes", [[1] * 10, [1, 3, 2, 4, 1, 2]])
@pytest.mark.parametrize("noise", [0.0, 0.8])
@pytest.mark.parametrize("head_clip", [None, 0.1, 0.3])
def test_it_equals_a_slow_loop(ready: Resident, sizes: list[int], noise: float, head_clip: float | None) -> None:
    how = replace(HOW, noise_multiplier=noise, head_clip=head_clip)
    section = TrainingSection(batch_size=4, micro_batch_size=2, learning_rate=1e-2, adam_epsilon=1e-4)
    units, start = units_of(ready, sizes), get_state(ready.model)
    oracle = slow(ready, units, section, how, seed=5, steps=4)
    set_state(ready.model, start)
    run(ready, units, section, how, seed=5, steps=4)
    found = by_parameter(ready)
    assert max(float(np.abs(found[n] - oracle[n]).max()) for n in oracle) < 2e-5
    moved = get_state(ready.model)
    assert max(float(np.abs(moved[n] - start[n]).max()) for n in start) > 1e-3


def test_the_size_of_physical_batches_changes_nothing(ready: Resident) -> None:
    units, start = units_of(ready, [1, 2, 3, 1, 2, 2]), get_state(ready.model)
    found = []
    for size in (1, 2, 4, 12):
        set_state(ready.model, start)
        section = TrainingSection(batch_size=12, micro_batch_size=size, learning_rate=1e-2, adam_epsilon=1e-4)
        found.append(run(ready, units, section, HOW, seed=9, steps=3))
    for state in found[1:]:
        assert max(float(np.abs(state[n] - found[0][n]).max()) for n in state) < 1e-5


def test_a_step_that_samples_nobody_is_noise_alone(ready: Resident) -> None:
    start = get_state(ready.model)
    nobody = Mechanism(1.0, 0.5, 1e-12, 3.0, 2)
    after = run(ready, units_of(ready, [1, 1]), TrainingSection(learning_rate=1e-2), nobody, seed=1, steps=2)
    assert all(not np.array_equal(after[n], start[n]) for n in start)


def test_noise_and_samples_are_new_in_every_run_without_a_seed(ready: Resident) -> None:
    units, start = units_of(ready, [1] * 4), get_state(ready.model)
    section = TrainingSection(learning_rate=1e-2)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        set_state(ready.model, start)
        train_private(
            ready.model,
            ready.task,
            units,
            section,
            HOW,
            SystemRandomness(),
            first_step=0,
            steps=1,
            total_steps=1,
            precision="fp32",
        )
        found.append(get_state(ready.model))
    # One step of Adam is a sign, so small tensors may agree by chance: A's and B's 14,000 values do not.
    assert sum(int((found[0][n] != found[1][n]).sum()) for n in start) > 1000


def sums(ready: Resident, units: Any, clip: float) -> np.ndarray:
    with per_sample_gradients(ready.model) as engine:
        unit_gradients(engine, ready.model, ready.task, units, "fp32")
        gradients: list[Any] = [p.grad_sample.double() for p in ready.model.parameters() if p.requires_grad]
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    factors = (clip / norms.clamp(min=1e-12)).clamp(max=1.0)
    return torch.cat([torch.einsum("u,u...->...", factors, g).ravel() for g in gradients]).numpy()


@pytest.mark.parametrize("clip", [1e-3, 0.1, 100.0])
def test_removing_one_unit_moves_the_sum_by_the_clip_at_most(ready: Resident, clip: float) -> None:
    units = units_of(ready, [1, 3, 2, 4, 1])
    whole = sums(ready, units, clip)
    for place in range(len(units)):
        rest = sums(ready, units[:place] + units[place + 1 :], clip)
        moved = float(np.linalg.norm(whole - rest))
        assert moved <= clip * (1 + 1e-4)
        assert moved > 0
    assert np.linalg.norm(whole) <= clip * len(units)


def test_the_optimiser_clips_as_the_slow_sum(ready: Resident) -> None:
    """Without noise and decay the first gradient that AdamW sees is the clipped sum over the expected units."""
    units = units_of(ready, [1, 2, 2, 1])
    expected = sums(ready, units, 0.5) / 3.0
    seen: list[np.ndarray] = []
    original = torch.optim.AdamW.step

    def spy(self: Any, closure: Any = None) -> Any:
        seen.append(np.concatenate([p.grad.numpy().ravel() for group in self.param_groups for p in group["params"]]))
        return original(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        run(ready, units, TrainingSection(), Mechanism(0.0, 0.5, 1.0, 3.0, 2), seed=0, steps=1)
    np.testing.assert_allclose(seen[0], expected, rtol=0, atol=1e-6 * np.abs(expected).max() + 1e-9)


def released_sum(ready: Resident, units: Any, how: Mechanism) -> dict[str, np.ndarray]:
    """The clipped sum of all units as the optimiser makes it: no noise, everyone drawn, divided by one."""
    start, seen = get_state(ready.model), {}
    original = torch.optim.AdamW.step

    def spy(self: Any, closure: Any = None) -> Any:
        seen.update({n: p.grad.double().numpy() for n, p in ready.model.named_parameters() if p.requires_grad})
        return original(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        run(ready, units, TrainingSection(), how, seed=0, steps=1)
    set_state(ready.model, start)
    return seen


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_apart_removing_one_unit_moves_each_part_by_its_bound_and_the_whole_by_the_clip(
    ready: Resident, scale: float
) -> None:
    how = Mechanism(0.0, scale, 1.0, 1.0, 4, head_clip=0.6 * scale)
    units = units_of(ready, [1, 3, 2, 1])
    whole = released_sum(ready, units, how)
    for place in range(len(units)):
        rest = released_sum(ready, units[:place] + units[place + 1 :], how)
        moved = {n: float(np.linalg.norm(whole[n] - rest[n])) for n in whole}
        head = math.hypot(*(m for n, m in moved.items() if is_head(n)))
        other = math.hypot(*(m for n, m in moved.items() if not is_head(n)))
        assert 0 < head <= 0.6 * scale * (1 + 1e-4)
        assert 0 < other <= 0.8 * scale * (1 + 1e-4)
        if scale == 1e-3:  # both parts are longer than their bounds, and use them up
            assert head == pytest.approx(0.6 * scale, rel=1e-2)
            assert other == pytest.approx(0.8 * scale, rel=1e-2)


def test_a_head_that_trains_alone_has_the_whole_clip(ready: Resident) -> None:
    units = units_of(ready, [1])
    try:
        train_head_alone(ready.model, True)
        found = released_sum(ready, units, Mechanism(0.0, 1e-3, 1.0, 1.0, 4, head_clip=2e-4))
    finally:
        train_head_alone(ready.model, False)
    assert all(is_head(n) for n in found)
    assert math.hypot(*(float(np.linalg.norm(g)) for g in found.values())) == pytest.approx(1e-3, rel=2e-3)


def test_the_noise_that_is_added_has_the_deviation_that_is_charged(ready: Resident) -> None:
    seen: list[np.ndarray] = []
    original = torch.optim.AdamW.step

    def spy(self: Any, closure: Any = None) -> Any:
        seen.append(np.concatenate([p.grad.numpy().ravel() for group in self.param_groups for p in group["params"]]))
        return original(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        run(ready, units_of(ready, [1]), TrainingSection(), Mechanism(2.0, 0.5, 1e-12, 4.0, 1), seed=3, steps=8)
    draws = np.concatenate(seen)
    # Deviation of the mean gradient: noise multiplier x clip / expected units; within 5 standard errors.
    assert abs(draws.std() / (2.0 * 0.5 / 4.0) - 1) < 5 / math.sqrt(2 * draws.size)
    assert abs(draws.mean()) < 5 * 0.25 / math.sqrt(draws.size)


def test_a_unit_whose_gradient_is_not_finite_counts_as_nothing(
    ready: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = units_of(ready, [1, 1, 1])
    expected = sums(ready, units[:1] + units[2:], 0.5)
    losses = type(ready.task).losses

    def broken(self: Any, output: Any, batch: Any) -> Any:
        factors = torch.tensor([math.inf if example is units[1][0] else 1.0 for example in batch.examples])
        return losses(self, output, batch) * factors

    monkeypatch.setattr(type(ready.task), "losses", broken)
    np.testing.assert_allclose(sums(ready, units, 0.5), expected, atol=1e-7)


class TestPreflight:
    def test_it_passes_on_the_real_thing(self, ready: Resident) -> None:
        check_gradients(ready.model, ready.task, units_of(ready, [1, 3, 2]), "fp32")
        check_randomness(HOW, SystemRandomness(), 50)

    def test_gradients_that_mix_records_stop_it(self, ready: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
        losses = type(ready.task).losses

        def mixed(self: Any, output: Any, batch: Any) -> Any:
            own = losses(self, output, batch)
            return own * own.mean()

        monkeypatch.setattr(type(ready.task), "losses", mixed)
        with pytest.raises(PrivacyError, match="pre-flight check 'gradients' failed"):
            check_gradients(ready.model, ready.task, units_of(ready, [1, 1, 2]), "fp32")

    @pytest.mark.parametrize("draw", [np.zeros, lambda count: np.full(count, 0.1) * np.arange(count), np.ones])
    def test_noise_that_is_none_stops_it(self, draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        randomness = SystemRandomness()
        monkeypatch.setattr(randomness, "normal", draw)
        with pytest.raises(PrivacyError, match="pre-flight check 'noise' failed"):
            check_randomness(HOW, randomness, 50)

    def test_samples_of_one_size_stop_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        randomness = SystemRandomness()
        monkeypatch.setattr(randomness, "chosen", lambda count, rate: np.arange(round(count * rate)))
        with pytest.raises(PrivacyError, match="pre-flight check 'sampling' failed"):
            check_randomness(HOW, randomness, 50)

    def test_a_tensor_that_stays_stops_it(self, ready: Resident) -> None:
        before = get_state(ready.model)
        after = {name: array + 1 for name, array in before.items()}
        check_moved(before, after)
        name = sorted(before)[0]
        with pytest.raises(PrivacyError, match=f"'moved' failed: {name} did not move"):
            check_moved(before, {**after, name: before[name]})
