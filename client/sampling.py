"""Which records are in which batch."""

from collections.abc import Iterator

import numpy as np

from common.randomness import seeded

__all__ = ["batches"]


def batches(records: int, batch_size: int, *, seed: int, site: str, cursor: int) -> Iterator[list[int]]:
    """Endless batches of record indices: one shuffled pass over all records after the other.

    `cursor` counts the records that the site has drawn before, over all rounds, so that a round goes on where the
    last one ended, whichever process it meets. A batch that reaches the end of a pass goes on in the next one.
    """
    position = cursor
    order: np.ndarray = np.empty(0, dtype=np.int64)
    pass_number = -1
    while True:
        batch: list[int] = []
        while len(batch) < batch_size:
            if position // records != pass_number:
                pass_number = position // records
                order = seeded(seed, "batches", site, pass_number).permutation(records)
            start = position % records
            taken = order[start : start + batch_size - len(batch)].tolist()
            batch.extend(taken)
            position += len(taken)
        yield batch
