"""The planner: nothing is promised more memory than there is, everybody gets work, and the longest come first."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RunError
from simulations.slots import SAFE, Device, Footprint, Plan, longest_first, makespan, more_careful, plan_slots

GB = 10**9
# Of a site with a base of 2 GB: 1.5 GB a record, so one record needs 5 GB and eight 15.5 GB.
LARGE = Footprint(process=GB, base=2 * GB, adapter=GB // 2, record=3 * GB // 2)

MEMORY = st.integers(1, 64 * GB)
FOOTPRINTS = st.builds(
    Footprint,
    process=st.integers(0, GB),
    base=st.integers(1, 8 * GB),
    adapter=st.integers(0, GB),
    record=st.integers(0, 2 * GB),
    floor=st.integers(0, 12 * GB),
)


def gpus(*sizes: int) -> list[Device]:
    return [Device(f"GPU {index}", size, index) for index, size in enumerate(sizes)]


def plan(devices: list[Device], footprint: Footprint = LARGE, **how: object) -> Plan:
    settings: dict[str, object] = {"sites": 20, "cores": 16, "batch": 8} | how
    return plan_slots(devices, footprint, **settings)  # type: ignore[arg-type]


@given(
    st.lists(MEMORY, min_size=1, max_size=4),
    FOOTPRINTS,
    st.integers(1, 40),
    st.integers(1, 32),
    st.integers(1, 64),
    st.booleans(),
)
def test_no_device_is_promised_more_than_it_has(
    sizes: list[int], footprint: Footprint, sites: int, cores: int, batch: int, on_gpus: bool
) -> None:
    devices = gpus(*sizes) if on_gpus else [Device("CPU", sizes[0])]
    fits_one = [SAFE * device.memory >= footprint.at(1) for device in devices]
    how = {"sites": sites, "cores": cores, "batch": batch}
    if not any(fits_one):
        with pytest.raises(RunError, match="no device has memory for a worker"):
            plan(devices, footprint, **how)
        return
    made = plan(devices, footprint, **how)
    assert made == plan(devices, footprint, **how)
    for place, device in enumerate(devices):
        assert made.planned(place) <= SAFE * device.memory
    assert 1 <= made.workers <= sites
    assert made.workers <= max(cores, sum(fits_one))
    assert made.threads * made.workers <= max(cores, made.workers)
    # Every device that has room gets a worker before another gets its second one.
    with_room = [made.on(place) for place, fits in enumerate(fits_one) if fits]
    if made.workers >= sum(fits_one):
        assert min(with_room) >= 1
    for slot in made.slots:
        assert any(slot.records == batch >> halvings for halvings in range(8))
        # The records are the most that fit: twice as many would not.
        if slot.records < batch:
            bigger = next(batch >> n for n in range(8) if batch >> (n + 1) == slot.records)
            assert footprint.at(bigger) > SAFE * devices[slot.device].memory - 1


@given(st.lists(MEMORY, min_size=1, max_size=4), FOOTPRINTS, st.integers(1, 40), st.integers(0, 32 * GB))
def test_more_memory_is_never_fewer_workers(sizes: list[int], footprint: Footprint, sites: int, more: int) -> None:
    try:
        fewer = plan(gpus(*sizes), footprint, sites=sites)
    except RunError:
        return
    larger = plan(gpus(*(size + more for size in sizes)), footprint, sites=sites)
    assert larger.workers >= fewer.workers
    assert larger.slots[0].records >= fewer.slots[0].records or larger.slots[0].device != fewer.slots[0].device


def test_three_cards_of_eight_gigabytes() -> None:
    """The reference machine. The base with eight records does not fit; with two it does, once on each card."""
    made = plan(gpus(8 * GB, 8 * GB, 8 * GB))
    assert [(slot.device, slot.place, slot.records) for slot in made.slots] == [(0, 0, 2), (1, 0, 2), (2, 0, 2)]
    assert made.threads == 5
    assert made.lines() == [
        "GPU 0: 1 worker, 2 records at once, 6.5 GB of 8.0 GB",
        "GPU 1: 1 worker, 2 records at once, 6.5 GB of 8.0 GB",
        "GPU 2: 1 worker, 2 records at once, 6.5 GB of 8.0 GB",
        "fewer than the manifest's 8 records at once: memory is short, results stay the same",
    ]
    assert [made.on(place) for place in range(3)] == [1, 1, 1]


def test_cards_of_different_sizes() -> None:
    made = plan(gpus(24 * GB, 4 * GB, 40 * GB))
    assert [(slot.device, slot.records) for slot in made.slots] == [(0, 8), (2, 8), (2, 8)]
    assert made.notes == ("GPU 1 is left out: 4.0 GB are too little for a worker",)


def test_more_slots_by_ones_own_word_take_fewer_records() -> None:
    made = plan(gpus(24 * GB), slots_per_gpu=4)
    assert [(slot.place, slot.records) for slot in made.slots] == [(0, 1), (1, 1), (2, 1), (3, 1)]


@pytest.mark.parametrize(
    ("devices", "how", "words"),
    [
        (gpus(4 * GB), {}, "needs 5.0 GB (estimated: process 1.0 GB, base 2.0 GB, adapter 500 MB, record 1.5 GB)"),
        (gpus(4 * GB), {}, "the largest is GPU 0 with 4.0 GB free, of which 90% are planned with"),
        (gpus(4 * GB), {}, "what would fit: a smaller base or a shorter data.max_length"),
        (
            gpus(4 * GB),
            {"would": {"four bits": Footprint(GB, GB // 4, 0, GB), "nothing": LARGE}},
            "what would fit: four bits (2.2 GB)",
        ),
        (
            gpus(8 * GB),
            {"slots_per_gpu": 2},
            "slots_per_gpu = 2 needs 10.0 GB on GPU 0 even with one record at once, which has 8.0 GB free; at most 1",
        ),
        ([Device("CPU", GB)], {}, "the largest is CPU"),
    ],
)
def test_what_does_not_fit_is_one_line(devices: list[Device], how: dict[str, object], words: str) -> None:
    with pytest.raises(RunError) as found:
        plan(devices, **how)
    assert words in str(found.value)
    assert "\n" not in str(found.value)


def test_a_persons_own_number_of_workers_is_kept_and_warned_of() -> None:
    made = plan([Device("CPU", 20 * GB)], workers=4)
    assert made.workers == 4
    assert made.notes == ("simulation.workers = 4 need about 62.0 GB, 20.0 GB are free: memory may run out",)
    assert plan([Device("CPU", 20 * GB)], workers=1).notes == ()
    assert plan([Device("CPU", GB)], workers=2, sites=1).workers == 1
    assert plan(gpus(64 * GB, 64 * GB), workers=3).workers == 3


def test_emulated_devices_are_no_gpus() -> None:
    devices = [Device("emulated GPU 0", 8 * GB, 0, emulated=True)]
    assert plan(devices).emulated
    assert plan(devices).gpu_share == 0.0
    assert plan(gpus(20 * GB, 20 * GB)).gpu_share == 1.0


def test_of_two_federations_the_more_demanding_one_is_planned_for() -> None:
    private = Footprint(GB, 2 * GB, GB, 3 * GB)
    one, other = plan(gpus(40 * GB)), plan(gpus(40 * GB), private)
    assert (one.workers, other.workers) == (2, 1)
    assert more_careful(one, other) is more_careful(other, one) is other


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_longest_first_is_near_the_best_order(seconds: list[int], workers: int) -> None:
    work = {f"site {place}": float(each) for place, each in enumerate(seconds)}
    order = longest_first(work)
    assert sorted(order) == sorted(work)
    assert [work[site] for site in order] == sorted(work.values(), reverse=True)
    best = min(
        max(sum(each for each, where in zip(seconds, dealt, strict=True) if where == worker) for worker in range(3))
        for dealt in itertools.product(range(workers), repeat=len(seconds))
    )
    assert best <= makespan(work, order, workers) <= (4 / 3 - 1 / (3 * workers)) * best + 1e-9
