"""Fields of a message on the wire: little-endian numbers, and lists that carry their length."""

from collections.abc import Mapping

from common.errors import MalformedMessage
from common.roster import MOST_INSTITUTIONS

__all__ = ["Reader", "pack_all", "pack_by_site", "pack_sites"]


class Reader:
    """Takes fields off bytes and refuses to go past their end."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._place = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        return bytes(self.view(count))

    def view(self, count: int) -> memoryview:
        """The next `count` bytes, not copied."""
        if not 0 <= count <= len(self._data) - self._place:
            raise MalformedMessage("a message is cut")
        self._place += count
        return self._data[self._place - count : self._place]

    def number(self, size: int) -> int:
        """The next `size` bytes as an unsigned number."""
        return int.from_bytes(self.take(size), "little")

    def by_site(self, size: int) -> dict[int, bytes]:
        """A list of (site, value of `size` bytes), in ascending order of site."""
        count = self.number(2)
        if count > MOST_INSTITUTIONS:
            raise MalformedMessage(f"a message lists {count} sites and may list {MOST_INSTITUTIONS}")
        found: dict[int, bytes] = {}
        last = -1
        for _ in range(count):
            site = self.number(2)
            if not last < site < MOST_INSTITUTIONS:
                raise MalformedMessage("a message lists sites out of order, twice or of no roster")
            found[site] = self.take(size)
            last = site
        return found

    def packets(self, largest: int, most: int = MOST_INSTITUTIONS) -> tuple[bytes, ...]:
        """A list of values of up to `largest` bytes, each after its length."""
        count = self.number(2)
        if count > most:
            raise MalformedMessage(f"a message lists {count} sites and may list {most}")
        return tuple(self._packet(largest) for _ in range(count))

    def _packet(self, largest: int) -> bytes:
        size = self.number(2)
        if size > largest:
            raise MalformedMessage(f"a part of a message has {size} bytes and may have {largest}")
        return self.take(size)

    def end(self) -> None:
        """Refuse anything that follows."""
        if self._place != len(self._data):
            raise MalformedMessage("a message is too long")


def pack_by_site(values: Mapping[int, bytes]) -> bytes:
    """What `Reader.by_site` reads."""
    parts = [len(values).to_bytes(2, "little")]
    for site in sorted(values):
        parts += [site.to_bytes(2, "little"), values[site]]
    return b"".join(parts)


def pack_sites(sites: tuple[int, ...]) -> bytes:
    """A list of sites without values."""
    return pack_by_site(dict.fromkeys(sites, b""))


def pack_all(values: tuple[bytes, ...]) -> bytes:
    """What `Reader.packets` reads."""
    parts = [len(values).to_bytes(2, "little")]
    for value in values:
        parts += [len(value).to_bytes(2, "little"), value]
    return b"".join(parts)
