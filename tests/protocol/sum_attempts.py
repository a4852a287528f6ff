"""The coordinator's side of one attempt at a sum, step by step, so that a test may stop between two."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.codec.vector import DecodedSum, decode_words
from common.messages import Envelope, encode
from common.secure_sum.config import RoundConfig
from common.secure_sum.coordinator import CoordinatorRound, Stage
from common.summed import Request, agreed, sum_number


class Attempt:
    """An attempt over `sites` (all) of `it`, which has what a `vault_field.Field` has: coordinator, roster, manifest,
    adapter, names and `settled`."""

    def __init__(self, it: Any, header: Request, number: int, *, accepted: int = 0, sites: Sequence[int] = ()) -> None:
        self.it = it
        tensors = it.adapter
        shapes = {name: array.shape for name, array in tensors.items()}
        sites = list(sites) or list(range(len(it.names)))
        self.what = agreed(
            it.manifest, Envelope(header=header, tensors=tensors), shapes, accepted=accepted, sites=len(sites)
        )
        self.round = CoordinatorRound(
            it.coordinator,
            it.roster,
            RoundConfig.for_round(it.roster, sites, self.what),
            invited=sites,
            round_number=sum_number(header),
            attempt=number,
            model_hash=self.what.model_hash,
        )
        (first,) = set(self.round.start().values())
        whole = encode(Envelope(header=header.model_copy(update={"secure_sum": first.hex()}), tensors=tensors))
        self.out: Mapping[int, bytes] = dict.fromkeys(sites, whole)

    def ask(self, *sites: int) -> dict[int, tuple[Any, bytes]]:
        """Send the named sites (all) what is due, and hand their answers to the protocol."""
        answers = {}
        for site in sites or self.out:
            answers[site] = self.it.settled(site, self.out[site])
            if answers[site][0].kind == "message":
                self.round.receive(site, answers[site][1])
        return answers

    def go_on(self) -> None:
        """To the next stage."""
        self.out = self.round.advance()

    def to_the_end(self) -> DecodedSum:
        """The stages that are left, and the opened sum."""
        while True:
            self.ask()
            if self.round.stage is Stage.REVEAL:
                break
            self.go_on()
        opened = self.round.open_sum()
        return decode_words(opened.words, opened.count, self.what.spec, opened.context)
