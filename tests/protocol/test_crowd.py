"""Sums of many simulated sites, through the coordinator's collection and the sites' channel, without training."""

import numpy as np
import pytest
from crowd import Crowd, Manifests, changes, request_of

from common.codec.packing import bits_for
from common.messages import RoundStart
from common.progress import SumOpened
from common.secure_sum.config import RoundConfig
from common.secure_sum.messages import Reveal, read
from common.secure_sum.messages import RoundStart as SumStart


def made_crowd(manifest_for: Manifests, count: int, values: int, weighting: str = "uniform") -> Crowd:
    training = {"rounds": 2, "local_steps": 4, "learning_rate": 0.02}
    manifest = manifest_for(training=training, aggregation={"method": "separate", "weighting": weighting})
    return Crowd(manifest, changes(count, values, 0.02), {"w": np.zeros(values, np.float32)})


@pytest.mark.parametrize(("count", "silent"), [(3, 0), (32, 1), (132, 0), (132, 3)])
def test_the_mean_of_a_crowd_is_the_plain_mean_up_to_rounding(manifest_for: Manifests, count: int, silent: int) -> None:
    crowd = made_crowd(manifest_for, count, values=300)
    for name in crowd.names[:silent]:
        del crowd.made[name]
    done = crowd.round()
    header = request_of(crowd).header
    assert isinstance(header, RoundStart)
    step = 2 * header.ranges["w"] / (2 ** bits_for(count) - 1)
    plain = np.mean([made.change["w"].astype(float) for made in crowd.made.values()], axis=0)
    error = np.abs(done.mean["w"] - plain)
    assert error.max() < step
    # Rounding is independent from site to site: its deviation is at most half a step by the root of their number.
    assert np.sqrt(np.mean(error**2)) < 1.3 * step / 2 / np.sqrt(len(crowd.made))
    assert {answer.site for answer in done.answers} == set(crowd.made)
    assert done.failures == dict.fromkeys(crowd.names[:silent], "timeout")
    (event,) = (event for event in crowd.events if isinstance(event, SumOpened))
    assert len(event.survivors) == count - silent


def test_above_128_sites_each_shares_with_some_neighbours(manifest_for: Manifests) -> None:
    crowd = made_crowd(manifest_for, 130, values=30)
    crowd.round()
    roster = crowd.consortium.roster
    start = read(bytes.fromhex(request_of(crowd).header.secure_sum), lambda sender: roster.coordinator)
    assert isinstance(start.body, SumStart)
    degree = RoundConfig.parse(start.body.config).degree
    assert 0 < degree.neighbours < 129
    heard = [read(reply.data, roster.public_key_of, most_bytes=1 << 22) for reply in crowd.heard]
    reveals = [message.body for message in heard if isinstance(message.body, Reveal)]
    assert {len(reveal.shares) for reveal in reveals} == {degree.neighbours + 1}
    assert len(reveals) == 130


def test_a_request_is_encoded_once_for_all(manifest_for: Manifests) -> None:
    crowd = made_crowd(manifest_for, 5, values=30)
    crowd.round()
    first = [data for _, data in crowd.sent if not data[0]]
    assert len(first) == 5
    assert len({id(data) for data in first}) == 1
