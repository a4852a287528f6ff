import numpy as np
import pytest

from common.randomness import seeded
from common.secure_sum import masks
from common.secure_sum.masks import apply_masks
from common.secure_sum.primitives import Keystream


@pytest.mark.parametrize("count", [1, 5, 2**15 - 1, 2**15, 2**15 + 1, 3 * 2**15 + 7])
def test_blocks_are_the_slow_way_at_once(count: int) -> None:
    words = seeded(count).integers(0, 2**64, count, dtype=np.uint64)
    keys = [bytes([key]) * 32 for key in range(4)]
    slow = words.copy()
    for place, key in enumerate(keys):
        stream = np.frombuffer(Keystream(key).bytes(8 * count), "<u8")
        slow = slow + stream if place % 2 else slow - stream
    apply_masks(words, [(key, 1 if place % 2 else -1) for place, key in enumerate(keys)])
    assert np.array_equal(words, slow)


def test_a_mask_and_its_opposite_leave_nothing() -> None:
    words = np.arange(100_000, dtype=np.uint64)
    apply_masks(words, [(b"k" * 32, 1)])
    assert not np.any(words[:1000] == np.arange(1000, dtype=np.uint64))
    apply_masks(words, [(b"k" * 32, -1)])
    assert np.array_equal(words, np.arange(100_000, dtype=np.uint64))


def test_a_block_fits_the_second_level_cache() -> None:
    assert masks.BLOCK_BYTES <= 2**18
