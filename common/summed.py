"""What one secure sum carries: both sides make the same vector specification from the manifest and a request.

A site sends its contribution times its weight, and beside it *extras*: numbers that leave only as sums. Without privacy
these are its weight, its loss, and the counts of what it measured. With privacy there is the weight alone, which is a
public number then: an exact sum would not be private against sites that collude, nor against the next round's.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from common.codec.layout import Layout
from common.codec.packing import bits_for
from common.codec.state import AdapterState, state_digest
from common.codec.vector import DecodedSum, VectorSpec
from common.config.manifest import Manifest
from common.contribution import contribution_shapes, projection_shapes
from common.errors import MessageError, VectorRefused
from common.messages import Envelope, Evaluate, Evaluated, Project, Projected, RoundDone, RoundStart
from common.metrics import Counts, count_names
from common.secure_sum.config import NO_DP, Agreed, Weights

__all__ = [
    "Request",
    "agreed",
    "counts_in",
    "extras",
    "loss_in",
    "mean_in",
    "measures",
    "sum_number",
    "sum_number_of",
    "weighted",
]

Request = RoundStart | Project | Evaluate
Shapes = Mapping[str, tuple[int, ...]]

_COUNT = "count/"
# A weight is rounded to 2^-20 records, and its share of the most that counts to a float.
_SLACK = 1e-6
_KINDS = (RoundStart, Project, Evaluate)


def sum_number(request: Request) -> int:
    """The number of a sum in its run, which only grows: a round may have a second sum and one of counts."""
    return sum_number_of(request.round, type(request))


def sum_number_of(round_number: int, kind: type[Request]) -> int:
    """The number of the sum of one kind of request in a round."""
    return len(_KINDS) * round_number + _KINDS.index(kind)


def agreed(manifest: Manifest, request: Envelope, shapes: Shapes, *, accepted: int, sites: int) -> Agreed:
    """What a request asks to sum, and under what.

    Args:
        manifest: what the sides agreed on.
        request: as it is sent; its ranges say how far each value may go.
        shapes: of the tensors that a site's model trains.
        accepted: aggregations that went into the round's adapter.
        sites: most that may be in the sum.

    Raises:
        MessageError: the request's ranges are not those of its tensors.
    """
    header = request.header
    if not isinstance(header, _KINDS):
        raise MessageError(f"nothing is summed for {header.kind!r}")
    summed = _summed(manifest, header, shapes, accepted)
    if summed.keys() != header.ranges.keys():
        raise MessageError("the ranges of the request are not those of the tensors that are summed")
    layout = Layout(tuple((name, summed[name]) for name in sorted(summed)))
    spec = VectorSpec(
        layout=layout,
        ranges=tuple(header.ranges[name] for name, _ in layout.tensors),
        bits=bits_for(sites),
        sites=sites,
        extras=_extra_names(manifest, header),
    )
    private = manifest.privacy
    return Agreed(
        spec=spec,
        model_hash=_request_hash(header, request.tensors),
        manifest_hash=bytes.fromhex(manifest.digest()),
        dp_digest=NO_DP if private is None else hashlib.sha256(private.model_dump_json().encode()).digest(),
        weights=Weights.SUMMED if _by_records(manifest) else Weights.EQUAL,
    )


def _summed(manifest: Manifest, header: Request, shapes: Shapes, accepted: int) -> Shapes:
    match header:
        case RoundStart():
            return contribution_shapes(manifest, shapes, accepted)
        case Project():
            return projection_shapes(manifest, shapes, accepted)
        case Evaluate():
            return {}


def _request_hash(header: Request, tensors: AdapterState) -> bytes:
    """SHA-256 over all that the coordinator says: who was told something else derives masks that do not cancel."""
    said = header.model_dump_json(exclude={"secure_sum"})
    return hashlib.sha256(f"{state_digest(tensors)} {said}".encode()).digest()


def _by_records(manifest: Manifest) -> bool:
    return manifest.aggregation.weighting == "records"


def measures(manifest: Manifest, request: Request) -> bool:
    """Whether a request's sum carries counts of the adapter that comes with it."""
    if manifest.privacy is not None or isinstance(request, Project):
        return False
    return isinstance(request, Evaluate) or request.evaluate


def _extra_names(manifest: Manifest, header: Request) -> tuple[str, ...]:
    names = []
    if _by_records(manifest) and not isinstance(header, Evaluate):
        names.append("weight")
    if manifest.privacy is None and isinstance(header, RoundStart):
        names += ["loss", "losses"]
    if measures(manifest, header):
        names += [_COUNT + name for name in count_names(manifest)]
    return tuple(sorted(names))


def _share(manifest: Manifest, records: int) -> float:
    """A site's weight in (0, 1], in units of the largest that counts."""
    most = manifest.secure_sum.most_records
    return min(records, most) / most if _by_records(manifest) else 1.0


def weighted(manifest: Manifest, tensors: AdapterState, records: int) -> AdapterState:
    """A site's contribution times its weight."""
    share = np.float32(_share(manifest, records))
    return {name: array * share for name, array in tensors.items()}


def extras(
    manifest: Manifest,
    request: Request,
    reply: RoundDone | Projected | Evaluated,
    records: int,
    *,
    metrics_leave: bool = True,
) -> Counts:
    """A site's own extras; zeros in place of its loss and counts where the site's policy keeps them in."""
    loss = reply.loss if isinstance(reply, RoundDone) and metrics_leave else None
    counts = reply.counts if not isinstance(reply, Projected) and metrics_leave else {}
    values: Counts = {}
    for name in _extra_names(manifest, request):
        if name == "weight":
            values[name] = _share(manifest, records) * manifest.secure_sum.most_records
        elif name == "loss":
            values[name] = loss or 0.0
        elif name == "losses":
            values[name] = float(loss is not None)
        else:
            values[name] = counts.get(name.removeprefix(_COUNT), 0.0)
    return values


def mean_in(manifest: Manifest, decoded: DecodedSum, count: int) -> dict[str, npt.NDArray[np.float64]]:
    """The weighted mean that the sum over `count` sites holds.

    Raises:
        VectorRefused: so many sites cannot weigh that much or that little together; one of them lied.
    """
    total: float = count
    if _by_records(manifest):
        weight, most = decoded.extras["weight"], manifest.secure_sum.most_records
        if not count * (1 - _SLACK) <= weight <= count * most * (1 + _SLACK):
            raise VectorRefused(
                f"{count} sites weigh {weight:g} records together and must weigh {count} to {count * most};"
                " the sum is thrown away"
            )
        total = weight / most
    return {name: array / total for name, array in decoded.state.items()}


def loss_in(decoded: DecodedSum) -> float | None:
    """The mean training loss of the sites that tell theirs; None where none does."""
    losses = decoded.extras.get("losses", 0.0)
    return decoded.extras["loss"] / losses if losses else None


def counts_in(decoded: DecodedSum) -> Counts:
    """The counts of what all sites measured together; empty where nothing was."""
    counts = {name.removeprefix(_COUNT): value for name, value in decoded.extras.items() if name.startswith(_COUNT)}
    return counts if counts.get("records") else {}
